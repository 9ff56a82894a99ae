"""The ranges that a model's activations take, on texts like those that it will see."""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import ModelProto

from prunelle.errors import InputError
from prunelle.export.runner import Batch

CALIBRATION_METHODS = ("minmax", "percentile", "entropy")
PERCENTAGE_KEPT = 99.99

BINS = 2048
LEVELS = 128  # that 8 bits have on either side of zero
POOL = 50_000  # texts that the sample is drawn from, since a stream has no end

Counts = NDArray[np.float64]  # (BINS,), a histogram
Range = tuple[float, float]


def calibration_batches(
    texts: Iterable[str | tuple[str, ...]],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    masked: float = 0.0,
    seed: int = 42,
) -> list[Batch]:
    """A sample of the texts as batches of one, so that no padding passes for something that the model reads.

    Args:
        texts: or pairs that are read together; drawn from at random, since files are often sorted by label.
        tokenizer: the model's.
        samples: how many to draw.
        length: tokens that longer texts are cut to.
        masked: the share of tokens that become the mask token, which a masked language model always sees.
        seed: draws texts and masks.

    Raises:
        InputError: there is no text.
    """
    draw = random.Random(seed)
    read = (text if isinstance(text, tuple) else (text,) for text in islice(texts, POOL))
    pool = [texts for texts in read if all(isinstance(text, str) and text.strip() for text in texts)]
    if not pool:
        raise InputError("there is no text to calibrate on")
    batches: list[Batch] = []
    for each in draw.sample(pool, min(samples, len(pool))):
        encoded = tokenizer(*each, truncation=True, max_length=length, return_special_tokens_mask=True)
        words = [
            tokenizer.mask_token_id if not special and draw.random() < masked else word
            for word, special in zip(encoded["input_ids"], encoded.pop("special_tokens_mask"), strict=True)
        ]
        batches.append({name: np.array([row]) for name, row in {**encoded, "input_ids": words}.items()})
    return batches


def activation_ranges(proto: ModelProto, names: Sequence[str], batches: Sequence[Batch], method: str) -> list[Range]:
    """Between which two values each of the named tensors is to be told apart; what lies beyond is clipped.

    - `minmax`: between the lowest and the highest that was seen.
    - `percentile`: the middle 99.99 % of what was seen.
    - `entropy`: as far from zero on either side as keeps most information about how far the values lie from
      it, 128 steps given (least Kullback-Leibler divergence).

    The histograms of the last two are taken in a second run, between the ends that the first has found. So
    they do not depend on the order of the batches, and one far value does not make them coarse for all.

    Args:
        proto: a float32 model.
        names: float tensors in it.
        batches: mappings of the model's inputs, and maybe more.
        method: one of the three.
    """
    ends = np.array([(np.inf, -np.inf)] * len(names))
    for tensors in tensors_within(proto, names, batches):
        ends[:, 0] = np.minimum(ends[:, 0], [tensor.min() for tensor in tensors])
        ends[:, 1] = np.maximum(ends[:, 1], [tensor.max() for tensor in tensors])
    seen = [(float(low), float(high)) for low, high in ends]
    if method == "minmax":
        return seen

    by_distance = method == "entropy"
    spans = [(0.0, max(-low, high)) if by_distance else (low, high) for low, high in seen]
    counts = np.zeros((len(names), BINS))
    for tensors in tensors_within(proto, names, batches):
        for row, tensor, span in zip(counts, tensors, spans, strict=True):
            row += np.histogram(np.abs(tensor) if by_distance else tensor, BINS, span)[0]
    if not by_distance:
        return [_middle(row, span) for row, span in zip(counts, spans, strict=True)]
    limits = [_most_informative_share(row) * furthest for row, (_, furthest) in zip(counts, spans, strict=True)]
    return [(max(low, -limit), min(high, limit)) for (low, high), limit in zip(seen, limits, strict=True)]


def _middle(counts: Counts, span: Range) -> Range:
    edges = np.linspace(*span, BINS + 1)
    shares = np.cumsum(counts) / counts.sum()
    outside = (1 - PERCENTAGE_KEPT / 100) / 2
    low, high = np.searchsorted(shares, outside, side="right"), np.searchsorted(shares, 1 - outside) + 1
    return float(edges[low]), float(edges[high])


def _most_informative_share(counts: Counts) -> float:
    """Which share of the way from zero to the furthest value to keep.

    Reference: Migacz, 8-bit inference with TensorRT, GTC 2017.
    """
    divergences = {}
    for kept in range(LEVELS, BINS + 1, 8):
        inside = counts[:kept]
        clipped = inside.copy()
        clipped[-1] += counts[kept:].sum()
        # What is left after rounding to levels: each level's values spread evenly over its occupied bins.
        level = np.arange(kept) * LEVELS // kept
        occupied = inside > 0
        bins = np.bincount(level, occupied, LEVELS)
        rounded = np.where(occupied, (np.bincount(level, inside, LEVELS) / np.maximum(bins, 1))[level], 0)
        divergences[kept / BINS] = _divergence(clipped, rounded)
    return min(divergences, key=divergences.__getitem__)


def _divergence(counts: Counts, approximation: Counts) -> float:
    """Kullback-Leibler, in nats. A bin that the approximation leaves empty costs much, but not everything."""
    found = counts > 0
    p, q = counts[found] / counts.sum(), approximation[found] / max(approximation.sum(), 1.0)
    return float((p * np.log(p / np.maximum(q, 1e-9))).sum())


def tensors_within(
    proto: ModelProto, names: Sequence[str], batches: Sequence[Batch]
) -> Iterator[list[NDArray[np.float32]]]:
    """The named float tensors of a model for each batch."""
    if not names:
        return  # asked for none, onnxruntime gives all
    shown = ModelProto()
    shown.CopyFrom(proto)
    for name in set(names) - {tensor.name for tensor in proto.graph.output}:
        shown.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = [tensor.name for tensor in session.get_inputs()]
    for batch in batches:
        yield session.run(list(names), {name: np.asarray(batch[name]) for name in taken})
