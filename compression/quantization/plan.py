"""What of a model is quantized and how: all that the export needs to know to do the same."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from prunelle.compression.record import RECORD_NAME, read_record
from prunelle.errors import InputError

Scheme = Literal["int8-dynamic", "int8-static", "int4-weight", "ternary", "binary"]
Inputs = Literal["float32", "int8"]
Embeddings = Literal["tensor", "row", "none"]


@dataclass(frozen=True)
class QuantizationPlan:
    """What a model was trained to bear.

    Args:
        scheme: as `Quantization` takes it.
        linear: qualified names of the linear modules that are quantized; all others stay as they are.
        tables: of the tables of embeddings.
        embeddings: whether each of those has one scale a row, or one.
        inputs: for `int8-static`, the scale and the zero point of the input of each linear module.
        divisors: for `int8-static`, what the channels of a linear module's input are divided by, where they are.
        block_size: for `int4-weight`, how many weights share a scale.
        symmetric: for `int4-weight`, whether there are no zero points.
        activations: for `ternary` and `binary`, whether inputs are those of `int8-dynamic` or not quantized.
    """

    scheme: Scheme
    linear: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    embeddings: Embeddings = "row"
    inputs: dict[str, tuple[float, int]] = field(default_factory=dict)
    divisors: dict[str, list[float]] = field(default_factory=dict)
    block_size: int = 32
    symmetric: bool = False
    activations: Inputs = "float32"


def read_plan(folder: Path | None) -> QuantizationPlan | None:
    """The plan of the model in a checkpoint folder; None where it was not trained for one.

    Raises:
        InputError: Another version of Prunelle wrote it, which says more than this one knows.
    """
    record = None if folder is None else read_record(folder)
    if record is None or "quantization" not in record:
        return None
    plan = record["quantization"]
    if unknown := sorted(plan.keys() - {each.name for each in fields(QuantizationPlan)}):
        raise InputError(
            f"{folder}/{RECORD_NAME} has {', '.join(unknown)} under quantization, which this version of Prunelle does "
            "not know: export the model with the version that trained it"
        )
    inputs = {name: (scale, zero) for name, (scale, zero) in plan["inputs"].items()}
    return QuantizationPlan(**(plan | {"inputs": inputs}))
