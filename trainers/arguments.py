"""The flags of the training scripts, beside those of `transformers.TrainingArguments`."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from prunelle.errors import InputError
from prunelle.trainers.layer_map import explicit_pairs
from prunelle.trainers.schedule import Schedule, read_schedules

RELATIONS = ("attention", "query", "key", "value")


@dataclass
class FinetuningArguments(TrainingArguments):
    """`transformers.TrainingArguments`, with logs in TensorBoard unless told otherwise, and every task's labels."""

    # HfArgumentParser reads unions from the left and fails where None comes last.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="tensorboard", metadata={"help": "Where logs go beside the console: tensorboard, wandb, …, or none."}
    )
    # The Trainer would look for start_positions and end_positions where a question is answered.
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "The columns that hold labels."}
    )
    # The Trainer's would have the host wait in every step for whether the loss is a number; and hide that it is none.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are no number out of the logged mean."}
    )
    disable_dropout: bool = field(
        default=False, metadata={"help": "Train without dropout; the model's configuration keeps its rates."}
    )
    frozen_modules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Modules whose weights stay as they are, by shell patterns of their names, such as *embeddings. A "
            "teacher that is trained first is trained whole."
        },
    )

    def __post_init__(self) -> None:
        if self.batch_eval_metrics:
            raise InputError("--batch_eval_metrics: metrics are computed over the whole evaluation; leave it out")
        # Batches go to a GPU while it computes. (Of a field that is set here mypy forgets what the base class says.)
        if self.accelerator_config is None and self.dataloader_pin_memory:  # type: ignore[has-type]
            self.accelerator_config = {"non_blocking": True}
        super().__post_init__()


@dataclass
class PredictionArguments(FinetuningArguments):
    """What is learned from labels, and from what other models predict."""

    soft_target_weight: float = field(
        default=5.0, metadata={"help": "Weight of the difference from the teacher's distribution."}
    )
    soft_target_loss: Literal["forward_kl", "reverse_kl", "jensen_shannon", "mse", "decoupled", "top_k"] = field(
        default="forward_kl", metadata={"help": "How the difference is measured."}
    )
    temperature: float = field(
        default=2.0, metadata={"help": "Softens both distributions of the soft targets; mse has none."}
    )
    jensen_shannon_beta: float = field(
        default=0.5, metadata={"help": "The teacher's share of the mixture: near 0 as forward, near 1 as reverse KL."}
    )
    decoupled_target_weight: float = field(
        default=1.0, metadata={"help": "Weight of how sure the teacher is of the label, within decoupled."}
    )
    decoupled_non_target_weight: float = field(
        default=8.0, metadata={"help": "Weight of what the teacher thinks of the other classes, within decoupled."}
    )
    schedules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Weights of terms, or the temperature, that move from the flag's value to another: NAME:END:SHAPE, "
            "such as temperature:1:linear, or NAME:END:SHAPE:SHARE with the share of the run until then, such as "
            "hidden_mse_weight:0:cosine:0.5."
        },
    )
    soft_target_top_k: int = field(
        default=64, metadata={"help": "How many classes top_k keeps apart; all others share one bucket."}
    )
    distilled_positions: Literal["masked", "all"] = field(
        default="masked",
        metadata={"help": "Which tokens' predictions are learned from the teacher: those that have a label, or all."},
    )
    hard_label_weight: float = field(default=2.0, metadata={"help": "Weight of the cross-entropy with the labels."})

    def __post_init__(self) -> None:
        weights = {f"{name}_weight": weight for name, weight in self.term_weights.items()}
        parts = ("decoupled_target_weight", "decoupled_non_target_weight")
        for name, weight in (weights | {name: getattr(self, name) for name in parts}).items():
            if not 0 <= weight < float("inf"):
                raise InputError(f"--{name} {weight} must not be negative or infinite")
        if any(schedule.name == "temperature" for schedule in self.read_schedules) and (
            "soft_target" not in self.wanted_terms or self.soft_target_loss == "mse"
        ):
            raise InputError("--schedules temperature: there are no soft targets with a temperature")
        if not self.wanted_terms:
            raise InputError(f"{', '.join('--' + name for name in weights)} are all 0: nothing would be learned")
        if not any(getattr(self, name) for name in parts):
            raise InputError(f"{', '.join('--' + name for name in parts)} are both 0: nothing would be learned")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature} must be above 0")
        if not 0 < self.jensen_shannon_beta < 1:
            raise InputError(f"--jensen_shannon_beta {self.jensen_shannon_beta} must be between 0 and 1, and neither")
        if self.soft_target_top_k < 1:
            raise InputError(f"--soft_target_top_k {self.soft_target_top_k} must be at least 1")
        if self.soft_target_loss == "decoupled" and self.distilled_positions == "all":
            raise InputError(
                "--soft_target_loss decoupled needs a label wherever it looks: give --distilled_positions masked"
            )
        super().__post_init__()

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each loss term, by the name it is logged under."""
        return {"soft_target": self.soft_target_weight, "hard_label": self.hard_label_weight}

    @property
    def wanted_terms(self) -> list[str]:
        """The loss terms that have a weight, from the start or by a schedule."""
        later = {schedule.name for schedule in self.read_schedules}
        return [name for name, weight in self.term_weights.items() if weight or f"{name}_weight" in later]

    @property
    def read_schedules(self) -> list[Schedule]:
        """`--schedules` as they are meant."""
        starts = {f"{name}_weight": weight for name, weight in self.term_weights.items()}
        return read_schedules(self.schedules, {"temperature": self.temperature, **starts})


@dataclass
class DistillationArguments(PredictionArguments):
    """How the student is trained. The defaults are DistilBERT's (arXiv:1910.01108)."""

    teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={
            "help": "What the teacher computes in. By default its checkpoint's, with --bf16 or --fp16 what the student "
            "computes in."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "A folder for what the teacher says: asked once, used again by every epoch and run. Keeps what "
            "the soft targets need; terms that look inside the teacher do without it."
        },
    )
    teacher_cache_top_k: int = field(
        default=64,
        metadata={
            "help": "How many of a language model's classes are kept apart in the cache; all others share one bucket."
        },
    )
    hidden_cosine_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cosine between last hidden states."}
    )
    hidden_mse_weight: float = field(
        default=0.0, metadata={"help": "Weight of the squared error of the hidden states of --layer_map."}
    )
    embedding_weight: float = field(
        default=0.0, metadata={"help": "Weight of the squared error of the embeddings' output."}
    )
    patient_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distance of the first token's normalized states."}
    )
    hidden_projection: Literal["none", "identity", "random"] = field(
        default="none",
        metadata={
            "help": "Learn a linear map of the student's hidden states for the terms above, from this start; "
            "needed where hidden sizes differ."
        },
    )
    layer_map: str = field(
        default="uniform",
        metadata={
            "help": "The layers that hidden_mse, patient and attention compare: uniform, last, or pairs "
            "teacher:student such as 1:0,3:1,5:2."
        },
    )
    attention_weight: float = field(
        default=0.0, metadata={"help": "Weight of the squared error of attention scores; wants as many heads."}
    )
    relation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the divergence of the relations between tokens."}
    )
    relations: str = field(
        default="query,key,value",
        metadata={"help": "Which relations: query,key,value as in MiniLMv2, attention,value as in MiniLM."},
    )
    relation_heads: int | None = field(
        default=None,
        metadata={"help": "How many heads queries, keys and values are split into. By default the teacher's."},
    )
    relation_layer_map: str = field(
        default="last", metadata={"help": "The layers whose relations are compared, as in --layer_map."}
    )
    relational_distance_weight: float = field(
        default=0.0, metadata={"help": "Weight of the distances between the examples of a batch."}
    )
    relational_angle_weight: float = field(
        default=0.0, metadata={"help": "Weight of the angles between the examples of a batch."}
    )

    def __post_init__(self) -> None:
        for name in ("teacher_cache_top_k", "relation_heads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} {value} must be at least 1")
        if self.relation_heads is not None and "relation" not in self.wanted_terms:
            raise InputError(f"--relation_heads {self.relation_heads}: --relation_weight is 0, and nothing is related")
        if self.teacher_cache is not None:
            self._check_cacheable()
        chosen = self.chosen_relations
        if unknown := [name for name in chosen if name not in RELATIONS]:
            raise InputError(f"--relations {self.relations}: no {unknown[0]!r}; there are {', '.join(RELATIONS)}")
        if len(set(chosen)) != len(chosen):
            raise InputError(f"--relations {self.relations} names one more than once")
        for name in ("layer_map", "relation_layer_map"):
            explicit_pairs(getattr(self, name), f"--{name}")
        super().__post_init__()

    def _check_cacheable(self) -> None:
        if inside := self.terms_inside:
            raise InputError(
                "--teacher_cache keeps the teacher's predictions, and not what it holds inside: give "
                f"{' '.join(f'--{name}_weight 0' for name in inside)}, or do without the cache"
            )
        if any(schedule.name == "temperature" for schedule in self.read_schedules):
            raise InputError("--teacher_cache keeps what the teacher says at one temperature: schedule it no further")
        if "soft_target" not in self.wanted_terms:
            raise InputError("--teacher_cache has nothing to keep: --soft_target_weight is 0")

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight each loss term begins with, by the name it is logged under."""
        return {
            **super().term_weights,
            "hidden_cosine": self.hidden_cosine_weight,
            "hidden_mse": self.hidden_mse_weight,
            "embedding": self.embedding_weight,
            "patient": self.patient_weight,
            "attention": self.attention_weight,
            "relation": self.relation_weight,
            "relational_distance": self.relational_distance_weight,
            "relational_angle": self.relational_angle_weight,
        }

    @property
    def terms_inside(self) -> list[str]:
        """Those of them that need more of the teacher than its predictions."""
        return [name for name in self.wanted_terms if not name.endswith(("target", "label"))]

    @property
    def chosen_relations(self) -> list[str]:
        """`--relations` as names."""
        return [name.strip() for name in self.relations.split(",")]
