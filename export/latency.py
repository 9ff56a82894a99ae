"""How long a model takes, measured so that the comparison holds on a noisy machine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunelle.errors import InputError
from prunelle.export.runner import Batch, Runner

SHAPES = ("1x32", "16x128")


@dataclass(frozen=True)
class Latency:
    """Milliseconds a call: the median, and what 95 % of the calls stay below."""

    p50: float
    p95: float


def measure_latency(
    runners: Sequence[Runner],
    *,
    shapes: Sequence[str] = SHAPES,
    vocabulary: int,
    maximum_length: int,
    seconds: float = 20.0,
) -> list[dict[str, Latency]]:
    """Measures all models side by side, and returns for each its latencies by shape.

    The models take turns in short rounds, so that what else the machine does meets all alike. A turn
    begins with a call that is not counted: it warms the caches, and lets the threads of the model before
    come to rest.

    Args:
        runners: the models.
        shapes: batch x tokens, `"16x128"`. Tokens are cut to `maximum_length`, and the name says so.
        vocabulary: how many words to draw the input from.
        maximum_length: tokens that all of the models can take.
        seconds: how long to measure in all, roughly; slow models are given at least 5 rounds.
    """
    sizes = dict.fromkeys(_parse(shape, maximum_length) for shape in shapes)
    results: list[dict[str, Latency]] = [{} for _ in runners]
    for rows, length in sizes:
        batch = _full_batch(rows, length, vocabulary)
        samples = _take_turns(runners, batch, seconds / len(sizes))
        for result, milliseconds in zip(results, samples, strict=True):
            p50, p95 = np.percentile(milliseconds, (50, 95))
            result[f"{rows}x{length}"] = Latency(float(p50), float(p95))
    return results


def _take_turns(runners: Sequence[Runner], batch: Batch, seconds: float) -> list[list[float]]:
    samples: list[list[float]] = [[] for _ in runners]
    calls = []
    for runner in runners:  # the first call allocates, the second tells how many fit into a turn
        _milliseconds(runner, batch)
        calls.append(int(np.clip(50 / _milliseconds(runner, batch), 1, 10)))
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or (time.perf_counter() < end and rounds < 100):
        for runner, count, taken in zip(runners, calls, samples, strict=True):
            _milliseconds(runner, batch)
            taken += [_milliseconds(runner, batch) for _ in range(count)]
        rounds += 1
    return samples


def _milliseconds(runner: Runner, batch: Batch) -> float:
    start = time.perf_counter()
    runner(batch)
    return 1000 * (time.perf_counter() - start)


def _full_batch(rows: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Low numbers are special tokens in most vocabularies; padding among them changes positions.
    words = torch.randint(min(10, vocabulary - 1), vocabulary, (rows, length), generator=generator)
    return {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "token_type_ids": torch.zeros_like(words),
    }


def _parse(shape: str, maximum_length: int) -> tuple[int, int]:
    rows, _, length = shape.partition("x")
    if not (rows.isdecimal() and length.isdecimal() and int(rows) and int(length)):
        raise InputError(f"a shape is written batch x tokens, as 16x128; this one is {shape}")
    return int(rows), min(int(length), maximum_length)
