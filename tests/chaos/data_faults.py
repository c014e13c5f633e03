"""Damage to the training data, before a run and during one: told with file and place, or counted; never trained on.

Half of the trials damage a source (JSONL, gzip, parquet, text) that a run was started with, and start again; the other
half damage the prepared tokens while batches are being read. Parquet is read by a C++ library, so all of it happens in
a child, see children.py.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pathlib
import random
import shutil
import time
from collections.abc import Callable
from typing import Any

from chaos import Goal
from chaos.children import failures
from chaos.mutations import mutate_bytes

NAME = "damaged, missing, replaced training data: named with file and byte, counted, or refused"
SHARDS, RECORDS = 6, 20
SEQ_LEN, BATCH = 32, 8


# ---------------------------------------------------------------- sources


def _texts(shard: int) -> list[str]:
    rng = random.Random(shard)
    return [" ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(25)) for _ in range(RECORDS)]


def _lines(shard: int) -> list[bytes]:
    return [json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(_texts(shard))]


def _write_parquet(path: pathlib.Path, shard: int) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(RECORDS)), "text": _texts(shard)})
    pyarrow.parquet.write_table(table, path, row_group_size=5, write_page_checksum=True)


# Suffix, writer of a shard, and whether the format has checksums: then what survives damage is what was there before.
SOURCES: tuple[tuple[str, Callable[[pathlib.Path, int], Any], bool], ...] = (
    ("jsonl", lambda path, shard: path.write_bytes(b"".join(_lines(shard))), False),
    ("jsonl.gz", lambda path, shard: path.write_bytes(gzip.compress(b"".join(_lines(shard)), mtime=0)), True),
    (
        "members.jsonl.gz",
        lambda path, shard: path.write_bytes(b"".join(gzip.compress(line, mtime=0) for line in _lines(shard))),
        True,
    ),
    ("parquet", _write_parquet, True),
    ("txt", lambda path, shard: path.write_text("\n".join(_texts(shard))), False),
)


def _damage_source(folder: pathlib.Path, rng: random.Random) -> str:
    """Damages one file of a folder; returns its name."""
    victim, other = rng.sample(sorted(folder.iterdir()), 2)
    kind = rng.randrange(6)
    if kind < 4:
        victim.write_bytes(mutate_bytes(victim.read_bytes(), rng))
    elif kind == 4:
        victim.unlink()
    else:
        shutil.copyfile(other, victim)
    return victim.name


def _try_source(place: pathlib.Path, rng: random.Random) -> str:
    from dsjax.config import UserError
    from dsjax.data.corpus import Source, changed_documents, check_damage, read_source

    number = rng.randrange(len(SOURCES))
    suffix, write, checked = SOURCES[number]
    folder = place / "source"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for shard in range(SHARDS):
        write(folder / f"part-{shard:05d}-of-{SHARDS:05d}.{suffix}", shard)
    source = Source(str(folder))
    before = read_source(source)
    name = _damage_source(folder, rng)
    try:
        after = read_source(source)
    except UserError:
        return ""
    kept = [(d.name, d.text) for d in after.documents]
    if kept == [(d.name, d.text) for d in before.documents] and not after.skipped:
        return ""  # an empty stretch, a comment in a header
    what = f"{suffix}, {name}"
    if name not in changed_documents(json.loads(json.dumps([before.digests])), [after.digests]):
        return f"{what}: the change is not named"
    if checked and not {text for _, text in kept} <= {d.text for d in before.documents}:
        return f"{what}: a record is used that was never there"
    damaged = [s for s in after.skipped if s.damaged]
    if not all(s.name.startswith(name) and s.records > 0 for s in damaged):
        return f"{what}: damage is said to be elsewhere: {damaged}"
    lost = len(before.documents) - len(kept) - sum(s.records for s in after.skipped)
    if checked and lost > 0 and (folder / name).exists() and (folder / name).stat().st_size:
        return f"{what}: {lost} records are neither used nor counted"
    if damaged:
        try:
            check_damage([after], 0.001)
            return f"{what}: damage passes the budget: {damaged}"
        except UserError as error:
            return "" if name in str(error) and "byte" in str(error) else f"{what}: told without the place: {error}"
    return ""


# ---------------------------------------------------------------- the prepared tokens, while they are read


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A cache to damage copies of, the config it was made with, and the batches that it gives."""

    config: Any
    cache: pathlib.Path
    batches: list[Any]


def _prepare(place: pathlib.Path) -> _Prepared:
    from small_runs import write_corpus

    from dsjax.data.corpus import Source
    from dsjax.data.prepare import DataConfig, prepare

    write_corpus(place / "corpus")
    sources = (Source(str(place / "corpus")),)
    cfg = DataConfig(sources=sources, vocab_size=280, seq_len=SEQ_LEN, batch_size=BATCH, held_out_share=0.1)
    tokens = int(prepare(cfg, place / "cache").report.training_tokens)
    count = 2 * tokens // (SEQ_LEN * BATCH) + 12  # two epochs, and what may have been read ahead
    return _Prepared(cfg, place / "cache", list(_batches(cfg, place / "cache", count)))


def _batches(cfg: Any, cache: pathlib.Path, count: int, at: int = -1, then: Callable[[], None] | None = None) -> Any:
    """Batches of a prepared corpus; before batch number ``at``, ``then`` is called."""
    import jax

    from dsjax.data.pipeline import make_batches
    from dsjax.data.prepare import prepare

    batches = make_batches(prepare(cfg, cache), cfg)
    try:
        for number in range(count):
            if number == at and then is not None:
                then()
            yield [leaf.tobytes() for leaf in jax.tree.leaves(next(batches))]
    finally:
        batches.close()


def _damage_tokens(file: pathlib.Path, kind: str, rng: random.Random) -> None:
    """Damages a token file that somebody has open."""
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    if kind == "flip":
        with file.open("r+b") as handle:
            handle.seek(at)
            handle.write(bytes([content[at] ^ 1 << rng.randrange(8)]))
    elif kind == "cut":
        os.truncate(file, rng.choice((0, at)))
    elif kind == "overwritten":
        with file.open("r+b") as handle:
            handle.write(rng.randbytes(len(content)))
    elif kind == "deleted":
        file.unlink()
    elif kind == "folder deleted":
        shutil.rmtree(file.parent)
    else:
        other = file.with_name("other")
        other.write_bytes(rng.randbytes(len(content)))
        other.rename(file)


HARMLESS = ("deleted", "folder deleted", "replaced")  # the file that is open stays as it is
KINDS = ("flip", "cut", "overwritten", *HARMLESS)


def _try_tokens(prepared: _Prepared, place: pathlib.Path, rng: random.Random) -> str:
    from dsjax.config import UserError
    from dsjax.data.prepare import prepare

    cache = place / "work"
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(prepared.cache, cache)
    (entry,) = cache.iterdir()
    kind, at = rng.choice(KINDS), rng.randrange(5)
    count, got, said = len(prepared.batches), [], ""
    try:
        for batch in _batches(prepared.config, cache, count, at, lambda: _damage_tokens(entry / "tokens_0", kind, rng)):
            got.append(batch)
    except UserError as error:
        said = str(error)
    if got != prepared.batches[: len(got)]:
        return f"tokens {kind}: damaged tokens came in a batch"
    if kind in HARMLESS:
        return f"tokens {kind}: stopped a run that had the file open: {said}" if said else ""
    if not said:
        return f"tokens {kind}: not noticed in two epochs"
    if not ("tokens_0 is damaged at byte" in said and "made anew" in said and "\n" not in said):
        return f"tokens {kind}: told without file, place and remedy: {said}"
    if [*_batches(prepared.config, cache, 3)] != prepared.batches[:3]:
        return f"tokens {kind}: the next start has other batches"
    return "" if prepare(prepared.config, cache).fingerprint else "no fingerprint"


def trials(place: pathlib.Path, seed: int, defended: bool) -> Callable[[int], str]:
    """Makes what is needed; gives a function from the number of a trial to what went wrong in it."""
    import logging

    logging.disable(logging.WARNING)
    if not defended:
        from dsjax.data import corpus, token_file

        corpus.check_damage = lambda readings, share: None
        corpus._digest = lambda items: str(len(items))
        token_file._check = lambda block: b"12345678"
    prepared = _prepare(place)
    _write_parquet(place / "warm.parquet", 0)  # the library's own memory is not the trials'

    def trial(index: int) -> str:
        rng = random.Random(f"{seed} {index}")
        try:
            return _try_tokens(prepared, place, rng) if index % 2 else _try_source(place, rng)
        except BaseException as error:
            return f"raised {type(error).__name__}: {str(error)[:200]}"

    return trial


def run(n: int, seed: int = 0) -> Goal:
    """Makes n trials, and a few with the defences off, of which some must fail."""
    begin = time.perf_counter()
    found = tuple(failures("chaos.data_faults", n, seed))
    few = min(n, 40)
    without = len(tuple(failures("chaos.data_faults", few, seed, defended=False)))
    return Goal(NAME, n, found, time.perf_counter() - begin, f"{without} of {few} fail with the checks off")
