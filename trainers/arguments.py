"""The flags that every training script shares, beside those of `transformers.TrainingArguments`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class FinetuningArguments(TrainingArguments):
    """`transformers.TrainingArguments`, with logs in TensorBoard unless told otherwise."""

    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Where logs go beside the console: tensorboard, wandb, …, or none."}
    )
