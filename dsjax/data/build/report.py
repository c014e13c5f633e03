"""What became of every file: report.json and report.md, and dropped.jsonl with each file that was dropped and why.

report.json:

    files: {"found", "kept": {"files", "bytes"}, "dropped": {reason: {"files", "bytes"}}}
    licenses: SPDX expression -> {"files", "bytes"} of what was kept
    repositories: {"found", "kept"}
    written: documents, pairs, bytes of text, and how many documents were cut for fill-in-the-middle in which way

Bytes are UTF-8 of the texts, or on the disk where a file was not read. Nothing depends on when or where the corpus was
built.
"""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsjax.data.build.repositories import Repository
from dsjax.data.build.scan import Scanned
from dsjax.metrics import write_atomic

JSON, TABLE, DROPPED = "report.json", "report.md", "dropped.jsonl"


def reasons(records: Iterable[Scanned]) -> str:
    """Why files were dropped, the most frequent reason first, in one line."""
    counts = collections.Counter(record.reason for record in records if record.reason)
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items(), key=lambda x: (-x[1], x[0])))


def summary(
    records: Sequence[Scanned], repositories: Sequence[Repository], counts: Iterable[Mapping[str, int]]
) -> dict[str, Any]:
    """The report as plain data; ``counts`` are those of the shards."""
    kept = [record for record in records if not record.reason]
    written: collections.Counter[str] = collections.Counter()
    for part in counts:
        written.update(part)
    assert written["files"] == len(kept)
    return {
        "repositories": {"found": len(repositories), "kept": len({record.repository for record in kept})},
        "files": {
            "found": _total(records),
            "kept": _total(kept),
            "dropped": _by(lambda r: r.reason, [record for record in records if record.reason]),
        },
        "licenses": _by(lambda r: r.license, kept),
        "written": dict(sorted(written.items())),
    }


def _total(records: Sequence[Scanned]) -> dict[str, int]:
    return {"files": len(records), "bytes": sum(record.size for record in records)}


def _by(key: Any, records: Iterable[Scanned]) -> dict[str, dict[str, int]]:
    groups: dict[str, list[Scanned]] = collections.defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return {name: _total(group) for name, group in sorted(groups.items(), key=lambda x: (-len(x[1]), x[0]))}


def write(
    folder: pathlib.Path, found: dict[str, Any], records: Iterable[Scanned], repositories: Sequence[Repository]
) -> None:
    """Writes the three files."""
    dropped = [
        json.dumps(
            {"repository": repositories[r.repository].name, "path": r.path, "reason": r.reason, "detail": r.detail}
        )
        for r in records
        if r.reason
    ]
    write_atomic(folder / DROPPED, "".join(f"{line}\n" for line in dropped))
    write_atomic(folder / JSON, json.dumps(found, indent=1) + "\n")
    write_atomic(folder / TABLE, table(found))


def table(found: dict[str, Any]) -> str:
    """The report for people, in Markdown."""
    files = found["files"]
    rows = [("found", files["found"]), *((f"dropped: {name}", total) for name, total in files["dropped"].items())]
    rows.append(("kept", files["kept"]))
    lines = ["| files | number | MB |", "|---|---:|---:|"]
    lines += [f"| {name} | {total['files']:,} | {total['bytes'] / 1e6:,.2f} |" for name, total in rows]
    lines += ["", "| licences of what was kept | number | MB |", "|---|---:|---:|"]
    lines += [f"| {name} | {t['files']:,} | {t['bytes'] / 1e6:,.2f} |" for name, t in found["licenses"].items()]
    repositories = found["repositories"]
    lines += ["", "| written | |", "|---|---:|"]
    lines.append(f"| repositories | {repositories['kept']:,} of {repositories['found']:,} |")
    lines += [f"| {name} | {count:,} |" for name, count in found["written"].items()]
    return "\n".join(lines) + "\n"
