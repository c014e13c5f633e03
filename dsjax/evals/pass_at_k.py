"""pass@k: the chance that at least one of k programs sampled for a task is right (Chen et al. 2021, section 2.1).

Of n >= k samples c are right. Over all choices of k of them 1 - C(n - c, k) / C(n, k) is its unbiased estimate, here
computed as a product, since the binomials overflow. 1 - (1 - c / n)^k would be biased.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from dsjax.config import UserError

RESAMPLES = 10_000
_AT_ONCE = 2**22  # numbers drawn together


@dataclasses.dataclass(frozen=True)
class PassAtK:
    """An estimate over tasks, in [0, 1].

    low, high: a 95 % interval, were other tasks of the same kind taken.
    interval: how it was made: "Clopper-Pearson" where each task is solved or not (then it is exact), else "bootstrap
        over tasks".
    """

    k: int
    value: float
    low: float
    high: float
    num_tasks: int
    interval: str

    def __str__(self) -> str:
        return f"pass@{self.k} {100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f} %)"


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The unbiased estimate for one task.

    Raises:
        UserError: k is not within 1 and the number of samples, or more are right than there are.
    """
    if not 1 <= k <= num_samples:
        raise UserError(f"k is {k}; it must be from 1 to the number of samples of a task, {num_samples}")
    if not 0 <= num_right <= num_samples:
        raise UserError(
            f"{num_right} of {num_samples} samples are said to be right; it must be from 0 to {num_samples}"
        )
    if num_samples - num_right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num_samples - num_right + 1, num_samples + 1)))


def estimate(results: Sequence[tuple[int, int]], k: int, *, seed: int = 0) -> PassAtK:
    """The mean over tasks, with its interval.

    Args:
        results: (samples, right ones) of each task.
        k: at the most the fewest samples of any task.
        seed: of the bootstrap.

    Raises:
        UserError: no task, or see :func:`pass_at_k`.
    """
    if not results:
        raise UserError("pass@k of no task is asked for; there must be at least one")
    values = np.array([pass_at_k(n, c, k) for n, c in results])
    if np.isin(values, (0.0, 1.0)).all():
        low, high, interval = *_exact(int(values.sum()), values.size), "Clopper-Pearson"
    else:
        low, high, interval = *_bootstrap(values, seed), "bootstrap over tasks"
    return PassAtK(k, float(values.mean()), low, high, values.size, interval)


def _exact(successes: int, n: int) -> tuple[float, float]:
    """Clopper & Pearson's 95 % interval of a share (1934)."""
    from scipy.stats import beta

    low = beta.ppf(0.025, successes, n - successes + 1) if successes else 0.0
    high = beta.ppf(0.975, successes + 1, n - successes) if successes < n else 1.0
    return float(low), float(high)


def _bootstrap(values: Float64[np.ndarray, " tasks"], seed: int) -> tuple[float, float]:
    """The middle 95 % of the means of tasks drawn with replacement."""
    generator = np.random.Generator(np.random.Philox(seed))
    rows = max(_AT_ONCE // values.size, 1)
    means = [
        generator.choice(values, (min(rows, RESAMPLES - done), values.size)).mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)
