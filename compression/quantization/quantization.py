"""Quantization-aware training: a model learns to predict with the weights and inputs that its file will have."""

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel

from prunelle.compression.method import CompressionMethod
from prunelle.compression.quantization.inputs import DynamicInput, quantize_inputs
from prunelle.compression.quantization.plan import QuantizationPlan
from prunelle.compression.quantization.weights import FakeQuantizer, Int8Table, Int8Weight
from prunelle.compression.targets import LINEAR, match_modules, shared_weights
from prunelle.errors import InputError

Scheme = Literal["int8-dynamic"]


class Quantization(CompressionMethod):
    """Rounds weights and inputs as the exported file does, with gradients that pass straight through.

    - `int8-dynamic`: linear modules have weights of `Int8Weight` and inputs of `DynamicInput`, embeddings are those of
      `Int8Table`: what `prunelle.export.quantize_dynamic` writes.

    After `bake` the weights lie on their grids, so that the export finds the scales that were trained with.

    Args:
        scheme: As above.
        patterns: Shell patterns of qualified names of linear modules, as `*.attention.*`. By default all of them, but
            for those that share their weight, such as a language model's head.
        excluded: Shell patterns of those to leave out again.
        embeddings: Whether tables of embeddings are quantized too, where they share nothing.
        start: The share of the run before anything is rounded.

    Attributes:
        plan: What is quantized, once attached.
        quantizers: What rounds.
    """

    def __init__(
        self,
        scheme: Scheme = "int8-dynamic",
        *,
        patterns: Sequence[str] = (),
        excluded: Sequence[str] = (),
        embeddings: bool = True,
        start: float = 0.0,
    ) -> None:
        if not 0 <= start < 1:
            raise InputError(f"quantization that starts at {start} of the run: it must be from 0 to below 1")
        self.scheme, self.patterns, self.excluded = scheme, patterns, excluded
        self.embeddings, self.start_at = embeddings, start
        self.plan = QuantizationPlan(scheme)
        self.quantizers: list[FakeQuantizer] = []

    def attach(self, model: PreTrainedModel) -> None:
        if model.config.is_encoder_decoder:
            raise InputError(f"{type(model).__name__} is not exported, so there is no file to train it for")
        linear = match_modules(model, LINEAR, self.patterns or ["*"], self.excluded)
        tables = match_modules(model, (nn.Embedding,)) if self.embeddings else {}
        shared = shared_weights(model)
        if both := [name for name in linear if name in shared and self.patterns]:
            raise InputError(f"{both[0]} shares its weight with {shared[both[0]]}: it cannot be quantized on its own")
        linear = {name: module for name, module in linear.items() if name not in shared}
        tables = {name: module for name, module in tables.items() if name not in shared}
        if not linear:
            raise InputError(f"no linear module of {type(model).__name__} is left to quantize")
        for module in linear.values():
            inputs = DynamicInput()
            quantize_inputs(module, inputs)
            self.quantizers += [
                inputs,
                self._round_weight(module, Int8Weight(1 if isinstance(module, nn.Linear) else 0)),
            ]
        for module in tables.values():
            self.quantizers.append(self._round_weight(module, Int8Table()))
        self.plan = QuantizationPlan(self.scheme, list(linear), list(tables))

    def step(self, progress: float) -> None:
        for quantizer in self.quantizers:
            quantizer.enabled = progress >= self.start_at - 1e-9  # steps / all steps is rounded

    def finish(self) -> None:
        if not all(quantizer.enabled for quantizer in self.quantizers):
            raise RuntimeError(f"the run ended before {self.start_at} of it was done: nothing was quantized")

    def _round_weight(self, module: nn.Module, quantizer: FakeQuantizer) -> FakeQuantizer:
        # Unsafe: the parametrization is not tried out on the weight, which it leaves of its shape and type.
        register_parametrization(module, "weight", quantizer, unsafe=True)
        return quantizer
