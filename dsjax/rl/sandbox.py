"""Runs programs that a model wrote, and says which are right.

    with Sandbox(workers=2) as sandbox:
        verdicts = sandbox.check([Program(code=..., tests=[((2, 3), 5)], entry_point="add"), ...])

Three processes for each program: the program's, which can reach nothing; a judge that runs the tests and compares
answers; the worker that starts both (``dsjax.rl.jail``, ``dsjax.rl.judge``, ``dsjax.rl.warden``). See
docs/sandbox.md.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import keyword
import logging
import os
import platform
import queue
import sys
import unicodedata
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dsjax.config import UserError
from dsjax.rl import isolation, plain
from dsjax.rl.judge import Checks, Unfit
from dsjax.rl.worker_process import Trouble, WorkerProcess

_log = logging.getLogger(__name__)

ATTEMPTS = 3  # at one program, when trouble is not its own
START = 60.0  # seconds for a worker to start
PATIENCE = 120.0, 20.0  # seconds, and times a program's timeout, after which a worker is given up
AHEAD = 16  # programs that ``stream`` takes for each worker before it gives a verdict
TOO_DEEP = "it is nested too deep"
CLOSED = "the sandbox is closed; programs run within its with block, or before close()"
MOST = {"timeout": 86_400, "memory_mb": 1 << 20}  # a day, a TiB


@dataclasses.dataclass(frozen=True)
class Program:
    """A program and what is demanded of it.

    Attributes:
        code: Python source that defines ``entry_point``.
        tests: source that defines ``check(candidate)``, as HumanEval has it, or a list of (arguments, expected): a
            tuple or list of positional arguments, and the answer that must be equal. No iterators: they give what they
            have only once.
        entry_point: name of the function.
        timeout: seconds that the program may take, from its first line to its last answer, waiting for a processor
            not counted; at most a day.
        memory_mb: MiB that it may map beside what the interpreter has; at most a TiB.
    """

    code: str
    tests: Any
    entry_point: str
    timeout: float = 2.0
    memory_mb: float = 512


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        passed: whether all tests passed. None: nothing is known, by no fault of the program's; ``reason`` says why.
            That is no 0: leave such a program out.
        tests_passed: assertions of ``check`` that held, or pairs that were answered right.
        tests_total: all of them; one for a check without assertions.
        reason: "passed", "wrong answer", "wrong answer: TypeError in the tests", "exception: ZeroDivisionError",
            "timeout", "memory", "syntax error", "no function NAME", "exited", "killed: SIGSEGV", "output: ...",
            "protocol: ...", and of those without a verdict "tests: ..." (they can not be run) and "infrastructure:
            ..." (it was tried three times).
        seconds: from the start of its process to its end.
    """

    passed: bool | None
    tests_passed: int
    tests_total: int
    reason: str
    seconds: float


class Sandbox:
    """A pool of workers, for several threads too; ends its processes when it is closed, left or no longer used.

    Args:
        workers: programs that run at the same time.
        level: "bubblewrap" or "seccomp" (``dsjax.rl.isolation``); None is the best that works here.

    Raises ``UserError`` if no level works: then nothing is run. "seccomp" chosen for want of better is logged, once.
    """

    def __init__(self, workers: int = 2, level: str | None = None) -> None:
        if workers < 1:
            raise UserError(f"workers is {workers}; it must be at least 1")
        if level is not None and level not in isolation.LEVELS:
            raise UserError(f"level is {level!r}; it must be one of {', '.join(isolation.LEVELS)}")
        machine = f"{sys.platform} on {platform.machine()}"
        if machine not in [f"linux on {name}" for name in isolation.MACHINES]:
            allowed = " and ".join(isolation.MACHINES)
            raise UserError(f"this is {machine}; programs can be isolated on linux on {allowed} alone, so none is run")
        first, self.level, self._jail = _first_worker((level,) if level else isolation.LEVELS)
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for worker in (first, *[None] * (workers - 1)):
            self._idle.put(worker)
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        self._workers = workers
        self.close = weakref.finalize(self, _close, self._threads, self._idle, os.getpid())

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, programs: Iterable[Program]) -> list[Verdict]:
        """A verdict for each program, in their order. Raises ``UserError``, before any runs, if one is none, and if the
        sandbox is closed."""
        programs = list(programs)
        for i, program in enumerate(programs):
            validate(program, f"program {i}")
        return list(self._verdicts(programs, len(programs)))

    def stream(self, programs: Iterable[Program]) -> Iterator[Verdict]:
        """Verdicts in the order of the programs, of which it takes only some ahead."""
        return self._verdicts(_validated(programs), AHEAD * self._workers)

    def _verdicts(self, programs: Iterable[Program], ahead: int) -> Iterator[Verdict]:
        waiting: collections.deque[concurrent.futures.Future[Verdict]] = collections.deque()
        try:
            for program in programs:
                if len(waiting) == ahead:
                    yield waiting.popleft().result()
                if not self.close.alive:
                    raise UserError(CLOSED)
                waiting.append(self._threads.submit(self._verdict, program))
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.CancelledError:  # by ``close``
            raise UserError(CLOSED) from None
        finally:
            for future in waiting:
                future.cancel()

    def _verdict(self, program: Program) -> Verdict:
        request = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
        request["entry_point"] = unicodedata.normalize("NFKC", program.entry_point)  # as Python reads names
        if not isinstance(program.tests, str):
            request["tests"] = [[list(arguments), expected] for arguments, expected in program.tests]
        message, reason = plain.pack(request), ""
        for _ in range(ATTEMPTS):
            worker = self._idle.get()
            try:
                worker = worker or _Worker(self._jail)
                return Verdict(**worker.ask(message, PATIENCE[0] + PATIENCE[1] * program.timeout))
            except Trouble as trouble:
                reason = str(trouble)
                if worker is not None:
                    worker.close()
                worker = None
            finally:
                self._idle.put(worker)
        total = 1 if isinstance(program.tests, str) else len(program.tests)
        return Verdict(None, 0, total, f"infrastructure: {reason}", 0.0)


class _Worker(WorkerProcess):
    """A process of ``dsjax.rl.warden``, with a jail that ``command`` starts. Raises ``Trouble``."""

    def __init__(self, command: list[str]) -> None:
        super().__init__("warden", [json.dumps(command)], called="a worker")
        self.files: bool = self.first_word(START)["files"]

    def does_not_hold(self) -> str:
        """What is wrong with its jail, found out by a program that tries what it must not be able to do."""
        request = Program(PROBE, [[[__file__], True]], "probe", timeout=10.0)
        try:
            reply = self.ask(plain.pack(dataclasses.asdict(request)), START)
        except Trouble as trouble:
            return str(trouble)
        return "" if reply["passed"] else f"a program was not held ({reply['reason']})"


# Refused in a row if the jail holds: it stops at the first that is not.
PROBE = """
import os, socket
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return True
    return False
def probe(canary):
    return (
        refused(socket.socket)
        and refused(os.open, canary, os.O_RDONLY)
        and refused(os.open, canary, os.O_WRONLY | os.O_CREAT)
        and refused(os.kill, os.getpid(), 0)
        and refused(os.execv, "/bin/true", ["true"])
        and refused(os.fork)
    )
"""


def _first_worker(levels: Sequence[str]) -> tuple[_Worker, str, list[str]]:
    """A worker of the first level that holds when it is tried, the level, and what starts its jail."""
    complaints = []
    for level in levels:
        command = isolation.jail_command(level)
        if command is None:
            complaints.append(f"{level}: there is no program bwrap")
            continue
        try:
            worker = _Worker(command)
        except Trouble as trouble:
            complaints.append(f"{level}: {trouble}")
            continue
        complaint = worker.does_not_hold()
        if not complaint:
            if level != isolation.LEVELS[0] and len(levels) > 1:
                _warn("; ".join(complaints), worker.files)
            return worker, level, command
        worker.close()
        complaints.append(f"{level}: {complaint}")
    raise UserError(f"programs can not be isolated on this machine, so none is run ({'; '.join(complaints)})")


@functools.cache
def _warn(why: str, files: bool) -> None:
    held = "Landlock keeps files from programs" if files else "programs can not open any file"
    _log.warning("programs run under limits and a filter of system calls, without namespaces (%s); %s", why, held)


def _close(threads: concurrent.futures.ThreadPoolExecutor, idle: queue.SimpleQueue[_Worker | None], owner: int) -> None:
    """Waits for programs that run, and ends the workers; in a fork of their owner it does nothing."""
    if os.getpid() != owner:
        return
    threads.shutdown(wait=True, cancel_futures=True)
    with contextlib.suppress(queue.Empty):
        while True:
            worker = idle.get_nowait()
            if worker is not None:
                worker.close()


# ---------------------------------------------------------------- what is wrong with a program


def _validated(programs: Iterable[Program]) -> Iterator[Program]:
    for i, program in enumerate(programs):
        validate(program, f"program {i}")
        yield program


def validate(program: Program, where: str) -> None:
    """Raises ``UserError``, which begins with ``where``, for a field that makes no sense."""
    if not isinstance(program, Program):
        raise UserError(f"{where} is a {type(program).__name__}; it must be a Program")
    if not isinstance(program.code, str):
        raise UserError(f"{where}: code is a {type(program.code).__name__}; it must be a string")
    name = program.entry_point
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"{where}: entry_point is {name!r:.60}; it must be the name of a function")
    for field, most in MOST.items():
        value = getattr(program, field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
            raise UserError(f"{where}: {field} is {value!r}; it must be a number above 0, at most {most}")
    if isinstance(program.tests, str):
        complaint = _complaint(program.tests)
        if complaint:
            raise UserError(f"{where}: tests: {complaint}")
        return
    tests = program.tests
    if not isinstance(tests, (list, tuple)):
        raise UserError(
            f"{where}: tests is a {type(tests).__name__}; it must be source or a list of (arguments, expected)"
        )
    if not tests:
        raise UserError(f"{where}: tests is empty; what nothing is demanded of can not be judged")
    for k, test in enumerate(tests):
        if not isinstance(test, (tuple, list)) or len(test) != 2 or not isinstance(test[0], (tuple, list)):
            raise UserError(f"{where}: tests[{k}] must be (arguments, expected), the arguments a tuple or list")
        try:
            plain.encode(list(test), depth=2)  # as deep as it is in a request
        except plain.NotPlain as error:
            raise UserError(f"{where}: tests[{k}]: {error}, so it can not travel between processes") from None


@functools.lru_cache(maxsize=4096)
def _complaint(tests: str) -> str:
    try:
        Checks(tests)
    except SyntaxError as error:
        return f"{error.msg} in line {error.lineno}"
    except (RecursionError, MemoryError):
        return TOO_DEEP
    except (Unfit, ValueError) as error:
        return str(error)
    return ""
