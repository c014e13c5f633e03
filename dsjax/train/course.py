"""Which exercises come next, and all else that reinforcement learning remembers on the host.

The loop takes its batches from here, so what is remembered is saved with each checkpoint as the place in the data is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dsjax.config import UserError
from dsjax.rl import curriculum
from dsjax.rl.advantages import alive
from dsjax.rl.archive import Found, bonuses, plain_form, python_form, remembered
from dsjax.rl.arms import Arm
from dsjax.rl.course_report import metrics
from dsjax.rl.curriculum import Choice, Score
from dsjax.rl.exercises.exercise import Exercise, Family, exercise_of
from dsjax.rl.health import Health
from dsjax.rl.policy import adapted_kl
from dsjax.rl.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written: ``choices`` and ``exercises`` are P, ``rollouts`` K for each."""

    choices: tuple[Choice, ...]
    exercises: tuple[Exercise, ...]
    rollouts: tuple[tuple[Rollout, ...], ...]

    @property
    def flat(self) -> tuple[list[Exercise], list[Rollout]]:
        """Exercise and text, text after text."""
        exercises = [exercise for exercise, own in zip(self.exercises, self.rollouts, strict=True) for _ in own]
        return exercises, [text for own in self.rollouts for text in own]

    def some(self, places: Sequence[int]) -> Written:
        """Of those exercises alone."""
        of = lambda field: tuple(field[i] for i in places)  # noqa: E731
        return Written(of(self.choices), of(self.exercises), of(self.rollouts))

    def __add__(self, other: Written) -> Written:
        return Written(self.choices + other.choices, self.exercises + other.exercises, self.rollouts + other.rollouts)

    def to_plain(self) -> list[dict[str, Any]]:
        """As JSON has it, without loss; exercises are what choices say."""

        def plain(text: Rollout) -> dict[str, Any]:
            experts = None if text.experts is None else text.experts.tolist()
            return {field.name: getattr(text, field.name) for field in dataclasses.fields(text)} | {"experts": experts}

        return [
            choice._asdict() | {"arm": dataclasses.asdict(choice.arm), "texts": [plain(text) for text in own]}
            for choice, own in zip(self.choices, self.rollouts, strict=True)
        ]

    @classmethod
    def from_plain(cls, plain: Sequence[Mapping[str, Any]], exercise: Callable[[Choice], Exercise]) -> Written:
        """The inverse of :meth:`to_plain`."""
        choices, rollouts = list[Choice](), list[tuple[Rollout, ...]]()
        for one in plain:
            choices.append(Choice(Arm(**one["arm"]), one["number"], one["phase"], one["replayed"]))
            rollouts.append(tuple(_rollout(text) for text in one["texts"]))
        return cls(tuple(choices), tuple(map(exercise, choices)), tuple(rollouts))


def _rollout(text: Mapping[str, Any]) -> Rollout:
    experts = None if text["experts"] is None else np.asarray(text["experts"], np.int16)
    return Rollout(
        **(dict(text) | {"experts": experts, **{name: tuple(text[name]) for name in ("tokens", "log_probs")}})
    )


@dataclasses.dataclass(frozen=True)
class Worth:
    """Of K texts for each of P exercises: the reward, whether the text is right (1 or 0), and the reward's parts, not
    weighted. NaN: unknown."""

    total_PK: np.ndarray
    correct_PK: np.ndarray
    parts: dict[str, np.ndarray]

    @property
    def alive_P(self) -> np.ndarray:
        """Whether a group has two different rewards."""
        return np.asarray(alive(self.total_PK))

    def some(self, places: Sequence[int]) -> Worth:
        """Of those exercises alone."""
        at = np.asarray(places, int)
        return Worth(self.total_PK[at], self.correct_PK[at], {name: x[at] for name, x in self.parts.items()})

    def __add__(self, other: Worth) -> Worth:
        both = {name: np.concatenate([x, other.parts[name]]) for name, x in self.parts.items()}
        total_PK = np.concatenate([self.total_PK, other.total_PK])
        return Worth(total_PK, np.concatenate([self.correct_PK, other.correct_PK]), both)


class Course:
    """An endless iterator over the exercises of one round of writing after the other.

    Args:
        cfg: the config of the run, a :class:`dsjax.train.r1.R1`.
        families: of exercises, by name.
        fingerprint: of all exercises that there are.
    """

    def __init__(self, cfg: Any, families: Mapping[str, Family], fingerprint: str):
        self._cfg, self._families, self._fingerprint = cfg, families, fingerprint
        self._arms = [Arm(name, level) for name, family in families.items() for level in family.levels]
        self._curriculum = curriculum.begin(cfg.curriculum, self._arms)
        self._drawn, self._told = 0, list[tuple[Choice, Score]]()
        self.kl_coef: float = cfg.policy.kl_coef
        self._archive: dict[str, dict[str, int]] = {}
        self._health: dict[str, Any] = {}
        self._alarms = Health(cfg.health, self._health)
        # Texts that are written already, for the iteration to come: () -> them.
        self.ahead: Callable[[], Written] | None = None

    def __iter__(self) -> Course:
        return self

    def __next__(self) -> list[Choice]:
        key = (self._cfg.train.seed, self._drawn)
        self._drawn += 1
        return curriculum.sample(self._cfg.curriculum, self._curriculum, key, self._cfg.rollout.prompts)

    def exercise(self, choice: Choice) -> Exercise:
        """The one that was chosen."""
        return exercise_of(self._families[choice.arm.family], choice.arm.level, "training", choice.number)

    # ------------------------------------------------------------ what came of them

    def with_novelty(self, written: Written, worth: Worth, answers: Sequence[str]) -> Worth:
        """With the bonus for right solutions that were not seen before, in the phase that has one.

        Args:
            written, worth: texts, and what they are worth without it.
            answers: what each text comes to.
        """
        weight = curriculum.phase_of(self._cfg.curriculum, self._curriculum).novelty
        found = self._found(written, worth, answers)
        bonus_PK = np.array(bonuses(self._archive, found)).reshape(worth.total_PK.shape)
        self._archive = remembered(self._cfg.archive, self._archive, found)
        if not weight:
            return worth
        return Worth(worth.total_PK + weight * bonus_PK, worth.correct_PK, worth.parts | {"novelty": bonus_PK})

    def _found(self, written: Written, worth: Worth, answers: Sequence[str]) -> list[Found]:
        exercises, _ = written.flat
        right = [None if math.isnan(x) else x >= 1 for x in worth.correct_PK.reshape(-1).tolist()]
        forms = [
            (python_form if e.scorer == "program" else plain_form)(a) for e, a in zip(exercises, answers, strict=True)
        ]
        return [Found(e.key, form, r) for e, form, r in zip(exercises, forms, right, strict=True)]

    def scored(self, written: Written, worth: Worth) -> None:
        """Tells the curriculum how exercises went."""
        scores = [
            Score(choice.arm, tuple(rewards), tuple(None if math.isnan(x) else x >= 1 for x in correct))
            for choice, rewards, correct in zip(
                written.choices, worth.total_PK.tolist(), worth.correct_PK.tolist(), strict=True
            )
        ]
        self._curriculum = curriculum.update(self._cfg.curriculum, self._curriculum, scores)
        self._told += zip(written.choices, scores, strict=True)

    def adapt_kl(self, measured: float) -> None:
        """Moves the coefficient of the KL towards its target, if it has one."""
        update = self._cfg.update
        if update.kl_target:
            self.kl_coef = adapted_kl(self.kl_coef, measured, update.kl_target, 1 / update.kl_horizon)

    def observe(self, metrics: Mapping[str, Any]) -> list[str]:
        """What there is to say about the numbers of a step."""
        return self._alarms.observe(metrics)

    def metrics(self) -> dict[str, float]:
        """Where the course is, and how the exercises went that it was told of since this was asked last."""
        choices, scores = [choice for choice, _ in self._told], [score for _, score in self._told]
        self._told.clear()
        return metrics(self._cfg.curriculum, self._curriculum, choices, scores) | {"rl/kl_coef": self.kl_coef}

    @property
    def phase(self) -> str:
        """Name of the present phase."""
        return curriculum.phase_of(self._cfg.curriculum, self._curriculum).name

    # ------------------------------------------------------------ state

    def get_state(self) -> dict[str, Any]:
        """Plain data: all of it."""
        return {
            "fingerprint": self._fingerprint,
            "drawn": self._drawn,
            "curriculum": curriculum.to_plain(self._curriculum),
            "kl_coef": self.kl_coef,
            "archive": self._archive,
            "health": self._health,
            "ahead": None if self.ahead is None else self.ahead().to_plain(),
        }

    def set_state(self, state: dict[str, Any], *, changes: str = "") -> None:
        """Goes on exactly where :meth:`get_state` was called.

        Raises:
            UserError: the state is of other exercises.
        """
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                f"the exercises changed: the run was trained on some with fingerprint {state['fingerprint'][:16]}, "
                f" {self._fingerprint[:16]}{changes and f' ({changes})'}; restore them, or start a new run"
            )
        self._drawn, self.kl_coef = int(state["drawn"]), float(state["kl_coef"])
        self._curriculum = curriculum.from_plain(self._cfg.curriculum, self._arms, state["curriculum"])
        self._archive = state["archive"]
        self._health.clear()
        self._health.update(state["health"])
        self._alarms = Health(self._cfg.health, self._health)
        ahead = state["ahead"]
        written = None if ahead is None else Written.from_plain(ahead, self.exercise)
        self.ahead = None if written is None else lambda: written

    def wait(self) -> None:
        """Until no text is being written."""
        if self.ahead is not None:
            self.ahead()

    close = wait  # nothing else is open


def metrics_of(written: Written, worth: Worth) -> dict[str, float]:
    """What an iteration's texts were like, and the parts of their rewards: means over those that are known."""
    _, texts = written.flat
    found = {
        "rl/length": float(np.mean([len(text.tokens) for text in texts])),
        "rl/ended": float(np.mean([text.ended for text in texts])),
    }
    known = {name: x[np.isfinite(x)] for name, x in worth.parts.items() if name != "correct"}
    means = {name: float(x.mean()) for name, x in known.items() if x.size}
    if "format" in means:
        found["rl/format"] = means["format"]
    return found | {f"reward/{name}": mean for name, mean in means.items()}
