"""A plain checkpoint in; ONNX and int8 files, verified, measured and reported, out."""

from prunelle.export.calibration import activation_ranges, calibration_batches
from prunelle.export.card import write_card
from prunelle.export.checkpoint import Checkpoint, load_checkpoint
from prunelle.export.deployment import FP32_FILE, INT8_FILE, export_and_report, report_on
from prunelle.export.evaluation import Evaluation, evaluate
from prunelle.export.files import new_folder
from prunelle.export.half_precision import convert_to_fp16
from prunelle.export.hardware import hardware
from prunelle.export.inference import ExportError
from prunelle.export.latency import Latency, measure_latency
from prunelle.export.onnx import export_onnx
from prunelle.export.quantization import quantize_dynamic, quantize_int4, quantize_static
from prunelle.export.report import ModelReport, Report
from prunelle.export.runner import OnnxRunner, Runner, TorchRunner
from prunelle.export.sequences import report_on_sequences
from prunelle.export.variants import VARIANTS, Variant, export_variants

__all__ = [
    "FP32_FILE",
    "INT8_FILE",
    "VARIANTS",
    "Checkpoint",
    "Evaluation",
    "ExportError",
    "Latency",
    "ModelReport",
    "OnnxRunner",
    "Report",
    "Runner",
    "TorchRunner",
    "Variant",
    "activation_ranges",
    "calibration_batches",
    "convert_to_fp16",
    "evaluate",
    "export_and_report",
    "export_onnx",
    "export_variants",
    "hardware",
    "load_checkpoint",
    "measure_latency",
    "new_folder",
    "quantize_dynamic",
    "quantize_int4",
    "quantize_static",
    "report_on",
    "report_on_sequences",
    "write_card",
]
