"""The third stage: documents and pairs of one shard, as JSON lines."""

from __future__ import annotations

import collections
import hashlib
import json
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from dsjax.config import UserError
from dsjax.data.build.config import BuildConfig
from dsjax.data.build.filters import PYTHON
from dsjax.data.build.fim import fill_in_the_middle
from dsjax.data.build.pairs import pairs_of
from dsjax.data.build.repositories import Repository
from dsjax.data.build.scan import read_text
from dsjax.data.marked import Marked
from dsjax.metrics import write_atomic

Counts = collections.Counter[str]

# How a comment begins and ends, by suffix; "# " where nothing is said.
_SLASHES = (
    (".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".kt", ".go", ".rs", ".js", ".jsx", ".ts", ".tsx", ".mjs")
    + (".php", ".swift", ".scala", ".proto", ".cs")
)  # fmt: skip
_COMMENTS = dict.fromkeys(_SLASHES, ("// ", ""))
_COMMENTS |= dict.fromkeys((".html", ".htm", ".md", ".xml", ".vue"), ("<!-- ", " -->"))
_COMMENTS |= dict.fromkeys((".sql", ".lua", ".hs", ".lean"), ("-- ", ""))
_COMMENTS |= {
    ".css": ("/* ", " */"),
    ".tex": ("% ", ""),
    ".ml": ("(* ", " *)"),
    ".v": ("(* ", " *)"),
    ".rst": (".. ", ""),
}


def path_comment(path: str) -> str:
    """A line that names a file, as a comment of its language."""
    suffix = pathlib.PurePosixPath(path).suffix.lower()
    before, after = _COMMENTS.get(suffix, ("# ", ""))
    shown = path.encode("utf-8", errors="backslashreplace").decode()
    return before + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown) + after + "\n"


def write_part(
    listed: pathlib.Path,
    text: pathlib.Path,
    pairs: pathlib.Path | None,
    repositories: Sequence[Repository],
    cfg: BuildConfig,
) -> dict[str, int]:
    """Writes the shard of texts, and that of pairs, whole or not at all; returns what was counted.

    Raises:
        UserError: a file is no longer what it was when it was scanned.
    """
    counts = Counts()
    lines: list[str] = []
    pair_lines: list[str] = []
    groups = json.loads(listed.read_text(encoding="utf-8"))
    for group in groups:
        repository = repositories[group[0][0]]
        texts = [_checked(repository, path, sha256) for _, path, sha256, _ in group]
        lines.append(json.dumps(_document(repository.name, group, texts, cfg, counts)))
        if pairs is not None:
            pair_lines += map(json.dumps, _pairs(repository.name, group, texts))
    counts["documents"], counts["pairs"] = len(lines), len(pair_lines)
    counts["files"] = sum(map(len, groups))
    if pairs is not None:
        write_atomic(pairs, "".join(f"{line}\n" for line in pair_lines))
    write_atomic(text, "".join(f"{line}\n" for line in lines))
    return dict(counts)


def _checked(repository: Repository, path: str, sha256: str) -> str:
    text = read_text(repository.folder, path)
    if not isinstance(text, str) or hashlib.sha256(text.encode()).hexdigest() != sha256:
        raise UserError(f"{repository.folder / path} changed while the corpus was built; run the command again")
    return text


def _document(
    repository: str,
    group: Sequence[Sequence[Any]],
    texts: Sequence[str],
    cfg: BuildConfig,
    counts: collections.Counter[str],
) -> dict[str, Any]:
    """The record of one document: files one after another, each led by its path, cut for fill-in-the-middle or not."""
    paths = [path for _, path, _, _ in group]
    parts = []
    for path, text in zip(paths, texts, strict=True):
        parts += [path_comment(path) if cfg.path_comments else "", text, "" if text.endswith("\n") else "\n"]
    seed = f"{cfg.seed}/{repository}/{paths[0]}"
    draw = random.Random(seed.encode("utf-8", "surrogateescape"))  # as of the string; names may be any bytes
    python = all(path.lower().endswith(PYTHON) for path in paths)
    marked, done = fill_in_the_middle("".join(parts), python=python, cfg=cfg.fim, draw=draw)
    counts[f"fill-in-the-middle: {done}"] += 1
    counts["text bytes"] += len(marked.text.encode())
    files = [{"path": path, "license": license} for _, path, _, license in group]
    return marked.record(repository=repository, fim=done, files=files)


def _pairs(repository: str, group: Sequence[Sequence[Any]], texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for (_, path, _, license), text in zip(group, texts, strict=True):
        for pair in pairs_of(text) if path.lower().endswith(PYTHON) else ():
            marked = Marked(pair.head + pair.body, masked=((0, len(pair.head)),))
            origin = {"repository": repository, "path": path, "name": pair.name, "license": license}
            yield marked.record(prompt=pair.head, completion=pair.body, **origin)
