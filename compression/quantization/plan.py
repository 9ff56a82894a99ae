"""What of a model is quantized and how: all that the export needs to know to do the same."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class QuantizationPlan:
    """What a model was trained to bear.

    Args:
        scheme: as `Quantization` takes it.
        linear: qualified names of the linear modules that are quantized; all others stay as they are.
        embeddings: of the tables.
    """

    scheme: str
    linear: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
