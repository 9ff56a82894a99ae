"""How density falls in the course of a run."""

from dataclasses import dataclass

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
        for name in ("warmup", "cooldown"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"a {name} of {getattr(self, name)} must be a share of the run: from 0 to below 1")
        if self.warmup + self.cooldown >= 1:
            raise InputError(
                f"a warm-up of {self.warmup} and a cool-down of {self.cooldown} leave nothing of the run to prune in: "
                "their sum must be below 1"
            )

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
        begin, end = self.warmup * steps, (1 - self.cooldown) * steps
        between = any(begin < step < end - 1e-9 * steps for step in range(int(begin), int(end) + 1))
        after = self.cooldown == 0 or self.cooldown * steps >= 1 - 1e-9
        if self.density < 1 and not (between and after):
            raise InputError(
                f"the run has {steps} optimizer steps, too few to prune in: density would fall from step {begin:g} to "
                f"step {end:g} and need a step within that and one after it; give more steps, or other shares for "
                f"warm-up ({self.warmup}) and cool-down ({self.cooldown})"
            )
