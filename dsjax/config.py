"""Configuration: frozen dataclasses, Python files with ``get_config()``, typed dotted overrides.

A config is a tree of frozen dataclasses. Every value is checked twice over: its type and bounds from the
annotation (``layers: PositiveInt``), and what only the class can know from its ``validate`` method. Whatever is
wrong becomes a :class:`UserError` of one sentence that names the key, the value found and what is allowed.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import json
import math
import pathlib
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user's, in one sentence; the command line prints it and exits with code 2."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits of a number, as annotation: ``Annotated[int, Bounds(ge=1)]``."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def allow(self, x: float) -> bool:
        return x >= self.ge and x > self.gt and x <= self.le and x < self.lt

    def __str__(self) -> str:
        parts = [(">=", self.ge), (">", self.gt), ("<=", self.le), ("<", self.lt)]
        return " and ".join(f"{sign} {value:g}" for sign, value in parts if math.isfinite(value))


PositiveInt = Annotated[int, Bounds(ge=1, le=2**48)]
NonNegativeInt = Annotated[int, Bounds(ge=0, le=2**48)]
Seed = Annotated[int, Bounds(ge=0, lt=2**32)]
PositiveFloat = Annotated[float, Bounds(gt=0)]
NonNegativeFloat = Annotated[float, Bounds(ge=0)]
Share = Annotated[float, Bounds(ge=0, le=1)]
OpenShare = Annotated[float, Bounds(ge=0, lt=1)]


# ---------------------------------------------------------------- types of fields


def _fields(cls: type) -> dict[str, Any]:
    """Name -> annotation of a config class, resolved, ``Annotated`` kept."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _is_config(x: Any) -> bool:
    return dataclasses.is_dataclass(x)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union (itself alone when it is none)."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _describe(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        limits = " ".join(str(a) for a in args[1:] if isinstance(a, Bounds) and str(a))
        return f"{_describe(args[0])} {limits}".strip()
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if len(_options(annotation)) > 1:
        return " or ".join(_describe(a) for a in args)
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _parse(text: str, annotation: Any, key: str) -> Any:
    """The value that ``text`` stands for as ``annotation``; UserError when it stands for none."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    wrong = UserError(f"{key} is {text!r}; it must be {_describe(annotation)}")
    if origin is Annotated:
        return _parse(text, args[0], key)
    if len(_options(annotation)) > 1:
        if type(None) in args and text.lower() == "none":
            return None
        for option in args:
            if option is type(None) or _is_config(option):
                continue
            try:
                return _parse(text, option, key)
            except UserError:
                continue
        raise wrong
    if origin is Literal:
        by_text = {str(a): a for a in args}
        if text in by_text:
            return by_text[text]
        raise UserError(f"{key} is {text!r}; it must be {_describe(annotation)}{_nearest(text, list(by_text))}")
    if origin is tuple:
        if any(_is_config(o) for o in _options(args[0])):
            raise UserError(f"{key} is a list; set its parts, for example {key}.0.NAME=VALUE")
        inner = text.strip()
        if inner[:1] in "([" and inner[-1:] in ")]" and len(inner) >= 2:
            inner = inner[1:-1]
        items = [part.strip() for part in inner.split(",") if part.strip()]
        return tuple(_parse(_unquote(item), args[0], key) for item in items)
    if annotation is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise wrong
    if annotation in (int, float):
        try:
            value = annotation(text)
        except (ValueError, OverflowError):
            raise wrong from None
        if not math.isfinite(value):
            raise wrong
        return value
    if annotation is str:
        return _unquote(text)
    raise UserError(f"{key} can not be set from the command line; set its parts or edit the config file")


def _unquote(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        try:
            return str(ast.literal_eval(text))
        except (ValueError, SyntaxError):
            return text
    return text


def _nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean X?`` for the nearest of ``names``, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


# ---------------------------------------------------------------- overrides


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """``config`` with each ``a.b=value`` put in; lists take an index (``model.groups.0.num_layers=2``) and a part
    takes several values at once (``mesh=fsdp=2,tensor=4``).

    Raises:
        UserError: unknown key (names the nearest), a value of the wrong type, a key given twice, no ``=``.
    """
    seen: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} is not of the form key=value, for example train.steps=100")
        if key in seen:
            raise UserError(f"{key} is given twice, as {seen[key]!r} and {text!r}; give it once")
        seen[key] = text
        config = _replace(config, key.split("."), text, "", config)
    return config


def _replace(node: Any, path: list[str], text: str, prefix: str, root: Any) -> Any:
    name, rest = path[0], path[1:]
    here = f"{prefix}.{name}" if prefix else name
    if isinstance(node, tuple):
        if not (name.isascii() and name.isdigit() and int(name) < len(node)):
            allowed = f"0 to {len(node) - 1}" if node else "none: it is empty"
            raise UserError(f"{here} names no entry of {prefix}; it has {len(node)} (allowed: {allowed})")
        index = int(name)
        return node[:index] + (_replace_value(node[index], None, rest, text, here, root),) + node[index + 1 :]
    annotations = _fields(type(node))
    if name not in annotations:
        known = [f"{prefix}.{n}" if prefix else n for n in annotations]
        asked = ".".join([here, *rest])
        hint = _nearest(here, known) or _nearest(asked, keys(root))
        raise UserError(f"unknown key {asked}{hint or '; known here: ' + ', '.join(known)}")
    value = _replace_value(getattr(node, name), annotations[name], rest, text, here, root)
    return dataclasses.replace(node, **{name: value})


def _replace_value(value: Any, annotation: Any, rest: list[str], text: str, here: str, root: Any) -> Any:
    if rest:
        if not (_is_config(value) or isinstance(value, tuple)):
            raise UserError(f"unknown key {here}.{'.'.join(rest)}; {here} is a single value, {value!r}")
        return _replace(value, rest, text, here, root)
    if _is_config(value):
        parts = [part for part in text.split(",") if part]
        if not parts or not all("=" in part for part in parts):
            names = ", ".join(_fields(type(value)))
            raise UserError(f"{here} is a group of keys ({names}), found {text!r}; write {here}.NAME=VALUE")
        for part in parts:
            key, _, inner = part.partition("=")
            value = _replace(value, key.split("."), inner, here, root)
        return value
    if annotation is None:  # an entry of a list of plain values: its type is that of what it replaces
        annotation = type(value)
    return _parse(text, annotation, here)


def keys(config: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a config, for messages."""
    out: list[str] = []
    items = enumerate(config) if isinstance(config, tuple) else ((n, getattr(config, n)) for n in _fields(type(config)))
    for name, value in items:
        here = f"{prefix}.{name}" if prefix else str(name)
        nested = _is_config(value) or (isinstance(value, tuple) and any(_is_config(v) for v in value))
        out += keys(value, here) if nested else [here]
    return out


# ---------------------------------------------------------------- checks


def validate(config: Any, prefix: str = "") -> None:
    """Checks type and bounds of every value, then each part's own ``validate``, inner parts first.

    Raises:
        UserError: the first thing found wrong, with its full key.
    """
    for name, annotation in _fields(type(config)).items():
        here = f"{prefix}.{name}" if prefix else name
        _check(getattr(config, name), annotation, here)
    own = getattr(config, "validate", None)
    if own is not None:
        try:
            own()
        except UserError as error:
            raise UserError(f"{prefix}.{error}" if prefix else str(error)) from None


def _check(value: Any, annotation: Any, key: str) -> None:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    wrong = UserError(f"{key} is {value!r}; it must be {_describe(annotation)}")
    if origin is Annotated:
        _check(value, args[0], key)
        if not all(b.allow(value) for b in args[1:] if isinstance(b, Bounds)):
            raise wrong
    elif _is_config(value):
        if type(value) not in _options(annotation):
            raise UserError(f"{key} is a {type(value).__name__}; it must be {_describe(annotation)}")
        validate(value, key)
    elif len(_options(annotation)) > 1:
        for option in args:
            try:
                return _check(value, option, key)
            except UserError:
                continue
        raise wrong
    elif origin is Literal:
        if value not in args:
            raise wrong
    elif origin is tuple:
        if not isinstance(value, tuple):
            raise wrong
        for index, item in enumerate(value):
            _check(item, args[0], f"{key}.{index}")
    elif annotation is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise wrong
    elif type(value) is not annotation:
        raise wrong


# ---------------------------------------------------------------- files


def load_config(path: str | pathlib.Path) -> Any:
    """What ``get_config()`` of a Python config file returns, unchecked.

    Raises:
        UserError: no such file, not Python, no ``get_config``, or it fails.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"no config file {path}{_nearest(str(path), beside)}")
    if path.suffix != ".py":
        raise UserError(f"config {path} must be a Python file (.py) with get_config()")
    spec = importlib.util.spec_from_file_location(f"dsjax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A variant calls the base beside it: `from tiny import get_config as base`.
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"config {path} has no function get_config()")
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"config {path} fails to load: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    if not _is_config(config) or isinstance(config, type):
        raise UserError(f"get_config() of {path} returned {type(config).__name__}, not a config dataclass")
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain data; each part carries its class under ``type`` so that it can be read back."""
    out: dict[str, Any] = {"type": f"{type(config).__module__}:{type(config).__qualname__}"}
    for name in _fields(type(config)):
        out[name] = _to_plain(getattr(config, name))
    return out


def _to_plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_plain(v) for v in value]
    return to_dict(value) if _is_config(value) else value


def from_dict(data: Any, source: str = "config.json") -> Any:
    """The inverse of :func:`to_dict`; only classes of this library are ever constructed.

    Raises:
        UserError: an unknown class or key, or values that do not pass :func:`validate`.
    """
    config = _from_plain(data, source)
    if not _is_config(config):
        raise UserError(f"{source} holds no config")
    validate(config)
    return config


def _from_plain(data: Any, source: str) -> Any:
    if isinstance(data, list):
        return tuple(_from_plain(v, source) for v in data)
    if not isinstance(data, dict):
        return data
    module_name, _, class_name = str(data.get("type", "")).partition(":")
    if not (module_name == "dsjax" or module_name.startswith("dsjax.")):
        raise UserError(f"{source} names the class {data.get('type')!r}; only classes of dsjax can be read")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError):
        cls = None
    if not (isinstance(cls, type) and _is_config(cls)):
        raise UserError(f"{source} names the class {data['type']!r}, which is no config of this version")
    values = {k: _from_plain(v, source) for k, v in data.items() if k != "type"}
    unknown = sorted(set(values) - set(_fields(cls)))
    if unknown:
        raise UserError(f"{source} has the unknown key {unknown[0]} in {class_name}")
    return cls(**values)


def read_json(path: str | pathlib.Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
