"""What a curriculum chooses from, and the phases that it goes through: the config of :mod:`dsjax.rl.curriculum`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from dsjax.config import Bounds, NonNegativeFloat, OpenShare, PositiveInt, Share, UserError

Horizon = Annotated[float, Bounds(ge=1, lt=1e6)]


@dataclasses.dataclass(frozen=True)
class Arm:
    """A family of exercises at a level, from 1 on."""

    family: str = ""
    level: PositiveInt = 1

    def __str__(self) -> str:
        return f"{self.family} {self.level}"


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """A stretch of the course.

    Attributes:
        name: of it.
        families: those that belong to it; empty: all.
        levels_from, levels_to: which of a family's n levels do: the one above k others where from <= k / n < to.
        arms: the ones that belong, in place of families and levels.
        advance: competence above which the course goes on to the next phase.
        retreat: competence below which it comes back to this one.
        novelty: weight of the bonus for solutions not seen before (:mod:`dsjax.rl.archive`) in the reward.
        revisit: share of the phase's own prompts that are one of the arm's first ``pool`` exercises, asked again and
            again: what was solved one way can be solved another.
        pool: how many those are.
    """

    name: str = "all"
    families: tuple[str, ...] = ()
    levels_from: OpenShare = 0.0
    levels_to: Share = 1.0
    arms: tuple[Arm, ...] = ()
    advance: Share = 0.7
    retreat: Share = 0.5
    novelty: NonNegativeFloat = 0.0
    revisit: Share = 0.0
    pool: PositiveInt = 16

    def validate(self) -> None:
        if not self.name:
            raise UserError("name is ''; a phase needs one")
        if self.retreat >= self.advance:
            raise UserError(f"retreat is {self.retreat:g}; it must be below advance, {self.advance:g}")
        if self.levels_to <= self.levels_from:
            raise UserError(f"levels_to is {self.levels_to:g}; it must be above levels_from, {self.levels_from:g}")
        if self.arms and self.families:
            raise UserError("families is given beside arms; give one of them")

    def members(self, arms: Sequence[Arm]) -> tuple[int, ...]:
        """Which of ``arms`` belong to it, by their places."""
        if self.arms:
            return tuple(place for place, arm in enumerate(arms) if arm in self.arms)
        levels = collections.defaultdict[str, list[int]](list)
        for arm in arms:
            levels[arm.family].append(arm.level)
        for own in levels.values():
            own.sort()
        return tuple(
            place
            for place, arm in enumerate(arms)
            if (not self.families or arm.family in self.families)
            and self.levels_from <= levels[arm.family].index(arm.level) / len(levels[arm.family]) < self.levels_to
        )


FOUNDATIONS = PhaseConfig("foundations", levels_to=0.4)
MULTI_STEP = PhaseConfig("multi-step", levels_from=0.4, levels_to=0.8, advance=0.6, retreat=0.4)
OPEN_EXPLORATION = PhaseConfig("open exploration", novelty=0.1, revisit=0.5)


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """How arms are chosen.

    Attributes:
        mode: by the curriculum; or all arms alike; or the hardest level of each family alone.
        phases: of the curriculum, the first one first.
        replay: share of the prompts, behind the first phase, that come from arms of earlier ones.
        floor: share of a phase's prompts, and of those replayed, that is spread evenly.
        progress, live: weights of learning progress and of live groups.
        fast, slow: memories of the two running means, in updates that an arm was part of.
        observations: judged texts that each arm of a phase must have had before there is a verdict on the phase.
        confidence: standard errors by which competence must be beyond a threshold.
        patience: updates in a row, each with new evidence, that must say so.
    """

    mode: Literal["curriculum", "uniform", "hardest"] = "curriculum"
    phases: tuple[PhaseConfig, ...] = (FOUNDATIONS, MULTI_STEP, OPEN_EXPLORATION)
    replay: OpenShare = 0.3
    floor: Annotated[float, Bounds(gt=0, le=1)] = 0.2
    progress: NonNegativeFloat = 1.0
    live: NonNegativeFloat = 1.0
    fast: Horizon = 5.0
    slow: Horizon = 20.0
    observations: PositiveInt = 32
    confidence: NonNegativeFloat = 1.0
    patience: PositiveInt = 3

    def validate(self) -> None:
        if not self.phases:
            raise UserError("phases is empty; a curriculum has at least one")
        names = [phase.name for phase in self.phases]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"phases has {names.count(name)} with the name {name!r}; each needs its own")
        if self.slow <= self.fast:
            raise UserError(f"slow is {self.slow:g}; it must be above fast, {self.fast:g}")

    def phases_of(self, arms: Sequence[Arm]) -> list[tuple[PhaseConfig, tuple[int, ...]]]:
        """The phases that have some of ``arms``, with the places of those; of the other modes the only one."""
        if self.mode == "uniform":
            return [(PhaseConfig("uniform"), tuple(range(len(arms))))]
        if self.mode == "hardest":
            top = {arm.family: arm.level for arm in sorted(arms, key=lambda arm: arm.level)}
            hardest = tuple(place for place, arm in enumerate(arms) if arm.level == top[arm.family])
            return [(PhaseConfig("hardest"), hardest)]
        return [(phase, members) for phase in self.phases if (members := phase.members(arms))]


def check_arms(cfg: CurriculumConfig, arms: Sequence[Arm], key: str = "curriculum") -> None:
    """Whether there is something to choose from in every phase that is named by it.

    Args:
        key: of ``cfg`` in the config, for messages.

    Raises:
        UserError: there are no arms, or one of them twice, or a phase names what there is not, or none has an arm.
    """
    if not arms:
        raise UserError(f"{key} has nothing to choose from; name at least one family of exercises and a level")
    counts = collections.Counter(arms)
    for arm, count in counts.items():
        if count > 1:
            raise UserError(f"{key} has {arm.family!r} level {arm.level} {count} times; once is what it takes")
    families = sorted({arm.family for arm in arms})
    for number, phase in enumerate(cfg.phases):
        for family in phase.families:
            if family not in families:
                known = ", ".join(families)
                raise UserError(f"{key}.phases.{number}.families names {family!r}; the run has {known}")
        for arm in phase.arms:
            if arm not in counts:
                known = ", ".join(str(other) for other in arms)
                raise UserError(f"{key}.phases.{number}.arms names {str(arm)!r}; the run has {known}")
    if not cfg.phases_of(arms):
        raise UserError(f"{key}.phases has none with an arm; levels_from and levels_to leave out all that there are")
