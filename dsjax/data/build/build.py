"""``dsjax data build``: from a folder of repositories to shards, in stages that can be stopped at any moment.

    list -> scan (in chunks) -> plan (duplicates, order, documents) -> write (in shards) -> report, manifest, rename

Work lies in ``.DST.building`` beside DST. Every file there is written whole or not at all, and says with its name which
part of the work it is, so a build that was killed goes on with what is missing. Each part depends on the source and the
config only: not on when, in how many pieces or by how many processes it was made. DST appears at the end, by a rename.

Memory: about 2 KB for each candidate and 6 KB more for each file that is kept (MinHash signature and LSH tables), the
imports of one repository, one document, and one shard.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dsjax import manifest
from dsjax.config import UserError, to_dict, validate
from dsjax.data.build import report
from dsjax.data.build.config import BuildConfig
from dsjax.data.build.contamination import shingles_of_tests
from dsjax.data.build.plan import documents, without_duplicates, write_parts
from dsjax.data.build.repositories import Candidate, Repository, candidates, content_digest, discover
from dsjax.data.build.scan import CHUNK, Scanned, read_chunk, read_text, scan_chunk
from dsjax.data.build.write import write_part
from dsjax.data.corpus import STDLIB
from dsjax.metrics import told_of, write_atomic

# Raise when the same source and config give other bytes.
VERSION = 1
Say = Callable[[int, int, str], None]  # done, of how many, what


@dataclasses.dataclass(frozen=True)
class _Job:
    """One piece of work: a function at the top of a module and its arguments, for this or another process."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.function(*self.arguments)


def build(
    source: str, target: pathlib.Path, cfg: BuildConfig, *, workers: int = 1, say: Say = lambda done, total, what: None
) -> dict[str, Any]:
    """Builds a corpus, or goes on with one; returns its report (see `dsjax.data.build.report`).

    Args:
        source: a repository, a folder of repositories, or "stdlib".
        target: a folder that does not exist yet. If it holds this very corpus already, nothing is done.
        cfg: how.
        workers: processes; no effect on the bytes.
        say: progress.

    Raises:
        UserError: a bad setting or path, nothing left after filtering, a target that is something else, a source that
            changes meanwhile.
    """
    validate(cfg)
    target = target.expanduser().absolute()
    repositories = discover(source, cfg)
    root = repositories[0].folder if source == STDLIB else pathlib.Path(source).expanduser()
    if root.resolve() in (target.resolve(), *target.resolve().parents):
        raise UserError(f"{target} is inside {root}, which is read; build into a folder beside it")
    files = candidates(repositories, cfg)
    tests = shingles_of_tests(cfg.decontaminate)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        return _finished(target, repositories, files, tests, cfg)
    with told_of(target):
        manifest.make_folder(target.parent)
        with _work_folder(target, _identity(repositories, files, tests, cfg)) as work:
            return _run(work, target, repositories, files, tests, cfg, workers, say)


def _run(
    work: pathlib.Path,
    target: pathlib.Path,
    repositories: Sequence[Repository],
    files: Sequence[Candidate],
    tests: np.ndarray,
    cfg: BuildConfig,
    workers: int,
    say: Say,
) -> dict[str, Any]:
    chunks = [files[at : at + CHUNK] for at in range(0, len(files), CHUNK)]
    places = [work / "scan" / f"{number:06d}.json" for number in range(len(chunks))]
    missing = [
        _Job(scan_chunk, (place, [repositories[f.repository].folder for f in chunk], chunk, tests, cfg))
        for place, chunk in zip(places, chunks, strict=True)
        if not place.exists()
    ]
    done = len(chunks) - len(missing)
    for number, _ in enumerate(_all(missing, workers), start=done + 1):
        say(min(number * CHUNK, len(files)), len(files), "files read")

    records, signatures = _scanned(places)
    say(0, 1, "looking for duplicates")
    records = without_duplicates(records, signatures, repositories, cfg)
    if all(record.reason for record in records):
        raise UserError(f"nothing is left of {len(records)} files: {report.reasons(records)}")
    parts = write_parts(work / "plan", documents(records, cfg), cfg.shard_bytes)

    out = work / "out"
    jobs, counted = [], [work / "done" / f"{number:05d}.json" for number in range(parts)]
    for number, place in enumerate(counted):
        name = f"part-{number:05d}-of-{parts:05d}.jsonl"
        pairs = out / "pairs" / name if cfg.pairs else None
        listed = work / "plan" / f"{number:05d}.json"
        if not place.exists():
            jobs.append(_Job(_write_counted, (place, listed, out / "text" / name, pairs, repositories, cfg)))
    for number, _ in enumerate(_all(jobs, workers), start=parts - len(jobs) + 1):
        say(number, parts, "shards written")

    counts = [json.loads(place.read_text(encoding="utf-8")) for place in counted]
    found = report.summary(records, repositories, counts)
    report.write(out, found, records, repositories)
    contents = [record.sha256 or f"{record.size} bytes" for record in records]
    about = {
        "kind": "corpus",
        "version": VERSION,
        "config": to_dict(cfg),
        "source": content_digest(repositories, files, contents, tests),
    }
    manifest.write(out, about, manifest.inventory(out, manifest.files_of(out)))
    out.rename(target)  # over an empty folder, too
    manifest.sync_folder(target.parent)
    return found


def _write_counted(place: pathlib.Path, *arguments: Any) -> None:
    write_atomic(place, json.dumps(write_part(*arguments)))


def _scanned(places: Sequence[pathlib.Path]) -> tuple[list[Scanned], np.ndarray]:
    records: list[Scanned] = []
    signatures: list[np.ndarray] = []
    for place in places:
        found, rows = read_chunk(place)
        records += found
        signatures.append(rows)
    return records, np.concatenate(signatures)


# ---------------------------------------------------------------- the folder of the work


def _identity(
    repositories: Sequence[Repository], files: Sequence[Candidate], tests: np.ndarray, cfg: BuildConfig
) -> str:
    """What a half of a build must agree in to be taken up: settings, and names, sizes and times of all files."""
    listed = [[r.name, str(r.folder.resolve())] for r in repositories], [dataclasses.astuple(f) for f in files]
    digest = hashlib.sha256(json.dumps([VERSION, to_dict(cfg), listed]).encode())
    digest.update(tests.tobytes())
    return digest.hexdigest()


def _work_place(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f".{target.name}.building")


@contextlib.contextmanager
def _work_folder(target: pathlib.Path, identity: str) -> Iterator[pathlib.Path]:
    """The folder beside the target where the work lies: this process's alone; emptied if it is of another build."""
    work = _work_place(target)
    work.mkdir(exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process builds {target}; wait for it, or take another folder") from None
        mark = work / "identity"
        if not mark.exists() or mark.read_text() != identity:
            mark.unlink(missing_ok=True)
            for name in ("scan", "plan", "done", "out"):
                shutil.rmtree(work / name, ignore_errors=True)
            write_atomic(mark, identity)
        for name in ("scan", "plan", "done", "out/text", "out/pairs"):
            (work / name).mkdir(parents=True, exist_ok=True)
        for folder in (work, *(p for p in work.rglob("*") if p.is_dir())):
            for half in folder.glob(".*.*"):  # what a killed process was writing
                if half.is_file():
                    half.unlink()
        try:
            yield work
        except UserError:  # the same command would end the same way
            shutil.rmtree(work, ignore_errors=True)
            raise
    shutil.rmtree(work, ignore_errors=True)


def _finished(
    target: pathlib.Path,
    repositories: Sequence[Repository],
    files: Sequence[Candidate],
    tests: np.ndarray,
    cfg: BuildConfig,
) -> dict[str, Any]:
    """The report of a corpus that is there already, if it is the one that is asked for."""
    try:
        body = manifest.read(target)
    except manifest.Damaged as error:
        raise UserError(f"{target} is there already and is no corpus ({error}); build into a new folder") from None
    if body.get("kind") != "corpus" or body.get("config") != json.loads(json.dumps(to_dict(cfg))):
        raise UserError(f"{target} holds something else (other settings); build into a new folder, or remove it")
    contents = [_content(repositories[file.repository], file, cfg) for file in files]
    if body.get("source") != content_digest(repositories, files, contents, tests):
        raise UserError(f"{target} was built from other files; build into a new folder, or remove it")
    try:
        manifest.verify(target, body)
    except manifest.Damaged as error:
        raise UserError(f"{target} is damaged ({error}); remove it and build again") from None
    shutil.rmtree(_work_place(target), ignore_errors=True)  # of a build that was killed behind its last step
    return json.loads((target / report.JSON).read_text(encoding="utf-8"))


def _content(repository: Repository, file: Candidate, cfg: BuildConfig) -> str:
    """As in `_run`: the SHA-256 of a text, or the size of what is not read."""
    limit = cfg.filters.max_bytes
    unread = (repository.folder / file.path).is_symlink() or (limit and file.size > limit)
    text = None if unread else read_text(repository.folder, file.path)
    return hashlib.sha256(text.encode()).hexdigest() if isinstance(text, str) else f"{max(file.size, 0)} bytes"


# ---------------------------------------------------------------- processes


def _all(jobs: Sequence[_Job], workers: int) -> Iterator[Any]:
    """The results of all jobs, as they come."""
    if workers <= 1 or len(jobs) <= 1:
        yield from (job() for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_end_with_parent
    ) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
