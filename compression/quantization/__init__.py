"""Weights and activations of few bits, simulated while a model is trained exactly as the exported file computes."""

from prunelle.compression.quantization.inputs import DynamicInput as DynamicInput
from prunelle.compression.quantization.inputs import StaticInput as StaticInput
from prunelle.compression.quantization.packing import load_packed as load_packed
from prunelle.compression.quantization.packing import save_packed as save_packed
from prunelle.compression.quantization.plan import QuantizationPlan as QuantizationPlan
from prunelle.compression.quantization.plan import read_plan as read_plan
from prunelle.compression.quantization.quantization import Quantization as Quantization
from prunelle.compression.quantization.sensitivity import Sensitivity as Sensitivity
from prunelle.compression.quantization.sensitivity import SensitivityTest as SensitivityTest
from prunelle.compression.quantization.weights import BinaryWeight as BinaryWeight
from prunelle.compression.quantization.weights import Int4Weight as Int4Weight
from prunelle.compression.quantization.weights import Int8Rows as Int8Rows
from prunelle.compression.quantization.weights import Int8Table as Int8Table
from prunelle.compression.quantization.weights import Int8Weight as Int8Weight
from prunelle.compression.quantization.weights import TernaryWeight as TernaryWeight

__all__ = [
    "BinaryWeight",
    "DynamicInput",
    "Int4Weight",
    "Int8Rows",
    "Int8Table",
    "Int8Weight",
    "Quantization",
    "QuantizationPlan",
    "Sensitivity",
    "SensitivityTest",
    "StaticInput",
    "TernaryWeight",
    "load_packed",
    "read_plan",
    "save_packed",
]
