"""Runs of several processes: the same losses as one process, a lost process, a preempted one."""

from __future__ import annotations

import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from small_runs import Child, saved_steps, state_hash
from xla_flags import QUICK

from chaos import Goal
from chaos.kills import losses_of
from chaos.marked import MARKS, config_file, wait_for_mark
from dsjax.hosts import EXIT_HOST_LOST
from dsjax.train.loop import EXIT_INTERRUPTED

STEPS, EVERY = 30, 5
RTOL = 1e-5  # float32 sums in another order
LOST_SECONDS, STOP_SECONDS = 30.0, 10.0
JOIN = ("--join-timeout", "12")


class Group:
    """The processes of one run on this machine, each on a core of its own, as far as there are cores."""

    def __init__(self, words: Sequence[str], *, processes: int = 2, devices: int = 4, code: str = MARKS):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        cores = sorted(os.sched_getaffinity(0))
        joined = ("--coordinator", f"localhost:{port}", "--num-processes", str(processes), *JOIN)
        self.children = [
            Child(
                *words,
                *((*joined, "--process-id", str(index)) if processes > 1 else ()),
                code=code,
                core=cores[index % len(cores)],
                env={"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}"},
            )
            for index in range(processes)
        ]

    def end(self, seconds: float = 300.0) -> list[tuple[int, str, float]]:
        """Exit code, standard error, and when each ended, in seconds from now; -9 if it did not within ``seconds``."""
        begin, ended = time.monotonic(), {}
        while len(ended) < len(self.children) and time.monotonic() - begin < seconds:
            for child in self.children:
                if child.process.poll() is not None:
                    ended.setdefault(child, time.monotonic() - begin)
            time.sleep(0.02)
        for child in self.children:
            if child not in ended:
                child.process.kill()
        return [(*child.end()[::2], ended.get(child, seconds)) for child in self.children]


def arguments(config: pathlib.Path, run: pathlib.Path, *more: str) -> tuple[str, ...]:
    """Of ``dsjax train``."""
    steps = (f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "train.log_every=1")
    return ("train", str(config), *steps, *more, "--run", str(run))


# ---------------------------------------------------------------- the same numbers

MESHES = ("data=8", "data=1,fsdp=8", "data=2,fsdp=2,tensor=2", "data=1,expert=4,context=2", "data=1,tensor=2,fsdp=4")


def farthest(run: pathlib.Path, control: pathlib.Path) -> float:
    """The largest relative difference of two runs' losses."""
    losses, others = losses_of(run), losses_of(control)
    assert losses.keys() == others.keys() == set(range(1, STEPS + 1)), (len(losses), len(others))
    return max(abs(losses[step] / others[step] - 1) for step in losses)


def same_losses(folder: pathlib.Path, meshes: Sequence[str] = MESHES) -> Goal:
    """Two processes of four devices against one of eight, on several meshes."""
    folder.mkdir()
    begin, failures, worst = time.perf_counter(), [], 0.0
    config = config_file(folder)
    for number, mesh in enumerate(meshes):
        runs = [folder / f"{name}_{number}" for name in ("pair", "one")]
        for run, (processes, devices) in zip(runs, ((2, 4), (1, 8)), strict=True):
            for code, said, _ in Group(
                arguments(config, run, f"mesh={mesh}"), processes=processes, devices=devices
            ).end():
                if code:
                    failures.append(f"mesh {mesh}: {processes} process(es) ended with {code}: {said[-300:]}")
        if not failures:
            difference = farthest(*runs)
            worst = max(worst, difference)
            if difference > RTOL:
                failures.append(f"mesh {mesh}: losses differ by {difference:.1e}")
    name = f"2 processes x 4 devices give the losses of 1 x 8 (largest relative difference {worst:.0e})"
    return Goal(name, len(meshes), tuple(failures), time.perf_counter() - begin)


def reshaped(folder: pathlib.Path) -> Goal:
    """A run that goes on as 2 x 4, 1 x 8 and 1 x 2 against one that was 1 x 8 throughout."""
    folder.mkdir()
    begin, failures, difference = time.perf_counter(), [], np.nan
    config, run, control = config_file(folder), folder / "run", folder / "control"
    legs = [(control, 1, 8, STEPS), (run, 2, 4, 10), (run, 1, 8, 20), (run, 1, 2, STEPS)]
    for place, processes, devices, steps in legs:
        mesh = f"mesh=data=1,fsdp={processes * devices}"
        # Each leg ends as a preempted one does: the plan stays STEPS long.
        stop = f"\nimport dsjax.train.loop as loop\nloop.stop_at = {steps}\n" + _STOP_AT
        for code, said, _ in Group(
            arguments(config, place, mesh), processes=processes, devices=devices, code=MARKS + stop
        ).end():
            if code != (0 if steps == STEPS else EXIT_INTERRUPTED):
                failures.append(f"{processes} x {devices} ended with {code}: {said[-300:]}")
    if not failures:
        difference = farthest(run, control)
        if not difference <= RTOL:
            failures.append(f"losses differ by {difference:.1e}")
    name = f"2 x 4 -> 1 x 8 -> 1 x 2 goes on (largest relative difference {difference:.0e})"
    return Goal(name, 1, tuple(failures), time.perf_counter() - begin)


_STOP_AT = """
ask = loop.StopSignal.ask
beat = loop.hosts.beat
now = [0]

def counted(step):
    now[0] = step + 1
    beat(step)

def asked(self):
    if now[0] >= loop.stop_at:
        self.received = "SIGTERM"
    return ask(self)

loop.hosts.beat, loop.StopSignal.ask = counted, asked
"""


# ---------------------------------------------------------------- a lost process

LOST_IN = {"start": 3.0, "compile": 1.0, "restore": 0.1, "step": 0.3, "save": 0.1, "finalise": 0.1}


def losses_of_processes(n: int, folder: pathlib.Path, *, seed: int = 0) -> Goal:
    """``n`` times one of two processes is killed (or, each fifth time, frozen); then both are started again."""
    folder.mkdir()
    config, rng = config_file(folder), random.Random(seed)
    control = folder / "control"
    assert [code for code, _, _ in Group(arguments(config, control)).end()] == [0, 0]
    begin, failures, slowest, tried, number = time.perf_counter(), [], 0.0, 0, 0
    while tried < n:
        run, number = folder / f"run_{number}", number + 1
        while not (run / "checkpoints" / str(STEPS)).exists():
            group = Group(arguments(config, run))
            victim, phase = rng.randrange(2), rng.choice(list(LOST_IN))
            child, times = group.children[victim], rng.randint(1, 2)
            if tried < n and (phase == "start" or wait_for_mark(child, phase, times)):
                time.sleep(rng.uniform(0, LOST_IN[phase]))
                found, seconds = lose(group, victim, frozen=tried % 5 == 4)
                failures += [f"{run.name}, process {victim} lost in {phase}: {text}" for text in found]
                slowest, tried = max(slowest, seconds), tried + 1
            else:
                ends = group.end()
                failures += [f"{run.name} ended with {code}: {said[-300:]}" for code, said, _ in ends if code]
            if failures[20:]:
                break
        if state_hash(run) != state_hash(control):
            failures.append(f"{run.name}: the restarted pair does not end bitwise as the control")
    name = f"one of two processes lost: the other names it and ends (slowest {slowest:.0f} s), the pair goes on bitwise"
    return Goal(name, tried, tuple(failures), time.perf_counter() - begin)


def lose(group: Group, victim: int, *, frozen: bool = False) -> tuple[list[str], float]:
    """Kills or freezes a process; (what is wrong with how the other ended, its seconds)."""
    dead, other = group.children[victim], group.children[1 - victim]
    if dead.process.poll() is not None or other.process.poll() is not None:
        group.end()
        return [], 0.0  # the run was at its end
    dead.send(signal.SIGSTOP if frozen else signal.SIGKILL)
    begin = time.monotonic()
    try:
        code, _, said = other.end(timeout=2 * LOST_SECONDS)
    except subprocess.TimeoutExpired:
        other.process.kill()
        code, said = -9, other.end()[2]
    seconds = time.monotonic() - begin
    dead.process.kill()
    dead.end()
    wrong = []
    if code == 0 and re.search(r"^done: ", said, re.MULTILINE):
        return [], 0.0  # it was at its end
    if code != EXIT_HOST_LOST:
        wrong.append(f"the other ended with {code}: {said[-300:]}")
    if not re.search(rf"^dsjax: .*process {victim}\b", said, re.MULTILINE):
        wrong.append(f"it was not named: {said[-300:]}")
    if seconds > LOST_SECONDS:
        wrong.append(f"the other ended after {seconds:.0f} s")
    return wrong, seconds


# ---------------------------------------------------------------- a preempted process


def sigterms(n: int, folder: pathlib.Path, *, seed: int = 0, code: str = MARKS) -> tuple[Goal, list[float]]:
    """``n`` times one of two processes with a state of 200 MB gets SIGTERM, at any time."""
    folder.mkdir()
    config, rng = config_file(folder, "large({!r})"), random.Random(seed)
    begin, failures, seconds = time.perf_counter(), [], []
    words = ("train.steps=100000", "checkpoint.every=20", "mesh=data=1,fsdp=2", "train.log_every=10")
    run = folder / "run"
    for number in range(n):
        group = Group(("train", str(config), *words, "--run", str(run)), devices=1, code=code)
        victim = rng.randrange(2)
        if rng.random() < 0.2:  # while it prepares
            wait_for_mark(group.children[victim], rng.choice(("data", "compile")))
            time.sleep(rng.uniform(0, 1))
        else:
            wait_for_mark(group.children[victim], "step", rng.randint(1, 25))
            time.sleep(rng.uniform(0, 0.5))
        group.children[victim].send(signal.SIGTERM)
        ends = group.end(6 * STOP_SECONDS)
        seconds.append(max(when for _, _, when in ends))
        failures += [f"SIGTERM {number}: {text}" for text in met_wrongly(run, ends)]
    name = f"SIGTERM to one of two processes, 200 MB of state: both commit the same step ({spread(seconds)})"
    return Goal(name, n, tuple(failures), time.perf_counter() - begin), seconds


def met_wrongly(run: pathlib.Path, ends: Sequence[tuple[int, str, float]]) -> list[str]:
    """What is wrong with how two processes ended after a SIGTERM."""
    wrong = []
    for index, (code, said, seconds) in enumerate(ends):
        if code != EXIT_INTERRUPTED:
            wrong.append(f"process {index} ended with {code}: {said[-300:]}")
        if seconds > STOP_SECONDS:
            wrong.append(f"process {index} ended after {seconds:.1f} s")
    said_steps = {m[1] for _, said, _ in ends if (m := re.search(r"saved at step (\d+)", said))}
    on_disk = saved_steps(run)[-1:] if (run / "checkpoints").is_dir() else []
    if said_steps and said_steps != {str(step) for step in on_disk}:
        wrong.append(f"step {said_steps} was said to be saved, {on_disk} is on the disk")
    return wrong


def spread(seconds: Sequence[float]) -> str:
    """Median, 99th percentile and slowest."""
    median, late = np.percentile(seconds, [50, 99])
    return f"median {median:.1f} s, p99 {late:.1f} s, slowest {max(seconds):.1f} s"


# ---------------------------------------------------------------- with the defence off

NO_AGREEMENT = "\nimport dsjax.hosts as hosts\nhosts.Agreement.ask = lambda self, flag: flag\n"
NO_WATCH = """
import dsjax.hosts as hosts, dsjax.hosts.terminate as terminate
hosts.Watch.start = lambda self: None
hosts.blame = lambda error: None
terminate.call_instead_of_abort = lambda function: None
"""


def without_agreement(folder: pathlib.Path) -> str:
    """SIGTERM when each process decides alone."""
    goal, _ = sigterms(2, folder, code=MARKS + NO_AGREEMENT)
    return f"when each decides alone, {len(goal.failures)} faults in {goal.n} trials"


def without_watch(folder: pathlib.Path) -> str:
    """A killed process when nobody watches."""
    folder.mkdir()
    config, wrong = config_file(folder), 0
    for victim in (0, 1):
        group: Any = Group(arguments(config, folder / f"run_{victim}"), code=MARKS + NO_WATCH)
        wait_for_mark(group.children[victim], "step", 5)
        wrong += bool(lose(group, victim)[0])
    return f"when nobody watches, {wrong} of 2 are met wrongly"
