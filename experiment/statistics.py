"""Means of a metric over samples, with standard error and 95 % confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """Mean of n samples, its standard error and its 95 % interval.

    stderr: None where n is 1. low, high: None where n is 1 and the value is not 0 or 1.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "stderr": self.stderr,
            "ci95": [self.low, self.high],
            "n": self.n,
        }


def as_read(mean: float, *others: float | None) -> list[str]:
    """A mean, and bounds of its interval or the like, as people read them.

    In percent with one decimal; a mean that is no share, such as a perplexity, as it is and marked.
    """
    share = abs(mean) <= 1
    texts = ["-" if x is None else f"{100 * x:.1f}" if share else f"{x:.3f}" for x in others]
    return [f"{100 * mean:.1f}" if share else f"{mean:.3f} (no %)", *texts]


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a proportion, within [0, 1]. Source: Wilson 1927, JASA 22.

    Equal to scipy.stats.binomtest(successes, n).proportion_ci(method="wilson"). The formula stands
    here because importing scipy.stats takes longer than `progress` takes in all.
    """
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard error (sample standard deviation / sqrt(n)) and 95 % interval of `values`.

    The interval is Wilson's if every value is 0 or 1, else the normal one.
    Raises ValueError if `values` is empty.
    """
    n = len(values)
    if not n:
        raise ValueError("no values to estimate a mean from")
    mean = math.fsum(values) / n
    stderr = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    if {*values} <= {0, 1}:
        return Estimate(mean, stderr, *wilson(round(math.fsum(values)), n), n)
    if stderr is None:
        return Estimate(mean, None, None, None, n)
    return Estimate(mean, stderr, mean - Z95 * stderr, mean + Z95 * stderr, n)


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-quantile (q from 0 to 1) with linear interpolation; None if `values` is empty."""
    import numpy as np

    return float(np.quantile(values, q)) if len(values) else None
