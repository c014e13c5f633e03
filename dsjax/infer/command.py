"""``dsjax generate``: continuations or answers, printed as they come."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh

from dsjax.config import UserError, validate
from dsjax.data.chat import ChatTemplate
from dsjax.data.tokenizer import Tokenizer
from dsjax.infer.batching import Engine
from dsjax.infer.engine import heal
from dsjax.infer.grammar import PythonGrammar
from dsjax.infer.requests import Completion, Drafts, Event, Request, collected
from dsjax.infer.sampling import SamplingConfig

ROWS = 64  # samples at a time
POSITIONS = 256  # lengths are rounded up to these: few shapes, few compilations
PAUSE = 0.1  # seconds without a token, if one token takes less


@runtime_checkable
class Loaded(Protocol):
    """What is generated from: see :func:`dsjax.load`."""

    @property
    def graph(self) -> Any: ...
    @property
    def params(self) -> Any: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def end_ids(self) -> tuple[int, ...]: ...
    @property
    def max_length(self) -> int: ...
    @property
    def templates(self) -> Mapping[str, ChatTemplate]: ...
    @property
    def mesh(self) -> Mesh: ...


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command, as ``dsjax generate --help`` tells them."""

    prompt: str = ""
    chat: bool = False
    system: str = ""
    max_tokens: int = 128
    n: int = 1
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    heal: bool = False
    json: bool = False
    quiet: bool = False
    draft: int = 0
    grammar: str = ""

    def check(self) -> None:
        """Raises UserError: a value is out of range, or does not go with another."""
        try:
            validate(self.sampling)
        except UserError as error:
            raise UserError(f"--{error}".replace("_", "-")) from None
        for name, value in (("max-tokens", self.max_tokens), ("n", self.n)):
            if value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1")
        if self.draft < 0:
            raise UserError(f"--draft is {self.draft}; it must be at least 0")
        if self.draft and self.grammar:
            raise UserError("--draft does not go with --grammar")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; it must be at least 0 and below 2**32")
        if "" in self.stop:
            raise UserError("--stop is empty; give the text to stop at")
        if self.system and not self.chat:
            raise UserError("--system goes with --chat")


def run(model: Loaded, options: Options, since: float | None = None) -> None:
    """Prints what the model makes of a prompt to standard output, and how fast to standard error.

    Args:
        model: what is asked.
        options: checked.
        since: when the command began, by :func:`time.perf_counter`.

    Raises:
        UserError: the model has no tokenizer or no chat template, or the prompt is too long for it.
    """
    begin = time.perf_counter()
    request, shown = request_of(model, options)
    length = len(request.prompt)
    if length >= model.max_length:
        raise UserError(f"a prompt has {length} tokens; the model holds {model.max_length} with what it generates")
    rows = model.mesh.shape["data"] * model.mesh.shape["expert"]
    engine = Engine(
        model.graph,
        model.params,
        end_ids=model.end_ids,
        max_length=min(model.max_length, -(-(length + options.max_tokens) // POSITIONS) * POSITIONS),
        batch_size=-(-min(options.n, ROWS) // rows) * rows,
        mesh=model.mesh,
        tokenizer=model.tokenizer,
        pause=PAUSE,
        draft=options.draft,
    )
    pace = Pace(begin, 0.0 if since is None else begin - since)
    events = pace.watched(engine.stream(request))
    if options.json:
        _print_json(events, options.n, options.draft)
    else:
        _print_text(events, options.n, shown)
    if not options.quiet:
        print(pace, file=sys.stderr)


def request_of(model: Loaded, options: Options) -> tuple[Request, str]:
    """What the engine is asked for, and what is printed in front of each continuation.

    Raises:
        UserError: the model has no tokenizer, no chat template, or a tokenizer that no grammar can be used with.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError("the model's folder has no tokenizer.json: there is no text without one")
    shown, first, healed, program = options.prompt, None, None, 0
    if options.chat:
        messages = [{"role": "system", "content": options.system}] if options.system else []
        messages.append({"role": "user", "content": options.prompt})
        ids, shown = template_of(model).encode(tokenizer, messages), ""
        program = len(ids)  # the answer is a program, not the question
    else:
        ids = [*tokenizer.begin_ids, *tokenizer.encode(options.prompt).tolist()]
        if options.heal:
            whole = ids
            ids, first = heal(tokenizer, whole)
            healed = whole[-1] if len(ids) < len(whole) else None
    sampling, samples, seed = options.sampling, options.n, options.seed
    grammar = PythonGrammar(tokenizer) if options.grammar else None
    return Request(
        ids, options.max_tokens, sampling, seed, samples, stop=options.stop, first_tokens=first, healed=healed,
        grammar=grammar, program=program,
    ), shown  # fmt: skip


def template_of(model: Loaded) -> ChatTemplate:
    """The usual chat template.

    Raises:
        UserError: there is none.
    """
    if "default" in model.templates:
        return model.templates["default"]
    if model.templates:
        raise UserError(f"--chat: no chat template is the default; there are {', '.join(sorted(model.templates))}")
    raise UserError("--chat: the model has no chat template (tokenizer_config.json, or chat_template.jinja)")


def _print_text(events: Iterator[Event], n: int, shown: str) -> None:
    """The first sample as it comes, each of the others when those before it have ended."""
    texts, ended, at, printed = [shown] * n, [False] * n, 0, 0
    for event in events:
        texts[event.sample] += event.text
        ended[event.sample] = event.ended
        while at < n:
            if n > 1 and printed == 0 and (texts[at] or ended[at]):
                print(f"--- sample {at + 1} of {n}")
            print(texts[at][printed:], end="", flush=True)
            printed = len(texts[at])
            if not ended[at]:
                break
            print()
            at, printed = at + 1, 0


def _print_json(events: Iterator[Event], n: int, draft: int) -> None:
    """A line for each sample when it ends; with what became of its drafts, if there are any."""
    so_far: list[list[Event]] = [[] for _ in range(n)]
    for event in events:
        so_far[event.sample].append(event)
        if event.ended:
            ((all_of_it,),) = collected(so_far[event.sample]).values()
            fields = _fields(event.sample, all_of_it)
            if draft:
                drafts = all_of_it.drafts
                fields |= {"drafted": drafts.proposed, "accepted": drafts.accepted, "steps": drafts.steps}
            print(json.dumps(fields, ensure_ascii=False), flush=True)


def _fields(sample: int, found: Completion) -> dict[str, Any]:
    return {
        "sample": sample,
        "text": found.text,
        "tokens": found.tokens,
        "log_probs": found.log_probs,
        "finish": found.finish,
    }


@dataclasses.dataclass
class Pace:
    """How fast tokens come, of all samples together.

    Attributes:
        begin: when the engine was asked for, by :func:`time.perf_counter`.
        loading: seconds that the model took before.
    """

    begin: float
    loading: float
    first: float = 0.0
    last: float = 0.0
    num_first: int = 0
    num_tokens: int = 0
    drafts: Drafts = Drafts()

    def watched(self, events: Iterator[Event]) -> Iterator[Event]:
        """The events, with an eye on the clock."""
        for event in events:
            self.last = time.perf_counter()
            if not self.num_first and event.tokens:
                self.first, self.num_first = self.last, len(event.tokens)
            self.num_tokens += len(event.tokens)
            self.drafts += event.drafts
            yield event

    def __str__(self) -> str:
        if not self.num_tokens:
            return "no tokens: the model ended at once"
        said = f"first token after {self.first - self.begin:.2f} s (and {self.loading:.2f} s of loading)"
        if (more := self.num_tokens - self.num_first) and self.last > self.first:
            said += f", then {more / (self.last - self.first):.1f} tokens/s"
        if self.drafts.proposed:
            said += f"; {self.drafts}"
        return f"{self.num_tokens} tokens: {said}"
