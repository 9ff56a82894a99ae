"""GeLU becomes ReLU in the course of a run."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from prunelle.compression.method import CompressionMethod
from prunelle.errors import InputError

GELUS = ("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "quick_gelu")


class GeluToRelu(CompressionMethod):
    """Replaces the GeLUs of a model by ReLUs, gradually: (1 - share) GeLU + share ReLU, the share growing linearly.

    At the end they are ReLUs and the configuration says so: a stock model is left. A GeLU that the configuration has no
    say in, as that of ELECTRA's classification head, stays.

    Args:
        warmup: The share of the run before the change begins.
        cooldown: The share of the run that is left once it is complete.
    """

    def __init__(self, warmup: float = 0.1, cooldown: float = 0.3) -> None:
        self.warmup, self.cooldown = warmup, cooldown
        self.blends: dict[str, _Blend] = {}

    def attach(self, model: PreTrainedModel) -> None:
        config = copy.deepcopy(model.config)
        _say_relu(config)
        with torch.device("meta"):
            rebuilt = dict(type(model)(config).named_modules())
        kinds = tuple({type(ACT2FN[name]) for name in GELUS})
        for name, module in list(model.named_modules()):
            if isinstance(module, kinds) and isinstance(rebuilt.get(name), nn.ReLU):
                self.blends[name] = _Blend(module)
                model.set_submodule(name, self.blends[name])
        if not self.blends:
            raise InputError(f"{type(model).__name__} has no GeLU that its configuration could make a ReLU")
        self.model = model

    def start(self, steps: int) -> None:
        if not steps:
            raise InputError("the run has no optimizer step, and GeLU becomes ReLU in training alone")

    def step(self, progress: float) -> None:
        share = (progress - self.warmup) / (1 - self.cooldown - self.warmup)
        for blend in self.blends.values():
            blend.share = min(1.0, max(0.0, share))

    def metrics(self) -> dict[str, float]:
        return {"relu_share": next(iter(self.blends.values())).share}

    def finish(self) -> None:
        """Make them plain ReLUs.

        Raises:
            RuntimeError: They are not yet.
        """
        for name, blend in self.blends.items():
            if blend.share != 1:
                raise RuntimeError(f"the run ended with a share of {blend.share} ReLU in {name}, instead of 1")
            self.model.set_submodule(name, nn.ReLU())
        _say_relu(self.model.config)


class _Blend(nn.Module):
    """A GeLU on its way to a ReLU."""

    def __init__(self, gelu: nn.Module) -> None:
        super().__init__()
        self.gelu, self.share = gelu, 0.0

    def forward(self, inputs: Tensor) -> Tensor:
        if self.share == 0:
            return self.gelu(inputs)
        relu = inputs.relu()
        return relu if self.share == 1 else torch.lerp(self.gelu(inputs), relu, self.share)


def _say_relu(config: PreTrainedConfig) -> None:
    """Whatever a configuration calls a GeLU, it calls a ReLU."""
    said: dict[str, Any] = {key: value for key, value in config.to_dict().items() if value in GELUS}
    for key in said:
        setattr(config, key, "relu")
