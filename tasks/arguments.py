"""The flags that say what is learned, and from which data."""

from dataclasses import dataclass, field
from typing import Literal

from prunelle.errors import InputError

BUILTIN_PREFIX = "builtin:"

TaskName = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "causal-lm",
    "sequence-to-sequence",
]


@dataclass
class DataArguments:
    """What is learned, and from which data."""

    task: TaskName = field(default="text-classification", metadata={"help": "What the model learns to predict."})
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = field(
        default="single_label_classification",
        metadata={"help": "One label a text, a list of labels, or a number (text-classification)."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A hub data set or folder; or, without network, builtin:docstrings, (sequence-to-sequence) "
            "builtin:function-names or (question-answering) builtin:parameters."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The hub data set's configuration."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the hub data set as it trains (language models, with --max_steps)."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "CSV, TSV, JSON lines, Parquet, or (language models) plain text."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Like --train_file."})
    test_file: str | None = field(
        default=None, metadata={"help": "Like --train_file; the closing table is measured on it where it is given."}
    )
    text_column_name: str | None = field(
        default=None,
        metadata={"help": "By default found: text, sentence, …, tokens, words, …, or context (question-answering)."},
    )
    text_pair_column_name: str | None = field(
        default=None, metadata={"help": "A second text that is read with the first, such as a hypothesis."}
    )
    question_column_name: str | None = field(default=None, metadata={"help": "By default found: question or query."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "By default found: label, labels, class, …, ner_tags, tags, …, or answers."}
    )
    target_column_name: str | None = field(
        default=None, metadata={"help": "By default found: target, summary, … (sequence-to-sequence)."}
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training data held out where there is no validation data."}
    )
    max_seq_length: int = field(
        default=128, metadata={"help": "Tokens; longer texts are cut, or packed (language models)."}
    )
    max_target_length: int = field(
        default=64, metadata={"help": "Tokens of what is written; longer targets are cut (sequence-to-sequence)."}
    )
    source_prefix: str = field(
        default="", metadata={"help": "Put before each text, such as 'summarize: ' for T5 (sequence-to-sequence)."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Keep the first examples only."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Keep the first examples of validation and test only."}
    )
    doc_stride: int = field(
        default=32, metadata={"help": "Tokens by which the windows of a long context overlap (question-answering)."}
    )
    max_answer_length: int = field(
        default=30, metadata={"help": "Tokens of the longest answer to predict (question-answering)."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens to predict (masked-lm)."})
    mask_frequency_exponent: float = field(
        default=0.7,
        metadata={"help": "A token is masked in proportion to its frequency to the power of minus this; 0: evenly."},
    )
    static_masking: bool = field(
        default=False,
        metadata={"help": "Mask training text once and for all, not anew in every epoch; --teacher_cache needs it."},
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_file is None:
            raise InputError(
                "no data: give --train_file FILE or --dataset_name NAME (builtin:docstrings is always there)"
            )
        if self.dataset_name is not None and (self.train_file or self.validation_file or self.test_file):
            raise InputError(f"--dataset_name {self.dataset_name} and data files exclude each other: give one of them")
        if self.text_pair_column_name is not None and self.task != "text-classification":
            raise InputError(f"--text_pair_column_name {self.text_pair_column_name} is for --task text-classification")
        if self.max_seq_length < 3:
            raise InputError(f"--max_seq_length {self.max_seq_length} leaves no room for text; give at least 3")
        if self.max_target_length < 2:
            raise InputError(f"--max_target_length {self.max_target_length} leaves no room for text; give at least 2")
        if not 0 < self.validation_split_percentage < 100:
            raise InputError(
                f"--validation_split_percentage {self.validation_split_percentage} must lie between 1 and 99"
            )
        if not 0 < self.mlm_probability < 1:
            raise InputError(f"--mlm_probability {self.mlm_probability} must lie between 0 and 1")
        if self.mask_frequency_exponent < 0:
            raise InputError(f"--mask_frequency_exponent {self.mask_frequency_exponent} must not be negative")
        if self.doc_stride < 0:
            raise InputError(f"--doc_stride {self.doc_stride} must not be negative")
        if self.max_answer_length < 1:
            raise InputError(f"--max_answer_length {self.max_answer_length} leaves no answer; give at least 1")
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} leaves no data; give at least 1")
        if self.streaming and (self.task not in ("masked-lm", "causal-lm") or self.dataset_name is None):
            raise InputError("--streaming is for --task masked-lm or causal-lm with a hub data set")
        if self.static_masking and (self.task != "masked-lm" or self.streaming):
            raise InputError("--static_masking is for --task masked-lm without --streaming")


@dataclass
class DistillationDataArguments(DataArguments):
    """The data of `DataArguments`, and text on which the teacher alone speaks."""

    unlabeled_file: str | None = field(
        default=None, metadata={"help": "Like --train_file, without labels: more text to learn from the teacher."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unlabeled_file is not None and self.task not in ("text-classification", "token-classification"):
            raise InputError(
                f"--unlabeled_file is for --task text-classification or token-classification, not {self.task}; a "
                "language model learns from text without labels as it is: give it all as --train_file"
            )
