"""What an engine is asked for, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, cast

import numpy as np

from dsjax.infer.detokenize import Detokenizer
from dsjax.infer.sampling import SamplingConfig

Finish = Literal["end", "stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be continued.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: new tokens at the most.
        sampling: how to choose.
        seed: of the choices: the same tokens, alone or among others.
        num_samples: continuations; number i has seed ``seed + i``. The prompt is computed once for all of them.
        end_ids: tokens that end it; None: the engine's; empty: none does.
        stop: texts that end it. The token that completes one is the last.
        first_tokens: a mask of the V tokens that may come first (see :func:`dsjax.infer.engine.heal`).
        healed: the token in whose place the first one comes: its text is not new.
        top_log_probs: how many of the likeliest tokens to tell at each place, up to the engine's.
    """

    prompt: Sequence[int]
    max_tokens: int = 256
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    num_samples: int = 1
    end_ids: Collection[int] | None = None
    stop: Sequence[str] = ()
    first_tokens: np.ndarray | None = None
    healed: int | None = None
    top_log_probs: int = 0


@dataclasses.dataclass(frozen=True)
class Event:
    """What has come of one continuation of a request.

    Attributes:
        request: its number.
        sample: number of the continuation.
        tokens: new ones, without the one that ends it.
        log_probs: what the model gave each.
        text: that became certain (empty if the engine has no tokenizer).
        top: for each token the likeliest ones with their log-probabilities, best first.
        finish: why there is no more; None: there is. ``end``: an end token; ``stop``: a stop string; ``length``: as
            many tokens as were asked for, or as fit; ``cancelled``.
    """

    request: int
    sample: int
    tokens: list[int]
    log_probs: list[float]
    text: str = ""
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish: Finish | None = None

    @property
    def ended(self) -> bool:
        """Whether this is the last one."""
        return self.finish is not None


@dataclasses.dataclass
class Running:
    """A continuation in the engine: its tokens so far, and how many of them are in the cache, if it has a row.

    ``keys`` are those of its prefixes on the batch part of its row.
    """

    number: int
    sample: int
    request: Request
    tokens: list[int]
    limit: int
    end_ids: frozenset[int]
    text: Detokenizer | None
    row: int = -1
    filled: int = 0
    keys: list[bytes] = dataclasses.field(default_factory=list)
    keys_of_part: dict[int, list[bytes]] = dataclasses.field(default_factory=dict)

    @property
    def order(self) -> tuple[int, int]:
        """What came first is served first."""
        return self.number, self.sample

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def decodes(self) -> bool:
        return self.filled == len(self.tokens)

    @property
    def seed(self) -> int:
        return (self.request.seed + self.sample) % 2**32

    def add(self, tokens: list[int], log_probs: list[float], top: list[list[tuple[int, float]]]) -> Event:
        """Takes what was decoded, up to where it ends."""
        text, taken, finish = "", 0, cast(Finish | None, None)
        for token in tokens[: self.limit - len(self.tokens)]:
            if token in self.end_ids:
                finish = "end"
                break
            taken += 1
            if self.text is not None:
                text += self.text.add(token)
                if self.text.stopped:
                    finish = "stop"
                    break
        self.tokens += tokens[:taken]
        self.filled = len(self.tokens)
        if finish is None and len(self.tokens) == self.limit:
            finish = "length"
        if finish is not None and self.text is not None:
            text += self.text.end()
        more = self.request.top_log_probs
        top = [best[:more] for best in top[:taken]] if more else []
        return Event(self.number, self.sample, tokens[:taken], log_probs[:taken], text, top, finish)

    def cancelled(self) -> Event:
        """The last event of what is not wanted any more."""
        return Event(self.number, self.sample, [], [], finish="cancelled")


@dataclasses.dataclass
class Completion:
    """All events of one continuation together."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    text: str = ""
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish: Finish | None = None


def collected(events: Iterable[Event]) -> dict[int, list[Completion]]:
    """The continuations of each request, by their numbers."""
    found: dict[int, dict[int, Completion]] = {}
    for event in events:
        all_of_it = found.setdefault(event.request, {}).setdefault(event.sample, Completion())
        all_of_it.tokens += event.tokens
        all_of_it.log_probs += event.log_probs
        all_of_it.text += event.text
        all_of_it.top += event.top
        all_of_it.finish = event.finish
    return {number: [samples[i] for i in sorted(samples)] for number, samples in found.items()}


@dataclasses.dataclass
class Counts:
    """What an engine did: tokens computed in prefill and taken over from earlier prompts, continuations preempted."""

    prefilled: int = 0
    reused: int = 0
    preempted: int = 0
