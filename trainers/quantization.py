"""Quantization-aware training: what it is asked for by flags, and the trainer that does it on labels alone."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, TrainingArguments

from prunelle.compression import CompressionMethod
from prunelle.compression.quantization import Quantization, SensitivityTest
from prunelle.errors import InputError
from prunelle.trainers.arguments import DistillationArguments
from prunelle.trainers.compression import CompressionTrainer
from prunelle.trainers.models import layer_numbers
from prunelle.trainers.pruning import PrunedModelArguments, PruningArguments

logger = logging.getLogger(__name__)


@dataclass
class QuantizationArguments:
    """What is quantized, how, and when."""

    scheme: Literal["int8-dynamic", "int8-static", "int4-weight", "ternary", "binary"] = field(
        default="int8-dynamic", metadata={"help": "What the exported file is to compute with."}
    )
    quantized_modules: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Shell patterns of the linear modules to quantize, such as '*.attention.*'. By default all; with "
            "fewer than 8 bits those within the layers."
        },
    )
    unquantized_modules: list[str] = field(
        default_factory=list, metadata={"help": "Shell patterns of those to leave out again."}
    )
    embeddings: Literal["row", "tensor", "none"] = field(
        default="row", metadata={"help": "Embeddings in 8 bits too, with one scale a row or one a table, or not."}
    )
    weight_block_size: int = field(
        default=32, metadata={"help": "Weights that share a scale (int4-weight).", "choices": [32, 64, 128]}
    )
    weight_symmetric: bool = field(default=False, metadata={"help": "No zero points (int4-weight)."})
    activations: Literal["float32", "int8"] = field(
        default="float32", metadata={"help": "What inputs of ternary and binary modules are."}
    )
    quantization_start: float = field(
        default=0.0, metadata={"help": "The share of the run before anything is rounded."}
    )

    activation_ranges: Literal["moving_average", "learned"] = field(
        default="moving_average", metadata={"help": "Where the ranges of int8-static come from."}
    )
    quantization_samples: int = field(
        default=512, metadata={"help": "How many training examples int8-static looks at before the first step."}
    )
    range_freeze: float = field(
        default=0.9, metadata={"help": "The share of the run after which the ranges of int8-static stay."}
    )

    sensitivity_report: bool = field(
        default=False,
        metadata={
            "help": "Before training, quantize one module at a time, and write sensitivity.json: accuracy on the "
            "validation data, divergence and changed predictions against float32."
        },
    )
    keep_accuracy: float | None = field(
        default=None,
        metadata={
            "help": "Leave out the fewest modules, the most sensitive, without which quantizing costs no more than "
            "these points of accuracy before training."
        },
    )

    def __post_init__(self) -> None:
        if self.keep_accuracy is not None and not 0 <= self.keep_accuracy <= 100:
            raise InputError(f"--keep_accuracy {self.keep_accuracy} must be points of accuracy: from 0 to 100")
        if self.quantization_samples < 1:
            raise InputError(f"--quantization_samples {self.quantization_samples} must be at least 1")
        if self.scheme != "int8-static" and self.activation_ranges == "learned":
            raise InputError(f"--activation_ranges learned is for int8-static: {self.scheme} has no ranges to learn")
        self.method()

    def method(self) -> Quantization:
        """What the flags describe."""
        return Quantization(
            self.scheme,
            patterns=self.quantized_modules,
            excluded=self.unquantized_modules,
            embeddings=self.embeddings,
            block_size=self.weight_block_size,
            symmetric=self.weight_symmetric,
            activations=self.activations,
            ranges=self.activation_ranges,
            calibration_samples=self.quantization_samples,
            start=self.quantization_start,
            freeze=self.range_freeze,
        )


def leave_out_sensitive(
    arguments: QuantizationArguments, model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], folder: Path
) -> QuantizationArguments:
    """Measure which modules bear quantization badly, if that is asked for, and write `sensitivity.json`.

    Args:
        arguments: What is asked for.
        model: Not trained for quantization yet. It stays as it is.
        batches: The validation data, with labels.
        folder: Where the report goes.

    Returns:
        The arguments, with the modules that `--keep_accuracy` leaves out.
    """
    if arguments.keep_accuracy is None and not arguments.sensitivity_report:
        return arguments
    test = SensitivityTest(model, arguments.method(), list(batches))
    modules = test.one_by_one()
    left_out = [] if arguments.keep_accuracy is None else test.left_out(arguments.keep_accuracy / 100, modules)
    logger.info("%d modules are left out of the quantization: %s", len(left_out), ", ".join(left_out) or "none")
    report = {"accuracy": test.accuracy, "left_out": left_out, "modules": [asdict(each) for each in modules]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sensitivity.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return replace(arguments, unquantized_modules=[*arguments.unquantized_modules, *left_out])


@dataclass
class SelfDistillationArguments(DistillationArguments):
    """How a model is trained to predict what it did before it was rounded: dropout would move it further than that."""

    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})


@dataclass
class QuantizedModelArguments(PrunedModelArguments):
    """The model to quantize. It learns from itself, as it was, unless another teacher is named."""

    student_layers: str | None = field(
        default=None, metadata={"help": "The model's layers that are taken and trained, such as 0,2,5; by default all."}
    )
    prune: bool = field(
        default=False, metadata={"help": "Prune in the same run, by the flags of scripts/prune.py, and then round."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.teacher_name_or_path = self.teacher_name_or_path or self.model_name_or_path
        self.layers()

    def layers(self) -> list[int] | None:
        """`--student_layers` as numbers."""
        return layer_numbers(self.student_layers, "--student_layers")


def check_pruning_flags(models: QuantizedModelArguments, pruning: PruningArguments, given: Mapping[str, Any]) -> None:
    """See that flags of a pruning are meant, and leave names of modules as they are.

    Args:
        given: What was given beyond the defaults, as `prunelle.cli.parse` says.

    Raises:
        InputError: They have no `--prune`, or take out layers.
    """
    flags = {f.name for f in fields(PruningArguments)}
    if not models.prune and (idle := [f"--{name}" for name in given if name in flags]):
        raise InputError(f"nothing is pruned without --prune true: add it, or give no {idle[0]}")
    if models.prune and "layers" in pruning.structure:
        raise InputError("--structure layers renumbers what is quantized: take layers by --student_layers instead")


class QATTrainer(CompressionTrainer):
    """Quantizes a model while it learns from labels. (`DistillationTrainer` with `methods` does so with a teacher.)

    Args:
        model: What is quantized, in place; `bake` ends it after training.
        args: Every flag of `transformers.TrainingArguments`.
        quantization: What is quantized, how, and when.
        methods: What else is to be done to the weights, before they are rounded.
        kwargs: As for `transformers.Trainer`.

    Raises:
        InputError: As `CompressionTrainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        quantization: QuantizationArguments,
        methods: Sequence[CompressionMethod] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, [*methods, quantization.method()], **kwargs)
