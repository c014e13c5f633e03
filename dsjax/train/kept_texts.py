"""Texts that were written for exercises, with what they are worth, kept as they come: nothing is written twice.

A process that was killed leaves whole lines, and perhaps the beginning of one more. Texts follow from weights, config
and exercises, so the file says by which it was written, and another run does not go on with it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dsjax import hosts
from dsjax.config import UserError
from dsjax.evals.solved import as_judged
from dsjax.metrics import told_of, write_atomic
from dsjax.rl.exercises.exercise import Exercise
from dsjax.rl.rewards import Rewards
from dsjax.rl.rollout import Rollout

WRITTEN = "written.jsonl"  # in the folder of a run
CUT = "\N{REPLACEMENT CHARACTER}"  # stands in a text for bytes that are no UTF-8


@dataclasses.dataclass(frozen=True)
class Group:
    """What was written for an exercise, K texts.

    Attributes:
        texts: of them.
        tokens: of each, with the one that ended it.
        whole: whether it came to its end, and is a text that can be learned: not empty, and UTF-8.
        rewards: what each is worth; None: unknown.
        correct: 1 if it solves the exercise, else 0; None: unknown.
    """

    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    whole: tuple[bool, ...]
    rewards: tuple[float | None, ...]
    correct: tuple[float | None, ...]

    @property
    def counted(self) -> tuple[float | None, ...]:
        """The rewards of those that may be learned: a text that was cut off would be learned with an end there."""
        return tuple(reward if whole else None for reward, whole in zip(self.rewards, self.whole, strict=True))


def judged(rewards: Rewards, exercises: Sequence[Exercise], rollouts: Sequence[Sequence[Rollout]]) -> list[Group]:
    """The texts of some exercises with what they are worth."""
    texts = [[as_judged(text) for text in own] for own in rollouts]
    flat = [text for own in texts for text in own]
    found = rewards([e for e, own in zip(exercises, texts, strict=True) for _ in own], flat)

    def known(x_N: np.ndarray) -> list[tuple[float | None, ...]]:
        rows = x_N.reshape(len(texts), -1).tolist()
        return [tuple(None if math.isnan(x) else x for x in row) for row in rows]

    return [
        Group(
            tuple(text.text for text in own),
            tuple(len(text.tokens) + text.ended for text in own),
            tuple(text.ended and text.text != "" and CUT not in text.text for text in own),
            reward,
            correct,
        )
        for own, reward, correct in zip(texts, known(found.total_N), known(found.parts["correct"]), strict=True)
    ]


class Journal:
    """What was written so far, in ``RUN/written.jsonl``: the first line says of what, each further one has groups.

    Args:
        path: of the file.
        facts: what texts depend on.

    Raises:
        UserError: the texts there are of another config, or the file is damaged.
    """

    def __init__(self, path: pathlib.Path, facts: Mapping[str, Any]):
        self.path, self.groups = path, list[Group]()
        self._head: dict[str, Any] = {"facts": dict(facts), "checkpoint": ""}
        if self.path.exists():
            self._take_up()
        hosts.same("texts written", len(self.groups))

    def _take_up(self) -> None:
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path} can not be read: {error.strerror or error}") from None
        lines = content.split(b"\n")[:-1]  # behind the last line break is what a killed process left
        for number, line in enumerate(lines):
            try:
                found = json.loads(line)
                if number:
                    self.groups += [Group(**{name: tuple(x) for name, x in one.items()}) for one in found]
                else:
                    self._compare(found["facts"])
                    self._head["checkpoint"] = found["checkpoint"]
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
                raise UserError(
                    f"{self.path}, line {number + 1} is damaged; remove the file, and all of it is written anew"
                ) from None
        if not content.endswith(b"\n") and not hosts.index():
            write_atomic(self.path, b"".join(line + b"\n" for line in lines))

    def _compare(self, old: Mapping[str, Any]) -> None:
        new = self._head["facts"]
        for key in dict.fromkeys((*new, *old)):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{self.path} was written with {key}={old.get(key)}, now it is {new.get(key)}; give another --run,"
                    " or the old value"
                )

    def written_by(self, checkpoint: str) -> None:
        """Says which checkpoint writes, by the SHA-256 that its manifest states.

        Raises:
            UserError: what is there was written by another one.
        """
        if self.groups and self._head["checkpoint"] != checkpoint:
            raise UserError(
                f"{self.path} was written by another checkpoint than train.start_from has now; give another --run, or"
                " bring that one back"
            )
        self._head["checkpoint"] = checkpoint

    def add(self, groups: Sequence[Group]) -> None:
        """Keeps further groups, and brings them to the disk."""
        lines: list[Any] = [[dataclasses.asdict(group) for group in groups]]
        if not self.groups:
            lines.insert(0, self._head)
        self.groups += groups
        if not hosts.index():
            with told_of(self.path), self.path.open("ab" if len(lines) == 1 else "wb") as file:
                file.write(in_lines(lines))
                file.flush()
                os.fsync(file.fileno())


def in_lines(objects: Iterable[Any]) -> bytes:
    """Objects as lines of JSON."""
    return b"".join(json.dumps(one, allow_nan=False).encode() + b"\n" for one in objects)
