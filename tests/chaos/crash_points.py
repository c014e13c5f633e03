"""Stops a save at each of the system calls by which it changes files; the old step or the new one is left, whole.

python -m chaos.crash_points [COUNT]
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint  # noqa: F401 - so that forked children have it
from xla_flags import QUICK

from chaos import Goal
from chaos.durability import Rules, not_durable
from chaos.syscalls import WRITES, Fault, Trace
from chaos.traced import Traced
from dsjax import manifest
from dsjax.checkpoint import Checkpoints, as_tree, combined_hash, flatten, state_hashes

KEEP = 2
INSIDE = pathlib.Path("run", "checkpoints")  # of the folder that is watched: the first save makes both
WRONG = "WRONG:"
SECONDS = 60  # that a save may take; it takes one or two


@dataclasses.dataclass(frozen=True)
class Scene:
    """A save to be stopped.

    Attributes:
        name: what is special about it.
        before: the steps that there are.
        saves: the step to save.
        killed: the folder is one in which such a save was killed half-way.
    """

    name: str
    before: tuple[int, ...]
    saves: int
    killed: bool = False


SCENES = (
    Scene("a second save", (10,), 20),
    Scene("the first save", (), 20),
    Scene("a save that deletes an older step", (5, 10), 20),
    Scene("a save after a killed one", (5, 10), 20, killed=True),
)


def state(step: int) -> dict[str, Any]:
    """A small state, every array of it another one at each step, with some that compress to nothing."""
    w, m = np.random.default_rng(step).standard_normal((2, 64, 64), np.float32)
    return {
        "params": {"w": w, "b": np.full(300, step, np.float32)},
        "opt_state": {"m": {"w": m}, "count": np.int32(step)},
        "rng": np.asarray([7, step], np.uint32),
        "step": np.int32(step),
    }


def host(step: int) -> dict[str, Any]:
    """Plain data of a step."""
    return {"loop": {"iteration": step, "total_steps": 100}, "data": {"position": 8 * step}}


def right_hash(step: int) -> str:
    """What ``Checkpoints.load_numpy`` of a step must hash to."""
    return combined_hash(state_hashes(flatten(as_tree(state(step))), host(step)))


# ---------------------------------------------------------------- in the child that is stopped


def save(folder: str, steps: list[int], mutant: str = "", cores: int = 1) -> int:
    """Goes on from the latest step, as training would: changes the state, saves it, ends."""
    if cores == 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with MUTANTS[mutant].child():
        checkpoints = Checkpoints(pathlib.Path(folder), keep=KEEP)
        old, _, at = checkpoints.load_numpy() if checkpoints.latest() is not None else ({}, {}, 0)
        for step in steps:
            new = jax.tree.map(jax.numpy.asarray, state(step))
            if old and combined_hash(state_hashes(old, host(at))) != right_hash(at):
                return 3
            checkpoints.save(step, new, host(step))
            checkpoints.wait()
        checkpoints.close()
    return 0


def look(folder: str, latest: list[int | None], kept: list[int], mutant: str = "") -> int:
    """Opens the checkpoints afresh, reads every one, saves another; says what is wrong.

    Args:
        folder: of the checkpoints.
        latest: one of these must be the latest; None: there is none.
        kept: these must still be there.
        mutant: of ``MUTANTS``.
    """
    with MUTANTS[mutant].reader():
        wrong = _wrong_with(pathlib.Path(folder), latest, kept)
    print(WRONG, wrong)
    return int(bool(wrong))


def _wrong_with(folder: pathlib.Path, latest: Sequence[int | None], kept: Sequence[int]) -> str:
    """What is wrong with the checkpoints that a stopped save left; empty: nothing."""
    try:
        checkpoints = Checkpoints(folder, keep=KEEP)
    except Exception as error:
        return f"can not be opened: {error!r}"
    try:
        step = checkpoints.latest()
        if step not in latest:
            return f"the latest step is {step}, not one of {latest}; there are {[p.name for p in folder.iterdir()]}"
        if gone := set(kept) - set(checkpoints.steps()):
            return f"{sorted(gone)} is gone"
        for there in checkpoints.steps():
            arrays, plain, _ = checkpoints.load_numpy(there)
            if combined_hash(state_hashes(arrays, plain)) != right_hash(there):
                return f"step {there} is a mixture"
        if aside := checkpoints.set_aside():
            return f"{aside} was set aside, though nothing but a kill happened"
        checkpoints.save(30, jax.tree.map(jax.numpy.asarray, state(30)), host(30))
        checkpoints.wait()
        arrays, plain, step = checkpoints.load_numpy()
        if step != 30 or combined_hash(state_hashes(arrays, plain)) != right_hash(30):
            return f"the next save is not right: step {step}"
        left = sorted(p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock")
        return f"never cleared away: {left}" if left else ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        with contextlib.suppress(Exception):
            checkpoints.close()


# ---------------------------------------------------------------- defences off


@contextlib.contextmanager
def replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    """An attribute replaced, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _commit_by(write: Callable[[pathlib.Path, pathlib.Path], None]) -> contextlib.AbstractContextManager[None]:
    """Another way to make the staged folder a step than to rename it."""
    rename = pathlib.Path.rename

    def commit(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if not self.name.startswith(".saving-"):
            return rename(self, target)
        write(self, target)
        shutil.rmtree(self)
        return target

    return replaced(pathlib.Path, "rename", commit)


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the step in its place, file by file, the manifest last."""
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == manifest.FILE, path)):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def _overwrite(source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the new step over the last one, as if there were one folder for the latest state."""
    for last in sorted(target.parent.glob("[0-9]*"), key=lambda path: int(path.name))[-1:]:
        _copy(source, last)
        last.rename(target)
    _copy(source, target)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A defence off: in the process that saves, in the one that looks at what is left."""

    child: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    reader: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def _trusting() -> contextlib.AbstractContextManager[None]:
    return replaced(manifest, "verify", lambda *a, **k: None)


MUTANTS = {
    "": Mutant(),
    "written in place": Mutant(lambda: _commit_by(_copy)),
    "written in place, not verified": Mutant(lambda: _commit_by(_copy), _trusting),
    "written over the last step, not verified": Mutant(lambda: _commit_by(_overwrite), _trusting),
    "no fsync": Mutant(lambda: replaced(os, "fsync", lambda handle: None)),
}


# ---------------------------------------------------------------- the points


class CrashPoints:
    """Scenes set up in a folder, and what stopping a save in them leaves.

    Args:
        folder: to work in.
        mutant: which defence is off; the names are those of ``MUTANTS``.
    """

    def __init__(self, folder: pathlib.Path, traced: Traced, mutant: str = ""):
        self._folder, self._traced, self._mutant = folder, traced, mutant

    def set_up(self, scene: Scene) -> pathlib.Path:
        """The folder that a scene begins with, made once."""
        base = self._folder / "base" / scene.name.replace(" ", "-")
        if base.exists():
            return base
        base.mkdir(parents=True)
        if scene.before:
            self._finished(self._save(base, scene.before))
        if scene.killed:  # when it begins its manifest: then there is most to clear away
            half = base / INSIDE / f".saving-{scene.saves}"
            self._save(base, (scene.saves,), Fault(1, under=str(half / manifest.FILE)))
            if not half.exists():
                raise RuntimeError(f"{scene.name}: nothing half-written is left")
        return base

    def _save(
        self, folder: pathlib.Path, steps: tuple[int, ...], fault: Fault | None = None, mutant: str = ""
    ) -> Trace:
        inside = str(folder / INSIDE)
        return self._traced.run("save", folder, fault, seconds=SECONDS, folder=inside, steps=list(steps), mutant=mutant)

    @staticmethod
    def _finished(trace: Trace) -> Trace:
        if trace.code:
            raise RuntimeError(f"a save that nobody stopped ended with {trace.code}: {trace.said[-2000:]}")
        return trace

    def record(self, scene: Scene) -> tuple[Trace, pathlib.Path]:
        """All calls of a save that is not stopped, and where it saved."""
        trace, folder = self.stop(scene, None)
        return self._finished(trace), folder

    def stop(self, scene: Scene, fault: Fault | None) -> tuple[Trace, pathlib.Path]:
        """A save in a copy of the scene, and where it saved: always the same place."""
        work = self._folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.set_up(scene), work)
        return self._save(work, (scene.saves,), fault, self._mutant), work / INSIDE

    def try_out(self, scene: Scene, fault: Fault) -> tuple[bool, str]:
        """Whether the save got as far as the fault, and what is wrong with what is left (empty: nothing)."""
        trace, work = self.stop(scene, fault)
        where = f"{scene.name}, {fault.how} at {fault.at}"
        if trace.hit is not None:
            call = trace.calls[trace.hit]
            where += f" ({call.name} {pathlib.Path(call.path).relative_to(work.parent.parent)})"
        if trace.timed_out:
            return True, f"{where}: hangs"
        if trace.hit is None and trace.code:
            return False, f"{where}: not stopped, but ended with {trace.code}: {trace.said[-500:]}"
        wrong = self._wrong_with(work, scene, trace.hit is not None)
        return trace.hit is not None, f"{where}: {wrong}" if wrong else ""

    def _wrong_with(self, folder: pathlib.Path, scene: Scene, stopped: bool) -> str:
        """What a fresh process finds wrong with the checkpoints in a folder; empty: nothing."""
        old = scene.before[-1] if scene.before else None
        latest = [old, scene.saves] if stopped else [scene.saves]
        arguments = {"folder": str(folder), "latest": latest, "kept": scene.before[-1:], "mutant": self._mutant}
        trace = self._traced.run("look", folder, seconds=SECONDS, **arguments)
        if trace.timed_out:
            return "whoever opens it hangs"
        if not trace.code:
            return ""
        return trace.said.rsplit(WRONG, 1)[1].strip() if WRONG in trace.said else trace.said[-500:]


def faults(trace: Trace) -> list[Fault]:
    """Every way to stop a save with these calls: before each, in the middle of each write."""
    writes = sum(call.name in WRITES for call in trace.calls)
    middle = [Fault(number, "half", names=WRITES) for number in range(1, writes + 1)]
    return [Fault(number) for number in range(1, len(trace.calls) + 1)] + middle


def run(
    count: int | None = None, *, seed: int = 0, mutant: str = "", scenes: tuple[Scene, ...] = SCENES, say: Any = None
) -> Goal:
    """Stops saves at crash points.

    Args:
        count: how many, spread evenly over all of them; None: each one.
        seed: shifts those that are taken.
        mutant: a defence to switch off.
        scenes: the saves.
        say: called with a line on how it goes.
    """
    begin, failures, n = time.perf_counter(), [], 0
    with tempfile.TemporaryDirectory() as folder, Traced("chaos.crash_points", ENVIRONMENT) as traced:
        points = CrashPoints(pathlib.Path(folder).resolve(), traced, mutant)
        for number, scene in enumerate(scenes):
            tried = _sample(faults(points.record(scene)[0]), count, seed, number, len(scenes))
            if count is None:  # threads may make it a few calls longer
                last = max(f.at for f in tried if f.how == "kill")
                tried += [Fault(last + more) for more in range(1, 20)]
            for fault in tried:
                reached, wrong = points.try_out(scene, fault)
                n += reached
                failures += [wrong] if wrong else []
                if say:
                    say(f"{scene.name}: {fault.how} {fault.at}: {wrong or 'right'}")
                if not reached and count is None and fault.how == "kill" and fault.at > last:
                    break
    name = "a save stopped at any system call leaves the old or the new step"
    return Goal(name, n, tuple(failures), time.perf_counter() - begin)


ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "OPENBLAS_NUM_THREADS": "1"}


def _sample(every: list[Fault], count: int | None, seed: int, scene: int, scenes: int) -> list[Fault]:
    """This scene's share of ``count`` faults, evenly spread from a seeded beginning."""
    if count is None:
        return every
    share = count // scenes + (scene < count % scenes)
    shift = random.Random(f"{seed} {scene}").random()
    return [every[int((i + shift) * len(every) / share)] for i in range(share)]


# ---------------------------------------------------------------- power loss


def power(*, mutant: str = "", scenes: tuple[Scene, ...] = SCENES) -> Goal:
    """From a recorded save each: all of a step is on the disk before the rename that commits it, and the rename before
    anything is deleted or the save counts as done."""
    begin, failures, n = time.perf_counter(), [], 0
    with tempfile.TemporaryDirectory() as folder, Traced("chaos.crash_points", ENVIRONMENT) as traced:
        points = CrashPoints(pathlib.Path(folder).resolve(), traced, mutant)
        for scene in scenes:
            trace, work = points.record(scene)
            rules = Rules(work, commit=work / str(scene.saves))
            checked, wrong = not_durable(trace.calls, rules)
            n += checked
            failures += [f"{scene.name}: {line}" for line in wrong]
    name = "all of a step is on the disk before the rename that commits it"
    return Goal(name, n, tuple(failures), time.perf_counter() - begin)


def goals(count: int | None = None, *, seed: int = 0, say: Any = None) -> list[Goal]:
    """Both checks, each with what it reports when the defence is off."""
    stopped, mutant = run(count, seed=seed, say=say), "written over the last step, not verified"
    caught = run(8, mutant=mutant, scenes=SCENES[:1])
    lost = power(mutant="no fsync", scenes=SCENES[:1])
    return [
        dataclasses.replace(stopped, mutant=f"{mutant}: {len(caught.failures)} of {caught.n} are wrong"),
        dataclasses.replace(
            power(), mutant=f"without fsync, {len(lost.failures)} files and folders are not on the disk"
        ),
    ]


if __name__ == "__main__":
    how_many = int(sys.argv[1]) if sys.argv[1:] else None
    print(*goals(how_many, say=lambda line: print(line, file=sys.stderr, flush=True)), sep="\n")
