"""Needles in a haystack: facts hidden in a long row, asked for at its end.

A fact is three tokens, `fact name value`; everything between facts is filler. At the end of the row stand questions,
and what a model must give is in brackets:

    one    `ask name [value]`
    two    `ask name [value] name' [value']`     two facts from two places
    hops   `ask name [name' value]`              a chain: `fact name name'` and `fact name' value`

An answer counts when all of its tokens are the likeliest ones, each behind the right ones: that is when a model writes
it greedily. (As the needle test of Kamradt 2023, multi-query and tracing in RULER, Hsieh et al. 2024, and the
associative recall of Arora et al. 2024, in one small vocabulary.)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32

Kind = Literal["one", "two", "hops"]
KINDS: tuple[Kind, ...] = ("one", "two", "hops")


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """Rows of ``length`` tokens: facts hidden anywhere, ``questions`` at the end.

    Attributes:
        length: tokens in a row, T.
        facts: facts in a row; every question is about one or two of them.
        questions: asked at the end of a row.
        names: tokens that can be a name or, in a chain, what a name leads to.
        values: tokens that can be a value.
        fillers: tokens that stand between facts.
    """

    length: int
    facts: int = 16
    questions: int = 8
    names: int = 64
    values: int = 64
    fillers: int = 64

    END, FACT = 0, 1  # then one token for each kind of question

    @property
    def vocab_size(self) -> int:
        return 2 + len(KINDS) + self.names + self.values + self.fillers

    def name(self, n: np.ndarray) -> np.ndarray:
        return 2 + len(KINDS) + n

    def value(self, n: np.ndarray) -> np.ndarray:
        return 2 + len(KINDS) + self.names + n

    def filler(self, n: np.ndarray) -> np.ndarray:
        return 2 + len(KINDS) + self.names + self.values + n


@dataclasses.dataclass(frozen=True)
class NeedleRows:
    """Rows and what is asked in them.

    Attributes:
        tokens_BT: the rows; a question is followed by its answer.
        targets_BT: the next token.
        question_BT: where the target belongs to an answer: the number of its question, from 1; else 0.
        distance_BT: there, tokens back to the fact that tells it.
    """

    tokens_BT: Int32[np.ndarray, "B T"]
    targets_BT: Int32[np.ndarray, "B T"]
    question_BT: Int32[np.ndarray, "B T"]
    distance_BT: Int32[np.ndarray, "B T"]

    def share_right(self, predicted_BT: Int[np.ndarray, "B T"]) -> float:
        """Questions answered right, of all, when ``predicted_BT`` are the likeliest next tokens."""
        wrong = (predicted_BT != self.targets_BT) & (self.question_BT > 0)
        asked = {(row, n) for row, n in zip(*_where(self.question_BT > 0, self.question_BT), strict=True)}
        missed = {(row, n) for row, n in zip(*_where(wrong, self.question_BT), strict=True)}
        return 1 - len(missed) / len(asked)


def _where(chosen_BT: np.ndarray, question_BT: np.ndarray) -> tuple[list[int], list[int]]:
    rows, places = np.nonzero(chosen_BT)
    return rows.tolist(), question_BT[rows, places].tolist()


def needle_rows(cfg: NeedleConfig, kind: Kind, batch: int, seed: int) -> NeedleRows:
    """``batch`` rows of one kind; the same seed gives the same rows.

    Raises:
        ValueError: the facts and questions do not fit into the row, or there are not enough names.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    rows = [_row(cfg, kind, rng) for _ in range(batch)]
    tokens, question, distance = (np.stack(part).astype(np.int32) for part in zip(*rows, strict=True))
    return NeedleRows(tokens[:, :-1], tokens[:, 1:], question[:, 1:], distance[:, 1:])


def _row(cfg: NeedleConfig, kind: Kind, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T + 1 tokens; for those that answer something the number of the question, and how far back the fact lies."""
    T, chained, per_question = cfg.length + 1, kind == "hops", {"one": 3, "two": 5, "hops": 4}[kind]
    hay, num = T - cfg.questions * per_question, cfg.facts * (2 if chained else 1)
    about = cfg.questions * (2 if kind == "two" else 1)
    if num > cfg.names or 3 * num > hay or about > cfg.facts:
        raise ValueError(
            f"{cfg.facts} facts and {cfg.questions} questions ({kind}) do not fit into {cfg.length} tokens"
            f" and {cfg.names} names"
        )
    tokens, question, distance = cfg.filler(rng.integers(0, cfg.fillers, T)), np.zeros(T, int), np.zeros(T, int)
    names, values = cfg.name(rng.permutation(cfg.names)[:num]), cfg.value(rng.integers(0, cfg.values, cfg.facts))
    tells = np.concatenate([names[cfg.facts :], values]) if chained else values  # fact i: `names[i] tells[i]`
    gaps = np.sort(rng.choice(hay - 2 * num, num, replace=False))  # none of the facts, of three tokens each, overlap
    starts = rng.permutation(gaps + 2 * np.arange(num))
    for start, name, told in zip(starts, names, tells, strict=True):
        tokens[start : start + 3] = cfg.FACT, name, told

    at = hay
    for n, asked in enumerate(rng.permutation(cfg.facts)[:about].reshape(cfg.questions, -1), start=1):
        tokens[at] = 2 + KINDS.index(kind)
        at += 1
        for fact in asked:
            steps = (fact, fact + cfg.facts) if chained else (fact,)
            tokens[at] = names[fact]
            for step in steps:
                at += 1
                tokens[at], question[at], distance[at] = tells[step], n, at - starts[step]
            at += 1
    return tokens, question, distance
