"""kill -9 of runs of reinforcement learning, at any moment: started again they end bitwise as if nothing had been,
with the texts, the curriculum and the coefficients that they would have had."""

from __future__ import annotations

import pathlib
import random
import shutil
import signal
import subprocess
import time
from collections import Counter

from r1_runs import config_file
from small_runs import Child, state_hash, training_records

from chaos import Goal
from chaos.marked import on_all_cores

STEPS, KILLS_OF_A_RUN = 6, 4
VARIANTS = ("grpo", "ppo", "ahead")
TOLD = ("loss", "rl/reward", "rl/length", "rl/kl_coef", "curriculum/phase")


def arguments(config: pathlib.Path, run: pathlib.Path) -> tuple[str, ...]:
    """Of ``dsjax train``."""
    return ("train", str(config), f"train.steps={STEPS}", "checkpoint.every=2", "--run", str(run))


def come_to(run: pathlib.Path) -> tuple[str, list[dict[str, float]]]:
    """The last state with all that is remembered on the host, and what was told of each iteration."""
    return state_hash(run, STEPS), [{name: r.get(name) for name in TOLD} for r in training_records(run)]


def kills(n: int, folder: pathlib.Path, *, seed: int = 0) -> Goal:
    """``n`` kills, at moments drawn evenly over the time that a run takes, up to four in one."""
    begin = time.perf_counter()
    folder.mkdir(parents=True)
    controls: dict[str, tuple[pathlib.Path, float, object]] = {}
    for variant in VARIANTS[: -(-n // KILLS_OF_A_RUN)]:
        config = config_file(folder, variant)
        for control in (folder / f"control_{variant}", folder / f"again_{variant}"):  # the first one compiles
            started = time.perf_counter()
            code, _, said = Child(*arguments(config, control)).end(timeout=600)
            assert code == 0, said
            seconds = time.perf_counter() - started
        controls[variant] = config, seconds, come_to(control)
        assert come_to(folder / f"control_{variant}") == come_to(control), f"two runs of {variant} differ"

    def one(number: int, core: int) -> tuple[int, list[str]]:
        variant = VARIANTS[number % len(controls)]
        config, seconds, control = controls[variant]
        run, rng, killed = folder / f"killed_{number}", random.Random(1000 * seed + number), 0
        for _ in range(min(KILLS_OF_A_RUN, n - number * KILLS_OF_A_RUN)):
            child = Child(*arguments(config, run), core=core)
            try:
                child.end(timeout=rng.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                child.send(signal.SIGKILL).end()
                killed += 1
        code, _, said = Child(*arguments(config, run), core=core).end(timeout=600)
        if code:
            return killed, [f"{variant}, run {number}: ended with {code}: {said[-300:]}"]
        failures = [] if come_to(run) == control else [f"{variant}, run {number}: it came to something else"]
        shutil.rmtree(run)
        return killed, failures

    results = on_all_cores(one, range(-(-n // KILLS_OF_A_RUN)))
    spread = Counter(VARIANTS[number % len(controls)] for number in range(len(results)))
    name = f"kill -9 of RL, bitwise resumption ({', '.join(f'{k} {v}' for k, v in spread.items())} runs)"
    failures = tuple(failure for _, found in results for failure in found)
    return Goal(name, sum(killed for killed, _ in results), failures, time.perf_counter() - begin)
