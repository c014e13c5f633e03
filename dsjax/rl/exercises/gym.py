"""reasoning-gym's generators (Stojanovski et al. 2025, arXiv 2505.24760) as families ``gym/NAME``.

A level sets every attribute of the generator's curriculum to its value of that number. Entries are kept whole in
``Exercise.data``, so that an exercise can be judged by its own scorer without the generator that made it. Some are
judged here instead, since their scorers can be satisfied by texts that solve nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsjax.config import UserError
from dsjax.rl import gym_datasets, plain
from dsjax.rl.exercises.exercise import Exercise, Family, check_level
from dsjax.rl.exercises.form import AnswerForm

PREFIX = "gym/"
# Their scorers take any text for True, "0" for every probability, and -286 (or whatever holds 286) for 286.
OURS = {"game_of_life_halting": "exact", "coin_flip": "math", "gsm_symbolic": "math"}
# Expressions: their scorers would evaluate them, and that of puzzle24 takes numbers that were not given.
ARITHMETIC = ("countdown", "puzzle24")


@dataclasses.dataclass(frozen=True, eq=False)
class Gym(Family):
    """One generator. Needs reasoning-gym."""

    name: str
    levels: tuple[int, ...]
    form: AnswerForm = AnswerForm()

    def exercise(self, level: int, number: int) -> Exercise:
        """See :class:`Family`."""
        check_level(self, level)
        name = self.name.removeprefix(PREFIX)
        drawn = int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big")
        index = drawn % gym_datasets.SIZES.get(name, gym_datasets.SIZE)
        with _nothing_else_touched():
            entry = gym_datasets.dataset(name, level)[index]
        question, answer = entry["question"], entry["answer"]
        answer = answer.strip() if isinstance(answer, str) and name not in gym_datasets.UNORDERED else ""
        scorer, data = _judged(name, level, entry)
        return Exercise(
            family=self.name,
            level=level,
            prompt=self.form.prompt(f"{question}\n"),
            answer=answer,
            solution=self.form.solution("", answer) if answer else "",
            scorer=scorer,
            data=data,
            question=question,
        )


def names() -> tuple[str, ...]:
    """All families of reasoning-gym that can be used; none where it is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        return ()
    from reasoning_gym.factory import DATASETS

    return tuple(f"{PREFIX}{name}" for name in sorted(DATASETS) if name not in gym_datasets.REFUSED)


def family(name: str, form: AnswerForm) -> Gym:
    """The family of a name that begins with ``gym/``.

    Raises:
        UserError: reasoning-gym is not installed, or its generator of that name can not be used.
    """
    short = name.removeprefix(PREFIX)
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            f"exercises.families has {name!r}, but reasoning-gym is not installed: pip install 'dsjax[math]'"
        )
    if short in gym_datasets.REFUSED:
        raise UserError(f"exercises.families has {name!r}, which can not be used: {gym_datasets.REFUSED[short]}")
    return Gym(name, gym_datasets.levels(short), form)


def _judged(name: str, level: int, entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The scorer of an entry, and what it needs."""
    if name in OURS:
        return OURS[name], {}
    if name in ARITHMETIC:
        given = entry["metadata"]
        demands = {"numbers": given["numbers"], "target": given.get("target", 24)}
        return "arithmetic", {**demands, "operators": "+-*/", "all": True}
    return "gym", {"name": name, "level": level, "entry": plain.encode(entry, _as_plain)}


def _as_plain(x: Any) -> Any:
    """What stands for numpy's numbers and the like, as JSON."""
    if isinstance(x, np.generic):
        return plain.encode(x.item())
    if isinstance(x, np.ndarray):
        return plain.encode(x.tolist())
    for kind in (str, int, float, bool):
        if isinstance(x, kind):
            return plain.encode(kind(x))
    raise plain.NotPlain(f"{type(x).__name__} is not plain data")


@contextlib.contextmanager
def _nothing_else_touched() -> Iterator[None]:
    """Some generators seed numpy's shared stream of random numbers, or print."""
    state = np.random.get_state()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        np.random.set_state(state)
