"""Pairs of runs with the same seed: mean difference, its interval, and an exact test."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of n pairs.

    Attributes:
        mean: over pairs.
        low, high: 95 % interval by Student's t.
        p: two-sided sign-flip test: the share of the 2^n assignments of signs whose mean is at least as far from 0.
        n: pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int

    def said(self, form: str = "+.1%") -> str:
        """As text: mean, interval, p."""
        return f"{self.mean:{form}} ({self.low:{form}} to {self.high:{form}}; p = {self.p:.2f})"


def difference(values: Sequence[float]) -> Difference:
    """Of the differences of pairs, at least two.

    Raises:
        ValueError: there are fewer.
    """
    x = np.asarray(values, np.float64)
    if x.size < 2:
        raise ValueError(f"{x.size} pair(s); an interval needs two")
    low, high = t_interval(x)
    means = np.array(list(itertools.product((1, -1), repeat=x.size))) @ x / x.size
    p = float((np.abs(means) >= abs(x.mean()) * (1 - 1e-12)).mean())
    return Difference(float(x.mean()), low, high, p, x.size)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Sum over sum of pairs, with its 95 % interval (bootstrap over pairs, 10,000 resamples).

    Where theirs are all 0 it is infinite, or nothing is known of it.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    picks = np.random.default_rng(0).integers(0, len(a), (10_000, len(a)))
    with np.errstate(divide="ignore", invalid="ignore"):
        again = a[picks].sum(1) / b[picks].sum(1)
        low, high = np.nanpercentile(again, [2.5, 97.5], method="nearest")
        return float(a.sum() / b.sum()), float(low), float(high)


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def verdict(low: float, high: float, limit: float, *, at_least: bool) -> str:
    """Of a claim that something is at least or at most ``limit``, from its interval."""
    inside, outside = (low >= limit, high < limit) if at_least else (high <= limit, low > limit)
    return "holds" if inside else "does not hold" if outside else "not decided"
