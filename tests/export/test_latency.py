import time
from itertools import pairwise

import numpy as np
import pytest

from prunelle.errors import InputError
from prunelle.export import Runner, measure_latency


class Sleeper(Runner):
    format = "torch"
    size_bytes = parameters = 0
    input_names = ()

    def __init__(self, name, seconds, calls):
        self.name, self.seconds, self.calls = name, seconds, calls

    def __call__(self, batch):
        self.calls.append((self.name, tuple(batch["input_ids"].shape), int(batch["input_ids"].max())))
        time.sleep(self.seconds)
        return np.zeros(1, dtype=np.float32)


def measure(shapes, seconds=0.3, maximum_length=64):
    calls = []
    runners = [Sleeper("slow", 0.008, calls), Sleeper("fast", 0.002, calls)]
    results = measure_latency(runners, shapes=shapes, vocabulary=50, maximum_length=maximum_length, seconds=seconds)
    return results, calls


def test_models_take_turns_and_time_is_in_milliseconds():
    """Models measured one after the other are compared over two different moods of the machine."""
    (slow, fast), calls = measure(["2x8"])
    assert 8 <= slow["2x8"].p50 <= slow["2x8"].p95
    assert 2 <= fast["2x8"].p50 < 8
    names = [name for name, _, _ in calls]
    assert sum(before != after for before, after in pairwise(names)) >= 9
    assert {shape for _, shape, _ in calls} == {(2, 8)}
    assert max(word for _, _, word in calls) < 50


def test_shapes_beyond_the_maximum_length_are_cut_and_named_so():
    """A model asked for more positions than it has crashes; a name that hides the cut misleads."""
    results, _ = measure(["1x64", "1x128", "2x64"], seconds=0.0)
    assert [list(result) for result in results] == [["1x64", "2x64"]] * 2


def test_the_time_budget_is_kept():
    """Measuring must not take longer than training."""
    start = time.perf_counter()
    measure(["1x8"], seconds=0.2)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("shape", ["32", "x32", "1x", "0x32", "1x32x2", "ax32"])
def test_a_shape_that_is_none(shape):
    """A misread shape would be measured and reported under a wrong name."""
    with pytest.raises(InputError, match="batch x tokens"):
        measure([shape])
