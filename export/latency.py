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
    """How long single calls took, in milliseconds, in the order in which they were made."""

    milliseconds: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """What `share` % of the calls stayed below."""
        return float(np.percentile(self.milliseconds, share))

    @property
    def p50(self) -> float:
        """The median."""
        return self.percentile(50)

    @property
    def p95(self) -> float:
        return self.percentile(95)

    @property
    def p99(self) -> float:
        return self.percentile(99)

    @property
    def calls_per_second(self) -> float:
        """Of calls made one after the other: what is slow now and then counts, unlike in the median."""
        return 1000 * len(self.milliseconds) / sum(self.milliseconds)


def measure_latency(
    runners: Sequence[Runner],
    *,
    shapes: Sequence[str] = SHAPES,
    vocabulary: int,
    maximum_length: int,
    seconds: float = 20.0,
) -> list[dict[str, Latency]]:
    """Measures all models side by side, and returns for each its latencies by shape.

    The models take turns (`Runner.time_calls`) in short rounds, so that what else the machine does meets all
    alike.

    Args:
        runners: the models.
        shapes: batch x tokens, `"16x128"`. Tokens are cut to `maximum_length`, and the name says so.
        vocabulary: how many words to draw the input from.
        maximum_length: tokens that all of the models can take.
        seconds: how long to measure in all, roughly; slow models are given at least 5 rounds.
    """
    sizes = dict.fromkeys(parse_shape(shape, maximum_length) for shape in shapes)
    results: list[dict[str, Latency]] = [{} for _ in runners]
    for rows, length in sizes:
        batch = full_batch(rows, length, vocabulary)
        samples = _take_turns(runners, batch, seconds / len(sizes))
        for result, milliseconds in zip(results, samples, strict=True):
            result[f"{rows}x{length}"] = Latency(tuple(milliseconds))
    return results


def _take_turns(runners: Sequence[Runner], batch: Batch, seconds: float) -> list[list[float]]:
    samples: list[list[float]] = [[] for _ in runners]
    calls = []
    for runner in runners:  # the first call allocates, the second tells how many fit into a turn
        (first,) = runner.time_calls(batch, 1)
        calls.append(int(np.clip(50 / first, 1, 10)))
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or (time.perf_counter() < end and rounds < 100):
        for runner, count, taken in zip(runners, calls, samples, strict=True):
            taken += runner.time_calls(batch, count)
        rounds += 1
    return samples


def full_batch(rows: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    """Random words without padding, the same for the same numbers."""
    generator = torch.Generator().manual_seed(0)
    # Low numbers are special tokens in most vocabularies; padding among them changes positions.
    words = torch.randint(min(10, vocabulary - 1), vocabulary, (rows, length), generator=generator)
    return {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "token_type_ids": torch.zeros_like(words),
    }


def parse_shape(shape: str, maximum_length: int) -> tuple[int, int]:
    """`"16x128"` as (16, 128), the tokens cut to `maximum_length`."""
    rows, _, length = shape.partition("x")
    if not (rows.isdecimal() and length.isdecimal() and int(rows) and int(length)):
        raise InputError(f"a shape is written batch x tokens, as 16x128; this one is {shape}")
    return int(rows), min(int(length), maximum_length)
