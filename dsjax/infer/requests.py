"""What an engine is asked for, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal, cast

import numpy as np

from dsjax.config import UserError, validate
from dsjax.infer.detokenize import Detokenizer, check_stop
from dsjax.infer.grammar import Constraint, PythonGrammar
from dsjax.infer.reading import Reading
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
        first_tokens: a mask of the tokens that may come first (see :func:`dsjax.infer.engine.heal`), cut or filled up
            to the model's V. Probabilities that are told are the model's own, whatever may come.
        healed: the token in whose place the first one comes: its text is not new.
        top_log_probs: how many of the likeliest tokens to tell at each place, up to the engine's.
        grammar: what the text must stay within; it ends as a whole program. None: nothing. Of probabilities, as with
            ``first_tokens``.
        program: where the program begins: the number of tokens in front of it, of ``before`` and the prompt.
        before: tokens of the same text in front of the prompt, that the model does not see any more. Grammar and
            structure are read from there.
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
    grammar: PythonGrammar | None = None
    program: int = 0
    before: Sequence[int] = ()

    def check(self, max_length: int, top_log_probs: int, has_tokenizer: bool, draft: int = 0) -> None:
        """Raises UserError: the prompt is empty, or leaves no room for a token; a setting is out of range; the engine
        was not made for it.
        """
        length = len(self.prompt)
        if length == 0:
            raise UserError("a prompt is empty; give at least one token")
        if length >= max_length:
            raise UserError(f"a prompt has {length} tokens; the engine holds {max_length} with what it generates")
        validate(self.sampling)
        for name, least in (("max_tokens", 1), ("num_samples", 1), ("top_log_probs", 0), ("seed", None)):
            value = getattr(self, name)
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if not whole or (least is not None and value < least):
                allowed = "a whole number" if least is None else f"a whole number of at least {least}"
                raise UserError(f"{name} of a request is {value!r}; it must be {allowed}")
        if self.top_log_probs > top_log_probs:
            raise UserError(f"top_log_probs is {self.top_log_probs}; the engine was made for {top_log_probs}")
        if self.stop and not has_tokenizer:
            raise UserError("a request has stop strings; they need an engine that has a tokenizer")
        if self.grammar is not None and draft:
            raise UserError(f"draft is {draft}; a request with a grammar needs an engine that drafts no tokens")
        check_stop(self.stop)

    def check_tokens(self, vocab_size: int) -> None:
        """Raises UserError: the prompt has a token that the model has not, or only such ones may come first."""
        for token in (min(self.prompt), max(self.prompt)):
            if not 0 <= token < vocab_size:
                raise UserError(f"a prompt has a token {token}; the model has those from 0 to {vocab_size - 1}")
        if self.first_tokens is not None and not np.any(self.first_tokens[:vocab_size]):
            raise UserError(
                f"first_tokens of a request allows no token of the model, which has those from 0 to {vocab_size - 1};"
                " it must allow one"
            )

    def constraint(self, end_ids: Collection[int]) -> Constraint | None:
        """What its grammar allows; None: anything.

        Raises:
            UserError: the prompt is not the beginning of a program.
        """
        if self.grammar is None:
            return None
        found = self.grammar.begin([*self.before, *self.prompt][self.program :], sorted(end_ids))
        if self.first_tokens is not None and not (self.first_tokens & found.mask(len(self.first_tokens))).any():
            raise UserError("none of the tokens that may come first is in the grammar")
        return found


@dataclasses.dataclass(frozen=True)
class Drafts:
    """What became of drafts: how many there were, how many of them were accepted, and in how many steps."""

    proposed: int = 0
    accepted: int = 0
    steps: int = 0

    def __add__(self, other: Drafts) -> Drafts:
        return Drafts(self.proposed + other.proposed, self.accepted + other.accepted, self.steps + other.steps)

    @property
    def share(self) -> float:
        """Of the drafts, how many were accepted."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Each step gives one token and the accepted drafts."""
        return 1 + self.accepted / self.steps if self.steps else 0.0

    def __str__(self) -> str:
        each = self.proposed // max(self.steps, 1)
        return f"accepted {self.share:.0%} of {each} drafts a step, {self.tokens_per_step:.1f} tokens a step"


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
        drafts: that these tokens took.
        end_log_prob: what the model gave the token that ended it; None: none did.
        experts: with the last one, of an engine that tells them: the experts that each position of prompt and text went
            to, (positions, L, K), as :class:`dsjax.models.output.DecoderOutput` has them; else None.
        finish: why there is no more; None: there is. ``end``: an end token; ``stop``: a stop string; ``length``: as
            many tokens as were asked for, or as fit; ``cancelled``.
    """

    request: int
    sample: int
    tokens: list[int]
    log_probs: list[float]
    text: str = ""
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    drafts: Drafts = Drafts()
    end_log_prob: float | None = None
    experts: np.ndarray | None = dataclasses.field(default=None, compare=False)
    finish: Finish | None = None

    @property
    def ended(self) -> bool:
        """Whether this is the last one."""
        return self.finish is not None


@dataclasses.dataclass
class Running:
    """A continuation in the engine: its tokens so far, and how many of them are in the cache, if it has a row.

    ``keys`` are those of its prefixes on the batch part of its row. What modules draft from is known of the positions
    from ``begun`` on. With structure, ``read_prompt`` reads the prompt once for all samples, and ``reading`` is where
    this one is. ``experts_SLK`` are the experts that its positions went to, -1 where that is not known yet; None: it is
    not told. ``unrestricted``: what the model gave all tokens that may come first together, and the likeliest of all;
    None: any may come.
    """

    number: int
    sample: int
    request: Request
    tokens: list[int]
    limit: int
    end_ids: frozenset[int]
    text: Detokenizer | None
    constraint: Constraint | None = None
    read_prompt: Callable[[], Reading] | None = None
    reading: Reading | None = None
    row: int = -1
    filled: int = 0
    begun: int = 0
    experts_SLK: np.ndarray | None = None
    unrestricted: tuple[Any, Any, Any] | None = None
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

    def begin_reading(self) -> None:
        """From now on there are the features of its tokens, if the model is told any."""
        if self.reading is None and self.read_prompt is not None:
            self.reading = self.read_prompt().copy(self.limit)

    def begin_telling(self, sizes: tuple[int, int], dtype: np.dtype, known: Sequence[np.ndarray | None]) -> None:
        """From now on there is room for its decisions; at its beginning, ``known`` are those of its first positions.

        Of one that had to give its row back they are known: it is computed again by the same.
        """
        if self.experts_SLK is None:
            self.experts_SLK = np.full((self.limit, *sizes), -1, dtype)
            begin = 0
            for experts_TLK in known:
                assert experts_TLK is not None, "a prefix was kept without its decisions"
                self.experts_SLK[begin : begin + len(experts_TLK)] = experts_TLK
                begin += len(experts_TLK)

    def add(self, new: Decoded, draft: int) -> Event:
        """Takes what was decoded, with ``draft`` drafts a step, up to where it ends."""
        if self.num_new == 0 and self.unrestricted is not None:
            new = new.among_all(*self.unrestricted)
        text, taken, finish = "", 0, cast(Finish | None, None)
        for token in new.tokens[: self.limit - len(self.tokens)]:
            if token in self.end_ids:
                finish = "end"
                break
            taken += 1
            if self.text is not None:
                text += self.text.add(token)
                if self.text.stopped:
                    finish = "stop"
                    break
        tokens, used = new.tokens[:taken], new.drafted[: taken + (finish == "end")]
        if self.experts_SLK is not None and new.experts is not None:
            self.experts_SLK[len(self.tokens) : len(self.tokens) + taken] = new.experts[:taken]
        self.tokens += tokens
        self.filled = len(self.tokens)
        if finish is None and len(self.tokens) == self.limit:
            finish = "length"
        if finish is not None and self.text is not None:
            text += self.text.end()
        more = self.request.top_log_probs
        top = [best[:more] for best in new.top[:taken]] if more else []
        steps, accepted = used.count(False), used.count(True)
        drafts = Drafts(steps * draft, accepted, steps if draft else 0)
        end = new.log_probs[taken] if finish == "end" else None
        experts = None if finish is None or self.experts_SLK is None else self.experts_SLK[: len(self.tokens)]
        return Event(self.number, self.sample, tokens, new.log_probs[:taken], text, top, drafts, end, experts, finish)

    def cancelled(self) -> Event:
        """The last event of what is not wanted any more."""
        return Event(self.number, self.sample, [], [], finish="cancelled")


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What was decoded of a row: tokens, their log-probabilities, the likeliest ones, and which of them were drafts.

    And the experts that each went to, if that is told.
    """

    tokens: list[int]
    log_probs: list[float]
    top: list[list[tuple[int, float]]]
    drafted: list[bool]
    experts: np.ndarray | None = None

    def among_all(self, log_prob: Any, top_X: Any, top_log_prob_X: Any) -> Decoded:
        """With the first token as the model saw it, which gave all that might come there ``log_prob`` together."""
        first = [own + float(log_prob) for own in self.log_probs[:1]]
        best = list(zip(np.asarray(top_X).tolist(), np.asarray(top_log_prob_X).tolist(), strict=True))
        top = [best for _ in self.top[:1]]
        return dataclasses.replace(self, log_probs=first + self.log_probs[1:], top=top + self.top[1:])


@dataclasses.dataclass
class Completion:
    """All events of one continuation together."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    text: str = ""
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    drafts: Drafts = Drafts()
    end_log_prob: float | None = None
    experts: np.ndarray | None = dataclasses.field(default=None, compare=False)
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
        all_of_it.drafts += event.drafts
        all_of_it.end_log_prob = event.end_log_prob
        all_of_it.experts = event.experts
        all_of_it.finish = event.finish
    return {number: [samples[i] for i in sorted(samples)] for number, samples in found.items()}


@dataclasses.dataclass
class Counts:
    """What an engine did: tokens computed in prefill and taken over from earlier prompts, continuations preempted, and
    what became of drafts."""

    prefilled: int = 0
    reused: int = 0
    preempted: int = 0
    drafts: Drafts = Drafts()
