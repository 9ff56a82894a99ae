"""The part of a run in which something changes: between a warm-up and a cool-down, both given as shares of the run."""

from prunelle.errors import InputError


def check_shares(warmup: float, cooldown: float) -> None:
    """See that something of a run lies between.

    Raises:
        InputError: One is no share, or nothing lies between.
    """
    for name, share in (("warmup", warmup), ("cooldown", cooldown)):
        if not 0 <= share < 1:
            raise InputError(f"a {name} of {share} must be a share of the run: from 0 to below 1")
    if warmup + cooldown >= 1:
        raise InputError(
            f"a warm-up of {warmup} and a cool-down of {cooldown} leave nothing of the run between them: their sum "
            "must be below 1"
        )


def check_steps(warmup: float, cooldown: float, steps: int, change: str) -> None:
    """See that a run is long enough.

    Args:
        warmup, cooldown: As `check_shares` wants them.
        steps: The optimizer steps of the run.
        change: What happens in between, as "density would fall".

    Raises:
        InputError: No step lies between warm-up and cool-down, or none in the cool-down.
    """
    begin, end = warmup * steps, (1 - cooldown) * steps
    between = any(begin < step < end - 1e-9 * steps for step in range(int(begin), int(end) + 1))
    after = cooldown == 0 or cooldown * steps >= 1 - 1e-9
    if not (between and after):
        raise InputError(
            f"the run has {steps} optimizer steps, too few: {change} from step {begin:g} to step {end:g} and need a "
            f"step within that and one after it; give more steps, or other shares for warm-up ({warmup}) and "
            f"cool-down ({cooldown})"
        )
