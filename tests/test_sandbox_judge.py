"""The judge alone: how tests are read and counted, and what it makes of messages."""

from __future__ import annotations

import builtins
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dsjax.rl import plain
from dsjax.rl.judge import Answers, Checks, Ended, Outcome, Remote, Unfit, judge


@pytest.fixture(autouse=True)
def no_end() -> Iterator[None]:
    """A judge lets the kernel end its process after some computing. Here that is the process of all tests."""
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


class Program:
    """At the other end of a channel: answers with what a function makes of each message."""

    def __init__(self, answer: Any) -> None:
        ours, self.theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.remote = Remote(ours, [1.0])
        self.seen: list[Any] = []
        self.answer = answer
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        with self.theirs, self.theirs.makefile("rb") as file:
            self.theirs.sendall(b"r")
            while header := file.read(plain.HEADER):
                self.seen.append(plain.unpack(file.read(int.from_bytes(header, "big"))))
                try:
                    self.theirs.sendall(self.answer(self.seen[-1]))
                except OSError:
                    return

    def judged(self, tests: Any) -> Outcome:
        reports: list[Outcome] = []
        try:
            judge(
                {"code": "code", "tests": tests, "entry_point": "f", "timeout": 30.0}, self.remote, None, reports.append
            )
        finally:
            self.remote.channel.close()
            self.thread.join()
        return reports[-1]


def honest(message: Any) -> bytes:
    if "code" in message:
        return plain.pack({"value": None})
    return plain.pack({"id": message["id"], "value": message["arguments"][0] + 1})


PAIRS = [[[1], 2], [[2], 3]]


def test_tests_and_expected_values_are_never_sent() -> None:
    program = Program(honest)
    secret = [[[1], 2], [[2], "a secret"]]
    assert program.judged(secret).tests_passed == 1
    assert [message.get("arguments") for message in program.seen] == [None, [1], [2]]
    program = Program(honest)
    assert program.judged("def check(candidate):\n    assert candidate(5) == 6, 'a secret'\n").passed
    assert program.seen[0] == {"code": "code", "before": ""}
    assert [set(message) for message in program.seen[1:]] == [{"id", "name", "arguments", "keywords"}]


def test_each_question_has_a_number_that_can_not_be_guessed() -> None:
    program = Program(honest)
    assert program.judged(PAIRS).passed
    numbers = [message["id"] for message in program.seen[1:]]
    assert len(set(numbers)) == 2
    assert all(len(number) == 16 for number in numbers)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({"value": 2}, "protocol: an answer to another question"),
        ({"id": "0000000000000000", "value": 2}, "protocol: an answer to another question"),
        (3, "protocol: no message"),
        ([], "protocol: no message"),
    ],
)
def test_a_reply_that_is_none_ends_it(reply: Any, reason: str) -> None:
    program = Program(lambda message: honest(message) if "code" in message else plain.pack(reply))
    outcome = program.judged(PAIRS)
    assert (outcome.passed, outcome.tests_passed, outcome.tests_total, outcome.reason) == (False, 0, 2, reason)


@pytest.mark.parametrize(
    "raised",
    [
        {},
        {"raised": []},
        {"raised": 3, "text": ""},
        {"raised": ["ValueError"], "text": 3},
        {"raised": [3], "text": ""},
        {"raised": ["ValueError"], "text": "", "arguments": "a"},
    ],
)
def test_an_exception_that_is_none_ends_it(raised: dict[str, Any]) -> None:
    program = Program(
        lambda message: honest(message) if "code" in message else plain.pack({"id": message["id"], **raised})
    )
    assert program.judged(PAIRS).reason == "protocol: no message"


def test_every_exception_of_pythons_arrives_as_itself() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        remote = Remote(ours, [1.0])
        for name, kind in vars(builtins).items():
            if isinstance(kind, type) and issubclass(kind, BaseException) and not issubclass(kind, BaseExceptionGroup):
                error, own = remote.exception({"raised": ["Own", name, "object"], "text": "why"})
                assert (type(error), own) == (kind, "Own")
        error, own = remote.exception({"raised": ["<b>" * 100, "NoSuchError"], "text": "why"})
        assert (type(error), own, str(error)) == (Exception, "Exception", "why")


@pytest.mark.parametrize("start", [-(10**15), 10**15, 0])
def test_no_exception_reads_beyond_what_it_quotes(start: int) -> None:
    """Python's own would end this process."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = ["utf-8", b"", start, start + 1, "why"]
        told = {"raised": ["UnicodeDecodeError"], "text": "why", "arguments": arguments}
        error, _ = Remote(ours, [1.0]).exception(told)
        assert (type(error), str(error)) == (UnicodeDecodeError, "")


@pytest.mark.parametrize("name", ["StopIteration", "StopAsyncIteration", "GeneratorExit"])
@pytest.mark.parametrize(
    "asserted",
    [
        "for a, b in zip(map(candidate, [1, 2]), [1, 4]): assert a == b",
        "assert all(map(lambda x: candidate(x) == x, [1, 2]))",
        "assert not list(filter(candidate, [1, 2]))",
        "for a in iter(lambda: candidate(1), None): assert a == 1",
    ],
)
def test_a_program_ends_no_loop_of_the_tests(name: str, asserted: str) -> None:
    program = Program(
        lambda message: (
            honest(message)
            if "code" in message
            else plain.pack({"id": message["id"], "raised": ["Own", name, "BaseException"], "text": ""})
        )
    )
    outcome = program.judged(f"def check(candidate):\n    {asserted}\n")
    assert (outcome.passed, outcome.tests_passed, outcome.reason) == (False, 0, "exception: Own")


@pytest.mark.parametrize("name", ["StopIteration", "GeneratorExit", "RuntimeError"])
def test_tests_that_name_an_exception_may_expect_it(name: str) -> None:
    program = Program(
        lambda message: (
            honest(message) if "code" in message else plain.pack({"id": message["id"], "raised": [name], "text": "why"})
        )
    )
    source = f"""
def check(candidate):
    try:
        candidate(1)
        assert False
    except {name} as error:
        assert str(error) == "why"
"""
    assert program.judged(source).passed


def test_a_program_that_does_not_answer_runs_out_of_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        remote = Remote(ours, [0.2])
        begin = time.monotonic()
        with pytest.raises(Ended, match="timeout"):
            remote.call("f", (1,), {})
        assert 0.2 <= time.monotonic() - begin < 2
        with pytest.raises(Ended, match="timeout"):  # and gets no more
            remote.call("f", (1,), {})


def test_a_program_that_does_not_listen_runs_out_of_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        remote = Remote(ours, [0.2])
        with pytest.raises(Ended, match="timeout"):
            remote.call("f", ("x" * (1 << 22),), {})


# ---------------------------------------------------------------- reading tests


def test_tests_that_are_nested_too_deep_have_no_verdict() -> None:
    deep = "def check(candidate):\n    x = " + "1 + " * 600 + "1\n    assert candidate(600) == x\n"
    outcome = Program(honest).judged(deep)
    assert (outcome.passed, outcome.reason[:23]) == (None, "tests: maximum recursio")


def test_names_that_tests_do_not_define_are_found() -> None:
    checks = Checks(
        """
import random as r
from math import pi
LIMIT = 3
def help(a, *b, c=4, **d):
    return [e for e in (a, b, c, d, g := 3, g)]
class K: pass
def check(candidate):
    global h
    h = 1
    with open("x") as f:
        try: pass
        except ValueError as error: print(error, len(f), h)
    match candidate(1):
        case [i, *rest]: print(i, rest)
        case {"a": j, **others}: print(j, others)
    assert candidate(LIMIT, r, pi, K, help, __name__) == math.pi + double(root)
"""
    )
    assert checks.modules == ["math"]
    assert checks.foreign == ["double", "root"]
    assert checks.least_total == 1


def test_a_name_is_a_module_where_something_is_taken_from_it() -> None:
    checks = Checks("def check(candidate):\n    assert candidate(array(queue, math)) == [math.pi, token.x, token]\n")
    assert checks.modules == ["math", "token"]
    assert checks.foreign == ["array", "queue"]


@pytest.mark.parametrize("source", ["", "x = 1", "class check: pass", "def f():\n    def check(c): pass"])
def test_tests_without_a_check_are_refused(source: str) -> None:
    with pytest.raises(Unfit, match="no function check"):
        Checks(source)


def outcome_of(source: str, answer: Any) -> tuple[bool | None, int, int, int, int]:
    """Of both runs: as it is, and past failures."""

    class Direct(Answers):
        def __init__(self) -> None:
            super().__init__("f", Remote(socket.socket(), [1.0]), None, 30.0)

        def __call__(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            self.calls += 1
            return answer(*arguments, **keywords)

    answers = Direct()
    with answers.program.channel:
        first, _ = Checks(source).run(answers, go_on=False)
        again, _ = Checks(source).run(answers, go_on=True)
    return first.passed, first.tests_passed, first.tests_total, again.tests_passed, again.tests_total


def test_assertions_are_counted_as_they_are_reached() -> None:
    source = """
def check(candidate):
    assert True
    for i in range(3):
        assert candidate(i) == i
    if candidate(0):
        assert candidate(9) == 9
    assert candidate(7) == 7, "late"
    assert candidate(8) == 8
"""
    assert outcome_of(source, lambda x: x) == (True, 5, 6, 5, 6)
    assert outcome_of(source, lambda x: x if x != 1 else 0) == (False, 1, 5, 4, 6)
    assert outcome_of(source, lambda x: 8 // (x - 7)) == (False, 0, 4, 1, 6)


def test_an_assertion_nobody_should_reach_counts_if_it_is_reached() -> None:
    source = """
def check(candidate):
    try:
        candidate(0)
        assert False
    except ZeroDivisionError:
        pass
    assert candidate(1) == 1
"""
    assert outcome_of(source, lambda x: 1 // x) == (True, 1, 1, 1, 1)
    assert outcome_of(source, lambda x: 1) == (False, 0, 2, 1, 2)
