"""Answers judged in processes of their own: mathematics, limits, and trouble that is no answer's fault."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from sandbox_places import children_of, kill, wait_until_gone

pytest.importorskip("math_verify")
pytest.importorskip("reasoning_gym")

from test_rewards import HOSTILE, SUM, Given, Written

from dsjax.rl import isolation, plain
from dsjax.rl.answer_pool import Answer, AnswerPool, Judged
from dsjax.rl.exercises import ExercisesConfig, FamilyConfig, families_of
from dsjax.rl.rewards import RewardConfig, Rewards

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")


@pytest.fixture(scope="module")
def pool() -> Iterator[AnswerPool]:
    with AnswerPool(1, 0.6) as made:
        yield made


@pytest.mark.parametrize(
    ("right", "text", "score"),
    [
        ("72", "72.0", 1),
        ("\\frac{1}{2}", "0.5", 1),
        ("1/2", "\\frac12", 1),
        ("x^2+1", "1+x^2", 1),
        ("\\{1,2\\}", "\\{2,1\\}", 1),
        ("(1,2)", "(2,1)", 0),
        ("2\\sqrt{3}", "\\sqrt{12}", 1),
        ("10", "10 \\text{ cm}", 1),
        ("\\text{Friday}", "Friday", 1),
        ("x=5", "5", 1),
        ("1,234", "1234", 1),
        ("even", "odd", 0),
        ("7", "8", 0),
        ("6", "6,7", 0),
        ("5", "\\boxed{6}", 0),
    ],
)
def test_mathematics(pool: AnswerPool, right: str, text: str, score: float) -> None:
    assert pool.check([Answer("math", right, text)]) == [Judged(score)]


def test_it_works_from_a_thread(pool: AnswerPool) -> None:
    found: list[Judged] = []
    thread = threading.Thread(target=lambda: found.extend(pool.check([Answer("math", "1/2", "0.5")])))
    thread.start()
    thread.join()
    assert found == [Judged(1.0)]


def test_what_takes_for_ever_is_wrong_and_the_next_is_judged(pool: AnswerPool) -> None:
    answers = [Answer("math", "\\frac{1}{2}", text) for text in ("9^{9^{9^9}}", "0.5", "\\frac{" * 100, "0.50")]
    found = pool.check(answers)
    assert [one.score for one in found] == [0, 1, 0, 1]
    assert found[0].reason == "timeout"


IGNORES = """
import signal
from dsjax.rl.answer_pool import Answer, AnswerPool

signal.signal(signal.SIGPROF, signal.SIG_IGN)
with AnswerPool(seconds=1.0) as pool:
    print(pool.check([Answer("math", "1/2", "9^{9^{9^9}}")]))
"""


def test_time_ends_where_the_parent_ignores_its_signal() -> None:
    """As libtpu makes it: judges would go on for ever, and nothing would be known of the answer.

    In a process of its own: one that has loaded libtpu and then no longer ignores the signal is ended by it.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", IGNORES], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str([Judged(0.0, "timeout")])


def test_hostile_texts_are_wrong() -> None:
    names = ("gym/simple_integration", "gym/spiral_matrix", "gym/prime_factorization")
    families = families_of(ExercisesConfig(families=tuple(FamilyConfig(name, (1,)) for name in names)))
    exercises = [family.exercise(1, 0) for family in families.values()]
    with Rewards(RewardConfig(workers=1, seconds=0.4), {"sum": Given(SUM), **families}) as made:
        for exercise in (SUM, *exercises):
            found = made([exercise] * len(HOSTILE), [Written(f"#### {text}") for text in HOSTILE])
            assert found.known_N.all(), found.reasons
            assert (found.parts["correct"] == 0).all()
            found = made([exercise], [Written(exercise.solution)])
            assert found.total_N.tolist() == [1.0]


def test_a_scorer_that_raises_makes_a_text_wrong_or_an_exercise_unfit(pool: AnswerPool) -> None:
    exercise = families_of(ExercisesConfig((FamilyConfig("gym/prime_factorization"),)))[
        "gym/prime_factorization"
    ].exercise(1, 0)
    (found,) = pool.check([Answer("gym", exercise.answer, "two times three", exercise.data)])
    assert found.score == 0
    assert found.reason.startswith("raised ValueError: invalid literal")
    broken = {**exercise.data, "entry": plain.encode({"metadata": {}})}
    for text in ("2 × 3", exercise.answer):
        (found,) = pool.check([Answer("gym", exercise.answer, text, broken)])
        assert found.score is None
        assert found.reason.startswith("exercise: raised KeyError")


# ---------------------------------------------------------------- trouble


def test_a_judge_that_is_killed_is_replaced_and_asked_again() -> None:
    with AnswerPool(1, 5.0) as pool:
        seen = list[int]()
        for killed in (slice(1, 2), slice(0, 2), slice(0, 0)):  # the one that judges, both, none
            assert pool.check([Answer("math", "1/2", "0.5")]) == [Judged(1.0)]
            worker = pool._idle["math"].get()
            assert worker is not None
            family = children_of(worker.process.pid)
            assert len(family) == 2
            assert family[0] not in seen
            seen += family
            for pid in family[killed]:
                kill(pid)
            pool._idle["math"].put(worker)
    assert wait_until_gone(seen, 5) == []


def test_trouble_three_times_is_unknown_and_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "FLAGS", ("-c", "raise SystemExit(3)"))
    with AnswerPool(1, 1.0) as pool:
        (found,) = pool.check([Answer("math", "1/2", "0.5")])
    assert found.score is None
    assert found.reason.startswith("infrastructure: a judge has ended")
    with Rewards(RewardConfig(), {"sum": Given(SUM)}) as made:
        rewarded = made([SUM] * 2, [Written("#### 0.5"), Written("#### \\frac{1}{2}")])
    assert rewarded.known_N.tolist() == [False, True]
    assert rewarded.reasons[0].startswith("infrastructure")


def test_a_stopped_judge_is_given_up(pool: AnswerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsjax.rl import answer_pool

    assert pool.check([Answer("math", "1/2", "0.5")]) == [Judged(1.0)]
    worker = pool._idle["math"].get()
    assert worker is not None
    pool._idle["math"].put(worker)
    monkeypatch.setattr(answer_pool, "PATIENCE", (0.2, 0.0))
    monkeypatch.setattr(answer_pool, "ATTEMPTS", 1)
    child = children_of(worker.process.pid)[1]
    os.kill(child, signal.SIGSTOP)
    try:
        (found,) = pool.check([Answer("math", "1/2", "0.25")])
    finally:
        os.kill(child, signal.SIGKILL)
    assert found == Judged(None, "infrastructure: a judge said nothing for 0 s")
