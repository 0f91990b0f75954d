"""reporting/stats.py: AUP, McNemar, exact interval, bootstrap, against values that are known."""

import pytest

from reporting.stats import aup, bootstrap, compare, exact_interval, mcnemar

# ---------------------------------------------------------------- AUP


@pytest.mark.parametrize(
    "points, y_max, expected",
    [
        ([(1, 74.79), (2.77, 74.68)], 74.98, 205.8),  # Fast-dLLM on GSM8K
        ([(1, 74.02), (9.11, 73.09)], 74.98, 637.7),  # d3LLM
        ([(1, 74.79), (2.77, 74.68)], 75, 205.7),
        ([(1, 74.79), (2.77, 74.68)], 80, 183.4),  # the same curve: AUP depends on who is compared
        ([(1, 74.79), (2.77, 74.68)], 90, 154.3),
        ([(0.5, 80), (2, 79)], 80, 157.1),  # a slowest point below one token per forward pass
        ([(1, 72.55)], 90, 72.55),  # the first term is unweighted
        ([(2, 79), (0.5, 80)], 80, 157.1),  # any order
        ([(1, 0.0), (2, 0.0)], 0.0, 0.0),
    ],
)
def test_aup_of_the_published_curves(points, y_max, expected):
    assert aup(points, y_max).value == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "accuracy, weight", [(80, 1.0), (79, 0.963), (78, 0.928), (76, 0.861), (75, 0.829)]
)
def test_aup_weights(accuracy, weight):
    """Two points of equal accuracy one apart: what the second adds is the weighted accuracy."""
    added = aup([(1, accuracy), (2, accuracy)], 80).value - accuracy
    assert added / accuracy == pytest.approx(weight, abs=5e-4)


def test_aup_drops_what_fell_too_far_and_says_so():
    """The leaderboard's code raises where it is the last point; a dip in the middle leaves the value as it is."""
    ends = aup([(1, 80), (3, 79)], 80)
    assert aup([(1, 80), (2, 74.9), (3, 79)], 80).value == ends.value
    found = aup([(1, 80), (2, 75.0), (3, 74.9)], 80)
    assert (found.points, found.dropped) == (2, ((3, 74.9),))
    assert aup([(1, 80), (2, 75.0), (3, 74.9)], 80, drop=6).points == 3
    assert aup([(1, 80), (2, 75)], 80, alpha=0).value == pytest.approx(80 + 77.5)


# ---------------------------------------------------------------- paired comparison


@pytest.mark.parametrize(
    "only_a, only_b, p",
    [
        (10, 2, 0.03857421875),
        (5, 0, 0.0625),
        (6, 0, 0.03125),
        (3, 3, 1.0),
        (0, 0, 1.0),
        (1, 0, 1.0),
    ],
)
def test_mcnemar(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == p


def test_exact_interval():
    """Clopper and Pearson's, as scipy.stats.binomtest(...).proportion_ci() gives it."""
    assert exact_interval(2, 12) == pytest.approx((0.0208625, 0.4841377), abs=1e-6)
    assert exact_interval(0, 10) == pytest.approx((0.0, 0.3084971), abs=1e-6)
    assert exact_interval(10, 10) == pytest.approx((0.6915029, 1.0), abs=1e-6)


def pairs(only_a: int, only_b: int, both: int = 0, neither: int = 0) -> tuple[list, list]:
    return (
        [1] * only_a + [0] * only_b + [1] * both + [0] * neither,
        [0] * only_a + [1] * only_b + [1] * both + [0] * neither,
    )


def test_pass_or_fail_is_compared_by_mcnemar():
    found = compare(*pairs(10, 2, 80, 8))
    assert (found.n, found.test, found.only_a, found.only_b) == (100, "McNemar exact", 10, 2)
    assert found.difference == pytest.approx(-0.08) and found.p == 0.03857421875
    assert found.verdict("A", "B") == "A higher"
    assert compare(*pairs(5, 3, 80, 12)).verdict("A", "B") == "not distinguishable"


@pytest.mark.parametrize("only_a", range(0, 12))
@pytest.mark.parametrize("only_b", [0, 3, 9])
def test_interval_and_p_agree(only_a, only_b):
    """Or a table would show an interval that holds 0 beside "A higher"."""
    found = compare(*pairs(only_a, only_b, 20, 20))
    assert found.low <= found.difference <= found.high
    assert found.distinguishable is not (found.low <= 1e-9 and found.high >= -1e-9)


def test_anything_else_is_bootstrapped_always_alike():
    a = [0.1 * (i % 7) for i in range(60)]
    b = [x + 0.05 * (i % 3) for i, x in enumerate(a)]
    found = compare(a, b)
    assert found.test == "paired bootstrap" and found == compare(a, b)
    assert found.difference == pytest.approx(0.05)
    # normal theory: 0.05 +- 1.96 * 0.0408 / sqrt(60)
    assert (found.low, found.high) == pytest.approx((0.0397, 0.0603), abs=0.001)
    assert found.verdict("A", "B") == "B higher"
    back = bootstrap(b, a)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert compare([0.5, 0.2, 0.3], [0.5, 0.3, 0.2]).verdict("A", "B") == "not distinguishable"
