"""The tokenizer of a Hugging Face folder: ids for text, which tokens end one, and how a conversation is written down.

Read are ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json``, ``generation_config.json``,
``config.json`` and ``chat_template.jinja`` or ``chat_templates/NAME.jinja``. All but the first may be missing.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dsjax.config import UserError
from dsjax.data.chat import ChatTemplate
from dsjax.data.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class HFTokenizer:
    """What a folder says of text.

    Attributes:
        tokenizer: ids for text and back.
        end_ids: the tokens that end an answer.
        templates: chat templates by name; the only one, or the usual one, is ``default``.
    """

    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    templates: Mapping[str, ChatTemplate]


def load_hf_tokenizer(folder: str | pathlib.Path) -> HFTokenizer:
    """Reads it.

    Raises:
        UserError: a file is missing or wrong, or names a token that the tokenizer has not.
    """
    folder = pathlib.Path(folder)
    config, names = _json(folder / "tokenizer_config.json"), special_names(folder)
    if (end_token := end_token_of(folder)) is None:
        raise UserError(
            f"{folder}: neither tokenizer_config.json nor special_tokens_map.json has an eos_token, and no eos_token_id"
            " of generation_config.json or config.json is a special token of tokenizer.json"
        )
    tokenizer = load_tokenizer(folder / "tokenizer.json", end_token=end_token)
    tokenizer.begin_ids = tokenizer.put_in_front()
    if "add_bos_token" in config:
        if (begin := names.get("bos_token", "")) not in tokenizer.special_ids and config["add_bos_token"]:
            raise UserError(f"{folder}: add_bos_token is set; bos_token is {begin!r}, which is no special token")
        tokenizer.begin_ids = (tokenizer.special_ids[begin],) if config["add_bos_token"] else ()
    end_ids = tuple(dict.fromkeys((tokenizer.end_id, *stated_end_ids(folder))))
    return HFTokenizer(tokenizer, end_ids, load_templates(folder))


def end_token_of(folder: pathlib.Path) -> str | None:
    """The token that ends a text: the one that is named, else the first special one whose id is stated; None: neither.

    Raises:
        UserError: a file is wrong.
    """
    if (name := special_names(folder).get("eos_token")) is not None:
        return name
    added = _json(folder / "tokenizer.json").get("added_tokens")
    tokens = [t for t in added if isinstance(t, dict) and t.get("special")] if isinstance(added, list) else []
    names = {t["id"]: t["content"] for t in tokens if isinstance(t.get("id"), int) and "content" in t}
    return next((names[i] for i in stated_end_ids(folder) if i in names), None) if names else None


def stated_end_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """The ids that end a text by generation_config.json, or by config.json if that says nothing.

    Raises:
        UserError: a file is wrong.
    """
    for file in ("generation_config.json", "config.json"):
        stated = _json(folder / file).get("eos_token_id")
        if stated is not None:
            stated = stated if isinstance(stated, list) else [stated]
            if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in stated):
                raise UserError(f"{folder / file}: eos_token_id is {stated}; it must be an id, or a list of ids")
            return tuple(stated)
    return ()


def special_names(folder: pathlib.Path) -> dict[str, str]:
    """The special tokens by what they are for; tokenizer_config.json counts before special_tokens_map.json.

    Raises:
        UserError: a file is wrong.
    """
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in _json(folder / file).items():
            name = value.get("content") if isinstance(value, dict) else value
            if key in SPECIAL and name is not None:
                if not isinstance(name, str):
                    raise UserError(f"{folder / file}: {key} is {value!r}; it must be a text")
                found[key] = name
    return found


def load_templates(folder: pathlib.Path) -> dict[str, ChatTemplate]:
    """The chat templates by name: from files of their own if there are such, else from tokenizer_config.json.

    Raises:
        UserError: a file is wrong.
    """
    tokens, config = special_names(folder), folder / "tokenizer_config.json"
    files = {path.stem: path for path in sorted(folder.glob("chat_templates/*.jinja"))}
    if (usual := folder / "chat_template.jinja").is_file():
        files["default"] = usual
    if files:
        return {name: ChatTemplate(_text(path), tokens, str(path)) for name, path in files.items()}
    stated = _json(config).get("chat_template")
    if isinstance(stated, list):
        if not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in stated):
            raise UserError(f"{config}: chat_template is a list; each entry must have a name and a template")
        named = {t["name"]: t.get("template") for t in stated}
    else:
        named = {} if stated is None else {"default": stated}
    for name, source in named.items():
        if not isinstance(source, str):
            raise UserError(f"{config}: chat_template {name!r} is {source!r}; it must be a text")
    return {name: ChatTemplate(source, tokens, f"chat_template of {config}") for name, source in named.items()}


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object")
    return content
