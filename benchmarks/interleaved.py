"""Steps that take turns, so that whatever else the machine does slows all of them alike."""

import random
import statistics
import time
from collections.abc import Callable

import torch


def ratios_to_dense(steps: dict[str, Callable[[], None]], rounds: int, cpu_time: bool, device: str) -> dict[str, float]:
    """Of each step, the median over the rounds of its time divided by that of the round's `dense` step.

    Prints the median time of each, and its quartiles. The order is another one in every round; three warm up.

    Args:
        cpu_time: count the process's own time, for a machine with other work.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-3, rounds):
        for name in random.sample(list(steps), len(steps)):
            begin = clock()
            steps[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            if number >= 0:
                times[name].append(clock() - begin)
    for name, taken in times.items():
        quarters = [f"{1000 * quarter:.0f}" for quarter in statistics.quantiles(taken)]
        print(f"{name:32} {quarters[1]:>5} ms  (half of the steps: {quarters[0]} to {quarters[2]})")
    return {
        name: statistics.median(a / b for a, b in zip(taken, times["dense"], strict=True))
        for name, taken in times.items()
        if name != "dense"
    }
