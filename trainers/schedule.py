"""How a term's weight or the temperature moves in the course of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from prunelle.errors import InputError

Shape = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """From one value to another, and then no further.

    Args:
        name: of the flag that gives the value to start from.
        start, end: values.
        shape: a straight line, or half a cosine: slow, fast and slow again.
        share: of the run until the end value is reached, above 0 and at most 1.
    """

    name: str
    start: float
    end: float
    shape: Shape
    share: float

    def at(self, progress: float) -> float:
        """The value when a share of the run is done."""
        done = min(progress / self.share, 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


def read_schedules(texts: list[str], starts: Mapping[str, float]) -> list[Schedule]:
    """`--schedules` as they are meant.

    Args:
        texts: each NAME:END:SHAPE or NAME:END:SHAPE:SHARE.
        starts: what can be scheduled, and what each begins with.

    Raises:
        InputError: One of them is not of this form or names nothing of these, or two name the same.
    """
    schedules = [_read(text, starts) for text in texts]
    names = [schedule.name for schedule in schedules]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--schedules names {twice[0]} more than once")
    return schedules


def _read(text: str, starts: Mapping[str, float]) -> Schedule:
    name, end, shape, share = [*text.split(":"), "1"][:4] if text.count(":") in (2, 3) else [""] * 4
    try:
        schedule = Schedule(name, starts.get(name, 0.0), float(end), shape, float(share))  # type: ignore[arg-type]
    except ValueError:
        raise InputError(
            f"--schedules {text} must be NAME:END:SHAPE, such as temperature:1:linear, or NAME:END:SHAPE:SHARE with "
            "the share of the run until then, such as hidden_mse_weight:0:cosine:0.5"
        ) from None
    if name not in starts:
        raise InputError(f"--schedules {text}: no {name!r} to move; there are {', '.join(starts)}")
    if shape not in get_args(Shape):
        raise InputError(f"--schedules {text}: the shape must be {' or '.join(get_args(Shape))}")
    if not 0 < schedule.share <= 1:
        raise InputError(f"--schedules {text}: the share of the run must be above 0 and at most 1")
    if not 0 <= schedule.end < math.inf or (name == "temperature" and not schedule.end):
        raise InputError(f"--schedules {text}: it must end {'above' if name == 'temperature' else 'at or above'} 0")
    if schedule.end == schedule.start:
        raise InputError(f"--schedules {text} moves nothing: --{name} is {schedule.start:g} already")
    return schedule
