"""Several processes: joining, exchanging, agreeing, and ending when one is killed, frozen, stuck or leaves.

This file is also the program that the processes run: ``python tests/test_hosts.py SCENARIO INDEX COUNT PORT``.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from xla_flags import QUICK

from dsjax import hosts
from dsjax.config import UserError
from dsjax.hosts import watch

LIMITS = hosts.HostsConfig(join=30, period=0.25, lost_after=5.0, linger=2.0)
HERE = socket.gethostname()


# ---------------------------------------------------------------- what the processes run


def main(scenario: str, index: int, count: int, port: int) -> None:
    """One process: ends with what ``SCENARIOS[scenario]`` returns."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[index % len(os.sched_getaffinity(0))]})
    other = {"impatient": {"lost_after": 1.0}, "stuck": {"stall_after": 4.0}}.get(scenario, {})
    limits = dataclasses.replace(LIMITS, **other)
    code = 1
    try:
        hosts.start(f"localhost:{port}", count, index, limits)
        code = SCENARIOS[scenario]()
        hosts.finish()
    except Exception as error:
        hosts.blame(error)
        code = 2 if isinstance(error, UserError) else 1
        hosts.leave(code, str(error))
        print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(code)


def tell(**values: object) -> None:
    print(json.dumps(values), flush=True)


def talk() -> int:
    """Everything that works."""
    import jax

    hold_the_lock()
    me = hosts.index()
    tell(devices=jax.device_count(), own=jax.local_device_count(), index=me, count=hosts.count(), name=hosts.name(1))
    tell(
        first=hosts.exchange("x", {"me": me}),
        second=hosts.exchange("x", [me]),
        large=len(hosts.exchange("y", "z" * 10**6)[1]),
    )
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda n=n: found.extend(hosts.exchange(f"thread {n}", me + n))) for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tell(threads=sorted(found))
    hosts.same("seed", {"a": {"b": 1}})
    try:
        hosts.same("config", {"train": {"seed": 3 + me, "steps": 7}})
    except UserError as error:
        tell(differs=str(error))
    try:
        if me == 0:
            hosts.exchange("late", 0, timeout=0.5)
    except hosts.HostLost as error:
        tell(late=str(error))
    agreement = hosts.Agreement()
    tell(agreed=[agreement.ask(step == 3 + me) for step in range(8)])
    begin = time.monotonic()
    hosts.blame(RuntimeError("shapes do not fit"))  # is nobody's loss
    assert time.monotonic() - begin < 1
    return 0


def hold_the_lock() -> int:
    """Neither Python thread of process 1 runs for three seconds."""
    if hosts.index():
        ctypes.PyDLL(None).sleep(3)
    hosts.exchange("after", None)
    return 0


def work(stuck: bool = False) -> int:
    """Collectives over all devices, until something happens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("devices",))
    sharded = jax.sharding.NamedSharding(mesh, jax.P("devices"))
    ones = np.ones((mesh.size, 8), np.float32)
    x, total, agreement = (
        jax.make_array_from_callback(ones.shape, sharded, lambda at: ones[at]),
        jax.jit(jnp.sum),
        hosts.Agreement(),
    )
    for step in range(2000):
        if stuck and step == 20 and hosts.index() == 1:
            time.sleep(60)
        hosts.beat(step)
        assert float(total(x)) == ones.size
        agreement.ask(False)
        if step == 10:
            tell(running=True)
        time.sleep(0.02)
    return 1


def wait() -> int:
    """Waits for one that does not come, outside of every collective."""
    tell(running=True)
    if hosts.index() == 1:
        time.sleep(60)
    hosts.exchange("for ever", None, timeout=60)
    return 1


def mistake() -> int:
    """A user's mistake that only process 1 finds."""
    hosts.exchange("ready", None)
    if hosts.index() == 1:
        raise UserError("data.path is missing")
    return wait()


SCENARIOS: dict[str, Callable[[], int]] = {
    "talk": talk,
    "impatient": hold_the_lock,
    "work": work,
    "stuck": lambda: work(stuck=True),
    "wait": wait,
    "mistake": mistake,
}


# ---------------------------------------------------------------- running them


@dataclasses.dataclass
class Outcome:
    """Of one process: exit code, output, and seconds from the fault (or the start) to its end."""

    code: int
    out: str
    err: str
    seconds: float

    def told(self) -> dict[str, object]:
        return {k: v for line in self.out.splitlines() if line[:1] == "{" for k, v in json.loads(line).items()}

    def sentences(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("dsjax: ")]


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def launch(scenario: str, index: int, count: int, port: int) -> subprocess.Popen[str]:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICK}"}
    return subprocess.Popen(
        [sys.executable, __file__, scenario, str(index), str(count), str(port)],
        env=os.environ | flags | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(scenario: str, count: int, victim: int | None = None, fault: int = 0) -> list[Outcome | None]:
    """All processes of a scenario; ``victim`` gets the signal ``fault`` once it runs, and has no outcome."""
    port, outcomes = free_port(), [None] * count
    processes = [launch(scenario, index, count, port) for index in range(count)]
    try:
        if victim is not None:
            out = processes[victim].stdout
            assert out is not None
            assert any("running" in line for line in out), "the victim never got so far"
            os.kill(processes[victim].pid, fault)
        begin = time.monotonic()
        for index in (i for i in range(count) if i != victim):
            out, err = processes[index].communicate(timeout=40)
            outcomes[index] = Outcome(processes[index].returncode, out, err, time.monotonic() - begin)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return outcomes


RUNS = {
    "talk": ("talk", 2),
    "kill 1 of 3": ("work", 3, 1, signal.SIGKILL),
    "kill 0 of 3": ("work", 3, 0, signal.SIGKILL),
    "kill 1 while waiting": ("wait", 2, 1, signal.SIGKILL),
    "stop 1": ("work", 2, 1, signal.SIGSTOP),
    "stop 0": ("work", 2, 0, signal.SIGSTOP),
    "stuck": ("stuck", 2),
    "mistake": ("mistake", 2),
    "impatient": ("impatient", 2),
}


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, concurrent.futures.Future[list[Outcome]]]]:
    """All runs, two at a time: most of their time is waiting."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, *arguments) for name, arguments in RUNS.items()}


# ---------------------------------------------------------------- together


def test_processes_join_talk_agree_and_leave_together(outcomes) -> None:
    both = outcomes["talk"].result()
    assert [o.code for o in both] == [0, 0], both
    for index, told in enumerate(o.told() for o in both):
        assert (told["index"], told["count"], told["devices"], told["own"]) == (index, 2, 8, 4)
        assert told["name"] == f"process 1 ({HERE})"
        assert (told["first"], told["second"], told["large"]) == ([{"me": 0}, {"me": 1}], [[0], [1]], 10**6)
        assert told["threads"] == [0, 1, 1, 2, 2, 3]
        assert told["differs"] == (
            f"process 1 ({HERE}) has config.train.seed 4, process 0 ({HERE}) has 3; all processes must have the same"
        )
        # Process 0 asks at step 3, process 1 at step 4; both learn it at the step after.
        assert told["agreed"] == [False, False, False, False, True, True, False, False]
    assert both[0].told()["late"] == (f"process 1 ({HERE}) did not answer within 0.5 s when all were to tell 'late'")


def test_one_process_needs_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (hosts.index(), hosts.count(), hosts.name(0)) == (0, 1, "process 0")
    assert hosts.exchange("x", {"a": (1, 2)}) == [{"a": [1, 2]}], "as it would come from several"
    hosts.same("x", 1)
    hosts.beat(3)
    hosts.leave(2, "a mistake")
    hosts.finish()
    begin = time.monotonic()
    hosts.blame(RuntimeError("Gloo all-reduce failed"))
    assert time.monotonic() - begin < 1
    agreement = hosts.Agreement()
    monkeypatch.setattr(agreement, "_any", None, raising=False)  # a dispatch would fail
    assert [agreement.ask(flag) for flag in (False, True, False)] == [False, True, False], "known at once"


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("name", "lost", "survivors", "seconds"),
    [
        ("kill 1 of 3", 1, (0, 2), 15),
        ("kill 0 of 3", 0, (1, 2), 15),
        ("kill 1 while waiting", 1, (0,), 15),
        ("stop 1", 1, (0,), 15),
        ("stop 0", 0, (1,), 15),
    ],
)
def test_the_others_name_a_lost_process_and_end(outcomes, name, lost, survivors, seconds) -> None:
    found = outcomes[name].result()
    for index in survivors:
        outcome = found[index]
        assert outcome.code == hosts.EXIT_HOST_LOST, outcome
        assert len(outcome.sentences()) == 1, outcome.err
        assert outcome.sentences()[0].startswith(f"dsjax: process {lost} ({HERE}) was lost: "), outcome.err
        assert outcome.seconds < seconds


def test_a_process_that_is_stuck_ends_all(outcomes) -> None:
    for outcome in outcomes["stuck"].result():
        assert outcome.code == hosts.EXIT_HOST_LOST, outcome
        assert len(outcome.sentences()) == 1, outcome.err
        assert outcome.sentences()[0].startswith(f"dsjax: process 1 ({HERE}) made no progress for 4 s at step 19, ")
    assert "in work" in outcomes["stuck"].result()[1].err, "where it is stuck"


def test_a_process_that_ends_by_itself_says_why(outcomes) -> None:
    found = outcomes["mistake"].result()
    assert [o.code for o in found] == [2, 2]
    assert "UserError: data.path is missing" in found[1].out
    assert found[0].sentences() == [f"dsjax: process 1 ({HERE}) stopped: data.path is missing"]


def test_a_pause_of_python_is_no_loss(outcomes) -> None:
    assert [o.code for o in outcomes["talk"].result()] == [0, 0], "process 1 paused for 3 s"
    assert hosts.EXIT_HOST_LOST in [o.code for o in outcomes["impatient"].result()], "the control: it would be noticed"


def test_the_defaults_keep_within_thirty_seconds() -> None:
    limits = hosts.HostsConfig()
    assert limits.lost_after + 3 * limits.period + limits.linger < 30


def test_a_peer_s_death_is_told_from_other_errors() -> None:
    wrapped = UserError("checkpoint 3 could not be saved")
    wrapped.__cause__ = ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    assert watch.is_network_error(wrapped)
    assert not watch.is_network_error(UserError("the connection closed"))
    assert not watch.is_network_error(ValueError("shapes (3,) and (4,) do not fit"))
    assert not watch.is_network_error(OSError(28, "No space left on device"))


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:]))  # type: ignore[arg-type]
