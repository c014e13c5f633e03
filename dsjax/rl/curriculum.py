"""What a learner is asked next: which families of exercises, at which level, by how it does at them.

An *arm* is a family at a level. Of each arm the curriculum remembers how often texts were correct, once with a short
memory (f) and once with a long one (s), and how much texts behind one prompt differ (v). In a phase with N arms

    share(a) = floor / N + (1 - floor) * u(a) / sum u      u = progress * |f - s| + live * v

|f - s| is learning progress (Matiisen et al. 2017, arXiv 1707.00183; Portelas et al. 2020, arXiv 1910.07224), v the
mean over groups of the variance of correctness within one, p (1 - p) if exercises of an arm are alike: a group whose
texts are all right or all wrong teaches nothing. A part of the prompts goes back to arms of earlier phases, by how far
they fell from their best:

    share(a) = floor / N + (1 - floor) * r(a) / sum r      r = 0.1 + max(0, best - f)

A phase is left when the competence in it, the mean of f over its arms, is surely above its ``advance``; the course
goes back when that same competence, which replay goes on measuring, is surely below its ``retreat``. So the low pass
rates that a new phase begins with do not throw the course back at once.

All of it is pure: ``sample`` is a function of state and key, ``update`` of state and scores; a state is plain data.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from dsjax.config import Bounds, NonNegativeFloat, NonNegativeInt, Share, UserError, validate
from dsjax.rl.arms import Arm, CurriculumConfig, PhaseConfig, check_arms

NOISE = 0.1  # a fall of a pass rate that is none: without it the only arm that fell by a point would get all replay
NUMBERS = 2**53  # exercises of an arm that may be asked for: none comes twice by chance, and JSON holds the number


# ---------------------------------------------------------------- state


@dataclasses.dataclass(frozen=True)
class Record:
    """What is remembered of an arm. Sums fade by (1 - 1 / memory) with each update that the arm is part of, so that a
    quotient of two is a running mean in which each text counts alike.

    Attributes:
        texts: with a verdict, in all.
        fast_correct, fast_texts: with the short memory.
        slow_correct, slow_texts: with the long one.
        variance, groups: sum of the variances within groups of at least two texts, and their number; short memory.
        best: highest long-term pass rate so far.
    """

    texts: Annotated[int, Bounds(ge=0, lt=2**53)] = 0
    fast_correct: NonNegativeFloat = 0.0
    fast_texts: NonNegativeFloat = 0.0
    slow_correct: NonNegativeFloat = 0.0
    slow_texts: NonNegativeFloat = 0.0
    variance: NonNegativeFloat = 0.0
    groups: NonNegativeFloat = 0.0
    best: Share = 0.0

    def validate(self) -> None:
        if not (
            self.fast_correct <= self.fast_texts <= self.slow_texts <= self.texts
            and self.fast_correct <= self.slow_correct <= self.slow_texts
            and (self.fast_texts >= 1 or not self.texts)
        ):
            raise UserError("fast_texts, slow_texts and texts do not go together")

    @property
    def pass_rate(self) -> float:
        """f, pulled towards 1/2 as if one more text had been right and one wrong: what was never asked is open."""
        return (self.fast_correct + 1) / (self.fast_texts + 2)

    @property
    def progress(self) -> float:
        """|f - s|."""
        if not self.texts:
            return 0.0
        return abs(self.fast_correct / self.fast_texts - self.slow_correct / self.slow_texts)

    @property
    def liveness(self) -> float:
        """v, of one more group at 1/4; where groups have one text each, p (1 - p)."""
        if not self.groups:
            return self.pass_rate * (1 - self.pass_rate)
        return (self.variance + 0.25) / (self.groups + 1)

    @property
    def forgotten(self) -> float:
        """How far the pass rate has fallen from its best."""
        return max(0.0, self.best - self.fast_correct / self.fast_texts) if self.texts else 0.0


@dataclasses.dataclass(frozen=True)
class CurriculumState:
    """Where the course is; plain data all through.

    Attributes:
        arms: what there is to choose from.
        records: of each arm.
        phases: names of those that have arms, in order.
        phase: the present one's place among them.
        above: updates in a row that found the present phase mastered.
        below: updates in a row that found an earlier one forgotten.
    """

    arms: tuple[Arm, ...]
    records: tuple[Record, ...]
    phases: tuple[str, ...]
    phase: NonNegativeInt = 0
    above: NonNegativeInt = 0
    below: NonNegativeInt = 0


class Choice(NamedTuple):
    """An exercise to ask for: ``number`` of the arm, in the phase of that place; ``replayed`` from an earlier one."""

    arm: Arm
    number: int
    phase: int
    replayed: bool = False


class Score(NamedTuple):
    """What became of one prompt: of each text behind it the reward and whether it is correct; None or NaN: unknown."""

    arm: Arm
    rewards: tuple[float | None, ...]
    correct: tuple[bool | float | None, ...]

    @property
    def known_rewards(self) -> tuple[float, ...]:
        """Rewards that there are."""
        return tuple(float(x) for x in self.rewards if x is not None and math.isfinite(x))

    @property
    def verdicts(self) -> tuple[bool, ...]:
        """What is known of correctness."""
        return tuple(bool(x) for x in self.correct if x is not None and x == x)


def begin(cfg: CurriculumConfig, arms: Sequence[Arm]) -> CurriculumState:
    """The state before anything was asked. A phase whose share of the levels holds none is left out.

    Raises:
        UserError: as of :func:`dsjax.rl.arms.check_arms`.
    """
    check_arms(cfg, arms)
    return CurriculumState(tuple(arms), (Record(),) * len(arms), tuple(phase.name for phase, _ in cfg.phases_of(arms)))


def phase_of(cfg: CurriculumConfig, state: CurriculumState) -> PhaseConfig:
    """The present phase."""
    return cfg.phases_of(state.arms)[state.phase][0]


def to_plain(state: CurriculumState) -> dict[str, Any]:
    """The state as JSON has it, without loss."""
    return dataclasses.asdict(state)


def from_plain(cfg: CurriculumConfig, arms: Sequence[Arm], plain: Any) -> CurriculumState:
    """The inverse of :func:`to_plain`, for a run that goes on.

    Raises:
        UserError: it is of other arms or phases, or no state at all.
    """
    new = begin(cfg, arms)
    try:
        saved = {
            "arms": tuple(Arm(**arm) for arm in plain["arms"]),
            "records": tuple(Record(**record) for record in plain["records"]),
            "phases": tuple(plain["phases"]),
        }
        state = CurriculumState(**(plain | saved))
        validate(state)
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"the saved curriculum can not be read: {error}") from None
    if state.arms != new.arms or len(state.records) != len(new.records):
        raise UserError(
            f"the saved curriculum has {_listed(state.arms)}, the config {_listed(new.arms)}; a run keeps its arms"
        )
    if state.phases != new.phases or state.phase >= len(new.phases):
        raise UserError(
            f"the saved curriculum has the phases {', '.join(state.phases)}, the config {', '.join(new.phases)};"
            " a run keeps its phases"
        )
    return state


def _listed(arms: Sequence[Arm]) -> str:
    return ", ".join(map(str, arms))


# ---------------------------------------------------------------- sample


def shares(cfg: CurriculumConfig, state: CurriculumState) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The share of the prompts that each arm has, for its own sake and as replay; all together add up to 1."""
    phases, records = cfg.phases_of(state.arms), state.records
    members = phases[state.phase][1]
    earlier = sorted({place for _, some in phases[: state.phase] for place in some})
    replay = cfg.replay if earlier else 0.0
    if cfg.mode == "curriculum":
        useful = [cfg.progress * records[i].progress + cfg.live * records[i].liveness for i in members]
    else:
        useful = [0.0] * len(members)
    own, again = [0.0] * len(records), [0.0] * len(records)
    for place, share in zip(members, _spread(useful, cfg.floor), strict=True):
        own[place] = (1 - replay) * share
    for place, share in zip(earlier, _spread([NOISE + records[i].forgotten for i in earlier], cfg.floor), strict=True):
        again[place] = replay * share
    return tuple(own), tuple(again)


def _spread(useful: Sequence[float], floor: float) -> list[float]:
    """Shares in proportion to use, above an even floor; all even where nothing is of use."""
    total = math.fsum(useful)
    if not 0 < total < math.inf:
        return [1 / len(useful)] * len(useful) if useful else []
    return [floor / len(useful) + (1 - floor) * x / total for x in useful]


def sample(cfg: CurriculumConfig, state: CurriculumState, key: int | tuple[int, ...], num: int) -> list[Choice]:
    """``num`` exercises to ask for, in random order: of each arm its share of them, rounded up or down.

    Args:
        key: seed of everything random, >= 0; another one in each iteration.
    """
    own, again = shares(cfg, state)
    phase, K = phase_of(cfg, state), len(state.arms)
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(1 + 3 * num)
    # One draw for all: of steps of 1 / num along the shares, none gets more than one prompt too many or too few.
    ends = np.cumsum([*own, *again])
    places = np.searchsorted(ends / ends[-1], (np.arange(num) + raw[0] / 2**64) / num, side="right")
    order_N, again_N, number_N = raw[1:].reshape(3, num)
    choices = []
    for place, chance, number in zip(places.tolist(), again_N.tolist(), number_N.tolist(), strict=True):
        replayed = place >= K
        revisits = not replayed and chance < phase.revisit * 2**64
        exercise = number % phase.pool if revisits else phase.pool + number % (NUMBERS - phase.pool)
        choices.append(Choice(state.arms[place % K], exercise, state.phase, replayed))
    return [choices[i] for i in np.argsort(order_N, kind="stable")]


# ---------------------------------------------------------------- update


def update(cfg: CurriculumConfig, state: CurriculumState, scores: Sequence[Score]) -> CurriculumState:
    """The state behind the scores of one iteration. Their order does not matter, and unknown ones change nothing.

    Raises:
        ValueError: a score is of an arm that there is not.
    """
    places = {arm: place for place, arm in enumerate(state.arms)}
    groups = collections.defaultdict[int, list[tuple[bool, ...]]](list)
    for score in scores:
        if score.arm not in places:
            raise ValueError(f"a score is of {score.arm}; the curriculum has {_listed(state.arms)}")
        if score.verdicts:
            groups[places[score.arm]].append(score.verdicts)
    if not groups:
        return state
    records = list(state.records)
    for place, found in groups.items():
        records[place] = _observed(cfg, records[place], found)
    return _moved(cfg, dataclasses.replace(state, records=tuple(records)), set(groups))


def _variance(group: Sequence[bool]) -> float:
    """Of the correctness of a group's texts; without bias."""
    n, correct = len(group), sum(group)
    return correct * (n - correct) / (n * (n - 1))


def _observed(cfg: CurriculumConfig, record: Record, groups: Sequence[tuple[bool, ...]]) -> Record:
    correct, texts = sum(map(sum, groups)), sum(map(len, groups))
    variances = [_variance(group) for group in groups if len(group) > 1]
    keep_fast, keep_slow = 1 - 1 / cfg.fast, 1 - 1 / cfg.slow
    new = Record(
        texts=record.texts + texts,
        fast_correct=keep_fast * record.fast_correct + correct,
        fast_texts=keep_fast * record.fast_texts + texts,
        slow_correct=keep_slow * record.slow_correct + correct,
        slow_texts=keep_slow * record.slow_texts + texts,
        variance=keep_fast * record.variance + math.fsum(variances),
        groups=keep_fast * record.groups + len(variances),
        best=record.best,
    )
    if new.texts < cfg.observations:
        return new
    return dataclasses.replace(new, best=max(new.best, new.slow_correct / new.slow_texts))


@dataclasses.dataclass(frozen=True)
class Competence:
    """In a phase: the mean of its arms' pass rates, and the standard error of that."""

    mean: float
    error: float


def competence(cfg: CurriculumConfig, state: CurriculumState, members: Iterable[int]) -> Competence | None:
    """In a phase with these arms; None while one of them had too few texts.

    The error takes the texts of a group for independent, which they are not, and a running mean for one of as many
    texts as its weights add up to, which is half of what it is worth: one makes up for the other.
    """
    records = [state.records[place] for place in members]
    if any(record.texts < cfg.observations for record in records):
        return None
    rates = [record.pass_rate for record in records]
    variances = [p * (1 - p) / (record.fast_texts + 2) for p, record in zip(rates, records, strict=True)]
    return Competence(math.fsum(rates) / len(rates), math.sqrt(math.fsum(variances)) / len(rates))


def _moved(cfg: CurriculumConfig, state: CurriculumState, seen: set[int]) -> CurriculumState:
    """The state with the phase that the evidence speaks for, at most one further or one back. Only what was just
    ``seen`` counts towards patience: nothing gets more certain by being looked at again."""
    phases = cfg.phases_of(state.arms)

    def beyond(place: int, sign: int) -> bool:
        phase, members = phases[place]
        found = competence(cfg, state, members)
        if found is None:
            return False
        margin = cfg.confidence * found.error
        return found.mean - margin > phase.advance if sign > 0 else found.mean + margin < phase.retreat

    above, below = state.above, state.below
    forgotten = [place for place in range(state.phase) if beyond(place, -1)]
    if not forgotten:
        below = 0
    elif any(seen.intersection(phases[place][1]) for place in forgotten):
        below += 1
    if state.phase + 1 < len(phases) and seen.intersection(phases[state.phase][1]):
        above = above + 1 if beyond(state.phase, 1) else 0
    if below >= cfg.patience:
        return dataclasses.replace(state, phase=state.phase - 1, above=0, below=0)
    if above >= cfg.patience and not below:
        return dataclasses.replace(state, phase=state.phase + 1, above=0, below=0)
    return dataclasses.replace(state, above=above, below=below)
