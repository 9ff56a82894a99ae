import pytest

from prunelle.export.mcnemar import McNemar, two_sided_binomial


@pytest.mark.parametrize(
    ("heads", "tails", "expected"),
    [(0, 0, 1.0), (1, 0, 1.0), (0, 5, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024), (3, 3, 1.0)],
)
def test_p_values_by_hand(heads, tails, expected):
    """A one-sided test, or the chi-square that small counts do not allow, calls chance a difference."""
    assert two_sided_binomial(heads, tails) == expected


def test_many_throws():
    """Floating-point powers of a half are 0 from the 1,075th on: every large test set would be significant."""
    assert 0.0004 < two_sided_binomial(1500, 1700) < 0.0005
    assert two_sided_binomial(0, 3000) == 0.0 < two_sided_binomial(0, 1000)
    stats = pytest.importorskip("scipy.stats")
    for heads, tails in [(7, 19), (300, 251), (1500, 1700), (20_000, 20_300)]:
        assert two_sided_binomial(heads, tails) == pytest.approx(stats.binomtest(heads, heads + tails).pvalue, rel=1e-9)


def test_only_examples_that_one_model_alone_gets_right_count():
    """Counting flips between two wrong classes would dilute the test."""
    result = McNemar(keep_in_memory=True).compute(
        predictions1=[0, 1, 2, 2, 0, 1], predictions2=[0, 0, 1, 0, 1, 1], references=[0, 1, 0, 0, 0, 1]
    )
    assert result == {"p_value": 1.0, "only_first_right": 2, "only_second_right": 1}
