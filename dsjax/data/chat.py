"""Chat templates: how a conversation is written down for a model, as its tokenizer's files say it in Jinja.

A template comes with a model that anybody may have made: it runs in Jinja's immutable sandbox, as in transformers, and
sees nothing but the conversation and the names of special tokens.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, and whatever else a template looks at

NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # no text means anything by them


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template, and the names of the special tokens that it may use.

    Attributes:
        source: in Jinja.
        tokens: such as ``{"bos_token": "<s>"}``.
        origin: the file, for errors.
    """

    source: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    origin: str = "the chat template"

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **more: Any) -> str:
        """The conversation as one text, and by default what an answer begins with.

        Args:
            messages: what was said, first to last.
            add_generation_prompt: the model is to speak next.
            more: whatever else the template looks at: ``tools``, ``enable_thinking`` ...

        Raises:
            UserError: the template is wrong, or refuses the conversation.
        """
        given = {"tools": None, "documents": None, **self.tokens, **more}
        try:
            template = _compiled(self.source)
            return template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # whatever its code makes Python raise
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self.origin} can not write this conversation ({said})") from None

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True, **more: Any
    ) -> list[int]:
        """The ids of the conversation: control tokens where the template wrote them, and nowhere else.

        Those are special tokens, and added ones that the template spells. What looks like one in a message is text, but
        that a model's own words ("assistant") may have the latter. So it goes into the template between marks, which
        the tokenizer never sees.
        """
        everything = json.dumps([list(messages), more], ensure_ascii=False, default=str)
        mark = next((c for c in NONCHARACTERS if c not in everything), None)
        if mark is None:
            raise UserError("a conversation holds all 32 of Unicode's noncharacters")
        spelt = {name for name in tokenizer.added_ids if name in self.source}
        control = sorted({*tokenizer.special_ids, *spelt}, key=len, reverse=True)
        marked = [
            _marked(m, list(tokenizer.special_ids) if m.get("role") == "assistant" else control, mark) for m in messages
        ]
        text = self.render(marked, add_generation_prompt=add_generation_prompt, **_marked(more, control, mark))
        parts: list[str | int] = []
        for piece in re.split(f"({mark}(?:{_any_of(control)}){mark}|{_any_of(control)})", text):
            if piece in control:
                parts.append(tokenizer.added_ids[piece])
                continue
            piece = piece.replace(mark, "")
            if parts and isinstance(before := parts[-1], str):
                parts[-1] = before + piece
            elif piece:
                parts.append(piece)
        return tokenizer.encode_parts(parts, never=control)


def _any_of(names: Sequence[str]) -> str:
    return "|".join(map(re.escape, names)) or "(?!)"


def _marked(given: Any, names: Sequence[str], mark: str) -> Any:
    """``given`` with marks around the names in its texts, and where a text could complete one beside another text."""
    if isinstance(given, Mapping):
        return {k: v if k in ("role", "type") else _marked(v, names, mark) for k, v in given.items()}
    if isinstance(given, (list, tuple)):
        return [_marked(value, names, mark) for value in given]
    if not isinstance(given, str) or not given:
        return given
    text = re.sub(_any_of(names), lambda found: f"{mark}{found[0]}{mark}", given)
    ends = any(given.endswith(name[:n]) for name in names for n in range(1, len(name)))
    begins = any(given.startswith(name[-n:]) for name in names for n in range(1, len(name)))
    return (mark if begins else "") + text + (mark if ends else "")


# ---------------------------------------------------------------- the language


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` ... ``{% endgeneration %}`` marks what the model says, for training; here it is text."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own form)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
    # Jinja's own escapes for HTML.
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
