"""Damaged checkpoints: noticed before the first step, named, set aside; the step before is taken."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from small_runs import Child, small_moe, state_hash

from chaos import Goal
from chaos.kills import EVERY, arguments, uninterrupted
from chaos.marked import on_all_cores
from dsjax import manifest
from dsjax.checkpoint import Checkpoints
from dsjax.config import UserError
from dsjax.train.pretrain import build

OLD, NEW = 110, 120
TRAINED_FURTHER = 4  # one in so many is also given to ``dsjax train``


# ---------------------------------------------------------------- kinds of damage


def truncated(file: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def flipped(file: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def zeroed(file: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    """A block that never reached the disk."""
    content = bytearray(file.read_bytes())
    begin = rng.randrange(len(content))
    while not any(content[begin : begin + 4096]):
        begin = rng.randrange(len(content))
    content[begin : begin + 4096] = bytes(len(content[begin : begin + 4096]))
    file.write_bytes(content)


def emptied(file: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    os.truncate(file, 0)


def deleted(file: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    file.unlink()


def grown(file: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    with file.open("ab") as end:
        end.write(rng.randbytes(rng.randint(1, 100)))


def swapped(file: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    """The file of that name, or of that place in the list, of the other step."""
    file.write_bytes(other.read_bytes())


def of_another_kind(file: pathlib.Path, other: pathlib.Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


FILE_DAMAGE = (truncated, flipped, zeroed, emptied, deleted, grown, swapped, of_another_kind)


def copied_in_part(step: pathlib.Path, rng: random.Random) -> str:
    """A copy that was stopped: some files are not there, the last one is cut."""
    names = [*manifest.files_of(step), manifest.FILE]
    rng.shuffle(names)
    for name in names[: rng.randint(1, len(names) - 1)]:
        (step / name).unlink()
    return ""


def under_a_later_number(step: pathlib.Path, rng: random.Random) -> str:
    """The step before, under this step's name: what a stale pointer leads to."""
    shutil.rmtree(step)
    shutil.copytree(step.with_name(str(OLD)), step)
    return manifest.FILE


def with_a_strange_file(step: pathlib.Path, rng: random.Random) -> str:
    (step / "state" / "d" / "stray").write_bytes(rng.randbytes(10))
    return "state/d/stray"


def without_a_folder(step: pathlib.Path, rng: random.Random) -> str:
    shutil.rmtree(step / "state" / "d")
    return "state/d/"


FOLDER_DAMAGE = (copied_in_part, under_a_later_number, with_a_strange_file, without_a_folder)


def damage(step: pathlib.Path, number: int, rng: random.Random) -> tuple[str, str]:
    """Does the ``number``-th kind of damage to a step; (what was done, a name that the message must hold)."""
    kinds: list[Callable[..., Any]] = [*FILE_DAMAGE, *FOLDER_DAMAGE]
    kind = kinds[number % len(kinds)]
    if kind in FOLDER_DAMAGE:
        return kind.__name__, kind(step, rng)
    names = [*manifest.files_of(step), manifest.FILE]
    name = names[(number // len(kinds) + rng.randrange(3)) % len(names)]
    if kind is swapped:  # some files are the same in both
        name = rng.choice(
            [name for name in names if (step / name).read_bytes() != others(step, name, rng).read_bytes()]
        )
    elif not (step / name).stat().st_size:
        kind = grown
    kind(step / name, others(step, name, rng), rng)
    return f"{name} {kind.__name__}", name


def others(step: pathlib.Path, name: str, rng: random.Random) -> pathlib.Path:
    """The file of the same name in the other step; for one that is named after its content, any such file there."""
    other = step.with_name(str(OLD))
    if (other / name).exists():
        return other / name
    return other / rng.choice([n for n in manifest.files_of(other) if "/d/" in n])


# ---------------------------------------------------------------- what a resume makes of it


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings of the checkpoint module."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dsjax.checkpoint")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def resumed(run: pathlib.Path, shapes: Any) -> tuple[int | None, list[str]]:
    """The step that a resume takes, and what it says on the way."""
    with heard() as said:
        checkpoints = Checkpoints(run / "checkpoints")
        try:
            step = checkpoints.restore(shapes)[2]
        except UserError as error:
            return None, [*said, str(error)]
        finally:
            checkpoints.close()
    return step, said


def misjudged(run: pathlib.Path, done: str, name: str, shapes: Any, hashes: dict[int, str]) -> str:
    """What is wrong with how a damaged newest step was met; empty: nothing."""
    step, said = resumed(run, shapes)
    text = " ".join(said)
    if step != OLD:
        return f"{done}: step {step} was restored; {text[:200]}"
    if f"checkpoint {NEW}" not in text or name not in text:
        return f"{done}: the message names neither: {text[:200]}"
    if not (run / "checkpoints" / f"damaged-{NEW}").is_dir():
        return f"{done}: it was not set aside"
    if state_hash(run) != hashes[OLD]:
        return f"{done}: what was restored is not step {OLD}"
    return ""


def trained_further(run: pathlib.Path, config: pathlib.Path, done: str, want: str, core: int) -> str:
    """The same through the command: it goes on from the step before and ends as it would have."""
    code, _, said = Child(*arguments(config, run), core=core).end(timeout=300)
    if code or f"checkpoint {NEW} in" not in said or f"resumed at step {OLD}" not in said:
        return f"dsjax train with {done} ended with {code}: {said[-300:]}"
    return "" if state_hash(run) == want else f"dsjax train with {done}: another state in the end"


def corruptions(n: int, folder: pathlib.Path, *, seed: int = 0) -> list[Goal]:
    """``n`` damaged checkpoints, and as many copies of good ones."""
    folder.mkdir()
    control = uninterrupted(folder / "control")
    good = folder / "control" / "run"
    _, trainer = build(small_moe(bias_update_rate=1e-3))
    hashes = {step: state_hash(good, step) for step in (OLD, NEW)}
    assert EVERY == NEW - OLD
    begin = time.perf_counter()

    def one(number: int, *, further: bool = True, core: int = 0) -> tuple[str, str]:
        rng = random.Random(seed * 10**6 + number)
        run = folder / f"damaged_{number}"
        shutil.copytree(good, run)
        done, name = damage(run / "checkpoints" / str(NEW), number, rng)
        if further and number % TRAINED_FURTHER == 0:
            found = trained_further(run, control.config, done, control.hash, core)
        else:
            found = misjudged(run, done, name, trainer.shapes, hashes)
        shutil.rmtree(run)
        return done.split()[-1], found

    through = range(0, n, TRAINED_FURTHER)
    results = [one(number) for number in range(n) if number not in through]
    results += on_all_cores(lambda number, core: one(number, core=core), through)
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(kind for kind, _ in results).items()))
    failures = tuple(found for _, found in results if found)
    seconds = time.perf_counter() - begin
    with mock.patch.object(manifest, "verify"), mock.patch.object(manifest, "seal", lambda body: body_seal(body)):
        missed = sum(bool(one(number, further=False)[1]) for number in range(min(n, 48)))
    mutant = f"without the check, {missed} of {min(n, 48)} are met wrongly"
    if not missed:
        failures += ("without the check nothing fails: the test proves nothing",)
    name = f"damaged checkpoints are noticed, named and set aside, the one before is taken ({kinds})"
    return [Goal(name, n, failures, seconds, mutant), false_alarms(n, folder, good, trainer.shapes)]


def body_seal(body: dict[str, Any]) -> Any:
    """A seal that always fits."""

    class Fits(str):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    return Fits()


def false_alarms(n: int, folder: pathlib.Path, good: pathlib.Path, shapes: Any) -> Goal:
    """Copies of good checkpoints, with other times, modes, owners' leftovers and places."""
    begin, failures = time.perf_counter(), []
    for number in range(n):
        rng = random.Random(number)
        run = folder / f"copy_{number}" / "elsewhere" / "run"
        shutil.copytree(good, run, copy_function=shutil.copyfile)
        for path in run.rglob("*"):
            os.utime(path, (rng.randrange(10**9), rng.randrange(10**9)))
            path.chmod(0o755 if path.is_dir() else rng.choice((0o600, 0o644, 0o777)))
        (run / "checkpoints" / str(NEW) / ".nfs0001").write_text("of the file system")
        (run / "checkpoints" / ".saving-130").mkdir()
        step, said = resumed(run, shapes)
        if step != NEW or said:
            failures.append(f"copy {number}: step {step}, {said}")
        shutil.rmtree(folder / f"copy_{number}")
    return Goal("good checkpoints raise no alarm", n, tuple(failures), time.perf_counter() - begin)
