"""Are two results different, and how good is accuracy at speed: McNemar, paired bootstrap, AUP. Nothing is random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reporting.data import Run

LEVEL = 0.05
RESAMPLES, AUP_RESAMPLES = 10_000, 1_000


# ---------------------------------------------------------------- paired comparison


@dataclass(frozen=True)
class Paired:
    """b minus a over n documents, with its 95 % interval and two-sided p.

    test:   "McNemar exact" or "paired bootstrap".
    only_a, only_b: documents that only one of them got right; None for the bootstrap.
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
        return (
            f"{b if self.difference > 0 else a} higher"
            if self.distinguishable
            else "not distinguishable"
        )


def compare(a: Sequence[float], b: Sequence[float]) -> Paired:
    """a[i] and b[i] are the values of one document. All 0 or 1: McNemar's exact test, otherwise the bootstrap."""
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} values are no pairs")
    if not {*a, *b} <= {0, 1}:
        return bootstrap(a, b)
    n = len(a)
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    low, high = exact_interval(only_b, only_a + only_b)
    share = (
        only_a + only_b
    ) / n  # of documents on which they differ; given it, b wins with a chance that is bounded
    return Paired(
        n,
        (only_b - only_a) / n,
        share * (2 * low - 1),
        share * (2 * high - 1),
        mcnemar(only_a, only_b),
        "McNemar exact",
        only_a,
        only_b,
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p: the documents on which two systems differ fall to either with chance 1/2. McNemar 1947."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def exact_interval(successes: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval of a proportion: the chances that a two-sided exact test does not reject."""
    if n == 0:
        return 0.0, 1.0

    def at_most(k: int, chance: float) -> float:
        p, q = math.log(chance), math.log1p(-chance)
        const = math.lgamma(n + 1)
        return math.fsum(
            math.exp(const - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * p + (n - i) * q)
            for i in range(k + 1)
        )

    def chance_where(k: int, tail: float) -> float:
        """The chance at which at most k successes have probability `tail`; it falls as the chance rises."""
        below, above = 0.0, 1.0
        for _ in range(40):
            middle = (below + above) / 2
            below, above = (middle, above) if at_most(k, middle) > tail else (below, middle)
        return (below + above) / 2

    low = 0.0 if successes == 0 else chance_where(successes - 1, 1 - LEVEL / 2)
    high = 1.0 if successes == n else chance_where(successes, LEVEL / 2)
    return low, high


def bootstrap(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Mean of b - a with a percentile interval over resampled documents; the same numbers every time."""
    import numpy as np

    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    n, draw = len(difference), np.random.Generator(np.random.PCG64(0))
    means = np.concatenate(  # in parts: all indices at once would be 100 MB
        [
            difference[draw.integers(0, n, size=(500, n))].mean(axis=1)
            for _ in range(RESAMPLES // 500)
        ]
    )
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    p = min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))
    return Paired(
        n, float(difference.mean()), float(low), float(high), float(p), "paired bootstrap"
    )


def compare_runs(a: Run, b: Run) -> Paired:
    """Over the documents that both have. Raises ValueError where they do not answer the same documents."""
    if not a.same_documents(b):
        raise ValueError(
            f"{a.path.name} and {b.path.name} are not on the same documents: {a.task}, {b.task}"
        )
    if a.metric != b.metric:
        raise ValueError(
            f"{a.path.name} and {b.path.name} have different metrics: {a.metric}, {b.metric}"
        )
    common = sorted(a.scores.keys() & b.scores.keys())
    if not common:
        raise ValueError(f"{a.path.name} and {b.path.name} have no document in common")
    return compare([a.scores[d] for d in common], [b.scores[d] for d in common])


# ---------------------------------------------------------------- AUP


@dataclass(frozen=True)
class AUP:
    """dropped: points (rho, y) that fell more than `drop` below the slowest one and do not count."""

    value: float
    points: int
    dropped: tuple[tuple[float, float], ...]


def aup(
    points: Sequence[tuple[float, float]], y_max: float, *, alpha: float = 3.0, drop: float = 5.0
) -> AUP:
    """Accuracy under parallelism of (tokens per forward pass, accuracy in percent).

    y_max: the best accuracy on the task over all methods that are compared; the value means nothing without it.
    The first term is unweighted; later ones weigh each accuracy with exp(-alpha * (1 - y / y_max)), at most 1.
    Source: d3LLM, arXiv:2601.07568; hao-ai-lab/d3LLM AUP_leaderboard/aup_utils.py, which raises where the last point
    is one to be dropped; here it is dropped and told. Raises ValueError on no points, or a rho that is not positive.
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


def aup_interval(
    curve: Sequence[Run], y_max: float, *, alpha: float = 3.0, drop: float = 5.0
) -> tuple[float | None, float | None]:
    """95 % percentile interval of aup() over resampled documents; the same numbers every time.

    A document is drawn with its answers at every point of the curve. Tokens per forward pass and y_max stay as they are.
    (None, None) where the points are not on the same documents, there is one document only, or all have the same scores:
    no draw differs then, and an interval from 226 to 226 would read as certainty.
    """
    import numpy as np

    documents = sorted(curve[0].scores)
    n = len(documents)
    if n < 2 or any(sorted(run.scores) != documents for run in curve):
        return None, None
    scores = 100 * np.array([[run.scores[d] for d in documents] for run in curve])
    if (scores == scores[:, :1]).all():
        return None, None
    draw = np.random.Generator(np.random.PCG64(0))
    drawn = (scores[:, draw.integers(0, n, size=n)].mean(axis=1) for _ in range(AUP_RESAMPLES))
    values = [
        aup(
            [(r.tpf, y) for r, y in zip(curve, ys, strict=True)], y_max, alpha=alpha, drop=drop
        ).value
        for ys in drawn
    ]
    low, high = np.quantile(values, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)
