"""A worker: a process outside the sandbox that keeps one jail, and forks one judge for each program.

It runs nothing of anybody's itself. It starts the judge and the program's process, ends both, and says what became of
them. Trouble that is nobody's fault ends it: the parent starts another one and asks again. It ends too when its
parent has gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any, NoReturn

from dsjax.rl import plain, seccomp
from dsjax.rl.judge import Checks, Outcome, Remote, judge

CHANNEL = 0  # standard input is the socket to the parent
START, END = 30.0, 10.0  # seconds for a jail or a child to start, and for a child to be gone
CLOSED = 2.0  # after which a process that says nothing more has closed its channel and lives on
TICK = 0.5  # between two looks for the parent
PATIENCE = 60.0, 20.0  # the longest that a judge may take: seconds, and times the program's own limit
JUDGE_MEMORY = 4 << 30
PR_SET_PDEATHSIG = 1
OUT_OF_MEMORY = 71  # an exit code of the jail's children


class Trouble(Exception):
    """Something that is no program's fault; a sentence."""


@dataclasses.dataclass
class Child:
    """A program's process, as its jail tells of it."""

    number: int
    channel: socket.socket
    status: int | None = None
    cpu: float = 0.0


class Jail:
    """The process in which programs are forked, and the socket to it. Raises ``Trouble`` if it does not start."""

    def __init__(self, command: list[str]) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.control.settimeout(START)
        self.count = 0
        null = os.open(os.devnull, os.O_RDWR)
        self.process = subprocess.Popen(
            command,
            stdin=theirs.fileno(),
            stdout=null,
            stderr=subprocess.PIPE,
            preexec_fn=_first_to_go,
            start_new_session=True,
        )
        theirs.close()
        os.close(null)
        try:
            message, ancillary, _, _ = self.control.recvmsg(4096, socket.CMSG_SPACE(12))
            ready = json.loads(message)
        except (OSError, ValueError):
            self.process.kill()
            assert self.process.stderr is not None
            words = self.process.stderr.read().decode(errors="replace").strip().splitlines()
            raise Trouble(words[-1][:300] if words else "it did not start") from None
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.files: bool = ready["files"]
        pid = struct.unpack("=iii", ancillary[0][2][:12])[0]
        self.own_memory = _address_space(pid)

    def start(self, seconds: float, megabytes: float) -> Child:
        """A new process, with the limits of a program."""
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.count += 1
        limits = {"cpu": math.ceil(seconds) + 1, "address_space": self.own_memory + int(megabytes * (1 << 20))}
        try:
            socket.send_fds(self.control, [json.dumps({"start": self.count, **limits}).encode()], [theirs.fileno()])
        except OSError as error:
            raise Trouble(f"the jail is gone: {error}") from None
        theirs.close()
        return Child(self.count, ours)

    def hear(self, children: list[Child]) -> None:
        """Takes one message: that a child has ended. Raises ``Trouble`` if the jail has, or could not start one, and
        TimeoutError."""
        try:
            message = json.loads(self.control.recv(4096))
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            raise Trouble(f"the jail is gone: {error}") from None
        if "failed" in message:
            raise Trouble(f"no process could be started: {message['error']}")
        for child in children:
            if child.number == message["ended"]:
                child.status, child.cpu = message["status"], message["cpu"]

    def end(self, children: list[Child]) -> None:
        """Kills what still runs, and waits until it is gone."""
        for child in children:
            child.channel.close()
            if child.status is None:
                with contextlib.suppress(OSError):
                    self.control.send(json.dumps({"kill": child.number}).encode())
        self.control.settimeout(END)
        try:
            while any(child.status is None for child in children):
                self.hear(children)
        except TimeoutError:
            raise Trouble("a process could not be ended") from None


def _first_to_go() -> None:
    """Where memory runs out, the kernel shall take a program and nothing else."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/oom_score_adj").write_text("1000")


def _address_space(pid: int) -> int:
    """Bytes that a process has mapped; what a program may take is counted on top."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 256 << 20


# ---------------------------------------------------------------- one program


def referee(request: dict[str, Any], jail: Jail, parent: int) -> dict[str, Any]:
    """Has one program judged.

    Args:
        request: the fields of a ``Program``.
        parent: the process that must go on living.

    Returns:
        The fields of a ``Verdict``. Raises ``Trouble``.
    """
    begin = time.monotonic()
    tests = request["tests"]
    alone = not isinstance(tests, str) or not set(Checks(tests).foreign) - {request["entry_point"]}
    children = [jail.start(request["timeout"], request["memory_mb"]) for _ in range(1 if alone else 2)]
    reports, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reports)
        run_judge(request, children, told)
    os.close(told)
    try:
        text, late = listen(reports, jail, children, begin + PATIENCE[0] + PATIENCE[1] * request["timeout"], parent)
    finally:
        os.close(reports)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    finished = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    looped = late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
    *lines, _ = text.split(b"\n")
    if not lines or not (finished or looped):
        raise Trouble(f"a judge ended with status {status}")
    outcome = Outcome(**json.loads(lines[-1]))
    if looped:
        outcome.reason = outcome.reason or "timeout"
    if outcome.reason == "ended":
        outcome.reason = how_it_ended(jail, children, request["timeout"])
    if outcome.reason.startswith("infrastructure"):
        raise Trouble(outcome.reason)
    jail.end(children)
    return verdict(outcome, time.monotonic() - begin)


def run_judge(request: dict[str, Any], children: list[Child], told: int) -> NoReturn:
    """In a process of its own: judges, writes each report as a line, and is gone. The kernel ends it if it loops."""
    code = 1
    try:
        seccomp.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_AS, (JUDGE_MEMORY, JUDGE_MEMORY))
        budget = [request["timeout"]]
        program, *prompt = (Remote(child.channel, budget) for child in children)

        def report(outcome: Outcome) -> None:
            os.write(told, json.dumps(dataclasses.asdict(outcome)).encode() + b"\n")

        judge(request, program, prompt[0] if prompt else None, report)
        code = 0
    finally:
        os._exit(code)


def listen(reports: int, jail: Jail, children: list[Child], deadline: float, parent: int) -> tuple[bytes, bool]:
    """What the judge reports until it is gone, and whether it was too late. Ends this process if the parent is gone."""
    poll = select.poll()
    poll.register(reports, select.POLLIN)
    poll.register(jail.control, select.POLLIN)
    text = b""
    while time.monotonic() < deadline:
        for descriptor, _ in poll.poll(TICK * 1000):
            if descriptor != reports:
                jail.hear(children)
            elif part := os.read(reports, 1 << 16):
                text += part
            else:
                return text, False
        if os.getppid() != parent:
            os._exit(0)
    return text, True


def how_it_ended(jail: Jail, children: list[Child], seconds: float) -> str:
    """The reason for a program's process that gave no answer. Raises ``Trouble`` if somebody else has ended it."""
    jail.control.settimeout(CLOSED)
    with contextlib.suppress(TimeoutError):
        while all(child.status is None for child in children):
            jail.hear(children)
    for child in children:
        if child.status is None:
            continue
        if os.WIFSIGNALED(child.status):
            number = os.WTERMSIG(child.status)
            if number == signal.SIGXCPU or (number == signal.SIGKILL and child.cpu >= seconds):
                return "timeout"
            if number == signal.SIGKILL:
                raise Trouble("a program's process was killed from outside")
            return f"killed: {signal.Signals(number).name}"
        if os.WEXITSTATUS(child.status) == OUT_OF_MEMORY:
            return "memory"
    return "exited"


def verdict(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The fields of a ``Verdict``; all tests have passed if and only if the program has."""
    passed, held, total = outcome.passed, outcome.tests_passed, outcome.tests_total
    total = max(1, total) if passed else max(total, held + 1)  # a check that asserts nothing is one test
    return {
        "passed": passed,
        "tests_passed": total if passed else held,
        "tests_total": total,
        "reason": "passed" if passed else outcome.reason,
        "seconds": seconds,
    }


# ---------------------------------------------------------------- the worker


def main(jail_command: str) -> None:
    """Judges what the parent sends, one program after another, until it hangs up; the command is a JSON list."""
    parent = os.getppid()
    channel = socket.socket(fileno=CHANNEL)
    try:
        jail = Jail(json.loads(jail_command))
        channel.sendall(plain.pack({"ready": True, "files": jail.files}))
        while True:
            channel.sendall(plain.pack(referee(hear(channel, parent), jail, parent)))
    except Exception as error:  # whatever it is: nothing may be taken for a verdict
        with contextlib.suppress(OSError):
            told = str(error) if isinstance(error, Trouble) else f"{type(error).__name__}: {error}"
            channel.sendall(plain.pack({"trouble": told}))
        sys.exit(1)


def hear(channel: socket.socket, parent: int) -> dict[str, Any]:
    """The parent's next request; ends this process, and with it the jail, when there will be none."""

    def read(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            while not select.select([channel], [], [], TICK)[0]:
                if os.getppid() != parent:
                    os._exit(0)
            part = channel.recv(min(count - len(data), 1 << 20))
            if not part:
                os._exit(0)
            data += part
        return bytes(data)

    return plain.unpack(read(int.from_bytes(read(plain.HEADER), "big")))
