"""Quantization-aware training: a model learns to predict with the weights and inputs that its file will have."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization
from transformers import PreTrainedModel

from prunelle.compression.anatomy import matrix
from prunelle.compression.layers import find_layers
from prunelle.compression.method import CompressionMethod, RunOnExamples
from prunelle.compression.processes import agree
from prunelle.compression.quantization.bias_correction import correcting_biases, output_means
from prunelle.compression.quantization.compensation import compensated, gram_matrices
from prunelle.compression.quantization.inputs import NAME, DynamicInput, StaticInput, quantize_inputs
from prunelle.compression.quantization.plan import Embeddings, Inputs, QuantizationPlan, Scheme
from prunelle.compression.quantization.smoothing import InputWatch, channel_divisors
from prunelle.compression.quantization.weights import (
    INT8_END,
    BinaryWeight,
    FakeQuantizer,
    Int4Weight,
    Int8Rows,
    Int8Table,
    Int8Weight,
    TernaryWeight,
)
from prunelle.compression.targets import LINEAR, match_modules, shared_weights
from prunelle.errors import InputError

Ranges = Literal["moving_average", "learned"]


class Quantization(CompressionMethod):
    """Rounds weights and inputs as the exported file does, with gradients that pass straight through.

    - `int8-dynamic`: linear modules have weights of `Int8Weight` and inputs of `DynamicInput`, embeddings are those of
      `Int8Rows`: what `prunelle.export.quantize_dynamic` writes.
    - `int8-static`: inputs of `StaticInput`, else the same: what `prunelle.export.quantize_static` writes. Channels
      that differ much in size are evened out first (`channel_divisors`), weights make up for what others lose
      (`compensated`), and biases take back what is lost on average (`correcting_biases`), unless something is pruned in
      the same run: what `shrink` takes out of a module's input would be missing from what the file divides, and masked
      weights have nothing to make up with.
    - `int4-weight`: weights of `Int4Weight`, and inputs as they are: what `prunelle.export.quantize_int4` writes.

    - `ternary`, `binary`: weights of `TernaryWeight` or `BinaryWeight`, and inputs as they are or of `DynamicInput`.
      int8 holds these weights exactly, and `pack` stores them in 2 bits or 1.

    After `bake` the weights lie on their grids, so that the export finds the scales that were trained with.

    Args:
        scheme: As above.
        patterns: Shell patterns of qualified names of linear modules, as `*.attention.*`. By default all of them, for
            fewer than 8 bits those within the layers, but none that shares its weight, as a language model's head.
        excluded: Shell patterns of those to leave out again.
        embeddings: Whether tables of embeddings, where they share nothing, are of `Int8Rows` (`row`), of `Int8Table`
            (`tensor`) or not quantized.
        block_size, symmetric: As `Int4Weight` takes them.
        activations: What inputs of ternary and binary modules are, `float32` or `int8`.
        ranges: Whether static ranges are moving averages, or their scales are learned from there.
        calibration_samples: On how many examples ranges, divided channels, weights and biases of `int8-static` are
            found before the first step.
        start: The share of the run before anything is rounded.
        freeze: The share of the run after which static ranges stay.

    Attributes:
        quantizers: What rounds.
    """

    def __init__(
        self,
        scheme: Scheme = "int8-dynamic",
        *,
        patterns: Sequence[str] = (),
        excluded: Sequence[str] = (),
        embeddings: Embeddings = "row",
        block_size: int = 32,
        symmetric: bool = False,
        activations: Inputs = "float32",
        ranges: Ranges = "moving_average",
        calibration_samples: int = 512,
        start: float = 0.0,
        freeze: float = 0.9,
    ) -> None:
        if not 0 <= start < freeze <= 1:
            raise InputError(
                f"quantization starts at {start} of the run and ranges freeze at {freeze}: the one must be from 0 to "
                "below the other, which is at most 1"
            )
        self.scheme, self.patterns, self.excluded, self.embeddings = scheme, patterns, excluded, embeddings
        self.block_size, self.symmetric, self.activations = block_size, symmetric, activations
        self.ranges, self.calibration_samples = ranges, calibration_samples
        self.start_at, self.freeze_at = start, freeze
        self.linear: dict[str, nn.Module] = {}
        self.tables: dict[str, nn.Module] = {}
        self.quantizers: list[FakeQuantizer] = []
        self.calibrated = self.is_pruned = False
        self.frozen: dict[str, Tensor] | None = None

    def attach(self, model: PreTrainedModel) -> None:
        if model.config.is_encoder_decoder:
            raise InputError(f"{type(model).__name__} is not exported, so there is no file to train it for")
        self.is_pruned = any(is_parametrized(module) for module in model.modules())
        default = "*" if self.scheme.startswith("int8") else f"{find_layers(model).name}.*"
        linear = match_modules(model, LINEAR, self.patterns or [default], self.excluded)
        tables = match_modules(model, (nn.Embedding,)) if self.embeddings != "none" else {}
        shared = shared_weights(model)
        if both := [name for name in linear if name in shared and self.patterns]:
            raise InputError(f"{both[0]} shares its weight with {shared[both[0]]}: it cannot be quantized on its own")
        self.linear = {name: module for name, module in linear.items() if name not in shared}
        self.tables = {name: module for name, module in tables.items() if name not in shared}
        if not self.linear:
            raise InputError(f"no linear module of {type(model).__name__} is left to quantize")
        for name, module in self.linear.items():
            if self.scheme == "binary" and is_parametrized(module, "weight"):
                raise InputError(f"{name} is pruned, and binary weights have no zero: make it ternary")
            self._round_linear(module)
        for module in self.tables.values():
            self._round_weight(module, Int8Table() if self.embeddings == "tensor" else Int8Rows())

    def calibrate(self, model: PreTrainedModel, run: RunOnExamples) -> None:
        if not self._static():
            return
        for quantizer in self.quantizers:
            quantizer.enabled = False
        if not self.is_pruned:
            self._smooth(model, run)
        for static in self._static().values():
            static.calibrating = True
        # Until rounding starts later, weights would have gone elsewhere.
        made_up = self.linear if not self.is_pruned and self.start_at == 0 else {}
        with gram_matrices(made_up) as grams, output_means(made_up) as means:
            run(self.calibration_samples, None)
        for static in self._static().values():
            static.calibrating = False
        if made_up:
            self._compensate(grams)
            for quantizer in self.quantizers:
                quantizer.enabled = True
            with correcting_biases(self.linear, means):
                run(self.calibration_samples, None)
            agree(parameter for module in self.linear.values() for parameter in module.parameters())
        self.calibrated = True

    def step(self, progress: float) -> None:
        if self._static() and not self.calibrated:
            raise RuntimeError("static ranges have to be calibrated before the first step")
        started = progress >= self.start_at - 1e-9  # steps / all steps is rounded
        frozen = progress >= self.freeze_at - 1e-9
        for quantizer in self.quantizers:
            quantizer.enabled = started
        for static in self._static().values():
            static.observing = not frozen
        if frozen and self.ranges == "learned":
            scales = {name: static.scale for name, static in self._static().items()}
            if self.frozen is None:
                self.frozen = {name: scale.detach().clone() for name, scale in scales.items()}
            for name, scale in scales.items():
                scale.data.copy_(self.frozen[name])

    def enable(self, names: Collection[str]) -> None:
        """Round what belongs to the modules of these names, and nothing else, until the next step."""
        for name, module in (self.linear | self.tables).items():
            for quantizer in module.modules():
                if isinstance(quantizer, FakeQuantizer):
                    quantizer.enabled = name in names

    def parameter_groups(self) -> list[dict[str, Any]]:
        parts = [part for quantizer in self.quantizers for part in quantizer.parameters()]
        scales = [part for part in parts if part.requires_grad]
        return [{"params": scales, "weight_decay": 0.0}] if scales else []

    def state_dict(self) -> dict[str, Tensor]:
        return {"calibrated": torch.tensor(self.calibrated)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.calibrated = bool(state["calibrated"])

    def finish(self) -> None:
        if not all(quantizer.enabled for quantizer in self.quantizers):
            raise RuntimeError(f"the run ended before {self.start_at} of it was done: nothing was quantized")

    def plan(self) -> QuantizationPlan:
        """What the export has to do. Before `bake`, which takes the ranges away."""
        inputs = {name: (static.scale.item(), round(static.zero.item())) for name, static in self._static().items()}
        divisors = {name: static.divisors for name, static in self._static().items()}
        return QuantizationPlan(
            self.scheme,
            list(self.linear),
            list(self.tables),
            self.embeddings,
            inputs,
            {name: each.tolist() for name, each in divisors.items() if (each != 1).any()},
            self.block_size,
            self.symmetric,
            self.activations,
        )

    def _smooth(self, model: PreTrainedModel, run: RunOnExamples) -> None:
        with InputWatch(model, self.linear, self.calibration_samples) as watch:
            run(self.calibration_samples, None)
        for names, rows, low, high in watch.inputs():
            modules: list[Any] = [self.linear[name] for name in names]
            weight = torch.cat([matrix(module).detach() for module in modules])
            if (divisors := channel_divisors(rows, low, high, weight)) is not None:
                for module in modules:
                    module.parametrizations["weight"][-1].divisors.copy_(divisors)
                    getattr(module, NAME).divisors.copy_(divisors)

    def _compensate(self, grams: Mapping[str, Tensor]) -> None:
        for name, gram in grams.items():
            module: Any = self.linear[name]
            divisors = getattr(module, NAME).divisors
            original = module.parametrizations["weight"].original.detach()
            weight = original if isinstance(module, nn.Linear) else original.T
            weight.copy_(compensated(weight * divisors, gram / torch.outer(divisors, divisors), INT8_END) / divisors)

    def _static(self) -> dict[str, StaticInput]:
        inputs = {name: getattr(module, NAME, None) for name, module in self.linear.items()}
        return {name: static for name, static in inputs.items() if isinstance(static, StaticInput)}

    def _round_linear(self, module: nn.Module) -> None:
        input_axis = 1 if isinstance(module, nn.Linear) else 0
        weight: Any = module.weight
        if self.scheme == "int4-weight":
            self._round_weight(module, Int4Weight(input_axis, self.block_size, self.symmetric))
        elif self.scheme in ("ternary", "binary"):
            kind = TernaryWeight if self.scheme == "ternary" else BinaryWeight
            self._round_weight(module, kind(weight, input_axis))
        else:
            divisors = weight.new_ones(weight.shape[input_axis]) if self.scheme == "int8-static" else None
            self._round_weight(module, Int8Weight(input_axis, divisors))
        inputs: FakeQuantizer | None = None
        if self.scheme == "int8-static":
            inputs = StaticInput(weight.shape[input_axis], weight.device, self.ranges == "learned")
        elif self.scheme == "int8-dynamic" or (self.scheme != "int4-weight" and self.activations == "int8"):
            inputs = DynamicInput()
        if inputs is not None:
            quantize_inputs(module, inputs)
            self.quantizers.append(inputs)

    def _round_weight(self, module: nn.Module, quantizer: FakeQuantizer) -> None:
        # Unsafe: the parametrization is not tried out on the weight, which it leaves of its shape and type.
        register_parametrization(module, "weight", quantizer, unsafe=True)
        self.quantizers.append(quantizer)
