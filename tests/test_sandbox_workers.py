"""Workers: trouble that is no program's fault, no orphans, the pool, bad input."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from sandbox_places import alive, children_of, kill, other_jail, sandbox_of, wait_until_gone

from dsjax.config import UserError
from dsjax.rl import isolation, seccomp
from dsjax.rl import sandbox as module
from dsjax.rl.sandbox import Program, Sandbox, Verdict

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and seccomp are Linux's")

ADD = "def add(a, b):\n    return a + b\n"
PAIRS = [((2, 3), 5), ((0, 0), 0), (("a", "b"), "ab")]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(2, "seccomp") as made:
        yield made


def one(sandbox: Sandbox, code: str) -> Verdict:
    (verdict,) = sandbox.check([Program(code, PAIRS, "add")])
    return verdict


# ---------------------------------------------------------------- trouble


def test_a_dead_worker_is_replaced_and_asked_again() -> None:
    with Sandbox(1, "seccomp") as sandbox:
        worker = sandbox._idle.get()
        assert worker is not None
        family = children_of(worker.process.pid)
        kill(worker.process.pid)
        sandbox._idle.put(worker)
        assert one(sandbox, ADD).passed
        assert wait_until_gone(family, 5) == []


def test_a_jail_that_is_killed_is_no_verdict_on_a_program() -> None:
    with Sandbox(1, "seccomp") as sandbox:
        worker = sandbox._idle.get()
        assert worker is not None
        (jail,) = children_of(worker.process.pid)[1:]
        kill(jail)
        sandbox._idle.put(worker)
        assert one(sandbox, ADD).passed


def test_trouble_that_stays_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox(1, "seccomp") as sandbox:

        def refuse(*_: object) -> None:
            raise module.Trouble("no processes left")

        monkeypatch.setattr(module._Worker, "ask", refuse)
        verdicts = sandbox.check([Program(ADD, PAIRS, "add")])
    assert verdicts == [Verdict(None, 0, 3, "infrastructure: no processes left", 0.0)]


def test_nothing_is_left_behind_when_it_is_closed() -> None:
    sandbox = Sandbox(2, "seccomp")
    sandbox.check([Program(ADD, PAIRS, "add")] * 4)
    family = [pid for worker in idle(sandbox) for pid in children_of(worker.process.pid)]
    assert len(alive(family)) >= 2
    sandbox.close()
    assert wait_until_gone(family, 5) == []


def idle(sandbox: Sandbox) -> list[module._Worker]:
    found = []
    for _ in range(sandbox._idle.qsize()):
        worker = sandbox._idle.get()
        if worker is not None:
            found.append(worker)
        sandbox._idle.put(worker)
    return found


@pytest.mark.parametrize("level", isolation.LEVELS)
def test_nothing_is_left_behind_by_kill_9(level: str) -> None:
    sandbox_of(level).close()  # skips
    script = f"""
from dsjax.rl.sandbox import Program, Sandbox
code = "import time\\ndef f():\\n    print(1)\\n    while True: pass"
sandbox = Sandbox(2, {level!r})
print("ready", flush=True)
sandbox.check([Program(code, [((), 1)], "f", timeout=60)] * 2)
"""
    root = pathlib.Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root)
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        end = time.monotonic() + 20
        while len(family := children_of(parent.pid)) < 9 and time.monotonic() < end:
            time.sleep(0.05)  # itself, and twice: worker, jail, judge, program
        assert len(family) >= 9
        parent.kill()
    assert wait_until_gone(family, 5) == []


# ---------------------------------------------------------------- the pool


def test_verdicts_come_in_order_and_lazily(sandbox: Sandbox) -> None:
    taken = []

    def programs() -> Iterator[Program]:
        for i in range(100):
            taken.append(i)
            yield Program(f"def f():\n    return {i}", [((), i if i % 3 else -1)], "f")

    stream = sandbox.stream(programs())
    first = [next(stream).passed for _ in range(5)]
    assert first == [False, True, True, False, True]
    assert len(taken) < 100
    assert [v.passed for v in stream] == [bool(i % 3) for i in range(5, 100)]


def test_workers_run_side_by_side(sandbox: Sandbox) -> None:
    code = "import time\ndef f():\n    time.sleep(1)\n    return 1"
    sandbox.check([Program(ADD, PAIRS, "add")] * 4)  # both workers are there
    begin = time.monotonic()
    assert all(v.passed for v in sandbox.check([Program(code, [((), 1)], "f")] * 2))
    assert time.monotonic() - begin < 1.9


# ---------------------------------------------------------------- bad input


def nested(depth: int) -> object:
    return [nested(depth - 1)] if depth else 1


def test_what_is_nested_as_deep_as_it_may_be_is_judged(sandbox: Sandbox) -> None:
    tests = [((nested(146),), nested(146))]
    program = Program("def f(x):\n    return x", tests, "f", timeout=86_400, memory_mb=1 << 20)
    assert [v.reason for v in sandbox.check([program])] == ["passed"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tests": []}, "tests is empty"),
        ({"tests": "def check(candidate) pass"}, "tests: expected ':' in line 1"),
        ({"tests": "x = 1"}, r"tests: there is no function check\(candidate\)"),
        ({"tests": 3}, "tests is a int; it must be source or a list"),
        ({"tests": [(1, 2)]}, r"tests\[0\] must be \(arguments, expected\)"),
        ({"tests": [((1, 2),)]}, r"tests\[0\] must be \(arguments, expected\)"),
        ({"tests": [((1, 2), 3), ((1, object()), 3)]}, r"tests\[1\]: object is not plain data"),
        ({"tests": [((iter([1]), 2), 3)]}, r"tests\[0\]: list_iterator is not plain data"),
        ({"tests": [((1, 2), {1: {2: 3}.values()})]}, r"tests\[0\]: dict_values is not plain data"),
        ({"tests": [((nested(147), 2), 3)]}, r"tests\[0\]: nested more than 150 deep"),
        ({"entry_point": "a b"}, "entry_point is 'a b'"),
        ({"entry_point": "class"}, "entry_point is 'class'"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"timeout": math.inf}, "timeout is inf"),
        ({"timeout": 3e6}, "timeout is 3000000.0; it must be a number above 0, at most 86400"),
        ({"memory_mb": -1.0}, "memory_mb is -1.0"),
        ({"memory_mb": 1e13}, "memory_mb is 10000000000000.0; it must be a number above 0, at most 1048576"),
    ],
)
def test_a_program_that_is_none_is_refused_before_any_runs(fields: dict[str, object], sentence: str) -> None:
    good = Program(ADD, PAIRS, "add")
    bad = Program(**{"code": ADD, "tests": PAIRS, "entry_point": "add", **fields})  # type: ignore[arg-type]
    with Sandbox(1, "seccomp") as sandbox, pytest.raises(UserError, match=f"program 1: {sentence}"):
        sandbox.check([good, bad])


def test_what_is_no_program_is_told() -> None:
    validate = inspect.unwrap(module.validate)  # without the types that only tests check
    with pytest.raises(UserError, match="program 0 is a dict; it must be a Program"):
        validate({"code": ADD}, "program 0")


def test_a_closed_sandbox_says_so() -> None:
    with Sandbox(1, "seccomp") as sandbox:
        stream = sandbox.stream(Program(ADD, PAIRS, "add") for _ in range(100))
        assert next(stream).passed
    for verdicts in (stream, sandbox.stream([Program(ADD, PAIRS, "add")])):
        with pytest.raises(UserError, match="the sandbox is closed"):
            for _ in verdicts:
                pass
    with pytest.raises(UserError, match="the sandbox is closed"):
        one(sandbox, ADD)


def test_a_sandbox_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="workers is 0"):
        Sandbox(0)
    with pytest.raises(UserError, match="level is 'docker'; it must be one of bubblewrap, seccomp"):
        Sandbox(1, "docker")


def test_another_kind_of_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UserError, match=r"this is linux on riscv64; .* on linux on x86_64 and aarch64 alone"):
        Sandbox(1)
    assert set(isolation.MACHINES) == set(seccomp.MACHINES)


def test_without_isolation_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where nothing can be started, nor where what is started does not hold."""
    broken = [sys.executable, "-c", "raise SystemExit('no seccomp here')"]
    monkeypatch.setattr(isolation, "jail_command", lambda level: broken)
    with pytest.raises(UserError, match=r"can not be isolated on this machine.*seccomp: no seccomp here"):
        Sandbox(1)
    monkeypatch.setattr(isolation, "jail_command", lambda level: other_jail("open"))
    with pytest.raises(UserError, match="a program was not held"):
        Sandbox(1)


def test_for_want_of_bubblewrap_it_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    module._warn.cache_clear()
    for _ in range(2):
        with Sandbox(1) as sandbox:
            assert sandbox.level == "seccomp"
            assert one(sandbox, ADD).passed
    assert len(caplog.records) == 1
    assert "without namespaces (bubblewrap: there is no program bwrap)" in caplog.text


def test_a_bubblewrap_that_may_not_do_its_work_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: pathlib.Path
) -> None:
    """As in a container: it is there, and the kernel refuses."""
    bubblewrap = tmp_path / "bwrap"
    bubblewrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    bubblewrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    module._warn.cache_clear()
    with Sandbox(1) as sandbox:
        assert sandbox.level == "seccomp"
    assert "(bubblewrap: bwrap: No permissions to create new namespace)" in caplog.text


def test_on_a_busy_machine_a_right_program_stays_right() -> None:
    """More programs than processors, each computing for half of its time: together they take longer than that."""
    code = "import time\ndef f():\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n"
    processors = len(os.sched_getaffinity(0))
    if processors > 4 or not pathlib.Path("/proc/self/schedstat").exists():
        pytest.skip("too many processors to keep them busy, or a kernel that does not say who waits")
    with Sandbox(3 * processors, "seccomp") as sandbox:
        verdicts = sandbox.check([Program(code, [((), None)], "f", timeout=0.6)] * 3 * processors)
    assert [v.reason for v in verdicts] == ["passed"] * 3 * processors
    assert max(v.seconds for v in verdicts) > 0.6


@pytest.mark.parametrize("level", isolation.LEVELS)
def test_processes_killed_at_random_give_no_wrong_verdict(level: str) -> None:
    """Killed by somebody else, any of them: programs are asked again, and what stays unknown is said to be so."""
    chosen = random.Random(0)
    right = [i % 3 > 0 for i in range(150)]
    programs = [Program(f"def f():\n    return {int(good)}", [((), 1)], "f") for good in right]
    ours = set(children_of(os.getpid()))
    verdicts = []
    with sandbox_of(level, workers=2) as sandbox:
        for verdict in sandbox.stream(programs):
            verdicts.append(verdict)
            if len(verdicts) % 10 == 0:
                with contextlib.suppress(ProcessLookupError, IndexError):  # none: one has just been killed
                    kill(chosen.choice(sorted(set(children_of(os.getpid())) - ours)))
    known = [(v.passed, good) for v, good in zip(verdicts, right, strict=True) if v.passed is not None]
    assert all(passed == good for passed, good in known)
    assert all(v.reason.startswith("infrastructure") for v in verdicts if v.passed is None)
    assert len(known) >= 145  # a program is asked three times
