"""The judge of one program: runs its tests, and asks the program's process for every answer.

Tests are trusted, programs are not. So tests run here, in a process that a worker forks for one program alone, and
``candidate`` is a stand-in that sends its arguments to the program's process and gives back what comes from there, as
plain data. What is compared with ``==`` are objects made here. Everything that the program's process sends is taken
as anybody's bytes.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import dataclasses
import functools
import importlib
import pathlib
import secrets
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from dsjax.rl import plain

WORTH_LOOKING = 1e-3  # seconds of a wait from which it is asked who was kept from running
OWN_SECONDS = 1.0  # that tests may compute between two calls, beside as many as the program may take in all
MOST_ANSWER = 1 << 24  # bytes of one answer, as JSON
EXCEPTIONS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException) and not issubclass(kind, BaseExceptionGroup)
}
CODECS = (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError)
ENDINGS = (StopIteration, StopAsyncIteration, GeneratorExit)  # what loops, map and generators take for an end


class Ended(BaseException):
    """The program gives no more answers; ``args[0]`` says why. Not an Exception, so that tests do not catch it."""


class Unfit(BaseException):
    """The tests themselves can not be run; the message says why. Not an Exception, for the same reason."""


@dataclasses.dataclass
class Outcome:
    """What a judge found.

    Attributes:
        passed: None if nothing can be said.
        tests_passed: assertions that held, or pairs whose answer was the expected one.
        tests_total: all of them, those that were not reached too.
        reason: as in ``Verdict``.
    """

    passed: bool | None = False
    tests_passed: int = 0
    tests_total: int = 0
    reason: str = ""


# ---------------------------------------------------------------- the program's process


class Remote:
    """The judge's end of the channel to a program.

    Args:
        channel: a socket with SO_PASSCRED, so that the kernel tells which process is at the other end.
        budget: a list with one number, the seconds that programs may still take; several channels share it.
    """

    def __init__(self, channel: socket.socket, budget: list[float]) -> None:
        self.channel, self.budget = channel, budget
        self.ended = ""
        self.pid: int | str = "none"
        self.delay = self._delay()

    def start(self) -> None:
        """Waits until the process is there and confined."""
        started, ancillary, _, _ = self.channel.recvmsg(1, socket.CMSG_SPACE(12))  # the worker limits this wait
        if not started:
            self.end("infrastructure: a process was not confined")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                self.pid = struct.unpack("=iii", data[:12])[0]
        self.delay = self._delay()

    def load(self, code: str, before: str = "") -> dict[str, Any]:
        """Sends the program. Returns the reply: a ``value``, or what it ``raised``."""
        self._send(plain.pack({"code": code, "before": before}))
        return self._receive()

    def call(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
        """Calls a function of the program. Returns a ``value``, what it ``raised``, or that it is ``missing``."""
        if self.ended:
            raise Ended(self.ended)
        number = secrets.token_hex(8)  # an answer that was sent before the question can not name it
        call = {"id": number, "name": name, "arguments": list(arguments), "keywords": keywords}
        try:
            message = plain.pack(call, self._reference)
        except RecursionError:
            raise Unfit("arguments are made of too many objects, one of another") from None
        self._send(message)
        reply = self._receive()
        if reply.get("id") != number:
            self.end("protocol: an answer to another question")
        return reply

    def _send(self, message: bytes) -> None:
        view = memoryview(message)
        while view:
            self._wait(select.POLLOUT)
            try:
                view = view[self.channel.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                continue
            except OSError:
                self.end("ended")

    def _receive(self) -> dict[str, Any]:
        size = int.from_bytes(self._read(plain.HEADER), "big")
        if size > MOST_ANSWER:
            self.end(f"output: an answer of more than {MOST_ANSWER >> 20} MiB")
        try:
            reply = plain.unpack(self._read(size), self._opaque)
        except plain.Malformed:
            self.end("protocol: no message")
        if type(reply) is not dict:
            self.end("protocol: no message")
        return reply

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._wait(select.POLLIN)
            try:
                part = self.channel.recv(min(count - len(data), 1 << 20), socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                part = b""
            if not part:
                self.end("ended")
            data += part
        return bytes(data)

    def _wait(self, event: int) -> None:
        """Until the channel can be read or written. Takes from the budget what passes, without what either of the two
        processes waited for a processor: a busy machine must not turn a right program into a slow one."""
        poll = select.poll()
        poll.register(self.channel, event)
        begin, left = time.monotonic(), self.budget[0]
        while not poll.poll(max(0.0, left) * 1000):
            left = self.budget[0] - (time.monotonic() - begin) + (self._delay() - self.delay)
            if left <= 0:
                self.budget[0] = 0.0
                self.end("timeout")
        passed = time.monotonic() - begin
        if passed > WORTH_LOOKING:
            delay = self._delay()
            passed, self.delay = passed - (delay - self.delay), delay
        self.budget[0] -= max(0.0, passed)

    def _delay(self) -> float:
        return waited_for_processor(self.pid) + waited_for_processor("self")

    def end(self, reason: str) -> NoReturn:
        """No more answers. Raises ``Ended``."""
        self.ended = self.ended or reason
        raise Ended(self.ended)

    def exception(self, reply: dict[str, Any]) -> tuple[BaseException, str]:
        """What a program raised, as the first of its classes that is Python's own, and the name of its very own one."""
        names, text, arguments = reply.get("raised"), reply.get("text"), reply.get("arguments", [])
        if (
            type(names) is not list
            or not names
            or not all(type(name) is str for name in names)
            or type(text) is not str
            or type(arguments) is not list
        ):
            self.end("protocol: no message")
        kind = next((EXCEPTIONS[name] for name in names if name in EXCEPTIONS), Exception)
        own_name = names[0] if names[0].isidentifier() and len(names[0]) < 60 else kind.__name__
        return exception_of(kind, arguments, text), own_name

    def _opaque(self, kind: str, body: Any) -> Opaque:
        if kind != "opaque" or type(body) is not list or list(map(type, body)) != [str, bool, int]:
            raise plain.Malformed(kind)
        name, true, number = body
        return Opaque(name, true, {self: number})

    def _reference(self, x: Any) -> dict[str, Any]:
        if type(x) is Name:
            return {"name": x.name}
        if type(x) is Opaque:
            if x.made is not None and self not in x.kept:
                like = self.call(*x.made).get("value")
                x.kept |= like.kept if type(like) is Opaque else {}
            return {"kept": x.kept[self]} if self in x.kept else {"name": f"<{x.kind}>"}  # by which there is nothing
        raise Unfit(f"an argument of type {type(x).__name__} is not plain data")


def exception_of(kind: type[BaseException], arguments: list[Any], text: str) -> BaseException:
    """An exception with this message: made of these arguments if they give it, else of the message alone."""
    ways: list[list[Any]] = [arguments, [text]]
    for given in ways:
        with contextlib.suppress(Exception):
            if issubclass(kind, CODECS):  # their messages quote what lies there, even outside
                whole, start, end, _ = given[-4:]
                if not 0 <= start < end <= len(whole):
                    continue
            made = kind(*given)
            if type(made) is kind and str(made) == text:
                return made
    return kind.__new__(kind, text)  # without __init__: some want more arguments


def waited_for_processor(pid: int | str) -> float:
    """Seconds in which a process was ready to run and did not, since it began; 0 where the kernel does not say."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


class Opaque:
    """In place of an answer that is not plain data: equal to nothing, and as true as it says.

    ``kept`` has the processes that hold the object itself, each with its number there: to them it may be an argument.
    ``made`` is the call that made it, if another process may make its like: name, arguments, keywords.
    """

    __slots__ = ("kept", "kind", "made", "true")  # tests can not set an attribute, which the object would not have

    def __init__(self, kind: str, true: bool, kept: dict[Remote, int]) -> None:
        self.kind, self.true, self.kept = kind, true, kept
        self.made: tuple[str, tuple[Any, ...], dict[str, Any]] | None = None

    def __eq__(self, other: object) -> bool:
        return False

    def __bool__(self) -> bool:
        return self.true

    __hash__ = object.__hash__  # it may be in a set, or be a key


class Name:
    """Something that tests name and do not define: the program's, by its name. It may be called, or be an argument."""

    def __init__(self, name: str, answers: Answers) -> None:
        self.name, self.answers = name, answers

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.answers(self.name, arguments, keywords)


class Answers:
    """What tests call: the program, and beside it a second process with what stands in front of the entry point.

    Tests may use functions that a prompt gives (HumanEval/32, 38, 50). A program that redefines them must not be
    asked, so they are called where nothing else of the program runs. An object that they make there is made anew in the
    program's process once it is an argument, and not before: it may hold what the tests expect.

    ``source`` is that of the tests. A StopIteration that it does not name becomes a RuntimeError, as that of a
    generator does (PEP 479): ``map`` would end by it, and what follows would not be asserted.
    """

    def __init__(
        self, entry_point: str, program: Remote, prompt: Remote | None, patience: float, source: str = ""
    ) -> None:
        self.entry_point, self.program, self.prompt, self.patience = entry_point, program, prompt, patience
        self.source = source
        self.calls = 0
        self.came: list[tuple[BaseException, str]] = []  # exceptions from the program, with their own names

    def __call__(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        self.calls += 1
        end_after(self.patience)
        reply: dict[str, Any] = {"missing": True}
        if self.prompt is not None and name != self.entry_point:
            reply = self.prompt.call(name, arguments, keywords)
            if type(reply.get("value")) is Opaque:
                reply["value"].made = name, arguments, keywords
        if "missing" in reply:
            reply = self.program.call(name, arguments, keywords)
        if "missing" in reply:
            self.program.end(f"no function {name}")
        if "value" in reply:
            return reply["value"]
        error, own_name = self.program.exception(reply)
        if isinstance(error, ENDINGS) and type(error).__name__ not in self.source:
            error = RuntimeError(f"the program raised {type(error).__name__}")
        self.came.append((error, own_name))
        raise error

    @property
    def ended(self) -> str:
        """Why there are no more answers, if there are none."""
        return self.program.ended or (self.prompt.ended if self.prompt is not None else "")

    def why(self, error: BaseException) -> str:
        """The reason of a failure by this exception."""
        for came, own_name in self.came:
            if came is error:
                return "memory" if own_name == "MemoryError" else f"exception: {own_name}"
        return (
            "wrong answer"
            if isinstance(error, AssertionError)
            else f"wrong answer: {type(error).__name__} in the tests"
        )


def end_after(seconds: float) -> None:
    """Lets the kernel end this process once it has computed for so long, unless it is asked again before.

    An odd answer may send tests into a loop, or into one long operation that no handler would interrupt.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


# ---------------------------------------------------------------- tests


class Checks:
    """Source with ``check(candidate)``, as HumanEval has it.

    Raises SyntaxError (or ValueError) for what is no Python, and ``Unfit`` if there is no check.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        tree = ast.parse(source)
        if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body):
            raise Unfit("there is no function check(candidate)")
        nodes = list(ast.walk(tree))
        names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - _defined(nodes)
        names -= vars(builtins).keys() | {"__name__", "__file__"}
        bases = {n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
        self.modules = sorted(names & bases & sys.stdlib_module_names)  # what a prompt imports, tests may use
        self.foreign = sorted(names.difference(self.modules))
        self.least_total = sum(isinstance(n, ast.Assert) and not isinstance(n.test, ast.Constant) for n in nodes)

    def run(self, answers: Answers, *, go_on: bool) -> tuple[Outcome, BaseException | None]:
        """Calls ``check``, and counts its assertions; with ``go_on`` those that fail do not end it."""
        counting = _Counting(go_on)
        try:
            tree = ast.fix_missing_locations(counting.visit(ast.parse(self.source)))
        except RecursionError as deep:
            raise Unfit(str(deep)) from None
        reached, held = [0] * len(counting.certain), [0] * len(counting.certain)

        def count(counts: list[int], assertion: int) -> None:
            counts[assertion] += 1

        def candidate(*arguments: Any, **keywords: Any) -> Any:
            return answers(answers.entry_point, arguments, keywords)

        candidate.__name__ = candidate.__qualname__ = answers.entry_point
        namespace: dict[str, Any] = {name: Name(name, answers) for name in self.foreign}
        namespace |= {name: importlib.import_module(name) for name in self.modules}
        namespace |= {answers.entry_point: candidate, "__name__": "tests"}
        namespace |= {"__reached__": functools.partial(count, reached), "__held__": functools.partial(count, held)}
        error: BaseException | None = None
        try:
            exec(compile(tree, "<tests>", "exec"), namespace)
            namespace["check"](candidate)
        except Unfit:
            raise
        except BaseException as raised:
            if not answers.calls and isinstance(raised, Exception) and not isinstance(raised, AssertionError):
                raise Unfit(f"{type(raised).__name__}: {raised}"[:200]) from None
            error = raised
        # one that was not reached counts as one, unless it stands where nobody is meant to come
        total = sum(max(n, 1) if sure else n for n, sure in zip(reached, counting.certain, strict=True))
        return Outcome(error is None and not answers.ended, sum(held), total), error


class _Counting(ast.NodeTransformer):
    """Counts assertions before and behind each; with ``go_on`` one that fails is passed over."""

    def __init__(self, go_on: bool) -> None:
        self.go_on = go_on
        self.certain: list[bool] = []  # of each assertion: whether a run of the tests is meant to reach it

    def visit_Assert(self, node: ast.Assert) -> Any:
        if isinstance(node.test, ast.Constant) and node.test.value:
            return node  # assert True: nobody's merit
        before, behind = (ast.parse(f"{name}({len(self.certain)})").body[0] for name in ("__reached__", "__held__"))
        self.certain.append(not isinstance(node.test, ast.Constant))
        steps = [before, node, behind]
        if not self.go_on:
            return steps
        passed_over = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [ast.Pass()])
        return ast.Try(steps, [passed_over], [], [])


def _defined(nodes: list[ast.AST]) -> set[str]:
    """Names that are bound anywhere."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            found.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            found.add(node.rest)
    return found


def run_pairs(pairs: list[Any], answers: Answers) -> Outcome:
    """Compares the answer to each (arguments, expected); goes on behind wrong ones, as long as there are answers."""
    outcome = Outcome(tests_total=len(pairs))
    for arguments, expected in pairs:
        reason = ""
        try:
            answer = answers(answers.entry_point, tuple(arguments), {})
            if [answer] != [expected]:  # lists, in which the one NaN of ``plain`` is equal to itself
                reason = "wrong answer"
        except Ended as ended:
            outcome.reason = outcome.reason or str(ended)
            break
        except Unfit:
            raise
        except BaseException as error:
            reason = answers.why(error)
        outcome.tests_passed += not reason
        outcome.reason = outcome.reason or reason
    outcome.passed = outcome.tests_passed == outcome.tests_total
    return outcome


def run_checks(checks: Checks, answers: Answers, report: Callable[[Outcome], None]) -> Outcome:
    """Runs ``check`` as it is for the verdict; if it fails, once more past each failure, to count what holds."""
    outcome, error = checks.run(answers, go_on=False)
    if outcome.passed:
        return outcome
    outcome.reason = answers.ended or (answers.why(error) if error is not None else "")
    report(outcome)  # what follows may take too long
    if not answers.ended:
        again, _ = checks.run(answers, go_on=True)
        outcome.tests_passed = max(outcome.tests_passed, again.tests_passed)
        outcome.tests_total = max(outcome.tests_total, again.tests_total)
    return outcome


def judge(request: dict[str, Any], program: Remote, prompt: Remote | None, report: Callable[[Outcome], None]) -> None:
    """Loads the program, runs its tests, and reports; the last report counts.

    Args:
        request: code, tests and entry_point of a ``Program``.
        program: where it runs.
        prompt: where what stands in front of its entry point runs, if the tests name more than that.
        report: called with what is known, each time that it is more.
    """
    tests, entry_point = request["tests"], request["entry_point"]
    checks = Checks(tests) if isinstance(tests, str) else None
    outcome = Outcome(tests_total=len(tests) if checks is None else checks.least_total)
    patience = request["timeout"] + OWN_SECONDS
    answers = Answers(entry_point, program, prompt, patience, "" if checks is None else checks.source)
    end_after(patience)
    report(dataclasses.replace(outcome, reason="infrastructure: a process did not start"))
    try:
        program.start()
        report(outcome)  # from here on it is the program's time
        reply = program.load(request["code"])
        if "raised" in reply:
            _, name = program.exception(reply)
            kinds = {"SyntaxError": "syntax error", "MemoryError": "memory"}
            outcome.reason = kinds.get(name, f"exception: {name}")
        else:
            if prompt is not None:
                prompt.start()
                prompt.load(request["code"], before=entry_point)
            outcome = run_pairs(tests, answers) if checks is None else run_checks(checks, answers, report)
    except Ended as ended:
        outcome.reason = str(ended)
    except Unfit as unfit:
        outcome = Outcome(None, 0, outcome.tests_total, f"tests: {unfit}")
    report(outcome)
