"""The process that judges answers with libraries that may take for ever, take all memory, or crash on them.

It imports a library, then forks a child, which judges one answer after another. A child that an answer ends is told of
and replaced by another, at the cost of a fork. Of this library only files of ``dsjax.rl`` are imported here that import
nothing else of it (``dsjax.rl.isolation``), so it starts fast and holds no device.

Nothing of an answer is ever run: what scorers would evaluate is looked at before
(``dsjax.rl.gym_datasets.may_be_judged``). So limits of time and memory are all that a child needs.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import signal
import socket
import sys
import warnings
from typing import Any, NoReturn

from dsjax.rl import gym_datasets, plain

CHANNEL = 0  # standard input is the socket to the parent
MEMORY = 1 << 30  # bytes that a child may map beside what it has
WARM = (
    ("72", "72.0"),
    ("\\frac{1}{2}", "0.5"),
    ("x^2+1", "1+x^2"),
    ("(1,2)", "(2,1)"),
    ("\\{1,2\\}", "[1,2)"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("\\pi", "3.14"),
    ("\\text{Friday}", "x=5"),
)


def main(kind: str) -> None:
    """Judges what the parent sends until it hangs up; ``kind`` is "math" or "gym"."""
    channel = socket.socket(fileno=os.dup(CHANNEL))
    warnings.simplefilter("ignore")
    if kind == "math":
        for right, answer in WARM:  # what parsers learn here, children know
            equal(right, answer)
    else:
        import reasoning_gym  # noqa: F401
        import sympy  # noqa: F401
    channel.sendall(plain.pack({"ready": True}))
    while True:
        pid = os.fork()
        if pid == 0:
            child(channel)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status))
        channel.sendall(plain.pack({"died": signal.Signals(os.WTERMSIG(status)).name}))


def child(channel: socket.socket) -> NoReturn:
    """Judges one answer after another; each may take its seconds of processor time, or the kernel ends this process."""
    code = 1
    try:
        limit()
        with channel.makefile("rb") as file:
            while header := file.read(plain.HEADER):
                request = plain.unpack(file.read(int.from_bytes(header, "big")))
                if "prepare" in request:
                    gym_datasets.dataset(*request["prepare"])
                signal.setitimer(signal.ITIMER_PROF, request["seconds"])
                try:
                    reply: dict[str, Any] = {"score": judged(request)}
                except Exception as error:
                    reply = {"raised": f"{type(error).__name__}: {error}"[:200]}
                signal.setitimer(signal.ITIMER_PROF, 0)
                channel.sendall(plain.pack(reply))
        code = 0
    finally:
        os._exit(code)


def limit() -> None:
    """Of this process from now on: memory, and no file to be written, no core."""
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # where there is no /proc, memory has no limit
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def judged(request: dict[str, Any]) -> float:
    """The score of an answer, from 0 to 1. Raises whatever the libraries raise."""
    if request["kind"] == "math":
        return float(equal(request["right"], request["answer"]))
    return gym_datasets.score(request["name"], request["level"], request["answer"], request["entry"])


def equal(right: str, answer: str) -> bool:
    """Whether an answer is mathematically the right one (math-verify, without its alarms)."""
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{right}}}", parsing_timeout=None)
    found = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return bool(verify(gold, found, timeout_seconds=None))
