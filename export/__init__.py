"""A plain checkpoint in; ONNX and int8 files, verified, measured and reported, out."""

from prunelle.export.deployment import FP32_FILE, INT8_FILE, export_and_report
from prunelle.export.evaluation import Evaluation, evaluate
from prunelle.export.hardware import hardware
from prunelle.export.inference import ExportError
from prunelle.export.latency import Latency, measure_latency
from prunelle.export.onnx import export_onnx
from prunelle.export.quantization import quantize_dynamic
from prunelle.export.report import ModelReport, Report
from prunelle.export.runner import OnnxRunner, Runner, TorchRunner

__all__ = [
    "FP32_FILE",
    "INT8_FILE",
    "Evaluation",
    "ExportError",
    "Latency",
    "ModelReport",
    "OnnxRunner",
    "Report",
    "Runner",
    "TorchRunner",
    "evaluate",
    "export_and_report",
    "export_onnx",
    "hardware",
    "measure_latency",
    "quantize_dynamic",
]
