"""Configuration: frozen dataclasses, Python files with ``get_config()``, typed dotted overrides.

A config is a tree of frozen dataclasses. Every value is checked twice over: its type and bounds from the
annotation (``layers: PositiveInt``), and what only the class can know from its ``validate`` method. Whatever is
wrong becomes a :class:`UserError` of one sentence that names the key, the value found and what is allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import math
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        shown = [(sign, f"{value:,}" if isinstance(value, int) else f"{value:g}") for sign, value in parts]
        return " and ".join(f"{sign} {value}" for sign, value in shown if not value.endswith("inf"))


# What JAX counts in int32 and float32 can not be larger.
PositiveInt = Annotated[int, Bounds(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Bounds(ge=0, lt=2**31)]
Seed = Annotated[int, Bounds(ge=0, lt=2**32)]
PositiveFloat = Annotated[float, Bounds(gt=0, lt=1e38)]
NonNegativeFloat = Annotated[float, Bounds(ge=0, lt=1e38)]
Share = Annotated[float, Bounds(ge=0, le=1)]
OpenShare = Annotated[float, Bounds(ge=0, lt=1)]


# ---------------------------------------------------------------- types of fields


_type_hints: Callable[..., dict[str, Any]] = functools.cache(typing.get_type_hints)


def _fields(cls: type) -> dict[str, Any]:
    """Name -> annotation of a config class, resolved, ``Annotated`` kept."""
    hints = _type_hints(cls, include_extras=True)
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


def _shown(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _parse(text: str, annotation: Any, key: str) -> Any:
    """The value that ``text`` stands for as ``annotation``; UserError when it stands for none."""
    wrong = UserError(f"{key} is {_shown(text)}; it must be {_describe(annotation)}")
    if typing.get_origin(annotation) is Annotated:  # bounds are for `validate`
        annotation = typing.get_args(annotation)[0]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if len(_options(annotation)) > 1:
        if type(None) in args and text.lower() == "none":
            return None
        for option in args:
            if option is not type(None) and not _is_config(option):
                try:
                    return _parse(text, option, key)
                except UserError:
                    continue
        raise wrong
    if origin is Literal:
        by_text = {str(a): a for a in args}
        if text in by_text:
            return by_text[text]
        raise UserError(f"{wrong}{_nearest(text, list(by_text))}")
    if origin is tuple:
        if any(_is_config(o) for o in _options(args[0])):
            raise UserError(f"{key} is a list; set its parts, for example {key}.0.NAME=VALUE")
        return tuple(_parse(_unquote(item), args[0], key) for item in _items(text))
    if annotation is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if annotation in (int, float) and text.isascii():
        try:
            value = annotation(text)
        except ValueError:
            raise wrong from None
        if annotation is int or math.isfinite(value):
            return value
    if annotation is str:
        return _unquote(text)
    raise wrong


def _items(text: str) -> list[str]:
    """The entries of a list written as ``a,b``, ``(a,b)`` or ``[a,b,]``."""
    inner = text.strip()
    if inner[:1] + inner[-1:] in ("()", "[]") and not set(inner[1:-1]) & set("()[]"):
        inner = inner[1:-1]
    items = [item.strip() for item in inner.split(",")]
    return items if items[-1] else items[:-1]


def _unquote(text: str) -> str:
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text


def _nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean X?`` for the nearest of ``names``, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


# ---------------------------------------------------------------- overrides


@dataclasses.dataclass(frozen=True)
class _Override:
    """One value on its way to its place in the tree.

    Attributes:
        key: as given, for messages.
        text: what stands behind the ``=``.
        root: the whole config, to find the nearest key in.
        given: value by key of all overrides so far.
    """

    key: str
    text: str
    root: Any
    given: dict[str, str]


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """``config`` with each ``a.b=value`` put in; lists take an index (``model.groups.0.num_layers=2``) and a part
    takes several values at once (``mesh=fsdp=2,tensor=4``).

    Raises:
        UserError: unknown key (names the nearest), a value of the wrong type, a key given twice, no ``=``.
    """
    given: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"override {_shown(text)} is not of the form key=value, for example train.steps=100")
        config = _put(config, type(config), "", key.split("."), _Override(key, value, config, given))
    return config


def _put(node: Any, annotation: Any, here: str, path: list[str], override: _Override) -> Any:
    """``node``, which stands at the key ``here``, with the override's value put in at ``path`` below it."""
    if not path:
        return _put_value(node, annotation, here, override)
    name, rest = path[0], path[1:]
    below = f"{here}.{name}" if here else name
    if _is_config(node):
        annotations = _fields(type(node))
        if name not in annotations:
            known = [f"{here}.{n}" if here else n for n in annotations]
            hint = _nearest(override.key, [*known, *keys(override.root)])
            raise UserError(f"unknown key {override.key}{hint or '; known here: ' + ', '.join(known)}")
        new = _put(getattr(node, name), annotations[name], below, rest, override)
        return dataclasses.replace(node, **{name: new})
    if isinstance(node, tuple):
        if name not in map(str, range(len(node))):
            allowed = f"its entries are 0 to {len(node) - 1}" if node else "it is empty"
            raise UserError(f"unknown key {override.key}; {here} is a list without an entry {_shown(name)}: {allowed}")
        index = int(name)
        new = _put(node[index], _entry(annotation), below, rest, override)
        return node[:index] + (new,) + node[index + 1 :]
    parts = [option.__name__ for option in _options(annotation) if _is_config(option)]
    hint = f"; the config file can set it to {' or '.join(parts)}()" if node is None and parts else ""
    shown = "none" if node is None else f"the single value {_shown(node)}"
    raise UserError(f"unknown key {override.key}; {here} is {shown}{hint}")


def _entry(annotation: Any) -> Any:
    """The annotation of a list's entries."""
    lists = [option for option in _options(annotation) if typing.get_origin(option) is tuple]
    return typing.get_args(lists[0])[0]


def _put_value(node: Any, annotation: Any, here: str, override: _Override) -> Any:
    text = override.text
    leaves_out = type(None) in _options(annotation) and text.lower() == "none"
    if _is_config(node) and not leaves_out:
        parts = [part.partition("=") for part in text.split(",")]
        if not all(name and equals for name, equals, _ in parts):
            names = ", ".join(_fields(type(node)))
            raise UserError(f"{here} is a group of keys ({names}), found {_shown(text)}; write {here}.NAME=VALUE")
        for name, _, value in parts:
            inner = dataclasses.replace(override, key=f"{here}.{name}", text=value)
            node = _put(node, annotation, here, name.split("."), inner)
        return node
    for key, other in override.given.items():
        if f"{key}.".startswith(f"{here}.") or f"{here}.".startswith(f"{key}."):
            raise UserError(f"{here} is given twice, {key}={_shown(other)} and {here}={_shown(text)}; give it once")
    override.given[here] = text
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
    wrong = UserError(f"{key} is {_shown(value)}; it must be {_describe(annotation)}")
    bounds: list[Any] = []
    if typing.get_origin(annotation) is Annotated:
        annotation, *bounds = typing.get_args(annotation)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_config(value):
        if type(value) not in _options(annotation):
            raise UserError(f"{key} is a {type(value).__name__}; it must be {_describe(annotation)}")
        validate(value, key)
    elif len(_options(annotation)) > 1:
        for option in args:
            try:
                _check(value, option, key)
                return
            except UserError:
                continue
        raise wrong
    elif origin is Literal:
        if not any(type(value) is type(a) and value == a for a in args):
            raise wrong
    elif origin is tuple:
        if not isinstance(value, tuple):
            raise wrong
        for index, item in enumerate(value):
            _check(item, args[0], f"{key}.{index}")
    elif annotation is float:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # NaN is not either
            raise wrong
    elif type(value) is not annotation:
        raise wrong
    if not all(b.allow(value) for b in bounds if isinstance(b, Bounds)):
        raise wrong


# ---------------------------------------------------------------- files


_imported_from: dict[str, pathlib.Path] = {}  # what configs imported, and from beside which


@contextlib.contextmanager
def _importing_from(folder: pathlib.Path) -> Iterator[None]:
    """A variant calls the base beside it: `from tiny import get_config as base`; another folder may have one, too."""
    for name, other in _imported_from.items():
        if other != folder and (folder / f"{name}.py").exists():
            sys.modules.pop(name, None)
    paths, known = sys.path[:], set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = paths
        for name in sys.modules.keys() - known:
            if pathlib.Path(getattr(sys.modules[name], "__file__", None) or "").parent == folder:
                _imported_from[name] = folder


def load_config(path: str | pathlib.Path) -> Any:
    """What ``get_config()`` of a Python config file returns, or a run's config.json holds; unchecked.

    Raises:
        UserError: no such file, neither kind, no ``get_config``, or it fails.
    """
    path = pathlib.Path(path)
    try:
        found = path.is_file()
    except OSError as error:  # a name that no file can have
        raise UserError(f"no config file {_shown(str(path))}: {error.strerror}") from None
    if not found:
        beside = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"no config file {path}{_nearest(str(path), beside)}")
    if path.suffix == ".json":
        return from_dict(read_json(path), str(path))
    if path.suffix != ".py":
        raise UserError(f"config {path} must be a Python file (.py) with get_config(), or a run's config.json")
    spec = importlib.util.spec_from_file_location(f"dsjax_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        with _importing_from(path.parent.resolve()):
            spec.loader.exec_module(module)
            if not callable(getattr(module, "get_config", None)):
                raise UserError(f"config {path} has no function get_config()")
            config = module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        raise UserError(f"config {where} fails to load: {type(error).__name__}: {error}") from error
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
    try:
        config = _from_plain(data, "")
        if not _is_config(config):
            raise UserError("it holds no config")
        validate(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except RecursionError:
        raise UserError(f"{source}: it is nested too deeply to be a config") from None
    return config


def _from_plain(data: Any, key: str) -> Any:
    def below(name: Any) -> str:
        return f"{key}.{name}" if key else str(name)

    if isinstance(data, list):
        return tuple(_from_plain(v, below(i)) for i, v in enumerate(data))
    if not isinstance(data, dict):
        return data
    cls = _config_class(data.get("type"))
    annotations = _fields(cls)
    values = {name: _from_plain(v, below(name)) for name, v in data.items() if name != "type"}
    for name, value in values.items():
        if name not in annotations:
            raise UserError(f"unknown key {_shown(below(name))}{_nearest(name, annotations)}")
        _check(value, annotations[name], below(name))
    return cls(**values)


def _config_class(name: Any) -> type:
    """The class that ``module:Class`` names: a frozen dataclass of this library, with a default for every field."""
    if not (isinstance(name, str) and re.fullmatch(r"dsjax(\.[a-z][a-z0-9_]*)*:[A-Z][A-Za-z0-9]*", name)):
        raise UserError(f"the class {_shown(name)} is none of dsjax, and no other can be read")
    module_name, _, class_name = name.partition(":")
    try:
        cls: Any = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError:
        cls = None
    missing = dataclasses.MISSING
    if not (
        isinstance(cls, type)
        and _is_config(cls)
        and vars(cls)["__dataclass_params__"].frozen
        and all(f.init and (f.default, f.default_factory) != (missing, missing) for f in dataclasses.fields(cls))
    ):
        raise UserError(f"the class {name!r} is no config of this version")
    return cls


def read_json(path: str | pathlib.Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} can not be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and numbers of 5,000 digits
        raise UserError(f"{path} is not valid JSON: {error}") from None
