"""reporting/stats.py: AUP, McNemar and bootstrap against known values and plain implementations."""

import math
import random

import pytest
from scipy.stats import binomtest

from experiment.statistics import wilson
from reporting.stats import aup, bootstrap, compare, mcnemar

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
    """Of two points one apart with equal accuracy, the second adds its weighted accuracy."""
    added = aup([(1, accuracy), (2, accuracy)], 80).value - accuracy
    assert added / accuracy == pytest.approx(weight, abs=5e-4)


def test_aup_drops_and_reports_points_far_below_the_slowest():
    """The leaderboard's code raises an error if the last point is one of them."""
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
    assert mcnemar(only_a, only_b)[0] == pytest.approx(p, rel=1e-12)
    assert mcnemar(only_b, only_a)[0] == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(
    "only_a, only_b, low, high",
    [(10, 2, 0.0208625, 0.4841377), (10, 0, 0.0, 0.3084971), (0, 10, 0.6915029, 1.0)],
)
def test_the_interval_is_clopper_and_pearson_s(only_a, only_b, low, high):
    """The interval of b's share of the differing documents, scaled to only_b - only_a."""
    n = only_a + only_b
    expected = (n * (2 * low - 1), n * (2 * high - 1))
    assert mcnemar(only_a, only_b)[1:] == pytest.approx(expected, abs=1e-5)


def binomial_cdf(k: int, n: int, chance: float) -> float:
    return math.fsum(math.comb(n, i) * chance**i * (1 - chance) ** (n - i) for i in range(k + 1))


def chance_where(k: int, n: int, tail: float) -> float:
    """The chance at which at most k of n successes have probability `tail`, by bisection."""
    below, above = 0.0, 1.0
    for _ in range(60):
        middle = (below + above) / 2
        if binomial_cdf(k, n, middle) > tail:
            below = middle
        else:
            above = middle
    return (below + above) / 2


@pytest.mark.parametrize(
    "only_a, only_b", [(1, 0), (0, 4), (7, 3), (48, 38), (219, 231), (120, 20)]
)
def test_mcnemar_equals_the_plain_sums(only_a, only_b):
    n = only_a + only_b
    p, low, high = mcnemar(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    assert p == pytest.approx(min(1.0, 2 * tail / 2**n), abs=1e-9)
    lowest = 0.0 if only_b == 0 else chance_where(only_b - 1, n, 0.975)
    highest = 1.0 if only_a == 0 else chance_where(only_b, n, 0.025)
    assert (low / n, high / n) == pytest.approx((2 * lowest - 1, 2 * highest - 1), abs=1e-9)


@pytest.mark.parametrize("k, n", [(0, 1), (1, 1), (0, 50), (50, 50), (81, 263), (1000, 1319)])
def test_wilson_s_formula_equals_scipy_s(k, n):
    """The formula serves `progress`, which cannot wait for scipy.stats to be imported."""
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


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
    """Otherwise a table shows an interval that contains 0 together with "A higher"."""
    found = compare(*pairs(only_a, only_b, 20, 20))
    assert found.low <= found.difference <= found.high
    assert found.distinguishable is not (found.low <= 1e-9 and found.high >= -1e-9)


def test_other_values_are_bootstrapped_with_a_fixed_seed():
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


def test_the_bootstrap_equals_plain_resampling_within_noise():
    rng = random.Random(3)
    a = [rng.random() for _ in range(50)]
    b = [x + rng.gauss(0.05, 0.2) for x in a]
    found = compare(a, b)
    difference = [y - x for x, y in zip(a, b, strict=True)]
    means = sorted(math.fsum(rng.choices(difference, k=50)) / 50 for _ in range(10_000))
    assert found.difference == pytest.approx(math.fsum(difference) / 50)
    assert (found.low, found.high) == pytest.approx((means[250], means[9750]), abs=0.005)
    p = 2 * min(sum(m <= 0 for m in means), sum(m >= 0 for m in means)) / len(means)
    assert found.p == pytest.approx(p, abs=0.02)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_few_documents_are_never_distinguishable(n):
    """Two of one sign had p 0: each resample has that sign."""
    found = compare([0.5] * n, [0.6] * n)
    assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1.0)
    assert found.verdict("A", "B") == "not distinguishable"
    assert compare([0.5] * 6, [0.6] * 6).verdict("A", "B") == "B higher"
