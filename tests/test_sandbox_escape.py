"""Attacks have no effect, cheats no reward; both would have, were it not for the defence."""

from __future__ import annotations

import pathlib
import secrets
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator

import pytest
import sandbox_attacks
import sandbox_cheats
from sandbox_places import KINDS, sandbox_of, try_all

from dsjax.rl.sandbox import Program, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and seccomp are Linux's")


@pytest.fixture
def folder() -> Iterator[pathlib.Path]:
    """One that every user can reach, so that it is not the file system that keeps programs out."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as made:
        pathlib.Path(made).chmod(0o777)
        yield pathlib.Path(made)


ATTACKS = sandbox_attacks.programs()
CHEATS = sandbox_cheats.programs()


def test_there_are_enough_of_each() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 60
    assert len(CHEATS) >= 30
    for name, codes in CHEATS.items():
        for code in codes if name != "not_be_python" else ():
            compile(code, name, "exec")
    for attack in ATTACKS:
        compile(attack.code, attack.name, "exec")


@pytest.mark.parametrize("kind", KINDS)
def test_no_attack_has_an_effect(kind: str, folder: pathlib.Path) -> None:
    with sandbox_of(kind, workers=2) as sandbox:
        verdicts, effects, names = try_all(sandbox, ATTACKS, folder)
    assert not names
    assert not any(effects)
    assert [v.passed for v in verdicts] == [False] * len(ATTACKS)  # and all were judged: none of them is infrastructure


def test_without_the_defence_attacks_have_effects(folder: pathlib.Path) -> None:
    attacks = [attack for attack in ATTACKS if sandbox_attacks.root() or not attack.root]
    with sandbox_of("open", workers=2) as sandbox:
        verdicts, _, names = try_all(sandbox, attacks, folder)
    silent = {a.name: v.reason for a, v in zip(attacks, verdicts, strict=True) if a.name not in names}
    assert len(names) >= 0.95 * len(attacks), silent


# ---------------------------------------------------------------- cheats


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(2) as made:  # what keeps cheats from a reward is the same at each level
        yield made


def cheats(tests: object, folder: pathlib.Path) -> list[Program]:
    return [
        Program(code.replace("{path}", str(folder)), tests, "solve", timeout=0.3)  # type: ignore[arg-type]
        for codes in CHEATS.values()
        for code in codes
    ]


def test_no_cheat_is_rewarded(sandbox: Sandbox, folder: pathlib.Path) -> None:
    secret = f"secret-{secrets.token_hex(8)}"
    pairs = [((1,), secret), (([3, 1, 2],), [secret]), ((2,), secret)]
    checks = [source.format(secret=secret) for source in (sandbox_cheats.CHECK, sandbox_cheats.LOOPS)]
    for tests in (pairs, *checks):
        verdicts = sandbox.check(cheats(tests, folder))
        assert {(v.passed, v.tests_passed, v.tests_total) for v in verdicts} == {(False, 0, 3)}


def test_a_naive_judge_is_cheated(folder: pathlib.Path) -> None:
    """Exit code 0 of one process that runs program and tests, as many do: so the cheats can work."""
    tests = sandbox_cheats.CHECK.format(secret=f"secret-{secrets.token_hex(8)}")
    rewarded = []
    skipped = sandbox_cheats.CHANNEL + sandbox_cheats.ODD  # they speak to a judge that is not there, or only disturb
    for name, codes in CHEATS.items():
        if f"--- {name}\n" in skipped:
            continue
        for code in codes:
            whole = code.replace("{path}", str(folder)) + tests + "\ncheck(solve)\n"
            done = subprocess.run([sys.executable, "-S", "-c", whole], capture_output=True, timeout=30, check=False)
        rewarded.append(done.returncode == 0)
    assert len(rewarded) >= 40
    assert sum(rewarded) >= 15


def test_a_program_can_not_change_what_the_judge_holds(sandbox: Sandbox) -> None:
    check = textwrap.dedent("""
        def check(candidate):
            given = [3, 1, 2]
            assert candidate(given) == sorted(given)
    """)
    program = Program("def solve(x):\n    x.clear()\n    return x", check, "solve")
    assert [v.reason for v in sandbox.check([program])] == ["wrong answer"]


def test_a_prompts_function_is_not_the_programs_to_change(sandbox: Sandbox) -> None:
    """As in HumanEval/32 and 38: the tests name a function that the prompt gives, and the program gives it anew."""
    prompt = "def double(x):\n    return 2 * x\n\ndef halve(x):\n    '''the inverse of double'''\n"
    check = "def check(candidate):\n    for x in range(5):\n        assert candidate(double(x)) == x\n"
    right = Program(prompt + "    return x // 2\n", check, "halve")
    wrong = Program(prompt + "    return x\n\ndef double(x):\n    return x\n", check, "halve")
    assert [v.passed for v in sandbox.check([right, wrong])] == [True, False]


def test_what_a_prompt_makes_for_the_tests_alone_is_not_heard_by_the_program(sandbox: Sandbox) -> None:
    prompt = textwrap.dedent("""
        seen = None
        class Ratio:
            def __init__(self, a, b):
                global seen
                seen = self.a, self.b = a, b
        def pair(ratio):
            return ratio.a, ratio.b
    """)
    check = "def check(candidate):\n    assert pair(Ratio(1, 2)) == candidate({})\n"
    cheat = Program(f"{prompt}\ndef solve(x):\n    return seen", check.format("3"), "solve")
    right = Program(f"{prompt}\ndef solve(x):\n    return pair(x)", check.format("Ratio(1, 2)"), "solve")
    assert [v.passed for v in sandbox.check([cheat, right])] == [False, True]


def test_nothing_of_an_earlier_program_is_left(sandbox: Sandbox) -> None:
    marks = [
        "import builtins; builtins.mark = 1",
        "import math; math.mark = 1",
        "import sys; sys.modules['mark'] = sys; sys.path.append('mark')",
        "import os; os.environ['mark'] = '1'",
        "import random; random.seed(7); random.random()",
        "import functools; functools.cache.mark = 1",
    ]
    look = textwrap.dedent("""
        import builtins, functools, math, os, random, sys
        def solve():
            return [hasattr(x, "mark") for x in (builtins, math, functools.cache)] + [
                "mark" in sys.modules, "mark" in sys.path, "mark" in os.environ, random.random() == {after_seed}]
    """).format(after_seed=after_seed())
    tests = [((), [False] * 7)]
    programs = [Program(f"{mark}\ndef solve(): return None", [((), None)], "solve") for mark in marks]
    verdicts = sandbox.check([*programs, Program(look, tests, "solve")])
    assert [v.reason for v in verdicts] == ["passed"] * 7


def after_seed() -> float:
    import random

    generator = random.Random(7)
    generator.random()
    return generator.random()


def test_random_numbers_differ_between_programs_and_from_the_judges(sandbox: Sandbox) -> None:
    check = "import random\ndef check(candidate):\n    mine = random.random()\n    assert candidate() != mine\n"
    program = Program("import random\ndef solve():\n    return random.random()", check, "solve")
    repeated = Program("import random\ndef solve():\n    return random.random()", [((), 0.5)], "solve")
    assert [v.passed for v in sandbox.check([program, repeated])] == [True, False]


def test_output_is_thrown_away(sandbox: Sandbox) -> None:
    code = "def solve():\n    for _ in range(1024):\n        print('x' * (1 << 20))\n    return 1"
    assert [v.reason for v in sandbox.check([Program(code, [((), 1)], "solve", timeout=10)])] == ["passed"]
    answer = "def solve():\n    return 'x' * (1 << 27)"
    (verdict,) = sandbox.check([Program(answer, [((), 1)], "solve", timeout=10, memory_mb=1024)])
    assert (verdict.passed, verdict.reason) == (False, "output: an answer of more than 16 MiB")
