"""reasoning-gym's generators as families: which work, that they are the same everywhere, and what scorers accept."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("reasoning_gym")
pytest.importorskip("math_verify")

from dsjax.config import UserError
from dsjax.rl import gym_datasets, plain
from dsjax.rl.exercises import AnswerForm, Exercise, ExercisesConfig, FamilyConfig, exercise_of, families_of, gym
from dsjax.rl.rewards import at_once

RUBBISH = ("rubbish", "-7301", "[[0, 0]]", "x y", "nan", "0.123", "{}")
# Of these only the scorer can tell what is right, or several answers are and none is shown.
WITHOUT_ANSWER = {
    *("boxnet", "graph_color", "knight_swap", "propositional_logic", "rubiks_cube", "rush_hour", "word_ladder"),
}
SOME = ("aiw", "arc_1d", "chain_sum", "countdown", "game_of_life_halting", "graph_color", "needle_haystack", "rearc")
LONG = ("sokoban",)  # seconds for a question


def family(name: str) -> gym.Gym:
    return gym.family(f"gym/{name}", AnswerForm())


def share(exercise: Exercise, answer: str) -> float:
    """What an answer is worth, judged in this process; what a scorer raises is a 0."""
    verdict = at_once(exercise, answer) if exercise.scorer != "gym" else None
    if verdict is not None:
        assert verdict.share is not None
        return verdict.share
    if exercise.scorer == "math":
        from dsjax.rl.answer_judge import equal

        return float(equal(exercise.answer, answer))
    data = exercise.data
    try:
        return gym_datasets.score(data["name"], data["level"], answer, plain.decode(data["entry"]))
    except Exception:
        return 0.0


def check(name: str, level: int) -> list[str]:
    """Two exercises of a level, from JSON: their own answer is right, rubbish is not. Their keys."""
    made = family(name)
    exercises = [made.exercise(level, number) for number in (3, 2**70)]
    assert exercises == [made.exercise(level, number) for number in (3, 2**70)]
    for exercise in exercises:
        again = Exercise(**json.loads(json.dumps(dataclasses.asdict(exercise))))
        assert again == exercise
        assert bool(exercise.answer) == (name not in WITHOUT_ANSWER)
        if exercise.answer:
            assert share(again, exercise.answer) == 1
            assert AnswerForm().answer(exercise.solution, True) == exercise.answer
        for text in RUBBISH:
            assert text == exercise.answer or share(again, text) < 0.5, (name, text)
    return [exercise.key for exercise in exercises]


def test_101_of_106_can_be_used() -> None:
    from reasoning_gym.factory import DATASETS

    assert len(DATASETS) == len(gym.names()) + len(gym_datasets.REFUSED)
    assert len(gym.names()) >= 101
    for short, reason in gym_datasets.REFUSED.items():
        with pytest.raises(UserError, match=rf"'gym/{short}', which can not be used: {reason[:20]}"):
            families_of(ExercisesConfig(families=(FamilyConfig(f"gym/{short}"),)))


@pytest.mark.parametrize("name", SOME)
def test_own_answers_are_right_and_rubbish_is_not(name: str) -> None:
    levels = family(name).levels
    for level in {levels[0], levels[-1]}:
        check(name, level)


def test_a_level_is_harder_than_the_one_below() -> None:
    questions = [family("chain_sum").exercise(level, 0).question for level in family("chain_sum").levels]
    assert len(questions) == 11
    assert len(questions[-1]) > len(questions[0]) + 40
    assert family("caesar_cipher").levels == (1, 2)  # the third turns letters by more than there are
    assert family("knight_swap").levels == (1,)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    family("bf").exercise(1, 0)
    assert capsys.readouterr().out == ""


def test_numpys_random_numbers_are_left_alone() -> None:
    np.random.seed(7)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr,index]
    family("pool_matrix").exercise(1, 0)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("puzzle24", "6*4*1*1"),  # numbers that were not given
        ("puzzle24", "24"),
        ("game_of_life_halting", "anything"),
        ("coin_flip", "0"),
        ("complex_arithmetic", "nan"),
        ("gsm_symbolic", "-{}"),
        ("gsm_symbolic", "1 2 3 {}"),
        ("countdown", "{}+0"),
    ],
)
def test_what_would_satisfy_a_scorer_and_solves_nothing(name: str, text: str) -> None:
    for number in range(3):
        exercise = family(name).exercise(1, number)
        assert share(exercise, text.format(exercise.answer)) == 0


CODE = (
    "__import__('pathlib').Path({0!r}).write_text('x')",
    "[__import__('pathlib').Path({0!r}).write_text('x')]",
    "(lambda: 0).__class__",
    "open({0!r}, 'w')",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "x.__class__",
    "exit()",
    "print(1)",
    "1 .real",
    "x if x else x",
    "f'{{1}}'",
    "9**9**9**9",
)


@pytest.mark.parametrize("name", [*gym_datasets.EVALUATES, *gym_datasets.PARSES])
def test_no_answer_is_run(name: str, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "written"
    made = family(name)
    exercise = made.exercise(1, 0)
    for code in CODE:
        text = code.format(str(target))
        if text == CODE[-1] and name in gym_datasets.PARSES:
            assert gym_datasets.may_be_judged(name, text)  # arithmetic: it only takes for ever, and has its seconds
            continue
        assert not gym_datasets.may_be_judged(name, text), text
        assert share(exercise, text) == 0
    assert not target.exists()
    if exercise.answer:
        assert gym_datasets.may_be_judged(name, exercise.answer)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("simple_integration", "x**2/2 + 3*x + C"),
        ("simple_integration", "sin(x)*exp(2*x) - 1.5"),
        ("spiral_matrix", "[1, 2, -3]"),
        ("string_insertion", "['A', 'B']"),
        ("string_insertion", "ABCDE"),
        ("spiral_matrix", "1 2 3"),
    ],
)
def test_what_people_write_is_judged(name: str, text: str) -> None:
    assert gym_datasets.may_be_judged(name, text)


def test_scorers_that_nobody_has_looked_at() -> None:
    """Every scorer that evaluates is known, also in later versions of the package."""
    import re

    import reasoning_gym

    root = pathlib.Path(reasoning_gym.__file__).parent
    known = {*gym_datasets.EVALUATES, *gym_datasets.PARSES, *gym.ARITHMETIC, *gym_datasets.REFUSED}
    found = set()
    for path in root.glob("*/*.py"):
        text = path.read_text(encoding="utf-8")
        body = re.search(r"def score_answer.*?(?=\n    def |\nclass |\Z)", text, re.DOTALL)
        if body and re.search(r"(?<![\w.])(eval|exec)\(|sympify\(|(?<![\w])parse_expr\(", body[0]):
            found.add(path.stem)
    assert found - known <= {"number_sorting", "propositional_logic"}  # its own answer; a parser of its own
    assert found >= {*gym_datasets.EVALUATES, *gym_datasets.PARSES}


def test_splits_of_a_generator() -> None:
    made = family("chain_sum")
    sides = {split: exercise_of(made, 1, split, 5).question for split in ("training", "validation", "held_out")}  # type: ignore[arg-type]
    assert len(set(sides.values())) == 3


def keys(names: tuple[str, ...]) -> dict[str, list[str]]:
    return {name: check(name, 1) for name in names}


def in_another_process(names: tuple[str, ...], seed: str) -> dict[str, list[str]]:
    """The keys of exercises, in a process whose sets are in another order."""
    code = f"import json, test_exercises_gym as t; print(json.dumps(t.keys({names!r})))"
    paths = os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths},
        capture_output=True,
        check=True,
    )
    return json.loads(told.stdout)


def test_exercises_are_the_same_in_another_process() -> None:
    names = ("arc_1d", "group_anagrams")
    assert in_another_process(names, "1") == in_another_process(names, "2")


USABLE = tuple(name.removeprefix(gym.PREFIX) for name in gym.names() if name.removeprefix(gym.PREFIX) not in LONG)


@pytest.mark.slow
def test_all_exercises_are_the_same_in_another_process() -> None:
    assert in_another_process(USABLE, "1") == in_another_process(USABLE, "2")


@pytest.mark.slow
@pytest.mark.parametrize("name", USABLE)
def test_all_own_answers_are_right_and_rubbish_is_not_on_the_highest_level(name: str) -> None:
    check(name, family(name).levels[-1])
