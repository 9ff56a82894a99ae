"""How density falls in the course of a run."""

import math
from dataclasses import dataclass
from typing import ClassVar

from prunelle.compression.ramp import check_shares, check_steps
from prunelle.errors import InputError


@dataclass(frozen=True)
class OneShotSchedule:
    """The target from the start: weights go before the first step, and what there is of a run trains the rest.

    Args:
        density: The target, the share of weights kept, above 0 and at most 1.

    Raises:
        InputError: It is out of its range.
    """

    density: float

    masks_follow_scores: ClassVar[bool] = True  # or stay while density does

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise InputError(f"a density of {self.density} must be above 0 and at most 1: it is the share kept")

    def at(self, progress: float) -> float:
        """The density when a share of the run is done."""
        return self.density

    def ends_by(self, progress: float) -> bool:
        """Whether the target has been reached; from then on nothing changes."""
        return True

    def check(self, steps: int) -> None:
        """See that a run is long enough: any is."""


@dataclass(frozen=True)
class CubicSchedule(OneShotSchedule):
    """Falls from 1 to the target, fast at first and slower towards the end (Zhu and Gupta, arXiv:1710.01878).

    Args:
        density: The target, the share of weights kept, above 0 and at most 1.
        warmup: The share of the run before it begins to fall.
        cooldown: The share of the run that is left once it has reached the target.

    Raises:
        InputError: A number that is out of its range, or no room between warm-up and cool-down.
    """

    warmup: float = 0.1
    cooldown: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.warmup, self.cooldown)

    def at(self, progress: float) -> float:
        """The density when a share of the run is done."""
        if self.ends_by(progress):
            return self.density
        rest = 1 - max(0.0, progress - self.warmup) / (1 - self.cooldown - self.warmup)
        return self.density + (1 - self.density) * rest**3

    def ends_by(self, progress: float) -> bool:
        """Whether the target has been reached; from then on nothing changes."""
        return progress >= 1 - self.cooldown - 1e-9  # steps / all steps is rounded

    def check(self, steps: int) -> None:
        """See that a run is long enough.

        Raises:
            InputError: No step lies between warm-up and cool-down, or none in the cool-down.
        """
        if self.density < 1:
            check_steps(self.warmup, self.cooldown, steps, "density would fall")


@dataclass(frozen=True)
class IterativeSchedule(OneShotSchedule):
    """Trains, then prunes and trains again in rounds, in each of which the same share of what is left goes.

    Masks stay within a round. The first training takes as many steps as each later one would if it were not rewound.

    Args:
        rounds: How many times weights go.
        rewind_to: Where in the first training those after it begin, as a share of it: 0 where they are as long as it.

    Raises:
        InputError: A number that is out of its range.
    """

    rounds: int = 3
    rewind_to: float = 0.0

    masks_follow_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise InputError(f"{self.rounds} rounds of pruning: at least 1 is needed")
        if not 0 <= self.rewind_to < 1:
            raise InputError(f"training cannot be rewound to {self.rewind_to}: it must be a share, from 0 to below 1")

    def at(self, progress: float) -> float:
        """The density when a share of the run is done."""
        return self.density ** (self.rounds_by(progress) / self.rounds)

    def ends_by(self, progress: float) -> bool:
        """Whether the target has been reached; from then on nothing changes."""
        return self.rounds_by(progress) == self.rounds

    def rounds_by(self, progress: float) -> int:
        """How many times weights have gone when a share of the run is done."""
        return sum(progress >= start - 1e-9 for start in self._starts)

    def starts(self, steps: int) -> list[int]:
        """Before which optimizer steps weights go, counted from 0."""
        return [math.ceil((start - 1e-9) * steps) for start in self._starts]

    def rewound_step(self, steps: int) -> int:
        """After how many steps of the first training those after it begin."""
        return round(self.rewind_to * self.starts(steps)[0])

    def check(self, steps: int) -> None:
        """See that a run is long enough.

        Raises:
            InputError: A training would have no step.
        """
        starts = self.starts(steps)
        if len({0, *starts, steps}) < self.rounds + 2:
            raise InputError(
                f"the run has {steps} optimizer steps, too few for {self.rounds} rounds: weights would go before the "
                f"steps {', '.join(map(str, starts))}, with a step at least before, between and after them; give more "
                "steps, or fewer rounds"
            )

    @property
    def _starts(self) -> list[float]:
        again = 1 - self.rewind_to
        first = 1 / (1 + self.rounds * again)
        return [first * (1 + number * again) for number in range(self.rounds)]
