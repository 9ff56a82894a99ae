"""Quantization-aware training: what it is asked for by flags, and the trainer that does it on labels alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedModel, TrainingArguments

from prunelle.compression import CompressionMethod
from prunelle.compression.quantization import Quantization
from prunelle.errors import InputError
from prunelle.trainers.compression import CompressionTrainer
from prunelle.trainers.pruning import PrunedModelArguments


@dataclass
class QuantizationArguments:
    """What is quantized, how, and when."""

    scheme: Literal["int8-dynamic"] = field(
        default="int8-dynamic", metadata={"help": "What the exported file is to compute with."}
    )
    quantized_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Shell patterns of the linear modules to quantize, such as '*.attention.*'. By default all."},
    )
    unquantized_modules: list[str] = field(
        default_factory=list, metadata={"help": "Shell patterns of those to leave out again."}
    )
    quantize_embeddings: bool = field(default=True, metadata={"help": "Quantize tables of embeddings too, to 8 bits."})
    quantization_start: float = field(
        default=0.0, metadata={"help": "The share of the run before anything is rounded."}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.quantization_start < 1:
            raise InputError(
                f"--quantization_start {self.quantization_start} must be a share of the run: from 0 to below 1"
            )

    def method(self) -> Quantization:
        """What the flags describe."""
        return Quantization(
            self.scheme,
            patterns=self.quantized_modules,
            excluded=self.unquantized_modules,
            embeddings=self.quantize_embeddings,
            start=self.quantization_start,
        )


@dataclass
class QuantizedModelArguments(PrunedModelArguments):
    """The model to quantize. It learns from itself, as it was, unless another teacher is named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.teacher_name_or_path = self.teacher_name_or_path or self.model_name_or_path


class QATTrainer(CompressionTrainer):
    """Quantizes a model while it learns from labels. (`DistillationTrainer` with `methods` does so with a teacher.)

    Args:
        model: What is quantized, in place; `bake` ends it after training.
        args: Every flag of `transformers.TrainingArguments`.
        quantization: What is quantized, how, and when.
        methods: What else is to be done to the weights, before they are rounded.
        kwargs: As for `transformers.Trainer`.

    Attributes:
        plan: What the export has to quantize.

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
        method = quantization.method()
        super().__init__(model, args, [*methods, method], **kwargs)
        self.plan = method.plan
