"""The flags that every training script shares, beside those of `transformers.TrainingArguments`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class FinetuningArguments(TrainingArguments):
    """`transformers.TrainingArguments`, with logs in TensorBoard unless told otherwise."""

    # HfArgumentParser reads unions from the left and fails where None comes last.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="tensorboard", metadata={"help": "Where logs go beside the console: tensorboard, wandb, …, or none."}
    )
