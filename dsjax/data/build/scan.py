"""The first stage: every candidate is read once, judged, and described by a record and a MinHash signature."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt64

from dsjax.config import UserError
from dsjax.data.build import licenses
from dsjax.data.build.config import BuildConfig
from dsjax.data.build.contamination import WIDTH
from dsjax.data.build.filters import reason_to_drop
from dsjax.data.build.imports import Import, imports_of
from dsjax.data.build.repositories import Candidate
from dsjax.data.dedup import NUM_HASHES, Shingles, signature
from dsjax.data.records import Skipped, read_file
from dsjax.metrics import write_atomic

CHUNK = 128  # files that are scanned together: what a killed build scans again at the most


@dataclasses.dataclass(frozen=True)
class Scanned:
    """What is known of a candidate.

    size: bytes of its text in UTF-8, or of the file where it was not read.
    sha256: of its text; empty where it was not read.
    license: an SPDX expression, or "unknown".
    reason, detail: why it is dropped; empty if it is not.
    """

    repository: int
    path: str
    size: int
    sha256: str
    license: str
    reason: str = ""
    detail: str = ""
    imports: tuple[Import, ...] = ()


def read_text(folder: pathlib.Path, path: str) -> str | Skipped:
    """The text of a file of a repository, or why it has none."""
    try:
        (found,) = read_file(folder / path, path, "text")
    except UserError as error:
        return Skipped(path, f"unreadable: {error}")
    return found if isinstance(found, Skipped) else found.text


def scan_file(folder: pathlib.Path, file: Candidate, cfg: BuildConfig) -> tuple[Scanned, str]:
    """The record of one candidate, and its text, empty where it is dropped."""
    place = folder / file.path
    unread = Scanned(file.repository, file.path, max(file.size, 0), "", file.license or licenses.UNKNOWN)
    if place.is_symlink():
        return dataclasses.replace(unread, reason="symbolic link", detail="what it points to is read where it lies"), ""
    limit = cfg.filters.max_bytes
    if limit and file.size > limit:
        return dataclasses.replace(unread, reason="too large", detail=f"{file.size} bytes, max_bytes is {limit}"), ""
    text = read_text(folder, file.path)
    if isinstance(text, Skipped):
        reason = "empty" if text.reason == "empty" else "unreadable"
        return dataclasses.replace(unread, reason=reason, detail=text.reason), ""
    content = text.encode()
    license = licenses.header(text) or file.license or licenses.UNKNOWN
    record = Scanned(file.repository, file.path, len(content), hashlib.sha256(content).hexdigest(), license)
    if refused := _refused(license, cfg):
        return dataclasses.replace(record, reason="licence", detail=refused), ""
    reason, detail = reason_to_drop(file.path, text, cfg.filters)
    if reason:
        return dataclasses.replace(record, reason=reason, detail=detail), ""
    return dataclasses.replace(record, imports=tuple(imports_of(file.path, text))), text


def _refused(license: str, cfg: BuildConfig) -> str:
    """What is wrong with a licence; empty if nothing is."""
    if license == licenses.UNKNOWN:
        return license if cfg.licenses.unknown == "drop" else ""
    allowed = not cfg.licenses.allow or licenses.permitted(license, cfg.licenses.allow)
    return "" if allowed else license


def scan_chunk(
    place: pathlib.Path,
    folders: Sequence[pathlib.Path],
    files: Sequence[Candidate],
    tests: UInt64[np.ndarray, " n"],
    cfg: BuildConfig,
) -> None:
    """Writes the records of some candidates to ``place`` (.json), their signatures beside it (.npy) before that.

    ``tests`` are the shingles of test data.
    """
    shingle, of_tests, nothing = Shingles(), Shingles(WIDTH), signature(np.empty(0, np.uint64))
    records, rows = [], []
    for file, folder in zip(files, folders, strict=True):
        record, text = scan_file(folder, file, cfg)
        if text and tests.size and np.isin(of_tests(text), tests).any():
            record = dataclasses.replace(record, reason="test data", detail=f"{WIDTH} tokens in a row", imports=())
            text = ""
        records.append(record)
        rows.append(signature(shingle(text)) if text and cfg.duplicates.level != "none" else nothing)
    buffer = io.BytesIO()
    np.save(buffer, np.stack(rows), allow_pickle=False)
    write_atomic(place.with_suffix(".npy"), buffer.getvalue())
    write_atomic(place, json.dumps([dataclasses.asdict(record) for record in records]))


def read_chunk(place: pathlib.Path) -> tuple[list[Scanned], UInt64[np.ndarray, "files hashes"]]:
    """What :func:`scan_chunk` wrote."""
    records = [Scanned(**_typed(entry)) for entry in json.loads(place.read_text(encoding="utf-8"))]
    rows = np.load(place.with_suffix(".npy"), allow_pickle=False)
    assert rows.shape == (len(records), NUM_HASHES), place
    return records, rows


def _typed(entry: dict[str, Any]) -> dict[str, Any]:
    found: Iterator[Import] = (Import(m, level, tuple(names), weak) for m, level, names, weak in entry["imports"])
    return entry | {"imports": tuple(found)}
