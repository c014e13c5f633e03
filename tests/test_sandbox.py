"""Verdicts: right ones for honest programs, with their reasons, and within limits."""

from __future__ import annotations

import math
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest
from sandbox_places import sandbox_of

from dsjax.rl import landlock
from dsjax.rl.sandbox import Program, Sandbox, Verdict

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and seccomp are Linux's")

ADD = "def add(a, b):\n    return a + b\n"
PAIRS = [((2, 3), 5), ((0, 0), 0), (("a", "b"), "ab")]
CHECK = """
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(0, 0) == 0
    assert candidate("a", "b") == "ab"
"""


@pytest.fixture(scope="module", params=("bubblewrap", "seccomp"))
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with sandbox_of(request.param, workers=2) as made:
        yield made


def one(sandbox: Sandbox, code: str, tests: object = PAIRS, entry_point: str = "add", **limits: float) -> Verdict:
    (verdict,) = sandbox.check([Program(textwrap.dedent(code), tests, entry_point, **limits)])  # type: ignore[arg-type]
    return verdict


# ---------------------------------------------------------------- right and wrong


@pytest.mark.parametrize("tests", [PAIRS, CHECK], ids=["pairs", "check"])
def test_a_right_program_passes_and_a_wrong_one_does_not(sandbox: Sandbox, tests: object) -> None:
    right = one(sandbox, ADD, tests)
    assert (right.passed, right.tests_passed, right.tests_total, right.reason) == (True, 3, 3, "passed")
    assert 0 < right.seconds < 2
    wrong = one(sandbox, "def add(a, b):\n    return 5 if a else 0", tests)
    assert (wrong.passed, wrong.tests_passed, wrong.tests_total, wrong.reason) == (False, 2, 3, "wrong answer")


REASONS = {
    "def add(a, b):\n    return a / 0": "exception: ZeroDivisionError",
    "def add(a, b):\n    raise AssertionError": "exception: AssertionError",
    "class Own(KeyError): pass\ndef add(a, b):\n    raise Own(1)": "exception: Own",
    "1 / 0": "exception: ZeroDivisionError",
    "def add(a, b) return": "syntax error",
    "def add(a, b):\nreturn 1": "syntax error",
    "def add(a, b):\n    return '\0'": "syntax error",
    "add = 3": "exception: TypeError",
    "def sub(a, b):\n    return 1": "no function add",
    "def add(a):\n    return a": "exception: TypeError",
    "def add(a, b):\n    while True: pass": "timeout",
    "while True: pass": "timeout",
    "import time\ndef add(a, b):\n    time.sleep(60)": "timeout",
    "def add(a, b):\n    return [0] * (1 << 28)": "memory",
    "block = bytearray(1 << 29)\ndef add(a, b):\n    return a + b": "memory",
    "import os\ndef add(a, b):\n    os._exit(0)": "exited",
    "import os\nos._exit(3)": "exited",
    "import sys\ndef add(a, b):\n    sys.exit()": "exception: SystemExit",
    "def add(a, b):\n    return add(a, b)": "exception: RecursionError",
    "import ctypes\ndef add(a, b):\n    ctypes.string_at(0)": "killed: SIGSEGV",
    "def add(a, b):\n    return object()": "wrong answer",
    "def add(a, b):\n    return input()": "exception: EOFError",
    "import numpy\ndef add(a, b):\n    return a + b": "exception: ModuleNotFoundError",
}


@pytest.mark.parametrize("tests", [PAIRS, CHECK], ids=["pairs", "check"])
def test_the_reason_is_told(sandbox: Sandbox, tests: object) -> None:
    programs = [Program(code, tests, "add", timeout=0.5, memory_mb=256) for code in REASONS]  # type: ignore[arg-type]
    verdicts = sandbox.check(programs)
    assert dict(zip(REASONS, [v.reason for v in verdicts], strict=True)) == REASONS
    assert {(v.passed, v.tests_total) for v in verdicts} == {(False, 3)}


def test_an_honest_program_may_use_python(sandbox: Sandbox) -> None:
    code = """
        from __future__ import annotations
        import bisect, collections, dataclasses, datetime, decimal, enum, fractions, functools, heapq, itertools, json
        import math, operator, random, re, statistics, string, sys, textwrap, time, typing, unicodedata
        @dataclasses.dataclass(order=True)
        class Point:
            x: int
            y: int = 0
        class Pair(typing.NamedTuple):
            a: int
            b: int
        class Colour(enum.Enum):
            RED = 1
        @functools.lru_cache(maxsize=None)
        def fib(n: int) -> int:
            return n if n < 2 else fib(n - 1) + fib(n - 2)
        def everything(x):
            sys.setrecursionlimit(20000)
            print("hello", Point(1), Pair(1, 2), Colour.RED)
            time.sleep(0.001)
            datetime.datetime.strptime("2024-02-29", "%Y-%m-%d")
            random.seed(x)
            return {
                "fib": fib(90), "json": json.loads(json.dumps({"a": [1, None]})), "re": re.findall(r"\\d+", "a1b22"),
                "frac": str(fractions.Fraction(1, 3)), "dec": str(decimal.Decimal("0.1")), "set": {1, 2},
                "best": heapq.nsmallest(2, [3, 1, 2]), "name": unicodedata.name("é"), "eval": eval("1 + 1"),
                "count": collections.Counter("aab"), "main": __name__ == "__main__", "time": time.time() > 0,
                "format": f"{x:>5}", "mean": statistics.mean([1, 2]),
            }
    """
    expected = {
        "fib": 2880067194370816120,
        **{"json": {"a": [1, None]}, "re": ["1", "22"], "frac": "1/3", "dec": "0.1", "best": [1, 2]},
        **{"name": "LATIN SMALL LETTER E WITH ACUTE", "count": {"a": 2, "b": 1}, "main": False, "time": True},
        **{"format": "    3", "mean": 1.5, "set": {1, 2}, "eval": 2},
    }
    assert one(sandbox, code, [((3,), expected)], "everything").reason == "passed"


@pytest.mark.parametrize("kind", ["bubblewrap", "seccomp", "landlock"])
def test_modules_can_be_imported_late_and_no_other_file_be_read(kind: str) -> None:
    if kind == "landlock" and not landlock.version():
        pytest.skip("the kernel has no Landlock")
    code = """
        import cProfile, wsgiref.util, xml.dom.minidom, os, json
        def read(path):
            with open(path) as file:
                return file.read()[:3]
        def own():
            return read(json.__file__ if os.path.exists(json.__file__) else "/json/__init__.py") == 'r""'
    """
    with sandbox_of(kind) as held:
        assert one(held, code, [((), True)], "own").reason == "passed"
        for other in (__file__, "/etc/passwd", pytest.__file__, sys.executable):
            assert one(held, code, [((other,), '"""')], "read").reason in (
                "exception: FileNotFoundError",
                "exception: PermissionError",
            )


def test_checks_may_expect_exceptions(sandbox: Sandbox) -> None:
    check = """
def check(candidate):
    try:
        candidate(1, 0)
        assert False, "it did not raise"
    except ZeroDivisionError as error:
        assert "zero" in str(error)
    assert candidate(4, 2) == 2
"""
    verdict = one(sandbox, "def add(a, b):\n    return a / b", check)
    assert (verdict.passed, verdict.tests_passed, verdict.tests_total) == (True, 2, 2)
    verdict = one(sandbox, "def add(a, b):\n    return a / b if b else None", check)
    assert (verdict.passed, verdict.tests_passed, verdict.tests_total) == (False, 1, 3)


ARRIVES = [  # what is done, and what is true of what comes of it
    ("raise KeyError('k')", "type(e) is KeyError and e.args == ('k',) and str(e) == \"'k'\""),
    ("{}[1, 2]", "e.args == ((1, 2),)"),
    ("raise ValueError", "e.args == ()"),
    ("raise ValueError('a', [2])", "e.args == ('a', [2])"),
    ("raise SyntaxError('bad x')", "str(e) == 'bad x'"),
    ("raise SystemExit(3)", "e.code == 3"),
    ("raise FileNotFoundError(2, 'no')", "type(e) is FileNotFoundError and (e.errno, e.strerror) == (2, 'no')"),
    ("b'\\xff'.decode()", "type(e) is UnicodeDecodeError and e.object == b'\\xff' and 'codec' in str(e)"),
    ("raise Own(7)", "type(e) is LookupError and e.args == ('of its own: 7',)"),
    ("raise OSOwn(2, 'no')", "type(e) is OSError and 'no' in str(e)"),
    ("raise Liar('x')", "e.args == ('x',)"),
    ("raise ValueError(object())", "'object object' in str(e)"),
    ("raise ValueError('x' * 10**6)", "str(e) == 'x' * 1000"),
]


def test_an_exception_arrives_with_its_arguments(sandbox: Sandbox) -> None:
    code = """
class Own(LookupError):
    def __str__(self): return f"of its own: {self.args[0]}"
class OSOwn(OSError): pass
class Liar(ValueError):
    args = property(lambda self: ("y",))
def add(i):
"""
    code += "".join(f"    if i == {i}: {action}\n" for i, (action, _) in enumerate(ARRIVES))
    check = "def check(candidate):\n" + "".join(
        f"    try: candidate({i})\n    except BaseException as e: assert {told}, {i}\n    else: assert False, {i}\n"
        for i, (_, told) in enumerate(ARRIVES)
    )
    verdict = one(sandbox, code, check)
    assert (verdict.reason, verdict.tests_passed) == ("passed", len(ARRIVES))


def test_assertions_are_counted(sandbox: Sandbox) -> None:
    check = """
import random
METADATA = {"author": "somebody"}
def check(candidate):
    assert True, "this prints if everything is good"
    for x in range(10):
        assert candidate(x, 1) == x + 1, "off"
    assert candidate(100, 0) == 100
    assert candidate(100, 1) == 0
    assert candidate(-1, 0) == -1
"""
    verdict = one(sandbox, ADD, check)
    assert (verdict.passed, verdict.tests_passed, verdict.tests_total, verdict.reason) == (
        False,
        12,
        13,
        "wrong answer",
    )
    verdict = one(sandbox, "def add(a, b):\n    return a + b if a > -1 else 1 / 0", check)
    assert (verdict.tests_passed, verdict.tests_total) == (11, 13)


def test_a_failure_that_a_check_expects_is_none(sandbox: Sandbox) -> None:
    check = """
def check(candidate):
    try:
        assert candidate(1, 1) == 3
    except AssertionError:
        assert candidate(1, 1) == 2
"""
    assert one(sandbox, ADD, check).passed


def test_a_check_that_asserts_nothing_is_one_test(sandbox: Sandbox) -> None:
    check = "def check(candidate):\n    if candidate(1, 1) != 2:\n        raise ValueError\n"
    right, wrong = one(sandbox, ADD, check), one(sandbox, "def add(a, b):\n    return 1", check)
    assert (right.passed, right.tests_passed, right.tests_total) == (True, 1, 1)
    assert (wrong.passed, wrong.tests_passed, wrong.tests_total) == (False, 0, 1)
    assert wrong.reason == "wrong answer: ValueError in the tests"


def test_a_check_that_swallows_everything_is_not_passed_by_a_dead_program(sandbox: Sandbox) -> None:
    check = "def check(candidate):\n    try:\n        candidate(1, 1)\n    except BaseException:\n        pass\n"
    assert one(sandbox, "import os\ndef add(a, b):\n    os._exit(0)", check).reason == "exited"


def test_values_come_back_as_they_are(sandbox: Sandbox) -> None:
    values = [
        *(None, True, 0, -1, 2**63, -(2**200), 1.5, -0.0, math.inf, 1e-320, 3 + 4j, "", "é😀", "\ud800", b"\0\xff"),
        *([], (), {}, set(), frozenset({1}), [[1], (2,)], {1: "a", (1, 2): {3}}, {None: {frozenset(): 1}}, range(3)),
    ]
    code = "def same(x):\n    return x"
    verdict = one(sandbox, code, [((value,), value) for value in values], "same")
    assert (verdict.passed, verdict.tests_passed) == (True, len(values))
    types = [((value,), type(value).__name__) for value in values]
    assert one(sandbox, "def same(x):\n    return type(x).__name__", types, "same").passed
    assert one(sandbox, code, [((math.nan,), math.nan), (([math.nan],), [math.nan])], "same").passed
    assert not one(sandbox, code, [((1,), math.nan)], "same").passed


def test_iterators_and_pythons_own_collections_come_back(sandbox: Sandbox) -> None:
    code = """
        import collections, decimal, enum, fractions, re
        def make(kind):
            if kind == "generator":
                return (x * x for x in range(4))
            if kind == "Counter":
                return collections.Counter("aab")
            if kind == "defaultdict":
                return collections.defaultdict(list, {1: [2]})
            if kind == "named":
                return collections.namedtuple("Pair", "a b")(1, 2)
            if kind in ("fraction", "decimal"):
                return fractions.Fraction(1, 2) if kind == "fraction" else decimal.Decimal("1.5")
            if kind in ("keys", "values"):
                return getattr({"a": 1, "b": 1}, kind)()
            if kind == "items":
                return {"a": 1}.items()
            if kind == "enum":
                return enum.IntEnum("Number", "one two three").three
            if kind == "missing":
                return type("Own", (dict,), {})(x=1)
            if kind == "match":
                return re.match("a", "a")
            if kind == "empty":
                return type("Empty", (), {"__bool__": lambda self: False})()
            return collections.deque([1, 2])
    """
    check = """
def check(candidate):
    assert list(candidate("generator")) == [0, 1, 4, 9]
    assert candidate("generator") != [0, 1, 4, 9]
    assert candidate("Counter") == {"a": 2, "b": 1}
    assert candidate("Counter").most_common(1) == [("a", 2)]
    assert candidate("defaultdict") == {1: [2]}
    assert list(candidate("deque")) == [1, 2]
    assert candidate("named") == (1, 2)
    assert candidate("fraction") == 0.5
    assert candidate("decimal") == 1.5
    assert candidate("keys") == {"a", "b"} and sorted(candidate("keys")) == ["a", "b"]
    assert candidate("items") == {("a", 1)} and list(candidate("values")) == [1, 1]
    assert candidate("enum") == 3 and candidate("missing")["x"] == 1
    assert candidate("match") and not candidate("empty")
    assert candidate("match") != candidate("match")
"""
    assert one(sandbox, code, check, "make").reason == "passed"


def test_tests_may_name_things_of_the_program(sandbox: Sandbox) -> None:
    code = """
        class Node:
            def __init__(self, value, next=None):
                self.value, self.next = value, next
        chain = Node(1, Node(2, Node(3)))
        def length(node):
            return 0 if node is None else 1 + length(node.next)
        def twice(x):
            return 2 * x
    """
    check = """
def check(candidate):
    assert candidate(chain) == 3
    assert twice(candidate(None)) == 0
    assert math.isclose(length(chain), 3)
"""
    assert one(sandbox, code, check, "length").reason == "passed"
    assert one(sandbox, code, check.replace("chain", "chains"), "length").reason == "exception: NameError"


@pytest.mark.parametrize("order", [("Node", "length"), ("length", "Node")])  # of a prompt's, and of the program's own
def test_tests_may_give_objects_of_the_program_back(sandbox: Sandbox, order: tuple[str, str]) -> None:
    codes = {
        "Node": "class Node:\n    def __init__(self, next=None): self.next = next\n",
        "length": "def length(node): return 0 if node is None else 1 + length(node.next)\n",
    }
    code = "".join(codes[name] for name in order)
    check = """
def check(candidate):
    assert candidate(Node(Node())) == 2
    chain = None
    for _ in range(40):
        chain = Node(chain)
    assert candidate(chain) == length(chain) == 40
    assert Node() != Node() and candidate(chain) != chain
"""
    assert one(sandbox, code, check, "length").reason == "passed"
    changed = "def check(candidate):\n    node = Node()\n    node.next = Node()\n    assert candidate(node) == 2\n"
    assert one(sandbox, code, changed, "length").reason == "wrong answer: AttributeError in the tests"
    if order[0] == "Node":
        verdict = one(sandbox, code, check.replace("40", "1000"), "length")
        assert (verdict.passed, verdict.reason[:30]) == (None, "tests: arguments are made of t")


def test_an_object_of_the_program_in_a_set_equals_nothing(sandbox: Sandbox) -> None:
    code = """
        import enum
        class Colour(enum.Enum):
            RED = 1
        def add(a, b):
            return {Colour.RED: {Colour.RED}} if a == 2 else a + b
    """
    verdict = one(sandbox, code)
    assert (verdict.passed, verdict.tests_passed, verdict.reason) == (False, 2, "wrong answer")


def test_names_are_read_as_python_reads_them(sandbox: Sandbox) -> None:
    assert one(sandbox, "def \ufb01nd(x):\n    return x", [((1,), 1)], "\ufb01nd").reason == "passed"


def test_keywords_and_defaults_reach_the_program(sandbox: Sandbox) -> None:
    check = """
def check(candidate):
    assert candidate(1, b=2) == 3
    assert candidate.__name__ == "add"
    assert add(1, 1) == 2
"""
    assert one(sandbox, ADD, check).reason == "passed"


# ---------------------------------------------------------------- limits


def test_time_is_limited_for_the_whole_program(sandbox: Sandbox) -> None:
    begin = time.monotonic()
    code = "import time\ndef add(a, b):\n    time.sleep(0.2)\n    return a + b"
    slow = one(sandbox, code, PAIRS, timeout=0.5)
    assert (slow.reason, slow.tests_passed) == ("timeout", 2)
    assert time.monotonic() - begin < 5
    assert one(sandbox, code, PAIRS, timeout=2).passed


def test_tests_that_never_end_are_ended(sandbox: Sandbox) -> None:
    verdict = one(
        sandbox,
        ADD,
        "def check(candidate):\n    while candidate(1, 1) == 2:\n        for _ in range(10**9): pass\n",
        timeout=0.2,
    )
    assert (verdict.passed, verdict.reason) == (False, "timeout")


def test_memory_means_what_it_says(sandbox: Sandbox) -> None:
    code = "def take(n):\n    return len(bytearray(n << 20))"
    for limit in (64, 512):
        fits, does_not = (
            one(sandbox, code, [((n,), n << 20)], "take", memory_mb=limit) for n in (limit - 16, limit + 16)
        )
        assert (fits.reason, does_not.reason) == ("passed", "memory")


def test_what_comes_after_an_attack_is_judged_as_before(sandbox: Sandbox) -> None:
    codes = [*REASONS, ADD] * 2
    verdicts = sandbox.check([Program(code, PAIRS, "add", timeout=0.3, memory_mb=256) for code in codes])
    assert [v.passed for v in verdicts] == [code == ADD for code in codes]


@pytest.mark.slow
def test_a_thousand_honest_programs_among_attackers() -> None:
    codes = list(REASONS)
    programs = []
    for i in range(1000):
        programs.append(Program(f"def add(a, b):\n    return a + b + {i % 2}", [((i, 1), i + 1)], "add"))
        if i % 4 == 0:
            programs.append(Program(codes[i // 4 % len(codes)], PAIRS, "add", timeout=0.2, memory_mb=128))
    with Sandbox(2) as sandbox:
        verdicts = list(sandbox.stream(programs))
    assert len(verdicts) == len(programs)
    for program, verdict in zip(programs, verdicts, strict=True):
        assert verdict.passed is (program.code.endswith("+ 0")), (program.code, verdict)


def test_a_program_takes_little_time(sandbox: Sandbox) -> None:
    """The demand is a median below 60 ms; it is about 10 on an idle core. The best of three: others may be busy."""
    medians = [statistics.median(one(sandbox, ADD, CHECK).seconds for _ in range(9)) for _ in range(3)]
    assert min(medians) < 0.06


def test_tests_that_can_not_be_run_are_no_verdict_on_a_program(sandbox: Sandbox) -> None:
    verdict = one(sandbox, ADD, "import no_such_module\ndef check(candidate):\n    assert candidate(1, 1) == 2\n")
    assert (verdict.passed, verdict.reason) == (None, "tests: ModuleNotFoundError: No module named 'no_such_module'")
    verdict = one(sandbox, ADD, "def check(candidate):\n    assert candidate(1, lambda: 2) == 2\n")
    assert (verdict.passed, verdict.reason) == (None, "tests: an argument of type function is not plain data")


@pytest.mark.slow
def test_many_tests_are_not_the_judges_time(sandbox: Sandbox) -> None:
    """What the judge computes between two calls has an end, not what it computes in all."""
    verdict = one(sandbox, ADD, [((i, 1), i + 1) for i in range(20_000)], timeout=20)
    assert (verdict.passed, verdict.tests_passed) == (True, 20_000)
