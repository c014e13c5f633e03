"""Models of a learner: what a curriculum can be tried on in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dsjax.rl.arms import Arm, CurriculumConfig
from dsjax.rl.curriculum import CurriculumState, Score, begin, sample, update

GROUP = 8  # texts of a prompt


class Chain:
    """Level l takes the skills 1 .. l one after the other, as chains of reasoning do: p_l = q_1 q_2 ... q_l.

    A group teaches all the skills that it took, by how mixed it is; nothing at all if it is dead. What is not practised
    fades.

    Args:
        levels: of the only family.
        skill: q that every skill begins with.
        rate: how much a group of the best mixture adds to the logit of each skill.
        fading: of a logit towards its beginning, a step.
    """

    def __init__(self, levels: int = 6, skill: float = 0.3, rate: float = 0.05, fading: float = 0.0):
        self.arms = tuple(Arm("chain", level) for level in range(1, levels + 1))
        self._start = np.log(skill / (1 - skill))
        self._logits, self._rate, self._fading = np.full(levels, self._start), rate, fading

    @property
    def rates(self) -> np.ndarray:
        """Pass rate of each arm."""
        return np.cumprod(1 / (1 + np.exp(-self._logits)))

    def practise(self, arm: Arm, chance: np.random.Generator) -> tuple[bool, ...]:
        """A group of texts, some of them correct, and what is learned from them."""
        correct = chance.random(GROUP) < self.rates[arm.level - 1]
        self._logits[self._skills(arm)] += self._rate * 4 * correct.mean() * (1 - correct.mean())
        return tuple(correct.tolist())

    def fade(self) -> None:
        """A step goes by."""
        self._logits += self._fading * (self._start - self._logits)

    def _skills(self, arm: Arm) -> slice:
        return slice(0, arm.level)


class Ladder(Chain):
    """A group teaches the last skill alone that it took: a level can be learned once those below it can be done."""

    def _skills(self, arm: Arm) -> slice:
        return slice(arm.level - 1, arm.level)


class Apart(Ladder):
    """Every level is a skill of its own."""

    @property
    def rates(self) -> np.ndarray:
        return 1 / (1 + np.exp(-self._logits))


def trained(
    learner: Chain, cfg: CurriculumConfig, *, steps: int, prompts: int = 16, seed: int = 0
) -> tuple[CurriculumState, list[CurriculumState]]:
    """The learner behind ``steps`` iterations of a curriculum; the last state and all of them."""
    state, states, chance = begin(cfg, learner.arms), [], np.random.default_rng(seed)
    for step in range(steps):
        scores = []
        for choice in sample(cfg, state, (seed, step), prompts):
            correct = learner.practise(choice.arm, chance)
            scores.append(Score(choice.arm, tuple(map(float, correct)), correct))
        learner.fade()
        state = update(cfg, state, scores)
        states.append(state)
    return state, states


def final(make: Callable[[], Chain], cfg: CurriculumConfig, seeds: Sequence[int], **options: int) -> np.ndarray:
    """Pass rates behind training, (seeds, arms)."""
    found = []
    for seed in seeds:
        learner = make()
        trained(learner, cfg, seed=seed, **options)
        found.append(learner.rates)
    return np.array(found)
