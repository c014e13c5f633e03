"""Which exercises a model solves: pass@1 and pass@k by family and level, sampled and greedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsjax.data.tokenizer import Tokenizer
from dsjax.evals.pass_at_k import estimate
from dsjax.infer.sampling import SamplingConfig
from dsjax.rl.exercises.exercise import Exercise
from dsjax.rl.rollout import Rollout, Sampler

AT_A_TIME = 512  # texts between two questions whether to stop

# (exercises, texts) -> 1 where the text solves the exercise, 0 where not, NaN where that is unknown
Verdicts = Callable[[Sequence[Exercise], Sequence[Rollout]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Solved:
    """What came of some exercises.

    Attributes:
        exercises: N of them.
        sampled_NK: of K sampled texts for each, 1 where right, 0 where not, NaN where unknown.
        greedy_N: of the likeliest one; empty: it was not asked for.
    """

    exercises: tuple[Exercise, ...]
    sampled_NK: np.ndarray
    greedy_N: np.ndarray

    def by_level(self, k: Sequence[int] = ()) -> dict[str, dict[int, dict[str, Any]]]:
        """For each family and level ``pass@1`` (and ``pass@K``) with a 95 % interval over exercises, ``greedy``, the
        number of exercises, and of texts whose verdict is unknown. What is unknown is left out of the shares.

        ``k``: of further ``pass@k``, each where every exercise has so many texts of known verdict.
        """
        table: dict[str, dict[int, dict[str, Any]]] = {}
        arms = [(e.family, e.level) for e in self.exercises]
        for family, level in dict.fromkeys(arms):
            mine = np.array([arm == (family, level) for arm in arms])
            greedy_N = self.greedy_N[mine] if self.greedy_N.size else self.greedy_N
            table.setdefault(family, {})[level] = _figures(self.sampled_NK[mine], greedy_N, k)
        return table


def _figures(sampled_NK: np.ndarray, greedy_N: np.ndarray, further: Sequence[int]) -> dict[str, Any]:
    known_NK = np.isfinite(sampled_NK)
    results = [(int(k.sum()), int(np.nansum(row))) for k, row in zip(known_NK, sampled_NK, strict=True) if k.any()]
    found: dict[str, Any] = {"exercises": len(sampled_NK), "unknown": int((~known_NK).sum())}
    if results:
        most = min(n for n, _ in results)
        for k in sorted({1, most, *(k for k in further if k < most)}):
            passed = estimate(results, k)
            found[f"pass@{k}"] = {"value": passed.value, "low": passed.low, "high": passed.high}
    if greedy_N.size and np.isfinite(greedy_N).any():
        found["greedy"] = float(np.nanmean(greedy_N))
    return found


def solved(
    sampler: Sampler,
    params: Any,
    tokenizer: Tokenizer,
    exercises: Sequence[Exercise],
    verdicts: Verdicts,
    *,
    num_samples: int,
    max_tokens: int,
    sampling: SamplingConfig,
    greedy: bool,
    seed: int,
    stop: Sequence[str] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> Solved | None:
    """Has a model write for each exercise, and looks what solves it; None: it was to stop on the way.

    Args:
        sampler, params: what writes, and all its variables.
        tokenizer: of the model.
        exercises: what is asked.
        verdicts: what is right.
        num_samples: K, of each exercise.
        max_tokens, sampling, stop: of a text.
        greedy: whether the likeliest text is asked for, too.
        seed: of the samples.
        stopped: asked now and then.
    """
    rows, likeliest = list[np.ndarray](), list[np.ndarray]()
    each = max(AT_A_TIME // num_samples, 1)
    for first in range(0, len(exercises), each):
        some = exercises[first : first + each]
        prompts = [prompt_tokens(tokenizer, exercise) for exercise in some]
        for found, samples, how in ((rows, num_samples, sampling), (likeliest, 1, SamplingConfig(0.0))):
            if found is likeliest and not greedy:
                continue
            written = sampler.sample(
                params, prompts, num_samples=samples, max_tokens=max_tokens, seed=seed + first, sampling=how, stop=stop
            )
            texts = [as_judged(text) for own in written for text in own]
            told = verdicts([exercise for exercise in some for _ in range(samples)], texts)
            found.append(np.asarray(told).reshape(len(some), samples))
        if stopped():
            return None
    greedy_N = np.concatenate(likeliest)[:, 0] if likeliest else np.zeros(0)
    return Solved(tuple(exercises), np.concatenate(rows), greedy_N)


def prompt_tokens(tokenizer: Tokenizer, exercise: Exercise) -> tuple[int, ...]:
    """A prompt as a document of training begins."""
    return tokenizer.end_id, *tokenizer.encode(exercise.prompt).tolist()


def as_judged(text: Rollout) -> Rollout:
    """A text that was stopped where it was to stop counts as one that ended by itself."""
    return dataclasses.replace(text, ended=text.ended or text.stopped)
