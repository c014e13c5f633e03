"""Recipes on two processes: they come to what one process with as many devices comes to.

This file is also the program that they run: ``python tests/test_r1_hosts.py SCENARIO INDEX COUNT PORT FOLDER``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from r1_runs import r1
from small_runs import ROOT, changed, home, saved, small, training_records
from xla_flags import QUICK

from dsjax import hosts
from dsjax.sharding import MeshConfig
from dsjax.train import code_finetune, pretrain
from dsjax.train import r1 as recipe
from dsjax.train.loop import EXIT_INTERRUPTED
from dsjax.train.preference import LabelConfig, PairsConfig, Preference
from dsjax.train.preference import run as learn_preferences

RTOL = 1e-5  # float32 sums over the devices, in another order
TOLD = {"loss", "grad_norm", "rl/reward", "rl/length", "rl/entropy", "rl/kl", "curriculum/phase"}


# ---------------------------------------------------------------- what the processes run


def main(scenario: str, index: int, count: int, port: int, folder: pathlib.Path) -> None:
    """One process: ends with 0 if the scenario came to its end."""
    from dsjax.runtime import configure

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})
    limits = hosts.HostsConfig(join=120)
    configure(lambda: hosts.start(f"localhost:{port}", count, index, limits) if count > 1 else None)
    code = 1
    try:
        SCENARIOS[scenario](folder)
        hosts.finish()
        code = 0
    except BaseException as error:
        hosts.blame(error)
        hosts.leave(code, str(error))
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.flush()
    os._exit(code)


def reinforce(folder: pathlib.Path) -> None:
    """Weights are cut over the processes, texts are written ahead and on devices cut in another way.

    The last process is told to stop on the way, and all go on.
    """
    devices = hosts.count() * local_devices()
    few = {"prompts": 4, "drop_dead": False}  # shapes, and so programs
    late = {"more_rounds": 0, "one_step_off": True, "rescore": True, "correction_limit": 2.0}
    config = r1(
        rollout={"mesh": MeshConfig(data=devices), **few, **late},
        report={"control": True, "prompts": 4},
        warm_start={"steps": 1},
        train={"steps": 4, "eval_every": 4},
        checkpoint={"every": 100},
        mesh={"data": 1, "fsdp": devices},
    )
    if hosts.count() > 1:
        with told_to_stop(1):
            assert recipe.run(config, folder / "rl") == EXIT_INTERRUPTED
    assert recipe.run(config, folder / "rl") == 0


def rounds(folder: pathlib.Path) -> None:
    """Further exercises in place of groups that do not teach."""
    config = r1(warm_start={"steps": 2}, train={"steps": 2}, checkpoint={"every": 100}, mesh={"data": 2})
    assert recipe.run(config, folder / "rounds", reports=False) == 0


def preferences(folder: pathlib.Path) -> None:
    """DPO from pairs of words."""
    pairs, base = folder / "pairs.jsonl", folder / "rounds" / "warm_start"
    lines = [{"prompt": f"{n:03} ", "chosen": "ab", "rejected": "bb"} for n in range(40)]
    if not hosts.index():
        pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    hosts.exchange("pairs", None)
    rl = r1()
    config = Preference(
        data=dataclasses.replace(rl.data, batch_size=8, held_out_share=0.2),
        optim=rl.optim,
        train=dataclasses.replace(rl.train, steps=2, eval_every=2, start_from=str(base)),
        pairs=PairsConfig(str(pairs)),
        labels=LabelConfig(beta=0.5),
        mesh=MeshConfig(data=hosts.count() * local_devices()),
    )
    assert learn_preferences(config, folder / "dpo") == 0
    assert learn_preferences(changed(config, train={"steps": 3}), folder / "dpo") == 0  # references are read


def code(folder: pathlib.Path) -> None:
    """Fine-tuning for code: candidates are run by the first process, and so are the programs of an evaluation."""
    import test_code_finetune_runs as cases

    cases.home = lambda: folder
    if not hosts.index():
        cases.material()
    hosts.exchange("material", None)
    cases.material = lambda: folder / "functions"
    config = changed(cases.tuning(folder / "base"), mesh={"data": hosts.count() * local_devices()})
    data = dataclasses.replace(config.data, repair=None)
    base = changed(dataclasses.replace(small(), data=data, mesh=config.mesh), train={"steps": 1})
    assert pretrain.run(base, folder / "base") == 0
    assert code_finetune.run(changed(config, train={"steps": 4}), folder / "code") == 0


def variants(folder: pathlib.Path) -> None:
    """Other objectives and meshes: values, a reference, experts whose routing is replayed, heads cut to write."""
    for name, variant, mesh, rollout in (
        ("ppo", "ppo", MeshConfig(data=2, fsdp=2, tensor=2), {}),
        ("experts", "experts", MeshConfig(data=2, expert=4), {}),
        ("heads", "grpo", MeshConfig(data=1, fsdp=8), {"mesh": MeshConfig(data=4, tensor=2)}),
    ):
        config = r1(variant, warm_start={"steps": 2}, train={"steps": 2}, checkpoint={"every": 100}, rollout=rollout)
        assert recipe.run(dataclasses.replace(config, mesh=mesh), folder / name, reports=False) == 0


def several(*scenarios: Callable[[pathlib.Path], None]) -> Callable[[pathlib.Path], None]:
    def run(folder: pathlib.Path) -> None:
        for scenario in scenarios:
            scenario(folder)

    return run


SCENARIOS: dict[str, Callable[[pathlib.Path], None]] = {
    "rl": reinforce,
    "more": several(rounds, preferences),
    "code": code,
    "variants": variants,
}


def local_devices() -> int:
    import jax

    return jax.local_device_count()


@contextlib.contextmanager
def told_to_stop(step: int) -> Iterator[None]:
    """The last process gets SIGTERM when it begins with ``step``."""
    beat = hosts.beat

    def counted(at: int | None = None) -> None:
        beat(at)
        if at == step and hosts.index() == hosts.count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    hosts.beat = counted
    try:
        yield
    finally:
        hosts.beat = beat


# ---------------------------------------------------------------- running them


@functools.cache
def outcome(scenario: str, processes: int, devices: int) -> pathlib.Path:
    """The folder in which so many processes, of so many devices each, came to the end of a scenario."""
    folder = home() / f"{scenario}_{processes}_{devices}"
    folder.mkdir()
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths}
    words = [scenario, str(processes), str(port), str(folder)]
    children = [
        subprocess.Popen(
            [sys.executable, __file__, words[0], str(index), *words[1:]], env=env, stderr=subprocess.PIPE, text=True
        )
        for index in range(processes)
    ]
    try:
        with concurrent.futures.ThreadPoolExecutor(processes) as pool:  # a full pipe would stop one, and so all
            said = list(pool.map(lambda child: child.communicate(timeout=900)[1], children))
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * processes, "\n".join(text[-3000:] for text in said)
    assert all("report.json" not in text and "training" not in text for text in said[1:]), "one speaks for all"
    return folder


def same(scenario: str, run: str, devices: int, *, rtol: float) -> None:
    """Two processes told the same of every step as one with as many devices, and came to the same state."""
    pair, one = (outcome(scenario, *by) / run for by in ((2, devices), (1, 2 * devices)))
    ours, theirs = training_records(pair), training_records(one)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in TOLD & b.keys():
            assert a[name] == pytest.approx(b[name], rel=rtol, abs=rtol), (name, a["step"])
    arrays, others = saved(pair)[0], saved(one)[0]
    assert arrays.keys() == others.keys()
    for name, x in arrays.items():
        np.testing.assert_allclose(x, others[name], rtol=rtol, atol=rtol, err_msg=name)


# ---------------------------------------------------------------- tests


@pytest.mark.slow
@pytest.mark.parametrize("run", ["rl/warm_start", "rl", "rl/control"])
def test_two_processes_come_to_what_one_comes_to(run: str) -> None:
    same("rl", run, 1, rtol=RTOL)


@pytest.mark.slow
def test_the_course_is_the_same_on_two_processes() -> None:
    found, there = (saved(outcome("rl", *by) / "rl")[1]["data"] for by in ((2, 1), (1, 2)))
    assert found["drawn"] > 0
    for name in ("drawn", "curriculum", "archive", "kl_coef"):
        assert found[name] == there[name], name
    texts = [[text["tokens"] for group in state["ahead"] for text in group["texts"]] for state in (found, there)]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_the_report_of_two_processes_is_that_of_one() -> None:
    pair, one = (json.loads((outcome("rl", *by) / "rl" / "report.json").read_text()) for by in ((2, 1), (1, 2)))
    for name in ("families", "greedy", "by_level"):
        assert pair[name] == one[name]
    records = [
        [json.loads(line) for line in (outcome("rl", *by) / "rl" / "metrics.jsonl").read_text().splitlines()]
        for by in ((2, 1), (1, 2))
    ]
    validation = [[(r["step"], r["validation"]) for r in own if "validation" in r] for own in records]
    assert validation[0] == validation[1]
    assert [step for step, _ in validation[0]] == [4]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["rounds", "dpo"])
def test_further_rounds_and_preferences_come_to_the_same(run: str) -> None:
    same("more", run, 1, rtol=RTOL)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["ppo", "experts", "heads"])
def test_other_objectives_and_meshes_come_to_the_same(run: str) -> None:
    same("variants", run, 4, rtol=RTOL)


@pytest.mark.slow
def test_fine_tuning_for_code_on_two_processes_comes_to_the_same() -> None:
    same("code", "code", 1, rtol=RTOL)
    scores = [json.loads((outcome("code", *by) / "code" / "best.json").read_text()) for by in ((2, 1), (1, 2))]
    assert scores[0]["step"] == scores[1]["step"]


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:5]), pathlib.Path(sys.argv[5]))  # type: ignore[arg-type]
