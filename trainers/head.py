"""The head of a language model, split off: logits of the positions that are asked for, and never all at once.

At every position of a batch, the logits over a vocabulary, of student and teacher, with all that the losses make of
them and all their gradients, are most of the memory of a distillation step and much of its time.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Logits in a chunk: enough for a matrix product to be worth its while, few enough for a dozen such tensors to be
# small beside a model.
CHUNK = {"cpu": 2**20, "cuda": 2**26}


@dataclass(frozen=True)
class Head:
    """What turns a language model's last hidden states into logits, and how to step in.

    Args:
        base: the model below the head.
        decoder: the linear map whose output the logits are.
    """

    base: nn.Module
    decoder: nn.Linear

    @contextmanager
    def taken_over(self, positions: Tensor, decode: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While the model runs, its head sees some positions alone, and another function decodes.

        Decoding stays within the model's forward: there DDP sees what the loss depends on, and FSDP has gathered
        the weights.

        Args:
            positions: (rows,) among all tokens of the batch, one example after the other.
            decode: gets the decoder's (rows, hidden) inputs; what it returns the model returns as its logits.
        """

        def select(module: nn.Module, inputs: Any, outputs: Any) -> Any:
            outputs.last_hidden_state = outputs.last_hidden_state.flatten(0, 1).index_select(0, positions)[None]
            return outputs

        hook = self.base.register_forward_hook(select)
        # As an attribute of the instance: hooks of the module, and whatever gathers its weights, stay in force.
        vars(self.decoder)["forward"] = lambda states: decode(states.squeeze(0))
        try:
            yield
        finally:
            hook.remove()
            del self.decoder.forward


class Logits:
    """A teacher's logits, computed when they are asked for: `logits[3:5]` are those of two rows, without gradients.

    Args:
        states: (rows, hidden), what the decoder reads.
        decoder: the linear map to (rows, vocabulary).
    """

    def __init__(self, states: Tensor, decoder: nn.Linear) -> None:
        self.states, self.weight, self.bias = _as_computed(states, decoder.weight, decoder.bias)

    def __getitem__(self, rows: slice) -> Tensor:
        with torch.no_grad():
            return F.linear(self.states[rows], self.weight, self.bias)


def find_head(model: nn.Module) -> Head | None:
    """The model's head, if it can be split off; None where the model does more, or other things, with its logits.

    A language model whose head stays is named in a warning, for what it costs.
    """
    if not isinstance(model, PreTrainedModel) or model.device.type == "meta" or model.config.is_encoder_decoder:
        return None
    decoder, base = model.get_output_embeddings(), model.base_model
    if decoder is None:
        return None
    plain = isinstance(decoder, nn.Linear) and type(decoder).forward is nn.Linear.forward
    if plain and base is not model and "forward" not in vars(decoder) and _is_all(Head(base, decoder), model):
        return Head(base, decoder)
    logger.warning(
        "%s makes more of its logits than a linear map's output: they are computed at all positions, not at the "
        "distilled ones alone, which takes time and memory",
        type(model).__name__,
    )
    return None


def _is_all(head: Head, model: PreTrainedModel) -> bool:
    """Whether the head gives the model's own logits.

    No table of model names knows (logits are scaled, capped, or shifted by a bias of their own): four tokens tell.
    """
    tokens = torch.arange(4, device=model.device).view(2, 2)
    decoded: list[Tensor] = []

    def decode(states: Tensor) -> Tensor:
        decoded.append(nn.Linear.forward(head.decoder, states))
        return decoded[0]

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.flatten(0, 1)[1:3]
            with head.taken_over(torch.tensor([1, 2], device=model.device), decode):
                split = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False  # its forward wants more than token ids, or its base returns something else
    finally:
        model.train(training)
    if not decoded or split is not decoded[0] or split.shape != whole.shape:
        return False
    # A product of fewer rows is summed in another order. What that does to logits near zero goes by the largest.
    tolerance = (1e-3 + 10 * torch.finfo(model.dtype).eps) * whole.abs().max()
    return bool((split - whole).abs().max() <= tolerance)


def summed_over_chunks(states: Tensor, decoder: nn.Linear, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """A loss that is a sum over rows of logits, with its gradient, chunk by chunk.

    The gradients of the decoder's inputs and weights are computed beside the loss, when a chunk's logits are there,
    and kept until the backward pass: no logits are computed twice, and none outlive their chunk.

    Args:
        states: (rows, hidden), what the decoder reads.
        decoder: the linear map to (rows, vocabulary).
        loss: of the logits of some rows, which the slice names: a scalar.
    """
    return _SumOverChunks.apply(states, decoder.weight, decoder.bias, loss)


class _SumOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, loss: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        inputs, factor, shift = _as_computed(states, weight, bias)
        size = max(1, CHUNK.get(states.device.type, CHUNK["cuda"]) // len(weight))
        full = torch.promote_types(states.dtype, torch.float32)
        total = torch.zeros((), dtype=full, device=states.device)
        # Sums over chunks keep the precision of the weights; one of half precision would lose what each chunk adds.
        states_grad, weight_grad = torch.empty_like(states, dtype=full), torch.zeros_like(weight)
        bias_grad = None if bias is None else torch.zeros_like(bias)
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), size):
                rows = slice(start, start + size)
                logits = F.linear(inputs[rows], factor, shift).to(full)
                with torch.enable_grad():
                    value = loss(logits.requires_grad_(), rows)
                (slope,) = torch.autograd.grad(value, logits)
                total += value.detach()
                if bias_grad is not None:
                    bias_grad += slope.sum(0)
                if factor.dtype == torch.float16:
                    # The loss is divided by the items of the whole accumulated batch, and the scaler that keeps what
                    # is left within float16 comes after this: the largest slope is 1 while they are multiplied.
                    peak = slope.abs().amax().clamp(min=torch.finfo(full).tiny)
                    slope = (slope / peak).half()
                    states_grad[rows] = (slope @ factor).to(full) * peak
                    weight_grad += (slope.t() @ inputs[rows]).to(full) * peak
                    continue
                slope = slope.to(factor.dtype)
                states_grad[rows] = slope @ factor
                if slope.dtype == weight.dtype:
                    weight_grad.addmm_(slope.t(), inputs[rows])  # in place: no second tensor of the weight's size
                else:
                    weight_grad += slope.t() @ inputs[rows]
        ctx.grads = states_grad, weight_grad, bias_grad
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # they are needed once, and scaled in place
        return (*(None if grad is None else grad.mul_(slope) for grad in grads), None)


def _as_computed(states: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A linear map's factors in the precision in which it is computed: autocast's, else the weight's."""
    device, dtype = states.device.type, weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
