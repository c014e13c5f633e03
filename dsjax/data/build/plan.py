"""The second stage: which files stay, in which order, and which of them make a document and a shard."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dsjax.data.build.config import BuildConfig
from dsjax.data.build.imports import dependencies
from dsjax.data.build.order import ordered
from dsjax.data.build.repositories import Repository
from dsjax.data.build.scan import Scanned, read_text
from dsjax.data.dedup import Shingles, find_duplicates
from dsjax.data.records import Skipped
from dsjax.metrics import write_atomic

_SETS = 512  # sets of shingles that are kept, for texts that are compared with many; 50 KB each


def without_duplicates(
    records: Sequence[Scanned], signatures: np.ndarray, repositories: Sequence[Repository], cfg: BuildConfig
) -> list[Scanned]:
    """The records, with "duplicate" or "near duplicate" as the reason of copies; others stay as they are."""
    kept = [i for i, record in enumerate(records) if not record.reason]
    if cfg.duplicates.level == "none" or not kept:
        return list(records)
    if cfg.duplicates.level == "file":
        groups = [[i] for i in kept]
    else:
        by_repository: dict[int, list[int]] = {}
        for i in kept:
            by_repository.setdefault(records[i].repository, []).append(i)
        groups = list(by_repository.values())

    def name(group: Sequence[int]) -> str:
        first = records[group[0]]
        repository = repositories[first.repository].name
        return f"{repository}/{first.path}" if cfg.duplicates.level == "file" else repository

    def digest(group: Sequence[int]) -> bytes:
        parts = sorted(bytes.fromhex(records[i].sha256) for i in group)
        return parts[0] if len(parts) == 1 else hashlib.sha256(b"".join(parts)).digest()

    shingle = Shingles()

    @functools.lru_cache(_SETS)
    def shingles_of(number: int) -> np.ndarray:
        sets = [shingle(_text(records[i], repositories)) for i in groups[number]]
        return sets[0] if len(sets) == 1 else np.unique(np.concatenate(sets))

    found = find_duplicates(
        [(digest(group), name(group)) for group in groups],
        shingles_of,
        lambda number: signatures[groups[number]].min(axis=0),
        cfg.duplicates.threshold,
    )
    out = list(records)
    for copy in found.dropped:
        is_same = digest(groups[copy.dropped]) == digest(groups[copy.kept])
        reason = "duplicate" if is_same else "near duplicate"
        detail = f"{copy.similarity:.3f} like {name(groups[copy.kept])}"
        for i in groups[copy.dropped]:
            out[i] = dataclasses.replace(records[i], reason=reason, detail=detail)
    return out


def _text(record: Scanned, repositories: Sequence[Repository]) -> str:
    text = read_text(repositories[record.repository].folder, record.path)
    return "" if isinstance(text, Skipped) else text  # that it changed is told where documents are written


def documents(records: Sequence[Scanned], cfg: BuildConfig) -> Iterator[list[Scanned]]:
    """The files of each document, in order, repository after repository."""
    for files in _by_repository(records):
        paths = {record.path: record for record in files}
        if cfg.order == "imports":
            order = ordered(dependencies({path: record.imports for path, record in paths.items()}))
        else:
            order = sorted(paths)
        yield from _grouped([paths[path] for path in order], cfg)


def _by_repository(records: Sequence[Scanned]) -> Iterator[list[Scanned]]:
    group: list[Scanned] = []
    for record in records:
        if group and group[0].repository != record.repository:
            yield group
            group = []
        if not record.reason:
            group.append(record)
    if group:
        yield group


def _grouped(files: Iterable[Scanned], cfg: BuildConfig) -> Iterator[list[Scanned]]:
    group: list[Scanned] = []
    size = 0
    for record in files:
        if group and (cfg.document == "file" or size + record.size > cfg.max_document_bytes):
            yield group
            group, size = [], 0
        group.append(record)
        size += record.size
    if group:
        yield group


def write_parts(folder: pathlib.Path, groups: Iterable[list[Scanned]], shard_bytes: int) -> int:
    """Writes which documents go into each shard, ``folder``/00000.json and so on; returns how many there are."""
    count = 0
    for part in _parts(groups, shard_bytes):
        listed = [[[r.repository, r.path, r.sha256, r.license] for r in group] for group in part]
        write_atomic(folder / f"{count:05d}.json", json.dumps(listed))
        count += 1
    return count


def _parts(groups: Iterable[list[Scanned]], shard_bytes: int) -> Iterator[list[list[Scanned]]]:
    part: list[list[Scanned]] = []
    size = 0
    for group in groups:
        more = sum(record.size for record in group)
        if part and size + more > shard_bytes:
            yield part
            part, size = [], 0
        part.append(group)
        size += more
    if part:
        yield part
