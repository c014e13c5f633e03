"""Text of which some parts are special tokens, and some are not to be learned: how records say it, how it is encoded.

A record stays plain: ``text`` is everything, special tokens spelt out, so that any reader of text can use it.
``special`` and ``masked`` list spans of characters, ``[[begin, end], ...]``. Where a file of the corpus happens to hold
the name of a special token, no span points at it, and it stays text.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer

Span = tuple[int, int]  # of characters: begin, end


@dataclasses.dataclass(frozen=True)
class Marked:
    """A text and what is said of its parts; spans are sorted, not empty, and do not overlap one another.

    special: each is the name of one special token.
    masked: read by the model, but no target of the loss.
    """

    text: str
    special: tuple[Span, ...] = ()
    masked: tuple[Span, ...] = ()

    def record(self, **more: Any) -> dict[str, Any]:
        """The record that says this, with further fields behind."""
        spans = {"special": self.special, "masked": self.masked}
        return {"text": self.text} | {name: [list(s) for s in x] for name, x in spans.items() if x} | more


def joined(parts: Iterable[str], *, special: Iterable[int]) -> Marked:
    """The parts one after another; ``special`` are the places of those that are special tokens."""
    chosen, spans, at, texts = set(special), list[Span](), 0, list(parts)
    for number, part in enumerate(texts):
        if number in chosen:
            spans.append((at, at + len(part)))
        at += len(part)
    return Marked("".join(texts), tuple(spans))


def parse_marked(record: dict[str, Any], origin: str) -> Marked:
    """What a record says; ``origin`` names it in errors.

    Raises:
        UserError: it has no text, or spans that do not fit it.
    """
    text = record.get("text")
    if not isinstance(text, str):
        raise UserError(f"{origin}: 'text' must be a string, found {type(text).__name__}")
    found = {name: _spans(record.get(name, []), len(text), f"{origin}: {name!r}") for name in ("special", "masked")}
    return Marked(text, **found)


def _spans(given: Any, length: int, what: str) -> tuple[Span, ...]:
    before = 0
    spans: list[Any] = given if isinstance(given, list) else [None]
    for span in spans:
        right = isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)
        if not (right and before <= span[0] < span[1] <= length):
            raise UserError(f"{what} must be sorted spans [begin, end] within {length} characters, found {span!r}")
        before = span[1]
    return tuple((begin, end) for begin, end in spans)


def encode(marked: Marked, tokenizer: Tokenizer) -> tuple[Int32[np.ndarray, " T"], Float32[np.ndarray, " T"]]:
    """Ids, and the weight of each as a target: 0 where any character of it is masked, else 1. No boundaries are added.

    The text is cut at the borders of the masked spans, so that no token is on both sides.

    Raises:
        UserError: a special token is none of the tokenizer's.
    """
    borders = {0, len(marked.text), *(x for span in (*marked.special, *marked.masked) for x in span)}
    cuts = list(itertools.pairwise(sorted(borders)))
    parts = list[str | int]()
    for begin, end in cuts:
        piece = marked.text[begin:end]
        if not _inside(begin, marked.special):
            parts.append(piece)
        elif piece in tokenizer.special_ids:
            parts.append(tokenizer.special_ids[piece])
        else:
            raise UserError(
                f"the tokenizer has no special token {piece!r}: put it into data.special_tokens; it has"
                f" {', '.join(tokenizer.special_ids)}"
            )
    ids, weights = list[np.ndarray](), list[np.ndarray]()
    for (begin, _), form in zip(cuts, tokenizer.said(parts), strict=True):
        ids.append(np.asarray([form], np.int32) if isinstance(form, int) else tokenizer.encode_said(form))
        weights.append(np.full(ids[-1].size, not _inside(begin, marked.masked), np.float32))
    if not ids:
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    return np.concatenate(ids), np.concatenate(weights)


def _inside(place: int, spans: Sequence[Span]) -> bool:
    return any(begin <= place < end for begin, end in spans)
