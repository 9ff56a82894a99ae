"""GeLU becomes ReLU in the course of a run."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from prunelle.compression.replacement import Blend, GradualReplacement
from prunelle.errors import InputError

GELUS = ("gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "quick_gelu")


class GeluToRelu(GradualReplacement):
    """Replaces the GeLUs of a model by ReLUs, gradually: (1 - share) GeLU + share ReLU.

    At the end they are ReLUs and the configuration says so: a stock model is left. A GeLU that the configuration has no
    say in, as that of ELECTRA's classification head, stays.
    """

    old, new = "GeLU", "ReLU"

    def find(self, model: PreTrainedModel) -> dict[str, Blend]:
        config = copy.deepcopy(model.config)
        _say_relu(config)
        with torch.device("meta"):
            rebuilt = dict(type(model)(config).named_modules())
        kinds = tuple({type(ACT2FN[name]) for name in GELUS})
        found: dict[str, Blend] = {
            name: _Blend(module)
            for name, module in model.named_modules()
            if isinstance(module, kinds) and isinstance(rebuilt.get(name), nn.ReLU)
        }
        if not found:
            raise InputError(f"{type(model).__name__} has no GeLU that its configuration could make a ReLU")
        return found

    def finish(self) -> None:
        super().finish()
        _say_relu(self.model.config)


class _Blend(Blend):
    def __init__(self, gelu: nn.Module) -> None:
        super().__init__()
        self.gelu = gelu

    def forward(self, inputs: Tensor) -> Tensor:
        if self.share == 0:
            return self.gelu(inputs)
        relu = inputs.relu()
        return relu if self.share == 1 else torch.lerp(self.gelu(inputs), relu, self.share)

    def finished(self) -> nn.Module:
        return nn.ReLU()


def _say_relu(config: PreTrainedConfig) -> None:
    """Whatever a configuration calls a GeLU, it calls a ReLU."""
    said: dict[str, Any] = {key: value for key, value in config.to_dict().items() if value in GELUS}
    for key in said:
        setattr(config, key, "relu")
