"""Verified rewards: whether a text solves its exercise, and what else it is worth.

    total = sum over parts of weight * part          correct, partial, format, work, length, learned (docs/rewards.md)

A verdict is 1, 0 or a share between; of a program the share of its hidden tests. Nothing that a text holds makes a
judge raise: what it can not be judged by is wrong. Where nothing is known, by no fault of the text's, parts and total
are NaN and ``reasons`` says why: that is no 0, and such a text is to be left out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Float64

from dsjax import hosts
from dsjax.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UserError
from dsjax.data.build.syntax import parsed
from dsjax.loaded import LoadedModel, load
from dsjax.rl.answer_pool import PACKAGES, Answer, AnswerPool, Kind
from dsjax.rl.answers import boxed, normalised, reaches, unmarked, whole_number, words
from dsjax.rl.completions import program_of
from dsjax.rl.exercises.exercise import Exercise, Family
from dsjax.rl.exercises.form import AnswerForm
from dsjax.rl.exercises.programs import problem, program
from dsjax.rl.sandbox import Program, Sandbox

# Characters of an answer that is judged at all: so many, or so many times what the right one has; more of unknown ones.
MOST_CHARACTERS, MOST_TIMES, MOST_UNKNOWN = 400, 4, 2**14
MAY_BE_BOXED = ("math", "words")  # scorers of answers that people and models put into \boxed{}


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a text is worth: each part times its weight.

    Attributes:
        correct: 1 if the text solves the exercise, else 0.
        partial: the scorer's share, from 0 to 1: of a program's hidden tests, or what reasoning-gym gives.
        format: 1 if the text has the form that was asked for, with work in front of the answer where the known solution
            has some; a program if it parses.
        work: share of the known solution's work that the text begins with, word by word.
        length: from 0 at ``length_from`` tokens to -1 at ``length_to`` and beyond.
        learned: what a model of rewards gives the text behind its prompt (docs/preference.md), of any size and sign.
        model: folder of that model's run.
        length_from, length_to: see ``length``.
        workers: programs or answers that are judged at the same time.
        seconds: of processor time for an answer that takes mathematics or reasoning-gym to judge.
    """

    correct: NonNegativeFloat = 1.0
    partial: NonNegativeFloat = 0.0
    format: NonNegativeFloat = 0.0
    work: NonNegativeFloat = 0.0
    length: NonNegativeFloat = 0.0
    learned: NonNegativeFloat = 0.0
    model: str = ""
    length_from: NonNegativeInt = 0
    length_to: PositiveInt = 1024
    workers: PositiveInt = 2
    seconds: PositiveFloat = 5.0

    def validate(self) -> None:
        """Raises ``UserError`` for lengths in the wrong order, a model without its weight or the other way round, or if
        nothing is worth anything."""
        if self.length_from >= self.length_to:
            raise UserError(f"length_from is {self.length_from}; it must be below length_to, {self.length_to}")
        if bool(self.learned) != bool(self.model):
            raise UserError(
                f"learned is {self.learned:g}, and model {self.model!r}; a model of rewards takes a weight and the"
                " folder of its run"
            )
        if not any((self.correct, self.partial, self.format, self.work, self.learned)):
            raise UserError(
                "correct, partial, format, work and learned are 0; one of them must be above, or nothing is learned"
            )


@runtime_checkable
class Text(Protocol):
    """What is looked at of a rollout."""

    @property
    def text(self) -> str: ...
    @property
    def ended(self) -> bool: ...
    @property
    def tokens(self) -> Sequence[int]: ...


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of an answer: the share of the exercise that it solves, from 0 to 1, or None, and why no more."""

    share: float | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Rewarded:
    """What N texts are worth.

    Attributes:
        total_N: the sum of the parts by their weights; NaN: unknown.
        parts: each without its weight. "correct", "partial" and "learned" are NaN where unknown; the last is there if
            it has a weight.
        answers: what each text gives as its answer, of a program its source; empty: nothing.
        reasons: why an answer is not right, where there is more to say of it, or why nothing is known.
    """

    total_N: np.ndarray
    parts: dict[str, np.ndarray]
    answers: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def known_N(self) -> np.ndarray:
        """Whether a text may be learned from."""
        return np.isfinite(self.total_N)


class Rewards:
    """The rewards of a config, with the processes that judge; ends them when it is closed, left or no longer used.

    Args:
        cfg: the weights.
        families: whose exercises are judged, by name.

    Raises ``UserError`` if what judges them is not there: a package, anything that can confine programs, or a model of
    rewards.
    """

    def __init__(self, cfg: RewardConfig, families: Mapping[str, Family]) -> None:
        self._cfg = cfg
        self._forms = {name: family.form for name, family in families.items()}
        scorers = {scorer: name for name, family in families.items() for scorer in _scorers(family)}
        for kind, (module, package) in PACKAGES.items():
            if kind in scorers and importlib.util.find_spec(module) is None:
                raise UserError(f"{scorers[kind]} is judged by {package}: pip install 'dsjax[math]'")
        self._sandbox = Sandbox(cfg.workers) if "program" in scorers and not hosts.index() else None
        self._model = _reward_model(cfg.model) if cfg.learned and not hosts.index() else None
        self._pool = AnswerPool(cfg.workers, cfg.seconds)
        self.close = weakref.finalize(self, _close, self._pool, self._sandbox)

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, exercises: Sequence[Exercise], texts: Sequence[Text]) -> Rewarded:
        """What each text is worth as a solution of its exercise. Of several processes the first one judges for all."""
        forms = [self._forms[exercise.family] for exercise in exercises]
        answers = [answer_of(*one) for one in zip(exercises, texts, forms, strict=True)]
        found = self.verdicts(exercises, answers)
        share_N = np.array([np.nan if v.share is None else v.share for v in found], np.float64)
        cfg = self._cfg
        parts = {
            "correct": np.where(np.isnan(share_N), np.nan, share_N >= 1),
            "partial": share_N,
            "format": follows_form(exercises, texts, forms, answers),
            "work": work_shown(exercises, texts, forms),
            "length": shortness([len(text.tokens) + text.ended for text in texts], cfg.length_from, cfg.length_to),
        }
        reasons = [verdict.reason for verdict in found]
        if cfg.learned:
            parts["learned"] = self._learned(exercises, texts)
            for n in np.flatnonzero(np.isnan(parts["learned"])):
                reasons[n] = reasons[n] or "longer than what the model of rewards reads"
        total_N = np.zeros(len(texts))
        for name, x_N in parts.items():
            if weight := getattr(cfg, name):  # 0 times unknown is 0
                total_N += weight * x_N
        return Rewarded(total_N, parts, tuple(a or "" for a in answers), tuple(reasons))

    def _learned(self, exercises: Sequence[Exercise], texts: Sequence[Text]) -> Float64[np.ndarray, " N"]:
        """What the model of rewards gives each text; NaN where it has no room for it."""
        told = None
        if (model := self._model) is not None:
            asked = [
                (e.prompt, t.text.encode(errors="replace").decode()) for e, t in zip(exercises, texts, strict=True)
            ]
            fits = [n for n, both in enumerate(asked) if len(model.whole_text(*both)) <= model.max_length]
            found = model.rewards([asked[n][0] for n in fits], [asked[n][1] for n in fits])
            told = list(map(dict(zip(fits, found.tolist(), strict=True)).get, range(len(texts))))
        return np.array(hosts.exchange("learned rewards", told)[0], np.float64)

    def verdicts(self, exercises: Sequence[Exercise], answers: Sequence[str | None]) -> list[Verdict]:
        """What is known of each answer to its exercise. Equal ones are judged once."""
        keys = [(exercise.key, answer) for exercise, answer in zip(exercises, answers, strict=True)]
        places = {key: place for place, key in reversed(list(enumerate(keys)))}
        told = None
        if not hosts.index():
            some = list(places.values())
            found = self._judged([exercises[i] for i in some], [answers[i] for i in some])
            told = [[verdict.share, verdict.reason] for verdict in found]
        told = hosts.exchange("verdicts", told)[0]
        by_key = dict(zip(places, (Verdict(*one) for one in told), strict=True))
        return [by_key[key] for key in keys]

    def _judged(self, exercises: Sequence[Exercise], answers: Sequence[str | None]) -> list[Verdict]:
        """What can be told here at once, then answers that take a process, then programs."""
        found = [at_once(exercise, answer) for exercise, answer in zip(exercises, answers, strict=True)]
        left = [place for place, verdict in enumerate(found) if verdict is None]
        asked = [place for place in left if exercises[place].scorer != "program"]
        judged = self._pool.check([_answer(exercises[i], answers[i] or "") for i in asked])
        for place, one in zip(asked, judged, strict=True):
            found[place] = Verdict(one.score, one.reason)
        run = [place for place in left if exercises[place].scorer == "program"]
        assert self._sandbox is not None or not run
        checked = self._sandbox.check([program(exercises[i], answers[i] or "") for i in run]) if self._sandbox else []
        for place, verdict in zip(run, checked, strict=True):
            share = None if verdict.passed is None else verdict.tests_passed / max(verdict.tests_total, 1)
            found[place] = Verdict(share, "" if verdict.passed else verdict.reason)
        return [verdict for verdict in found if verdict is not None]


def _scorers(family: Family) -> set[str]:
    """How a family's exercises are judged; without end they are all alike."""
    places = [(level, number) for level in family.levels for number in range(family.size(level) or 1)]
    return {family.exercise(level, number).scorer for level, number in places}


def _reward_model(path: str) -> LoadedModel:
    """Raises ``UserError`` if it is none."""
    model = load(path)
    if model.w_values_D is None:
        raise UserError(f"rewards.model is {path}, which gives no rewards; name there a run of method=reward")
    return model


def _close(pool: AnswerPool, sandbox: Sandbox | None) -> None:
    pool.close()
    if sandbox is not None:
        sandbox.close()


# ---------------------------------------------------------------- answers


def answer_of(exercise: Exercise, text: Text, form: AnswerForm) -> str | None:
    """What a text gives as its answer, of a program its source; None: it gives none."""
    if exercise.scorer != "program":
        answer = form.answer(text.text, text.ended)
        if exercise.scorer not in MAY_BE_BOXED:
            return answer
        found = boxed(text.text if answer is None else answer) or answer  # people and models box what they mean
        return found and unmarked(found)
    if form.template == "plain":
        return program_of(problem(exercise), text.text, text.ended)
    answer = form.answer(text.text, text.ended)
    return None if answer is None else program_of(problem(exercise), answer, True, chat=True)


def at_once(exercise: Exercise, answer: str | None) -> Verdict | None:
    """The verdict where it takes no other process; None: it does."""
    if answer is None:
        return Verdict(0.0, "no answer")
    if exercise.scorer == "program":
        return None
    if len(answer) > (max(MOST_CHARACTERS, MOST_TIMES * len(exercise.answer)) if exercise.answer else MOST_UNKNOWN):
        return Verdict(0.0, "too long")
    if exercise.scorer == "arithmetic":
        data = exercise.data
        return Verdict(float(reaches(answer, data["numbers"], data["target"], data["operators"], every=data["all"])))
    known = unmarked(exercise.answer) if exercise.scorer in MAY_BE_BOXED else exercise.answer
    if known and normalised(answer) == normalised(known):
        return Verdict(1.0)
    if exercise.scorer == "exact":
        return Verdict(0.0)
    if exercise.scorer == "words":
        return Verdict(float(words(known) == words(answer) is not None))
    if exercise.scorer == "math":
        right, given = whole_number(known), whole_number(answer)
        if right is not None and given is not None:
            return Verdict(float(right == given))
        if boxed(f"\\boxed{{{answer}}}") != answer:
            return Verdict(0.0, "braces that do not match")
    return None


def _answer(exercise: Exercise, text: str) -> Answer:
    return Answer(cast(Kind, exercise.scorer), exercise.answer, text, exercise.data)


# ---------------------------------------------------------------- other parts


def follows_form(
    exercises: Sequence[Exercise], texts: Sequence[Text], forms: Sequence[AnswerForm], answers: Sequence[str | None]
) -> Float64[np.ndarray, " N"]:
    """1 for each text of the form that was asked for, else 0."""

    def follows(exercise: Exercise, text: Text, form: AnswerForm, answer: str | None) -> bool:
        if exercise.scorer == "program" and form.template == "plain":
            added = (answer or "").removeprefix(exercise.data["prefix"])
            return bool(added.strip()) and not isinstance(parsed(answer or ""), str)
        return form.follows(text.text, text.ended, work=bool(form.work(exercise.solution)))

    found = [follows(*one) for one in zip(exercises, texts, forms, answers, strict=True)]
    return np.array(found, np.float64)


def work_shown(
    exercises: Sequence[Exercise], texts: Sequence[Text], forms: Sequence[AnswerForm]
) -> Float64[np.ndarray, " N"]:
    """The share of the known solution's work that each text begins with, of what is longer; 0 where none is known."""

    def shown(exercise: Exercise, text: Text, form: AnswerForm) -> float:
        known, own = form.work(exercise.solution).split(), form.work(text.text).split()
        same = next((i for i, (a, b) in enumerate(zip(known, own, strict=False)) if a != b), min(len(known), len(own)))
        return same / max(len(known), len(own), 1)

    return np.array([shown(*one) for one in zip(exercises, texts, forms, strict=True)], np.float64)


def shortness(lengths: Sequence[int], begin: int, end: int) -> Float64[np.ndarray, " N"]:
    """0 for each text of up to ``begin`` tokens, down to -1 at ``end`` and beyond."""
    return -np.clip((np.array(lengths, np.float64) - begin) / (end - begin), 0.0, 1.0)


# ---------------------------------------------------------------- programs of a fine-tuning run


def shares_passed(sandbox: Sandbox, programs: Sequence[Program]) -> list[float | None]:
    """The share of each program's hidden tests that it passes, from 0 to 1; None: nothing is known of it.

    A program that is there several times is run once. Of several processes the first one's word counts for all, so that
    they go on with the same numbers.
    """
    keys = [(p.code, p.entry_point, repr(p.tests)) for p in programs]
    first = {key: number for number, key in reversed(list(enumerate(keys)))}  # where each stands for the first time
    chosen = sorted(first.values())
    verdicts = sandbox.check([programs[i] for i in chosen] if not hosts.index() else [])
    shares = [None if v.passed is None else v.tests_passed / max(v.tests_total, 1) for v in verdicts]
    by_key = dict(zip([keys[i] for i in chosen], hosts.exchange("tests passed", shares)[0], strict=True))
    return [by_key[key] for key in keys]


def reward(
    passed: float | None, text: str, reference: str, likeness: Callable[[str, str], float], likeness_share: float
) -> float | None:
    """(1 - w) passed + w likeness(text, reference), from 0 to 1, or None if nothing is known of the tests.

    Args:
        passed: share of the tests.
        text: what was written.
        reference: a right one; empty: none is known, and tests alone count.
        likeness: of two texts, from 0 to 1.
        likeness_share: w. With 1 tests do not count.
    """
    share = likeness_share if reference else 0.0
    if passed is None and share < 1:
        return None
    return (1 - share) * (passed or 0.0) + (share * likeness(text, reference) if share else 0.0)
