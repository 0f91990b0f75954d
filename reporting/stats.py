"""Paired comparison of two results (McNemar, bootstrap), and accuracy under parallelism (AUP).

The same data give the same numbers: every bootstrap uses a fixed seed.
scipy is imported inside functions, because importing scipy.stats takes most of a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reporting.data import Result

LEVEL = 0.05
FEWEST = 6  # differences of one sign whose exact test reaches LEVEL
RESAMPLES, AUP_RESAMPLES = 10_000, 1_000


# ---------------------------------------------------------------- paired comparison


@dataclass(frozen=True)
class Paired:
    """Mean difference b - a over n documents, its 95 % interval and two-sided p-value.

    test: "McNemar exact" or "paired bootstrap".
    only_a, only_b: documents that only a, or only b, answers correctly; None for the bootstrap.
    """

    n: int
    difference: float
    low: float
    high: float
    p: float
    test: str
    only_a: int | None = None
    only_b: int | None = None

    @property
    def distinguishable(self) -> bool:
        return self.p < LEVEL if self.only_a is not None else not self.low <= 0 <= self.high

    def verdict(self, a: str, b: str) -> str:
        """ "<a> higher", "<b> higher" or "not distinguishable"; a, b: names of the two sides."""
        if not self.distinguishable:
            return "not distinguishable"
        return f"{b if self.difference > 0 else a} higher"


def compare(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare two systems; a[i] and b[i] are the values of the same document.

    Values that are all 0 or 1 use McNemar's exact test, others the paired bootstrap.
    Raises ValueError if a and b are empty or differ in length.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"expected pairs of values, got {len(a)} and {len(b)} values")
    if not {*a, *b} <= {0, 1}:
        return bootstrap(a, b)
    n = len(a)
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    p, low, high = mcnemar(only_a, only_b)
    return Paired(n, (only_b - only_a) / n, low / n, high / n, p, "McNemar exact", only_a, only_b)


def mcnemar(only_a: int, only_b: int) -> tuple[float, float, float]:
    """(two-sided exact p-value, low, high of the 95 % interval of only_b - only_a).

    A document on which the systems differ favours either with probability 1/2. Source: McNemar
    1947. The interval is Clopper and Pearson's for b's share of those documents; their number is
    taken as fixed.
    """
    from scipy.stats import binomtest

    differing = only_a + only_b
    if not differing:
        return 1.0, 0.0, 0.0
    test = binomtest(only_b, differing)
    low, high = test.proportion_ci(1 - LEVEL, method="exact")
    return float(test.pvalue), differing * float(2 * low - 1), differing * float(2 * high - 1)


def bootstrap(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Mean of b - a with a percentile interval over resampled documents.

    Fewer than FEWEST documents say nothing: resampling two of one sign always gives that sign.
    """
    import numpy as np

    difference = np.subtract(b, a, dtype=float)
    if len(a) < FEWEST:
        mean = float(difference.mean())
        return Paired(len(a), mean, -math.inf, math.inf, 1.0, "paired bootstrap")
    means, low, high = _resample([difference], np.mean, RESAMPLES)
    p = min(1.0, 2 * float(min((means <= 0).mean(), (means >= 0).mean())))
    return Paired(len(a), float(difference.mean()), low, high, p, "paired bootstrap")


def _resample(samples: Sequence, statistic: Callable, n: int) -> tuple:
    """(the statistic of n resamples, low, high of its 95 % percentile interval)."""
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        samples,
        statistic,
        n_resamples=n,
        batch=500,  # all indices at once would take 100 MB
        paired=True,
        confidence_level=1 - LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = map(float, found.confidence_interval)
    return found.bootstrap_distribution, low, high


def compare_results(a: Result, b: Result) -> Paired:
    """Compare two results on the documents that both have.

    Raises ValueError if they have different documents or metrics, or no document in common.
    """
    files = f"{a.path.name} and {b.path.name}"
    if not a.same_documents(b):
        raise ValueError(f"{files} are not on the same documents: {a.task}, {b.task}")
    if a.metric != b.metric:
        raise ValueError(f"{files} have different metrics: {a.metric}, {b.metric}")
    common = sorted(a.scores.keys() & b.scores.keys())
    if not common:
        raise ValueError(f"{files} have no document in common")
    return compare([a.scores[d] for d in common], [b.scores[d] for d in common])


# ---------------------------------------------------------------- AUP


@dataclass(frozen=True)
class AUP:
    """Accuracy under parallelism of one curve.

    points: number of points that count. dropped: points (rho, y) more than `drop` below the slowest
    one, which do not count.
    """

    value: float
    points: int
    dropped: tuple[tuple[float, float], ...]


def aup(
    points: Sequence[tuple[float, float]], y_max: float, *, alpha: float = 3.0, drop: float = 5.0
) -> AUP:
    """Accuracy under parallelism of points (tokens per forward pass, accuracy in percent).

    y_max: best accuracy on the task over all compared methods. AUP has no meaning without it.
    The first term is unweighted. Later terms weight each accuracy y by min(1, exp(-alpha * (1 -
    y / y_max))).
    Source: d3LLM, arXiv:2601.07568; hao-ai-lab/d3LLM AUP_leaderboard/aup_utils.py. That code raises
    an error if the last point is more than `drop` below the slowest; this one drops and reports it.
    Raises ValueError if there are no points, or if a rho is not positive.
    """
    ordered = sorted(points)
    if not ordered or ordered[0][0] <= 0:
        raise ValueError(f"AUP needs points with positive tokens per forward pass, got {ordered}")
    floor = ordered[0][1] - drop
    kept = [(rho, y) for rho, y in ordered if y >= floor]

    def weighted(y: float) -> float:
        return y * min(math.exp(-alpha * (1 - y / y_max)), 1.0) if y_max > 0 else 0.0

    area = kept[0][0] * kept[0][1]
    for (rho0, y0), (rho1, y1) in zip(kept, kept[1:], strict=False):
        area += (rho1 - rho0) * (weighted(y0) + weighted(y1)) / 2
    return AUP(area, len(kept), tuple(p for p in ordered if p[1] < floor))


def aup_spread(
    curve: Sequence[Result], y_max: float, *, alpha: float = 3.0, drop: float = 5.0
) -> float | None:
    """Standard deviation of aup() over the seeds that every point of the curve has.

    None if they are fewer than two, or if one of them has no tokens per forward pass at a point.
    """
    points = [{r.seed: r for r in result.members or (result,)} for result in curve]
    seeds = set.intersection(*map(set, points))
    if len(seeds) < 2 or not all(point[s].tpf for s in seeds for point in points):
        return None
    by_seed = [[(point[s].tpf, point[s].value) for point in points] for s in sorted(seeds)]
    return stdev(aup(found, y_max, alpha=alpha, drop=drop).value for found in by_seed)


def aup_interval(
    curve: Sequence[Result], y_max: float, *, alpha: float = 3.0, drop: float = 5.0
) -> tuple[float | None, float | None]:
    """95 % percentile interval of aup() over resampled documents.

    A document is drawn together with its answers at every point of the curve. Tokens per forward
    pass and y_max stay fixed. Returns (None, None) if the points are not on the same documents, if
    there is only one document, or if all documents have the same scores: every resample is then the
    same, and an interval from 226 to 226 would look like certainty.
    """
    import numpy as np

    documents = sorted(curve[0].scores)
    if len(documents) < 2 or any(sorted(result.scores) != documents for result in curve):
        return None, None
    scores = 100 * np.array([[result.scores[d] for d in documents] for result in curve])
    if (scores == scores[:, :1]).all():
        return None, None

    def of_resample(*drawn: np.ndarray) -> float:
        points = [(result.tpf, float(y.mean())) for result, y in zip(curve, drawn, strict=True)]
        return aup(points, y_max, alpha=alpha, drop=drop).value

    _, low, high = _resample(list(scores), of_resample, AUP_RESAMPLES)
    return low, high
