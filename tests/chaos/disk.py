"""A disk that is full, breaks or is read-only, under ``dsjax train``: one clear sentence, older steps as they were.

python -m chaos.disk [COUNT]
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import matplotlib.figure  # noqa: F401 - so that forked children have it
import orbax.checkpoint  # noqa: F401
import small_runs

from chaos import Goal
from chaos.crash_points import ENVIRONMENT, replaced
from chaos.durability import Rules, names_not_durable, not_durable
from chaos.syscalls import SYNCS, WRITES, Call, Fault, Trace
from chaos.traced import Traced
from dsjax.checkpoint import Checkpoints
from dsjax.cli import main
from dsjax.train import loop, pretrain  # noqa: F401

SECONDS = 60  # that the command may take; it takes five
STEP_SECONDS = 0.3  # of a disturbed run: longer than a save takes to fail
# A failed save ends the run within one step: the one under way when the call failed, and the one in which the save did.
STEPS_AFTER = 2
FIRST, LAST = 4, 12  # the steps of the run that exist before, and of the one that is disturbed

_MAKES = ("open", "openat", "openat2", "creat", "mkdir", "mkdirat")
_RENAMES = ("rename", "renameat", "renameat2")
_REMOVES = ("unlink", "unlinkat", "rmdir")
_REST = ("ftruncate", "truncate", "fallocate", "chmod", "fchmod", "fchmodat")
# Which calls an error can come from.
KINDS = {
    errno.ENOSPC: (*_MAKES, *WRITES, *_RENAMES, "fsync", "fdatasync", "fallocate"),
    errno.EIO: (*_MAKES, *WRITES, *_RENAMES, *_REMOVES, *SYNCS, *_REST),
    errno.EROFS: (*_MAKES, *WRITES, *_RENAMES, *_REMOVES, *SYNCS, *_REST),
    errno.EACCES: (*_MAKES, *_RENAMES, *_REMOVES),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Which files the disk fails for: the checkpoints, or all others of the run's folder."""

    name: str
    checkpoints: bool


PLACES = (Place("the checkpoints", True), Place("the other files of the run", False))


# ---------------------------------------------------------------- in the children


def train(words: list[str], mutant: str = "", step_seconds: float = 0.0) -> int:
    """``dsjax train``, on one core: XLA:CPU's sums depend on the number of threads."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.argv = ["dsjax", "train", *words]
    step = loop.Guard.step

    def slow_step(*arguments: Any) -> Any:
        time.sleep(step_seconds)
        return step(*arguments)

    loop.Guard.step = slow_step  # type: ignore[method-assign]
    with MUTANTS[mutant]():
        main()
    return 0


def look(run: str) -> int:
    """Says step and hash of every checkpoint that verifies."""
    checkpoints = Checkpoints(pathlib.Path(run) / "checkpoints")
    try:
        for step in checkpoints.steps():
            print(f"step {step}: {small_runs.state_hash(pathlib.Path(run), step)}")
        print(f"damaged: {checkpoints.set_aside()}")
    finally:
        checkpoints.close()
    return 0


def _silent_saves() -> contextlib.AbstractContextManager[None]:
    """A failed save is nobody's business."""
    wait = Checkpoints.wait

    def swallow(self: Checkpoints) -> None:
        with contextlib.suppress(Exception):
            wait(self)

    return replaced(Checkpoints, "wait", swallow)


def _raw_errors() -> contextlib.AbstractContextManager[None]:
    """What goes wrong with a save is raised as it is."""
    return replaced(Checkpoints, "_told_as", lambda self, *words: contextlib.nullcontext())


MUTANTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "failed saves are not told": _silent_saves,
    "errors are raised as they are": _raw_errors,
    "no fsync": lambda: replaced(os, "fsync", lambda handle: None),
}


# ---------------------------------------------------------------- the faults


class Disk:
    """A run to disturb, and what must come of it.

    Args:
        folder: to work in.
        traced: whose children train.
        mutant: of ``MUTANTS``.
    """

    def __init__(self, folder: pathlib.Path, traced: Traced, mutant: str = ""):
        self._traced, self._mutant = traced, mutant
        self.slowest = (0, 0.0)  # steps and seconds that a run went on after a fault
        self._base, self.run = folder / "base", folder / "run"
        self._begin(FIRST, self._base)
        self._new()
        self.control = self._begin(LAST, self.run)
        self.hashes = self._hashes()
        if set(self.hashes) != {4, 8, 12}:
            raise RuntimeError(f"the undisturbed run has the steps {sorted(self.hashes)}")

    def _words(self, steps: int, run: pathlib.Path) -> list[str]:
        config = str(small_runs.home() / "small.py")
        return [config, f"train.steps={steps}", "train.log_every=1", "--run", str(run), "--quiet"]

    def _begin(self, steps: int, run: pathlib.Path) -> Trace:
        trace = self._traced.run("train", run, words=self._words(steps, run), seconds=SECONDS)
        if trace.code or trace.said:
            raise RuntimeError(f"an undisturbed run ended with {trace.code}: {trace.said[-2000:]}")
        return trace

    def _new(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self._base, self.run)

    def _hashes(self) -> dict[int, str]:
        """Step -> state, of what is in the run; those that do not verify have no hash."""
        said = self._traced.run("look", self.run, run=str(self.run), seconds=SECONDS).said
        found = {int(step): state for step, state in re.findall(r"^step (\d+): (\w+)$", said, re.MULTILINE)}
        return found if "damaged: []" in said else {-1: said[-500:]}

    def eligible(self, place: Place, code: int) -> list[Call]:
        """The calls of the undisturbed command that this error can come from."""
        inside = self.run / "checkpoints"
        calls = [(call, pathlib.Path(call.path)) for call in self.control.calls if call.name in KINDS[code]]
        return [call for call, path in calls if (path == inside or inside in path.parents) == place.checkpoints]

    def try_out(self, place: Place, fault: Fault) -> tuple[bool, str]:
        """Whether the command got as far as the fault, and what is wrong with how it bears it (empty: nothing)."""
        self._new()
        checkpoints = str(self.run / "checkpoints")
        fault = dataclasses.replace(fault, **{"under" if place.checkpoints else "beside": checkpoints})
        words = self._words(LAST, self.run)
        arguments = {"words": words, "mutant": self._mutant, "step_seconds": STEP_SECONDS}
        trace = self._traced.run("train", self.run, fault, seconds=SECONDS, **arguments)
        where = f"{errno.errorcode[fault.code]} at {fault.at}{' and on' if fault.onward else ''} of {place.name}"
        if trace.hit is not None:
            call = trace.calls[trace.hit]
            where += f" ({call.name} {pathlib.Path(call.path).relative_to(self.run.parent)})"
        wrong = self._wrong_end(trace, fault) or self._wrong_left(trace)
        return trace.hit is not None, f"{where}: {wrong}" if wrong else ""

    def _wrong_end(self, trace: Trace, fault: Fault) -> str:
        if trace.timed_out:
            return f"hangs: {trace.said[-300:]}"
        if trace.code == 2:
            lines = trace.said.strip().splitlines()
            if len(lines) != 1 or not lines[0].startswith("dsjax: "):
                return f"{len(lines)} lines instead of one sentence: {trace.said[-1500:]}"
            reason = os.strerror(fault.code).lower()
            if reason not in lines[0].lower():
                return f"the sentence does not say {reason!r}: {lines[0]}"
            steps = [
                c for c in trace.calls[trace.hit :] if c.path == str(self.run / "metrics.jsonl") and c.name == "write"
            ]
            self.slowest = max(self.slowest, (len(steps), trace.seconds_after))
            if len(steps) > STEPS_AFTER:
                return f"{len(steps)} steps went on, for {trace.seconds_after:.1f} s"
        elif trace.code or trace.said:
            return f"ends with {trace.code}: {trace.said[-1500:]}"
        return ""

    def _logged(self, calls: list[Call]) -> int:
        """How many lines of the metrics were begun: one for each step."""
        return sum(call.name == "write" and call.path == str(self.run / "metrics.jsonl") for call in calls)

    def _wrong_left(self, trace: Trace) -> str:
        """Whether older steps are as they were, and the same command, the fault gone, ends as if it had not been."""
        before = self._hashes()
        if FIRST not in before:
            return f"step {FIRST} is gone; there are {before}"
        if not trace.code and LAST not in before:
            return f"ends with 0, but without step {LAST}: {sorted(before)}"
        for step, found in before.items():
            if found != self.hashes.get(step):
                return f"step {step} is not as it was: {found}"
        again = self._traced.run("train", self.run, words=self._words(LAST, self.run), seconds=SECONDS)
        if again.code or again.said:
            return f"the same command afterwards ends with {again.code}: {again.said[-1500:]}"
        after = self._hashes()
        if after != self.hashes:
            return f"the same command afterwards leaves {after} instead of {self.hashes}"
        left = {p.name for p in (self.run / "checkpoints").iterdir() if not p.name.isdecimal()}
        return f"never cleared away: {left}" if left - {".lock"} else ""


def faults(disk: Disk, place: Place) -> list[Fault]:
    """Every error at every call that it can come from: once, and for good."""
    return [
        Fault(number, "error", code, onward=onward, names=KINDS[code])
        for code in KINDS
        for onward in (False, True)
        for number in range(1, len(disk.eligible(place, code)) + 1)
    ]


def run(
    count: int | None = 40, *, seed: int = 0, mutant: str = "", places: tuple[Place, ...] = PLACES, say: Any = None
) -> Goal:
    """Disturbs ``dsjax train`` by errors of the disk.

    Args:
        count: how many faults, spread evenly over all; None: all (hours).
        seed: shifts those that are taken.
        mutant: a defence to switch off.
        places: which files.
        say: called with a line on how it goes.
    """
    begin, failures, n = time.perf_counter(), [], 0
    environment = ENVIRONMENT | {"DSJAX_CACHE": str(small_runs.home() / "cache")}
    with tempfile.TemporaryDirectory() as folder, Traced("chaos.disk", environment) as traced:
        disk = Disk(pathlib.Path(folder).resolve(), traced, mutant)
        for number, place in enumerate(places):
            every = faults(disk, place)
            if count is not None:
                share = count // len(places) + (number < count % len(places))
                shift = random.Random(f"{seed} {place.name}").random()
                every = [every[int((i + shift) * len(every) / share)] for i in range(share)]
            for fault in every:
                reached, wrong = disk.try_out(place, fault)
                n += reached  # threads make a save a few calls longer or shorter
                failures += [wrong] if wrong else []
                if say:
                    say(wrong or f"right: {place.name}, {errno.errorcode[fault.code]} at {fault.at} {fault.onward}")
        if say:
            say(f"after a fault a run went on for at most {disk.slowest[0]} steps, {disk.slowest[1]:.1f} s")
    name = "a full, broken or read-only disk: one sentence, older steps as they were"
    return Goal(name, n, tuple(failures), time.perf_counter() - begin)


def power(*, mutant: str = "") -> Goal:
    """From the trace of a new run: all that is needed to go on is on the disk when its first step is committed."""
    begin = time.perf_counter()
    environment = ENVIRONMENT | {"DSJAX_CACHE": str(small_runs.home() / "cache")}
    with tempfile.TemporaryDirectory() as folder, Traced("chaos.disk", environment) as traced:
        above = pathlib.Path(folder).resolve()
        checkpoints = above / "run" / "checkpoints"
        words = [str(small_runs.home() / "small.py"), f"train.steps={FIRST}", "--run", str(above / "run"), "--quiet"]
        trace = traced.run("train", above, seconds=SECONDS, words=words, mutant=mutant)
        if trace.code:
            raise RuntimeError(f"an undisturbed run ended with {trace.code}: {trace.said[-2000:]}")
        n, wrong = not_durable(trace.calls, Rules(checkpoints, checkpoints / str(FIRST)))
        needed = [above / "run" / name for name in ("config.json", "tokenizer.json")]
        wrong += names_not_durable(trace.calls, needed, checkpoints / str(FIRST))
    name = "a run is on the disk, with all that it needs, when its first step is committed"
    return Goal(name, n + len(needed), tuple(wrong), time.perf_counter() - begin)


def goals(count: int | None = 40, *, seed: int = 0, say: Any = None) -> list[Goal]:
    """Both checks, each with what it reports when the defence is off."""
    borne, caught = run(count, seed=seed, say=say), []
    for mutant in ("failed saves are not told", "errors are raised as they are"):
        off = run(5, mutant=mutant, places=PLACES[:1])
        caught.append(f"{mutant}: {len(off.failures)} of {off.n} are wrong")
    lost = power(mutant="no fsync")
    return [
        dataclasses.replace(borne, mutant="; ".join(caught)),
        dataclasses.replace(
            power(), mutant=f"without fsync, {len(lost.failures)} files and folders are not on the disk"
        ),
    ]


if __name__ == "__main__":
    how_many = int(sys.argv[1]) if sys.argv[1:] else 40
    print(*goals(how_many, say=lambda line: print(line, file=sys.stderr, flush=True)), sep="\n")
