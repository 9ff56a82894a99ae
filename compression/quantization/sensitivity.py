"""Which modules bear quantization badly: each is quantized alone, and the predictions compared with float32."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from prunelle.compression.quantization.quantization import Quantization

IGNORED = -100  # the label of what is no prediction


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing does to predictions, without any training.

    Args:
        name: of the only module that is quantized.
        accuracy: of its predictions, from 0 to 1.
        kl: mean Kullback-Leibler divergence of its distributions from those of float32, in nats.
        flips: how many predicted classes are others than in float32.
    """

    name: str
    accuracy: float
    kl: float
    flips: int


class SensitivityTest:
    """Predictions of a model of which some modules are quantized, all others in float32.

    Args:
        model: stays as it is.
        method: what is to be measured; not attached to anything.
        batches: labelled examples; a label of -100 does not count.

    Attributes:
        accuracy: of the float32 model.
        modules: names of those that can be left out.
    """

    def __init__(self, model: PreTrainedModel, method: Quantization, batches: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.method, self.batches = copy.deepcopy(model).eval(), method, batches
        self.labels = torch.cat([torch.as_tensor(batch["labels"]).flatten() for batch in batches])
        self.counted = self.labels != IGNORED
        method.attach(self.model)
        self.exact = self._copied()
        method.calibrate(self.model, lambda samples, after_batch: self._run(samples))
        method.step(1.0)
        self.calibrated = self._copied()
        self.modules = list(method.linear)
        self.reference = self.predict([])
        self.accuracy = self._accuracy(self.reference)

    def predict(self, modules: Sequence[str]) -> Tensor:
        """Log-probabilities of each class with these modules quantized, and no other: (labels, classes)."""
        self.method.enable(modules)
        for name, module in self.method.linear.items():
            module.load_state_dict((self.calibrated if name in modules else self.exact)[name])
        return torch.cat([self._logits(batch) for batch in self.batches]).log_softmax(-1)[self.counted]

    def one_by_one(self) -> list[Sensitivity]:
        """Each linear module quantized alone, the one that changes predictions most first."""
        found = []
        for name in self.modules:
            predicted = self.predict([name])
            kl = functional.kl_div(predicted, self.reference, log_target=True, reduction="batchmean").item()
            flips = int((predicted.argmax(-1) != self.reference.argmax(-1)).sum())
            found.append(Sensitivity(name, self._accuracy(predicted), kl, flips))
        return sorted(found, key=lambda each: -each.kl)

    def left_out(self, drop: float, order: Sequence[Sensitivity]) -> list[str]:
        """The fewest modules, of the most sensitive, without which accuracy drops by no more than that.

        Args:
            drop: from 0 to 1.
            order: as `one_by_one` gives it.
        """
        everything = [*self.modules, *self.method.tables]
        for count in range(len(order)):
            without = [each.name for each in order[:count]]
            quantized = self.predict([name for name in everything if name not in without])
            if self._accuracy(quantized) >= self.accuracy - drop:
                return without
        return [each.name for each in order]

    def _copied(self) -> dict[str, dict[str, Tensor]]:
        """What the linear modules hold, by name."""
        return {name: copy.deepcopy(module.state_dict()) for name, module in self.method.linear.items()}

    def _accuracy(self, predicted: Tensor) -> float:
        return (predicted.argmax(-1) == self.labels[self.counted]).double().mean().item()

    def _run(self, samples: int) -> None:
        for batch in self.batches[: -(-samples // len(self.batches[0]["labels"]))]:
            self._logits(batch)

    @torch.no_grad()
    def _logits(self, batch: Mapping[str, Any]) -> Tensor:
        device = self.model.device
        inputs = {name: torch.as_tensor(value, device=device) for name, value in batch.items() if name != "labels"}
        return self.model(**inputs).logits.flatten(0, -2).float().cpu()
