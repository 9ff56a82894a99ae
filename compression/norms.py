"""LayerNorm becomes NoNorm in the course of a run, and comes back from a checkpoint as such.

`config.layer_norm` says so and goes with every checkpoint. A stock class that is given one builds LayerNorms and
refuses the weights, whose shapes differ.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from prunelle.compression.replacement import Blend, GradualReplacement
from prunelle.errors import InputError

LAYER_NORM, NO_NORM = "layer_norm", "no_norm"  # The configuration's key, and what it says there.
MEMORY = 100  # In how many training batches means and variances are forgotten.


class NoNorm(nn.Module):
    """What MobileBERT has for a LayerNorm (Sun et al., arXiv:2004.02984): a factor and a summand for each feature.

    Args:
        weight: (width,) or (1, width). It is kept as the latter, so that a class that expects a LayerNorm's refuses it.
        bias: (width,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone().view(1, -1))
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: (..., width). Returns (..., width)."""
        return vectors * self.weight + self.bias


class LayerNormToNoNorm(GradualReplacement):
    """Replaces the LayerNorms of a model by NoNorms, gradually.

    Each token's mean and variance move linearly towards those of all tokens, a running mean over training batches. In
    the end they are constants, and are a part of weight and bias: nothing is computed over features any more.
    """

    old, new = "LayerNorm", "NoNorm"

    def find(self, model: PreTrainedModel) -> dict[str, Blend]:
        found: dict[str, Blend] = {name: _Blend(norm) for name, norm in _layer_norms(model).items()}
        if not found:
            raise InputError(f"{type(model).__name__} has no LayerNorm with weights that could become a NoNorm")
        return found

    def finish(self) -> None:
        super().finish()
        setattr(self.model.config, LAYER_NORM, NO_NORM)


class _Blend(Blend):
    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm
        for name in ("mean", "variance", "batches"):
            self.register_buffer(name, torch.zeros((), device=norm.weight.device))

    def forward(self, vectors: Tensor) -> Tensor:
        wide = vectors.float()
        mean, variance = self.mean, self.variance
        if self.share < 1:
            means, variances = wide.mean(-1, keepdim=True), wide.var(-1, keepdim=True, correction=0)
            if self.training:
                self._remember(means.detach().mean(), variances.detach().mean())
            if self.share == 0:
                return self.norm(vectors)
            mean, variance = torch.lerp(means, mean, self.share), torch.lerp(variances, variance, self.share)
        scaled = (wide - mean) * (variance + self.norm.eps).rsqrt() * self.norm.weight
        return (scaled if self.norm.bias is None else scaled + self.norm.bias).to(vectors.dtype)

    def finished(self) -> nn.Module:
        factor = (self.variance + self.norm.eps).rsqrt() * self.norm.weight
        bias = 0.0 if self.norm.bias is None else self.norm.bias
        return NoNorm(factor, bias - self.mean * factor)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        self.batches += 1
        weight = 1 / self.batches.clamp(max=MEMORY)
        self.mean.lerp_(mean, weight)
        self.variance.lerp_(variance, weight)


def has_no_norms(config: PreTrainedConfig) -> bool:
    """Whether models of this configuration have NoNorms for LayerNorms."""
    return getattr(config, LAYER_NORM, None) == NO_NORM


def leave_out_norms(model: PreTrainedModel) -> None:
    """Puts NoNorms, with whatever weights, where a new model has LayerNorms."""
    for name, norm in _layer_norms(model).items():
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        model.set_submodule(name, NoNorm(norm.weight, bias))


def _layer_norms(model: PreTrainedModel) -> dict[str, nn.LayerNorm]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    return {name: norm for name, norm in found.items() if norm.weight is not None}
