"""Manifests: what a folder holds, file by file with size and SHA-256, sealed so that damage to the list shows too.

A manifest is ``manifest.json``: ``{"body": {..., "files": {NAME: {"bytes", "sha256"}}}, "sha256": of the body}``. It is
written last. Whoever reads the folder verifies it first: every file that is listed, and no other, with its content.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Sequence
from typing import Any

FILE = "manifest.json"
MOST_BYTES = 2**28  # of a manifest: a hundred bytes for each file

_THREADS = min(8, os.cpu_count() or 1)  # SHA-256 lets other threads run
_SHA256 = re.compile("[0-9a-f]{64}")


class Damaged(Exception):
    """A folder does not hold what its manifest says; the message names the file and what differs."""


def files_of(folder: pathlib.Path, *, hidden: bool = False) -> list[str]:
    """The names of all files below ``folder`` but its manifest, sorted; hidden ones (a file system's own) left out.

    With ``hidden`` only hidden folders are left out.
    """
    names = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (pathlib.Path(place) / name).is_symlink()]
        inside = pathlib.Path(place).relative_to(folder)
        names += [(inside / name).as_posix() for name in (*files, *links) if hidden or not name.startswith(".")]
    return sorted(name for name in names if name != FILE)


def inventory(folder: pathlib.Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, each brought to the disk first."""

    def entry(name: str) -> dict[str, Any]:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}

    return dict(zip(names, _in_threads(entry, names), strict=True))


def write(folder: pathlib.Path, about: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest and brings it, and every folder below, to the disk."""
    body = json.loads(json.dumps(about | {"files": files}, allow_nan=False))
    with (folder / FILE).open("w", encoding="utf-8") as file:
        json.dump({"body": body, "sha256": seal(body)}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    for place, _, _ in os.walk(folder):
        sync_folder(pathlib.Path(place))


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder and those above it that are missing, and brings their names to the disk."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Brings the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(body: dict[str, Any]) -> str:
    """SHA-256 of a manifest's body, in canonical JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The body of a folder's manifest, its form and seal checked; the files are not looked at.

    Raises:
        Damaged: it is missing, malformed, changed, or names a file outside the folder.
    """
    path = folder / FILE
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise Damaged(f"{FILE} has {size} bytes, more than {MOST_BYTES}")
        sealed = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise Damaged(f"{FILE} is missing") from None
    except OSError as error:
        raise Damaged(f"{FILE} can not be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{FILE} is no JSON: {str(error)[:100]}") from None
    if not (isinstance(sealed, dict) and isinstance(body := sealed.get("body"), dict)):
        raise Damaged(f"{FILE} has no body")
    try:
        right = seal(body) == sealed.get("sha256")
    except (ValueError, RecursionError):
        right = False
    if not right:
        raise Damaged(f"{FILE} was changed: its SHA-256 is not the one it states")
    files = body.get("files")
    if not isinstance(files, dict):
        raise Damaged(f"{FILE} lists no files")
    for name, entry in files.items():
        if not stays_inside(name):
            raise Damaged(f"{FILE} names {name[:100]!r}, which is outside its folder")
        if not (isinstance(entry, dict) and _is_entry(entry)):
            raise Damaged(f"{FILE} states no size and SHA-256 of {name[:100]}")
    return body


def verify(folder: pathlib.Path, body: dict[str, Any], *, part: int = 0, parts: int = 1) -> None:
    """Compares a folder with the body of its manifest.

    Args:
        folder: where the files are.
        body: from :func:`read`.
        part: which of the files have their content hashed: every ``parts``-th of them, by size.
        parts: processes that share the work.

    Raises:
        Damaged: names the first file that is missing, not listed, or has another size or content.
    """
    files = body["files"]
    found = set(files_of(folder))
    for name in sorted(files.keys() | found):
        if name not in found:
            raise Damaged(f"{name} is missing")
        if name not in files:
            raise Damaged(f"{name} is not in its {FILE}")
        _check_size(folder, name, files[name]["bytes"])
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    for _ in _in_threads(lambda name: _check_content(folder, name, files[name]["sha256"]), by_size[part::parts]):
        pass


def stays_inside(name: str) -> bool:
    """Whether a file name, as a manifest or an index states it, is printable and relative and climbs nowhere."""
    parts = name.split("/")
    return name.isprintable() and not ({"", ".", ".."} & set(parts)) and not any(c in "\\:" for c in name)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _is_entry(entry: dict[str, Any]) -> bool:
    size, digest = entry.get("bytes"), entry.get("sha256")
    return type(size) is int and size >= 0 and isinstance(digest, str) and bool(_SHA256.fullmatch(digest))


def _check_size(folder: pathlib.Path, name: str, size: int) -> None:
    try:
        found = (folder / name).lstat()
    except OSError as error:
        raise Damaged(f"{name} can not be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{name} is no file")
    if found.st_size != size:
        raise Damaged(f"{name} has {found.st_size} bytes instead of {size}")


def _check_content(folder: pathlib.Path, name: str, sha256: str) -> None:
    try:
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Damaged(f"{name} can not be read: {error.strerror}") from None
    if found != sha256:
        raise Damaged(f"{name} was changed: its SHA-256 is {found[:12]} instead of {sha256[:12]}")


def _in_threads(function: Any, items: Sequence[str]) -> Iterator[Any]:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(function, items)
