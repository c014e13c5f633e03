"""Reading documents: the standard library, folders of text, JSONL, parquet and globs.

A document is one text file, one line of a JSONL file or one row of a parquet file. What cannot be used (empty, or
not decodable) is listed beside the documents, never silently lost; what the user got wrong is a `UserError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import gzip
import hashlib
import io
import json
import os
import pathlib
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Iterator

from dsjax.config import PositiveFloat, UserError

STDLIB = "stdlib"

# What a folder yields. A file or a glob that the user names is read whatever its suffix is.
# fmt: off
TEXT_SUFFIXES = frozenset((
    ".py", ".pyi", ".txt", ".md", ".rst", ".tex", ".json", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".html", ".css",
    ".js", ".jsx", ".ts", ".tsx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".kt", ".go", ".rs", ".rb", ".php",
    ".swift", ".scala", ".lua", ".jl", ".r", ".sql", ".sh", ".ps1", ".hs", ".ml", ".lean", ".v", ".proto", ".cmake",
))
# fmt: on
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

# Folders of the standard library that hold tests or other people's code (wheels bundled for pip).
_STDLIB_SKIPPED = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled"))
# Nobody's own text, in any folder.
_SKIPPED = frozenset(("__pycache__", "node_modules"))


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from.

    path: "stdlib" (the *.py files of the running interpreter's standard library, without its tests), a folder (read
        recursively), a text, .jsonl, .jsonl.gz or .parquet file, or a glob.
    weight: share of this source in the rows of training, relative to the other sources.
    text_key: the field (JSONL) or column (parquet) that holds the text.
    """

    path: str = STDLIB
    weight: PositiveFloat = 1.0
    text_key: str = "text"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and a name to find it by: a path relative to its source, with a line or row number in record files."""

    name: str
    text: str

    @functools.cached_property
    def content(self) -> bytes:
        """The text in UTF-8: what every byte count refers to."""
        return self.text.encode()

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the content (32 bytes)."""
        return hashlib.sha256(self.content).digest()


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A document that was found and not used, and why ("empty" or "not UTF-8" and the like)."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Reading:
    """The documents of one source in the order of their names, and those skipped."""

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


def read_source(source: Source) -> Reading:
    """Reads every document of a source, in an order that depends on names only.

    Raises:
        UserError: the path does not exist, holds no document, or a record file is malformed or lacks `text_key`.
    """
    documents: list[Document] = []
    skipped: list[Skipped] = []
    num_files = 0
    for path, name in _list_files(source.path):
        num_files += 1
        for item in _read_file(path, name, source.text_key):
            if isinstance(item, Document) and item.text.strip():
                documents.append(item)
            else:
                skipped.append(item if isinstance(item, Skipped) else Skipped(item.name, "empty"))
    if not documents:
        found = f"{num_files} file(s), {len(skipped)} empty or undecodable document(s)"
        raise UserError(
            f"data source {source.path!r} holds no document: found {found}; a folder yields files that end in"
            f" {', '.join(RECORD_SUFFIXES)} or a text suffix such as .py, .txt, .md (a glob yields any file)"
        )
    return Reading(tuple(documents), tuple(skipped))


def _list_files(path: str) -> Iterator[tuple[pathlib.Path, str]]:
    """(file, name) pairs of a source, sorted by name."""
    if path == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        yield from _walk(root, skip_folders=_SKIPPED | _STDLIB_SKIPPED, suffixes=frozenset((".py",)))
        return
    root = pathlib.Path(path).expanduser()
    if root.is_dir():
        yield from _walk(root, skip_folders=_SKIPPED, suffixes=TEXT_SUFFIXES)
    elif root.exists():
        yield root, root.name
    elif glob.has_magic(path):
        # Path.glob takes no absolute pattern.
        files = sorted(pathlib.Path(p) for p in glob.glob(str(root), recursive=True))  # noqa: PTH207
        yield from ((p, p.as_posix()) for p in files if p.is_file())
    else:
        raise UserError(_missing_path(path, root))


def _walk(
    root: pathlib.Path, *, skip_folders: frozenset[str], suffixes: frozenset[str]
) -> Iterator[tuple[pathlib.Path, str]]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip_folders and not f.startswith(".")]
        for file in files:
            suffix = pathlib.PurePath(file.lower()).suffix
            is_record = suffixes is TEXT_SUFFIXES and file.lower().endswith(RECORD_SUFFIXES)
            if suffix in suffixes or is_record:
                names.append(pathlib.Path(folder, file).relative_to(root).as_posix())
    yield from ((root / name, name) for name in sorted(names))


def _missing_path(path: str, root: pathlib.Path) -> str:
    siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    near = difflib.get_close_matches(root.name, siblings, n=1)
    hint = f"; did you mean {str(root.parent / near[0])!r}?" if near else ""
    return f"data source {path!r} does not exist: give {STDLIB!r}, a folder, a file or a glob{hint}"


def _read_file(path: pathlib.Path, name: str, text_key: str) -> Iterable[Document | Skipped]:
    lower = path.name.lower()
    try:
        if lower.endswith((".jsonl", ".jsonl.gz")):
            return _read_jsonl(path, name, text_key)
        if lower.endswith(".parquet"):
            return _read_parquet(path, name, text_key)
        return [_read_text(path, name)]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _read_text(path: pathlib.Path, name: str) -> Document | Skipped:
    # Bytes are decoded by hand: text mode would translate newlines, and what is trained on must be what is on disk.
    content = path.read_bytes()
    encoding = "utf-8"
    try:
        if path.suffix.lower() in (".py", ".pyi"):
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return Document(name, content.decode(encoding))
    except SyntaxError:  # PEP 263: an unknown or contradictory encoding cookie
        return Skipped(name, "unknown encoding")
    except UnicodeDecodeError:
        return Skipped(name, f"not {encoding}")


def _read_jsonl(path: pathlib.Path, name: str, text_key: str) -> list[Document | Skipped]:
    content = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.decompress(content)
    items: list[Document | Skipped] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            items.append(Skipped(f"{name}:{number}", "not utf-8"))
            continue
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{place}: not a line of JSON ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{place}: a JSON object was expected, found {type(record).__name__}")
        _require_key(text_key, list(record), place)
        items.append(_as_document(f"{name}:{number}", record[text_key], text_key, place))
    return items


def _read_parquet(path: pathlib.Path, name: str, text_key: str) -> list[Document | Skipped]:
    import pyarrow.parquet  # large, and only these files need it

    try:
        # `partitioning=None`: the file alone decides its columns, not folder names such as `split=train`.
        schema = pyarrow.parquet.read_schema(path)
        _require_key(text_key, list(schema.names), str(path))
        values = pyarrow.parquet.read_table(path, columns=[text_key], partitioning=None).column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error
    return [
        _as_document(f"{name}:{number}", value, text_key, f"{path}, row {number}")
        for number, value in enumerate(values, start=1)
    ]


def _require_key(text_key: str, keys: list[str], place: str) -> None:
    if text_key not in keys:
        near = difflib.get_close_matches(text_key, keys, n=1, cutoff=0.0)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise UserError(f"{place}: no key {text_key!r} (text_key), found {', '.join(map(repr, keys)) or 'none'}{hint}")


def _as_document(name: str, value: object, text_key: str, place: str) -> Document | Skipped:
    if not isinstance(value, str):
        raise UserError(f"{place}: {text_key!r} must be a string, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair, which no UTF-8 text can hold
        return Skipped(name, "not utf-8")
    return Document(name, value)
