"""A float32 ONNX file to a float16 one."""

import sys
from pathlib import Path

import onnx

from prunelle.export.files import published_when_done
from prunelle.export.onnx import save_checked
from prunelle.export.rewriting import sum_by_add


def convert_to_fp16(fp32_file: str | Path, output_file: str | Path) -> Path:
    """Writes the half-precision version of a file of `export_onnx`, and returns its path.

    Weights and arithmetic are float16, the logits float32, so that clients read all files alike. It is a
    file for GPUs and for WebGPU: on a CPU onnxruntime computes most of it in float32, converting on the way.
    Weights that float16 cannot hold become the nearest that it can.
    """
    output_file = Path(output_file)
    path = list(sys.path)
    from onnxruntime.transformers.float16 import convert_float_to_float16

    sys.path[:] = path  # that import adds its folder, whose `metrics`, `optimizer` and others would be found there
    proto = onnx.load(fp32_file)
    del proto.graph.value_info[:]  # the converter infers its own
    sum_by_add(proto)  # kernels for GPUs are not those that the float32 file goes round
    with published_when_done(output_file) as unfinished:
        save_checked(convert_float_to_float16(proto, keep_io_types=True), unfinished)
    return output_file
