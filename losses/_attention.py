"""What the losses on queries, keys and values have in common."""

import math

import torch
from torch import Tensor

from prunelle.losses._numerics import at_least_float32, full_precision


def checked_heads(heads: int) -> int:
    """The number of heads, if it means something.

    Raises:
        ValueError: It is below 1.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, not {heads}")
    return heads


def check_vectors(queries: Tensor, keys: Tensor, attention_mask: Tensor, heads: int) -> None:
    """See that queries and keys belong to the masked tokens and can be split into heads.

    Raises:
        ValueError: They do not, or cannot.
    """
    if queries.shape != keys.shape or queries.dim() != 3 or attention_mask.shape != queries.shape[:-1]:
        raise ValueError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and attention mask "
            f"{tuple(attention_mask.shape)} must be (batch, tokens, size) twice and (batch, tokens)"
        )
    if queries.shape[-1] % heads:
        raise ValueError(f"{heads} heads do not divide queries and keys of size {queries.shape[-1]}")


def scaled_scores(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """(batch, heads, tokens, tokens) products of queries and keys, divided by the root of a head's size."""
    queries, keys = (at_least_float32(x).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    with full_precision(queries):
        return queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])


def attended_pairs(attention_mask: Tensor, causal: bool) -> Tensor:
    """(batch, 1, tokens, tokens) which query sees which key: both attended, the key no later where causal."""
    attended = attention_mask.bool()
    pairs = attended.unsqueeze(-1) & attended.unsqueeze(-2)
    return (pairs.tril() if causal else pairs).unsqueeze(1)


def masked_log_softmax(scores: Tensor, pairs: Tensor) -> Tensor:
    """Log-softmax over the keys that a query sees; finite where it sees none."""
    return scores.masked_fill(~pairs, torch.finfo(scores.dtype).min).log_softmax(-1)
