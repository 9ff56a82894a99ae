"""The files that a model is exported to, one a precision."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from prunelle.compression.quantization import QuantizationPlan
from prunelle.export.files import published_when_done
from prunelle.export.half_precision import convert_to_fp16
from prunelle.export.onnx import OPSET_VERSION, export_onnx
from prunelle.export.quantization import INT4_BLOCK_SIZE, quantize_dynamic, quantize_int4, quantize_static
from prunelle.export.runner import Batch
from prunelle.export.verification import verify_half_range, verify_runs


@dataclass(frozen=True)
class Variant:
    """A file's path below the output folder, and its name and format in reports."""

    file: Path
    name: str


# The paths are those that transformers.js finds by dtype fp32, fp16, q8, int8 and q4, and optimum by file name.
VARIANTS = {
    "fp32": Variant(Path("onnx") / "model.onnx", "onnx"),
    "fp16": Variant(Path("onnx") / "model_fp16.onnx", "onnx-fp16"),
    "int8-dynamic": Variant(Path("onnx") / "model_quantized.onnx", "onnx-int8"),
    "int8-static": Variant(Path("onnx") / "model_int8.onnx", "onnx-int8-static"),
    "int4": Variant(Path("onnx") / "model_q4.onnx", "onnx-int4"),
}


def variant_of(plan: QuantizationPlan) -> str:
    """The variant that computes what a model was trained for."""
    if plan.scheme in ("ternary", "binary"):
        return "int8-dynamic" if plan.activations == "int8" else "fp32"
    return "int4" if plan.scheme == "int4-weight" else plan.scheme


def export_variants(
    model: nn.Module,
    output_dir: str | Path,
    variants: Sequence[str] = ("fp32", "int8-dynamic"),
    *,
    input_names: Sequence[str] | None = None,
    opset_version: int = OPSET_VERSION,
    calibration: Sequence[Batch] = (),
    calibration_method: str = "minmax",
    int4_block_size: int = INT4_BLOCK_SIZE,
    plan: QuantizationPlan | None = None,
) -> dict[str, Path]:
    """Exports the model once and derives the variants, each published when it has passed its checks.

    The float32 file computes what the model computes (`verify_onnx`), the others load in onnxruntime and
    give finite logits at the same shapes. How far theirs are from the model's shows on data only.

    Args:
        model: as `export_onnx` takes it; so are `input_names` and `opset_version`.
        output_dir: a folder, made if need be. The files' places in it are those of `VARIANTS`.
        variants: keys of `VARIANTS`.
        calibration: for int8-static, as `quantize_static` takes it; so is `calibration_method`.
        int4_block_size: as `quantize_int4` takes it.
        plan: of a model trained with `Quantization`, for the variant of its scheme.

    Returns:
        The files by variant, in the order of `VARIANTS`.

    Raises:
        ExportError: the model cannot be exported, or a file fails a check.
    """
    plans = {} if plan is None else {variant_of(plan): plan}
    converters: dict[str, Callable[[Path, Path], Path]] = {
        "fp16": convert_to_fp16,
        "int8-dynamic": partial(quantize_dynamic, plan=plans.get("int8-dynamic")),
        "int8-static": partial(
            quantize_static, batches=calibration, method=calibration_method, plan=plans.get("int8-static")
        ),
        "int4": partial(quantize_int4, block_size=int4_block_size, plan=plans.get("int4")),
    }
    files = {name: Path(output_dir) / variant.file for name, variant in VARIANTS.items() if name in variants}
    with tempfile.TemporaryDirectory() as folder:
        source = files.get("fp32", Path(folder) / "model.onnx")
        export_onnx(model, source, input_names=input_names, opset_version=opset_version)
        if "fp16" in files:
            verify_half_range(model, source)
        for name in [name for name in files if name != "fp32"]:
            with published_when_done(files[name]) as unfinished:
                converters[name](source, unfinished)
                verify_runs(model, unfinished)
    return files
