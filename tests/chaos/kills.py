"""kill -9 in every phase of a run: the run that is started again ends bitwise as if nothing had been."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import signal
import time
from collections import Counter

from small_runs import Child, state_hash, training_records

from chaos import Goal
from chaos.marked import MARKS, batches_of, config_file, on_all_cores, wait_for_mark

STEPS, EVERY = 120, 10
KILLS_OF_A_RUN = 8

# Phase -> the longest wait after it begins, in seconds: about as long as it takes.
PHASES = {
    "start": 2.0,
    "data": 0.5,
    "compile": 2.0,
    "restore": 0.05,
    "step": 0.02,
    "save": 0.02,
    "finalise": 0.05,
    "prune": 0.05,
}


@dataclasses.dataclass(frozen=True)
class Uninterrupted:
    """The run that all others are compared with."""

    config: pathlib.Path
    hash: str
    batches: dict[int, str]
    losses: dict[int, float]


def arguments(config: pathlib.Path, run: pathlib.Path) -> tuple[str, ...]:
    """Of ``dsjax train``."""
    steps = (f"train.steps={STEPS}", "train.log_every=1", f"checkpoint.every={EVERY}", "checkpoint.keep=2")
    return ("train", str(config), *steps, "--run", str(run))


def uninterrupted(folder: pathlib.Path, core: int | None = None) -> Uninterrupted:
    """A run that nothing happens to."""
    folder.mkdir(parents=True)
    config = config_file(folder)
    code, _, said = Child(*arguments(config, folder / "run"), code=MARKS, core=core).end(timeout=300)
    assert code == 0, said
    return Uninterrupted(config, state_hash(folder / "run"), batches_of(said), losses_of(folder / "run"))


def losses_of(run: pathlib.Path) -> dict[int, float]:
    """Step -> loss; a step that is recorded twice is an error."""
    records = training_records(run)
    assert len({r["step"] for r in records}) == len(records), "a step is recorded twice"
    return {r["step"]: r["loss"] for r in records}


def repeat(n: int, folder: pathlib.Path) -> tuple[Goal, Uninterrupted]:
    """Whether ``n`` runs that nothing happens to end with one hash; and the control of what follows."""
    begin = time.perf_counter()
    runs = on_all_cores(lambda number, core: uninterrupted(folder / f"control_{number}", core), range(n))
    failures = tuple(
        f"control {i} differs from control 0"
        for i, run in enumerate(runs)
        if (run.hash, run.batches, run.losses) != (runs[0].hash, runs[0].batches, runs[0].losses)
    )
    return Goal("uninterrupted runs end with one hash", n, failures, time.perf_counter() - begin), runs[0]


# ---------------------------------------------------------------- kills


def kills(n: int, folder: pathlib.Path, control: Uninterrupted, *, seed: int = 0) -> Goal:
    """``n`` kills, spread over the phases, up to eight in one run."""
    begin = time.perf_counter()
    order = random.Random(seed)
    phases = [p for _ in range(n // len(PHASES) + 1) for p in order.sample(list(PHASES), len(PHASES))][:n]
    plans = [phases[i : i + KILLS_OF_A_RUN] for i in range(0, n, KILLS_OF_A_RUN)]

    def one(item: tuple[int, list[str]], core: int) -> tuple[list[str], list[str]]:
        number, plan = item
        killed: list[str] = []
        failures: list[str] = []
        while plan and not failures:  # a run may end before all of it is done
            place, rng = folder / f"killed_{number}_{len(killed)}", random.Random(seed * 1000 + number + len(killed))
            done, found = torture(place, plan, control, rng, core)
            killed, failures = killed + done, failures + found
            plan = plan[len(done) :]
        return killed, failures

    results = on_all_cores(one, list(enumerate(plans)))
    killed = Counter(phase for phases, _ in results for phase in phases)
    spread = ", ".join(f"{phase} {killed[phase]}" for phase in PHASES)
    failures = tuple(failure for _, found in results for failure in found)
    return Goal(f"kill -9, bitwise resumption ({spread})", killed.total(), failures, time.perf_counter() - begin)


def torture(
    folder: pathlib.Path, plan: list[str], control: Uninterrupted, rng: random.Random, core: int
) -> tuple[list[str], list[str]]:
    """Kills one run in the planned phases, lets it end, compares; (phases in which it was killed, failures)."""
    folder.mkdir()
    run, killed, failures = folder / "run", [], []
    batches: dict[int, str] = {}
    while not (run / "checkpoints" / str(STEPS)).exists():
        number = len(killed)
        phase = plan[number] if number < len(plan) else "end"
        if phase == "restore" and not (run / "checkpoints").exists():
            phase = "step"  # there is nothing to restore yet
        env = {"JAX_COMPILATION_CACHE_DIR": str(folder / f"xla_{number}")} if phase == "compile" else {}
        child = Child(*arguments(control.config, run), code=MARKS, env=env, core=core)
        if phase == "end" or not wait_until(child, phase, rng):
            code, _, said = child.end(timeout=300)
            if code:
                failures.append(f"{run.parent.name}: start {number} ended with {code}: {said[-300:]}")
                break
        else:
            time.sleep(rng.uniform(0, PHASES[phase]))
            said = child.send(signal.SIGKILL).end()[2]
            killed.append(phase)
        taken = batches_of(said)
        batches = {k: v for k, v in batches.items() if not taken or k < min(taken)} | taken
    return killed, failures + differences(run, batches, control)


def wait_until(child: Child, phase: str, rng: random.Random) -> bool:
    """Until a random occurrence of a phase begins; False if the run ends before."""
    if phase == "start":
        return True
    often = {"step": 2 * EVERY, "save": 2, "finalise": 2, "prune": 2}.get(phase, 1)
    return wait_for_mark(child, phase, rng.randint(1, often))


def differences(run: pathlib.Path, batches: dict[int, str], control: Uninterrupted) -> list[str]:
    """What of a run that was started again differs from the control."""
    found = []
    try:
        if state_hash(run) != control.hash:
            found.append("the state differs")
        if {k: batches.get(k) for k in control.batches} != control.batches:
            wrong = [k for k in control.batches if batches.get(k) != control.batches[k]]
            found.append(f"batches {wrong[:5]} are others")
        if losses_of(run) != control.losses:
            found.append("the recorded losses differ")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return [f"{run.parent.name}: {text}" for text in found]


# ---------------------------------------------------------------- mutants

# Each leaves one class of state out of the checkpoint that the run goes on from.
_LEFT_OUT = """
import dataclasses, jax, numpy as np
import dsjax.train.loop as loop

def without(state, field):
    empty = jax.tree.map(lambda x: x * 0, getattr(state, field))
    return dataclasses.replace(state, **{{field: empty}})

save = checkpoint.Checkpoints.save

def leaky(self, step, state, host):
    {drop}
    save(self, step, state, host)

checkpoint.Checkpoints.save = leaky
"""
MUTANTS = {
    "nothing (the control)": "pass",
    "parameters": "state = without(state, 'params')",
    "optimizer moments": "state = without(state, 'opt_state')",
    "router biases": "state = without(state, 'buffers')",
    "schedule": "state = without(state, 'step')",
    "random numbers": "state = without(state, 'rng')",
    "data iterator": "host = host | {'data': host['data'] | {'rows_taken': 0}}",
    "counters": "host = host | {'loop': host['loop'] | {'tokens_seen': 0}}",
    "planned length": "host = host | {'loop': host['loop'] | {'total_steps': 2 * host['loop']['total_steps']}}",
}


def leaf_mutants(folder: pathlib.Path, control: Uninterrupted) -> Goal:
    """The kill test with each class of state left out of the save: it must fail for each, and for nothing else."""
    begin = time.perf_counter()

    def one(item: tuple[int, str], core: int) -> str:
        number, dropped = item
        place = folder / f"mutant_{number}"
        place.mkdir()
        words = arguments(control.config, place / "run")
        first = Child(*words, code=MARKS + _LEFT_OUT.format(drop=MUTANTS[dropped]), core=core)
        wait_for_mark(first, "prune", 3)
        wait_for_mark(first, "step", 3 * EVERY + 5)
        first.send(signal.SIGKILL).end()
        code, _, said = Child(*words, code=MARKS, core=core).end(timeout=300)
        found = differences(place / "run", control.batches | batches_of(said), control)
        caught = bool(code) or bool(found)
        if caught == (dropped == "nothing (the control)"):
            return f"{dropped} left out: {'found ' + str(found) if caught else 'not noticed'}"
        return ""

    results = on_all_cores(one, list(enumerate(MUTANTS)))
    failures = tuple(filter(None, results))
    names = ", ".join(list(MUTANTS)[1:])
    return Goal(f"state left out of a save is noticed ({names})", len(MUTANTS), failures, time.perf_counter() - begin)
