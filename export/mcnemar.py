"""Do two models differ in accuracy, or is it chance? A local `evaluate` module: the hub's would be downloaded."""

from typing import Any

import datasets
import evaluate
import numpy as np

FEATURES = datasets.Features({name: datasets.Value("int64") for name in ("predictions1", "predictions2", "references")})


class McNemar(evaluate.Comparison):
    """McNemar's exact test on two models' predictions of the same examples.

    Examples that both models get right, or both get wrong, say nothing about which is the better one. Of
    the others each model would win half if the two were equally accurate: a fair coin, whose two-sided
    p-value is computed exactly. Gives `p_value`, and the two counts: `only_first_right`, `only_second_right`.

    Reference:
        McNemar, Psychometrika 12 (1947); Dietterich, Neural Computation 10 (1998), on classifiers.
    """

    def _info(self) -> evaluate.ComparisonInfo:
        return evaluate.ComparisonInfo(
            module_type="comparison", description=self.__doc__, citation="", features=FEATURES
        )

    def _compute(self, predictions1: Any, predictions2: Any, references: Any) -> dict[str, float]:
        true = np.asarray(references)
        first, second = np.asarray(predictions1) == true, np.asarray(predictions2) == true
        only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
        return {
            "p_value": two_sided_binomial(only_first, only_second),
            "only_first_right": only_first,
            "only_second_right": only_second,
        }


def two_sided_binomial(heads: int, tails: int) -> float:
    """The chance that a fair coin falls at least as unevenly.

    In whole numbers until the last division: sums of powers of a half underflow at a thousand throws.
    """
    throws = heads + tails
    term = tail = 1
    for count in range(min(heads, tails)):
        term = term * (throws - count) // (count + 1)
        tail += term
    return min(1.0, 2 * tail / 2**throws)
