"""Pruning: what it is asked for by flags, and the trainer that does it on labels alone."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from datasets import IterableDataset
from transformers import PreTrainedModel, TrainingArguments

from prunelle.compression import CompressionMethod
from prunelle.compression.activations import GeluToRelu
from prunelle.compression.norms import LayerNormToNoNorm
from prunelle.compression.pruning import (
    LAYERS,
    SHARED,
    CubicSchedule,
    IterativeSchedule,
    OneShotSchedule,
    Pruning,
    Rewinding,
    prune_vocabulary,
    remove_layers,
    shrink,
)
from prunelle.compression.pruning.nn_pruning_bridge import SparseArguments, methods_of, read_arguments
from prunelle.compression.pruning.unit_masks import CALIBRATED, LEARNED
from prunelle.errors import InputError
from prunelle.tasks import Task
from prunelle.trainers.arguments import DistillationArguments, FinetuningArguments
from prunelle.trainers.compression import CompressionTrainer
from prunelle.trainers.models import LoadedModel, ModelArguments, load_model

logger = logging.getLogger(__name__)

# Flags of what is done beside the pruning itself.
_AFTER_PRUNING = ("prune_vocabulary", "shrink", "save_sparse", "round_to")


def _default(flag: Any) -> Any:
    """What a dataclass gives a field that nothing is said about."""
    return flag.default if flag.default_factory is MISSING else flag.default_factory()


@dataclass
class PruningArguments:
    """What is pruned, by what, and when."""

    density: list[float] = field(
        default_factory=lambda: [0.5],
        metadata={"help": "The share of weights, or of whatever the structure says, that is kept; one for each."},
    )
    structure: list[str] = field(
        default_factory=lambda: ["weights"],
        metadata={
            "help": "What goes as one: weights, rows, columns, blocks as 32x32, patterns as 2:4, heads, ffn (its "
            "dimensions), layers. Of several, each takes the modules that those before it left."
        },
    )
    score: Literal["magnitude", "movement", "soft_movement", "l0", "taylor", "wanda", "head_importance", "random"] = (
        field(default="movement", metadata={"help": "What weights are ranked by."})
    )
    calibration_samples: int = field(
        default=128,
        metadata={"help": "How many training examples wanda, head_importance and a one-shot taylor look at."},
    )
    ranking: Literal["row", "tensor", "global"] | None = field(
        default=None,
        metadata={
            "help": "Keep the share of each output's row of weights, of each tensor, or of all together. By default "
            "tensor; global for soft_movement and l0, row for wanda."
        },
    )
    pruned_modules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Shell patterns of the linear modules to prune, such as '*.attention.*'. By default all within "
            "the layers: no embeddings, no head."
        },
    )
    excluded_modules: list[str] = field(
        default_factory=list, metadata={"help": "Shell patterns of those to leave out again."}
    )
    pruned_layers: list[int] = field(
        default_factory=list,
        metadata={"help": "Of --structure layers, those that are to go, counted from 0; --density is not theirs."},
    )
    prune_vocabulary: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Before the run, take out the tokens that none of these texts has: train, validation, test, "
            "unlabeled."
        },
    )
    shrink: bool | None = field(
        default=None,
        metadata={
            "help": "Whether pruned heads and feed-forward dimensions are taken out of the model that is written. By "
            "default where heads or ffn are pruned; the folder is then loaded by prunelle.from_pretrained."
        },
    )
    save_sparse: bool = field(
        default=False,
        metadata={
            "help": "Write the checkpoint without its zeros: smaller the more weights are pruned, and loaded by "
            "prunelle.from_pretrained alone."
        },
    )
    round_to: int = field(
        default=8, metadata={"help": "Feed-forward dimensions that are left are a multiple of this; 1 takes out all."}
    )
    schedule: Literal["cubic", "one_shot", "iterative"] = field(
        default="cubic",
        metadata={
            "help": "Density falls gradually; at once before the first step, where with --num_train_epochs 0 nothing "
            "is trained after it; or in rounds, with training before and after each."
        },
    )
    pruning_rounds: int = field(
        default=3, metadata={"help": "Of the iterative schedule; the same share of what is left goes in each."}
    )
    rewind: Literal["none", "learning_rate", "weights"] = field(
        default="none",
        metadata={
            "help": "After each round of the iterative schedule the learning rate's schedule begins again; with "
            "weights, they too are again what they were at that point of the first training."
        },
    )
    rewind_to: float = field(
        default=0.0, metadata={"help": "Where in the first training those after it begin, as a share of it."}
    )
    pruning_warmup: float = field(default=0.1, metadata={"help": "The share of the run before density falls."})
    pruning_cooldown: float = field(
        default=0.3, metadata={"help": "The share of the run that is left, with masks that stay, once it has fallen."}
    )
    gelu_to_relu: bool = field(
        default=False,
        metadata={
            "help": "Replace GeLU by ReLU on the way, gradually: between --pruning_warmup and --pruning_cooldown, "
            "whatever the schedule."
        },
    )
    layer_norm_to_no_norm: bool = field(
        default=False,
        metadata={
            "help": "Replace LayerNorm by NoNorm, a factor and a summand for each feature, when --gelu_to_relu would "
            "replace GeLU; the folder is then loaded by prunelle.from_pretrained."
        },
    )
    score_init: Literal["magnitude", "zero", "noise"] = field(
        default="magnitude", metadata={"help": "Where learned scores begin; magnitude is |w| / std(w)."}
    )
    score_learning_rate: float = field(default=1e-2, metadata={"help": "Of learned scores; they have no weight decay."})
    score_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the mean sigmoid of learned scores, for l0 of the expected share of open gates. By "
            "default 1 for soft_movement and l0, 0 for movement."
        },
    )

    nn_pruning_config: str | None = field(
        default=None,
        metadata={
            "help": "A JSON file of nn_pruning's SparseTrainingArguments, which then say what is pruned, how and when, "
            "and what is distilled; its warm-ups count in --warmup_steps. No other flag may say so."
        },
    )

    def __post_init__(self) -> None:
        said = [f.name for f in fields(self) if getattr(self, f.name) != _default(f)]
        self.nn_pruning: SparseArguments | None = None
        if self.nn_pruning_config is not None:
            if twice := [name for name in said if name not in ("nn_pruning_config", *_AFTER_PRUNING)]:
                raise InputError(f"--nn_pruning_config says what is pruned: leave out --{twice[0]}, or the file")
            self.nn_pruning = read_arguments(Path(self.nn_pruning_config))
        if self.score_penalty is not None and not 0 <= self.score_penalty < float("inf"):
            raise InputError(f"--score_penalty {self.score_penalty} must be a number, and not negative")
        if not 0 < self.score_learning_rate < float("inf"):
            raise InputError(f"--score_learning_rate {self.score_learning_rate} must be a number above 0")
        if self.calibration_samples < 1:
            raise InputError(f"--calibration_samples {self.calibration_samples} must be at least 1")
        is_idle = self.schedule != "cubic" and not (self.gelu_to_relu or self.layer_norm_to_no_norm)
        if is_idle and (self.pruning_warmup, self.pruning_cooldown) != (0.1, 0.3):
            raise InputError(
                f"--schedule {self.schedule} has no --pruning_warmup and no --pruning_cooldown: leave them out"
            )
        if self.schedule != "iterative" and (self.pruning_rounds, self.rewind) != (3, "none"):
            raise InputError("--pruning_rounds and --rewind are for --schedule iterative")
        if self.rewind == "none" and self.rewind_to:
            raise InputError("--rewind_to says where --rewind learning_rate or --rewind weights goes back to: give one")
        if self.pruned_layers and LAYERS not in self.structure:
            raise InputError("--pruned_layers needs --structure layers")
        if LAYERS in self.structure[1:]:
            raise InputError("--structure names layers first: whatever else is pruned lies in them")
        if self.round_to < 1:
            raise InputError(f"--round_to {self.round_to} must be at least 1")
        if self.shrink is None:
            self.shrink = not set(SHARED).isdisjoint(self.structure) or self.nn_pruning is not None
        for name, reason in self._idle():
            if name in said:
                raise InputError(f"--{name} {reason}")
        if len(self.density) not in (1, len(self.structure)):
            raise InputError(f"--density has {len(self.density)} values and --structure {len(self.structure)}")
        self.methods(seed=0)

    def methods(self, seed: int, warmup_steps: float = 0.0) -> list[CompressionMethod]:
        """What the flags describe: a method for each structure, one that rewinds, those that replace modules.

        Args:
            seed: Of random scores and of noise.
            warmup_steps: Of `transformers.TrainingArguments`; nn_pruning's schedules count in them.
        """
        if self.nn_pruning is not None:
            return methods_of(self.nn_pruning, warmup_steps)
        densities = self.density if len(self.density) > 1 else self.density * len(self.structure)
        methods: list[CompressionMethod] = [
            Pruning(
                self._schedule(density),
                self.score,
                structure=structure,
                ranking=self.ranking,
                score_init=self.score_init,
                score_learning_rate=self.score_learning_rate,
                score_penalty=self.score_penalty,
                calibration_samples=self.calibration_samples,
                patterns=self.pruned_modules,
                excluded=self.excluded_modules,
                pruned_layers=self.pruned_layers if structure == LAYERS else (),
                seed=seed,
            )
            for structure, density in zip(self.structure, densities, strict=True)
        ]
        if self.rewind != "none":
            methods.append(Rewinding(self._iterative(densities[0]), weights=self.rewind == "weights"))
        if self.gelu_to_relu:
            methods.append(GeluToRelu(self.pruning_warmup, self.pruning_cooldown))
        if self.layer_norm_to_no_norm:
            methods.append(LayerNormToNoNorm(self.pruning_warmup, self.pruning_cooldown))
        return methods

    def compact(self, model: PreTrainedModel) -> PreTrainedModel:
        """A pruned and baked model without its pruned layers, and if asked for without heads and dimensions."""
        if LAYERS in self.structure:
            model = remove_layers(model)
        return shrink(model, self.round_to) if self.shrink else model

    def _idle(self) -> Iterator[tuple[str, str]]:
        """Flags that the others leave nothing to say, and what they would need."""
        if self.score not in LEARNED:
            for name in ("score_penalty", "score_init", "score_learning_rate"):
                yield name, f"needs scores that are learned, and --score {self.score} learns none"
        if not (self.score in CALIBRATED or (self.score == "taylor" and self.schedule == "one_shot")):
            yield "calibration_samples", "needs --score wanda or head_importance, or a one-shot taylor"
        if self.structure == [LAYERS]:
            for name in ("pruned_modules", "excluded_modules"):
                yield name, "chooses modules, and --structure layers prunes whole layers: give another structure too"
            yield "score_init", "begins at weights, and layers have none of their own: their scores begin at 0"
        if not self.shrink:
            yield "round_to", "needs --shrink true"

    def _schedule(self, density: float) -> OneShotSchedule:
        if self.schedule == "iterative":
            return self._iterative(density)
        if self.schedule == "one_shot":
            return OneShotSchedule(density)
        return CubicSchedule(density, self.pruning_warmup, self.pruning_cooldown)

    def _iterative(self, density: float) -> IterativeSchedule:
        return IterativeSchedule(density, self.pruning_rounds, self.rewind_to)


@dataclass
class PrunedModelArguments(ModelArguments):
    """The model to prune, and perhaps one to learn from."""

    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "A trained checkpoint to distil from in the same run; the model's own will do."}
    )


def settle_distillation(
    models: PrunedModelArguments, arguments: DistillationArguments, pruning: PruningArguments, given: Mapping[str, Any]
) -> None:
    """Take up, in place, the teacher that nn_pruning's arguments name, where flags do not name another.

    Args:
        given: What was given beyond the defaults, as `prunelle.cli.parse` says.

    Raises:
        InputError: There are flags of a distillation, and no teacher.
    """
    sparse = pruning.nn_pruning
    if sparse is not None and sparse.distil_teacher_name_or_path is not None:
        said = {
            "soft_target_weight": sparse.distil_alpha_teacher,
            "hard_label_weight": sparse.distil_alpha_ce,
            "temperature": sparse.distil_temperature,
            "hidden_cosine_weight": 0.0,
        }
        models.teacher_name_or_path = models.teacher_name_or_path or sparse.distil_teacher_name_or_path
        for name in said.keys() - given.keys():
            setattr(arguments, name, said[name])
    flags = {f.name for f in fields(DistillationArguments)} - {f.name for f in fields(FinetuningArguments)}
    if models.teacher_name_or_path is None and (idle := [f"--{name}" for name in given if name in flags]):
        raise InputError(f"without a teacher there is nothing to distil: give --teacher_name_or_path, or no {idle[0]}")


def load_dense_teacher(models: PrunedModelArguments, pruned: LoadedModel, task: Task) -> LoadedModel | None:
    """The teacher that the flags name; None where they name none.

    Raises:
        InputError: It has no head that was trained for the task, or reads other token ids.
    """
    if models.teacher_name_or_path is None:
        return None
    teacher = load_model(models.teacher_name_or_path, task)
    if not teacher.is_trained:
        raise InputError(f"{models.teacher_name_or_path} has no head that was trained for the task: fine-tune it first")
    if teacher.tokenizer.get_vocab() != pruned.tokenizer.get_vocab():
        raise InputError(
            f"the vocabularies of {models.teacher_name_or_path} and of the model to prune differ: both must read the "
            "same token ids"
        )
    return teacher


def prune_vocabularies(splits: Sequence[str], task: Task, pruned: LoadedModel, teacher: LoadedModel | None) -> None:
    """Take out of the tokenizer, and of the models that read it, in place, the tokens that the data never uses.

    Args:
        splits: The parts of the data whose tokens are kept; all tokens are where none is named.

    Raises:
        InputError: The data has no such part, or is a stream; or the tokenizer is of no known kind.
    """
    if not splits:
        return
    for split in splits:
        if split not in task.splits:
            raise InputError(f"--prune_vocabulary {split}: the data has {', '.join(task.splits)}")
        if isinstance(task.splits[split], IterableDataset):
            raise InputError("--prune_vocabulary reads all of the text first: leave out --streaming")
    loaded = [pruned] if teacher is None else [pruned, teacher]
    before = len(pruned.tokenizer)
    tokenizer, models = prune_vocabulary(task.texts(splits), pruned.tokenizer, *(each.model for each in loaded))
    for each, model in zip(loaded, models, strict=True):
        each.tokenizer, each.model = tokenizer, model
    if pruned.model.config.is_encoder_decoder:  # the token that the decoder starts from has another number
        task.adopt(pruned.model.config, str(pruned.model.name_or_path))
    logger.info("%d of %d tokens are left in the vocabulary", len(tokenizer), before)


class PruningTrainer(CompressionTrainer):
    """Prunes a model while it learns from labels. (`DistillationTrainer` with `methods` does so with a teacher.)

    Args:
        model: What is pruned, in place; `bake` ends it after training.
        args: Every flag of `transformers.TrainingArguments`.
        pruning: What is pruned, by what, and when.
        methods: What else is to be done to the weights, after the masks.
        kwargs: As for `transformers.Trainer`.

    Raises:
        InputError: As `CompressionTrainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        pruning: PruningArguments,
        methods: Sequence[CompressionMethod] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, [*pruning.methods(args.seed, args.warmup_steps), *methods], **kwargs)
