"""Weights and activations of few bits, simulated while a model is trained exactly as the exported file computes."""

from prunelle.compression.quantization.inputs import DynamicInput as DynamicInput
from prunelle.compression.quantization.plan import QuantizationPlan as QuantizationPlan
from prunelle.compression.quantization.quantization import Quantization as Quantization
from prunelle.compression.quantization.weights import Int8Table as Int8Table
from prunelle.compression.quantization.weights import Int8Weight as Int8Weight

__all__ = ["DynamicInput", "Int8Table", "Int8Weight", "Quantization", "QuantizationPlan"]
