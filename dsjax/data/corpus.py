"""Reading documents: the standard library, folders of text, JSONL, parquet and globs.

A document is one text file, one line of a JSONL file or one row of a parquet file. What cannot be used (empty, or
damaged) is listed beside the documents with its file and offset, never silently lost; what the user got wrong is a
`UserError`, and so is more damage than `data.max_damaged_share`.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

from dsjax.config import PositiveFloat, UserError
from dsjax.data.records import RECORD_SUFFIXES, Document, Skipped, read_file

STDLIB = "stdlib"
MOST_SHARDS = 100_000  # a larger number in a name counts something else
_SHOWN = 3  # places that a message names

# What a folder yields. A file or a glob that the user names is read whatever its suffix is.
# fmt: off
TEXT_SUFFIXES = frozenset((
    ".py", ".pyi", ".txt", ".md", ".rst", ".tex", ".json", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".html", ".css",
    ".js", ".jsx", ".ts", ".tsx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".kt", ".go", ".rs", ".rb", ".php",
    ".swift", ".scala", ".lua", ".jl", ".r", ".sql", ".sh", ".ps1", ".hs", ".ml", ".lean", ".v", ".proto", ".cmake",
))
# fmt: on

# Folders of the standard library that hold tests or other people's code (wheels bundled for pip).
STDLIB_SKIPPED = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled"))
# Nobody's own text, in any folder.
SKIPPED = frozenset(("__pycache__", "node_modules"))


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from.

    path: "stdlib" (the *.py files of the running interpreter's standard library, without its tests), a folder (read
        recursively), a text, .jsonl, .jsonl.gz or .parquet file, or a glob.
    weight: share of this source in the rows of training, relative to the other sources.
    text_key: the field (JSONL) or column (parquet) that holds the text.
    marked: whether records of JSON lines say which parts of their text are special tokens, and which are not learned
        (`dsjax.data.marked`), as those of `dsjax data build` and `dsjax data tasks` do.
    """

    path: str = STDLIB
    weight: PositiveFloat = 1.0
    text_key: str = "text"
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Reading:
    """The documents of one source in the order of their names, those skipped, and a digest of each file.

    digests: file name -> 16 hexadecimal digits of a SHA-256 over its records, the skipped ones included.
    """

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]
    digests: dict[str, str]


def read_source(source: Source) -> Reading:
    """Reads every document of a source, in an order that depends on names only.

    Raises:
        UserError: the path does not exist, can not be read, holds no document, or no record has `text_key`.
    """
    documents: list[Document] = []
    skipped: list[Skipped] = []
    digests: dict[str, str] = {}
    most = 1
    for path, listed in _list_files(source.path):
        name = listed.encode("utf-8", "backslashreplace").decode()  # a file's name may be any bytes
        items = read_file(path, name, source.text_key, marked=source.marked)
        most = max(most, len(items))
        documents += [item for item in items if isinstance(item, Document)]
        skipped += [item for item in items if isinstance(item, Skipped)]
        digests[name] = _digest(items)
    if pathlib.Path(source.path).expanduser().is_dir():
        skipped += _missing_shards(list(digests))
    # Of a loss of unknown size the worst is assumed: as many records as the fullest file has.
    skipped = [s if s.records else dataclasses.replace(s, records=most) for s in skipped]
    if not documents:
        found = f"{len(digests)} file(s), {len(skipped)} empty or damaged record(s)"
        first = next((f", the first {_place(s)}" for s in skipped if s.damaged), "")
        raise UserError(
            f"data source {source.path!r} holds no document: found {found}{first}; a folder yields files that end in"
            f" {', '.join(RECORD_SUFFIXES)} or a text suffix such as .py, .txt, .md (a glob yields any file)"
        )
    return Reading(tuple(documents), tuple(skipped), digests)


def _digest(items: Sequence[Document | Skipped]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.digest if isinstance(item, Document) else f"{item.name}\0{item.reason}".encode())
    return digest.hexdigest()[:16]


_SHARD = re.compile(r"(.*[-_.])(\d+)(-of-)(\d+)(.*)")


def _missing_shards(names: Sequence[str]) -> list[Skipped]:
    """What the names of a folder's files say is not there: "train-00003-of-00010.parquet" and the like."""
    there: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        if found := _SHARD.fullmatch(name):
            before, number, of, total, after = found.groups()
            if 0 < int(total) <= MOST_SHARDS:
                there.setdefault((before, of, total, after), set()).add(int(number))
    missing = []
    for (before, of, total, after), numbers in there.items():
        count = int(total)
        first = 1 if count in numbers and 0 not in numbers else 0  # some count from one
        for number in sorted(set(range(first, first + count)) - numbers):
            name = f"{before}{number:0{len(total)}d}{of}{total}{after}"
            missing.append(Skipped(name, "missing: its name follows from those of the others", records=0))
    return missing


# ---------------------------------------------------------------- damage and change


def describe_skipped(readings: Sequence[Reading]) -> str:
    """What was found and not used, in one line; empty if everything was."""
    skipped = [s for reading in readings for s in reading.skipped]
    if not skipped:
        return ""
    damaged = [s for s in skipped if s.damaged]
    num_damaged = sum(s.records for s in damaged)
    total = sum(len(reading.documents) for reading in readings) + sum(s.records for s in skipped)
    num_empty = sum(s.records for s in skipped if not s.damaged)
    first = f", the first {_place(damaged[0])}" if damaged else ""
    return f"skipped {num_empty + num_damaged} of {total} records: {num_empty} empty, {num_damaged} damaged{first}"


def check_damage(readings: Sequence[Reading], max_damaged_share: float) -> None:
    """Compares the damaged records with how many there may be.

    Raises:
        UserError: there are more.
    """
    skipped = [(number, s) for number, reading in enumerate(readings) for s in reading.skipped]
    damaged = [(number, s) for number, s in skipped if s.damaged]
    lost = sum(s.records for _, s in damaged)
    total = sum(len(reading.documents) for reading in readings) + sum(s.records for _, s in skipped)
    if lost <= max_damaged_share * total:
        return
    places = "; ".join(f"data.sources.{number}: {_place(s)}" for number, s in damaged[:_SHOWN])
    more = f"; and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
    raise UserError(
        f"{lost} of {total} records of the training data are damaged ({lost / total:.3g} of them;"
        f" data.max_damaged_share is {max_damaged_share:g}): {places}{more}; mend or remove them, or raise"
        " data.max_damaged_share"
    )


def _place(skipped: Skipped) -> str:
    return f"{skipped.name} at byte {skipped.offset} ({skipped.reason})"


def changed_documents(before: Any, now: Sequence[dict[str, str]]) -> str:
    """Which files differ between two `Corpus.documents`, the earlier one as JSON gives it back; empty if none does."""
    if not (isinstance(before, list | tuple) and all(isinstance(files, dict) for files in before)):
        return "the list of the documents it had can not be read"
    if len(before) != len(now):
        return f"it had {len(before)} source(s), now there are {len(now)}"
    changes = []
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        kinds = {
            "changed": [name for name in new if name in old and old[name] != new[name]],
            "added": [name for name in new if name not in old],
            "removed": [name for name in old if name not in new],
        }
        for kind, names in kinds.items():
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                changes.append(f"{kind} in data.sources.{number}: {', '.join(sorted(names)[:_SHOWN])}{more}")
    return "; ".join(changes)


# ---------------------------------------------------------------- files


def _list_files(path: str) -> Iterator[tuple[pathlib.Path, str]]:
    """(file, name) pairs of a source, sorted by name."""
    if path == STDLIB:
        yield from _walk(stdlib_folder(), skip_folders=SKIPPED | STDLIB_SKIPPED, suffixes=frozenset((".py",)))
        return
    if not path:
        raise UserError(f"a data source has an empty path: give {STDLIB!r}, a folder, a file or a glob")
    try:
        root = pathlib.Path(path).expanduser()
        is_folder = root.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no permission, no such user
        raise UserError(f"data source {path!r} can not be read: {getattr(error, 'strerror', None) or error}") from None
    if is_folder:
        yield from _walk(root, skip_folders=SKIPPED, suffixes=TEXT_SUFFIXES)
    elif root.exists():
        yield root, root.name
    elif glob.has_magic(path):
        # Path.glob takes no absolute pattern.
        files = sorted(pathlib.Path(p) for p in glob.glob(str(root), recursive=True))  # noqa: PTH207
        yield from ((p, p.as_posix()) for p in files if p.is_file())
    else:
        raise UserError(missing_path(path, root))


def _walk(
    root: pathlib.Path, *, skip_folders: frozenset[str], suffixes: frozenset[str]
) -> Iterator[tuple[pathlib.Path, str]]:
    for name in walk(root, skip_folders):
        is_record = suffixes is TEXT_SUFFIXES and name.lower().endswith(RECORD_SUFFIXES)
        if is_record or pathlib.PurePath(name.lower()).suffix in suffixes:
            yield root / name, name


def stdlib_folder() -> pathlib.Path:
    """Where the running interpreter's standard library is."""
    return pathlib.Path(sysconfig.get_path("stdlib"))


def walk(root: pathlib.Path, skip_folders: frozenset[str] = SKIPPED) -> list[str]:
    """The names of all files below a folder, sorted, relative to it, with /; hidden and linked folders are left out.

    Raises:
        UserError: a folder can not be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    names = []
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [f for f in folders if f not in skip_folders and not f.startswith(".")]
        names += [pathlib.Path(folder, file).relative_to(root).as_posix() for file in files]
    return sorted(names)


def missing_path(path: str, root: pathlib.Path) -> str:
    """That a source does not exist, in one sentence that names the nearest one that does."""
    siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    near = difflib.get_close_matches(root.name, siblings, n=1)
    hint = f"; did you mean {str(root.parent / near[0])!r}?" if near else ""
    return f"data source {path!r} does not exist: give {STDLIB!r}, a folder, a file or a glob{hint}"
