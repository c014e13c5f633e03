"""Exercises: splits that nothing crosses, letters' families by hand, forms of answers, configs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError, apply_overrides, validate
from dsjax.rl.answers import reaches
from dsjax.rl.exercises import (
    SPLITS,
    AnswerForm,
    Exercise,
    ExercisesConfig,
    Family,
    FamilyConfig,
    distinct,
    draw,
    exercise_of,
    families_of,
)
from dsjax.rl.exercises.exercise import HELD_OUT, VALIDATION, split_of
from dsjax.rl.exercises.letters import (
    BRACKETS,
    LETTERS,
    MODULUS,
    addition,
    brackets,
    chain,
    countdown,
    reverse,
    sort,
)
from dsjax.rl.exercises.programs import Programs

LETTER_NAMES = ("reverse", "sort", "brackets", "addition", "chain", "countdown")


def letters(**options: str) -> dict[str, Family]:
    return families_of(ExercisesConfig(families=tuple(map(FamilyConfig, LETTER_NAMES)), **options))  # type: ignore[arg-type]


# ---------------------------------------------------------------- families


def test_there_are_five_to_eight_levels_of_each() -> None:
    assert tuple(family.name for family in LETTERS) == LETTER_NAMES
    assert all(5 <= len(family.levels) <= 8 and family.levels[0] == 1 for family in LETTERS)


def solved(exercise: Exercise) -> str:
    """The answer, found in another way than the family finds it."""
    name, *words = exercise.prompt.split()
    if name == "reverse":
        return "".join(reversed(words[0]))
    if name == "sort":
        return "".join(letter * words[0].count(letter) for letter in "abcdefghijklmnopqrstuvwxyz")
    if name == "close":
        text = words[0]
        while (shorter := text.replace("()", "").replace("[]", "").replace("{}", "")) != text:
            text = shorter
        return "".join(BRACKETS[bracket] for bracket in text[::-1])
    if name == "add":
        return str(sum(map(int, words[0].split("+"))))
    assert name == "chain"
    value, text = "", words[0]
    for i, letter in enumerate([*text, "+"]):
        if not letter.isdigit():
            value = str(eval(value) % MODULUS)  # of our own digits and signs
        value += letter if i < len(text) else ""
    return value


@settings(deadline=None)
@given(st.sampled_from(LETTER_NAMES[:-1]), st.integers(1, 8), st.integers(0, 2**60))
def test_answers_are_right(name: str, level: int, number: int) -> None:
    exercise = letters()[name].exercise(level, number)
    assert exercise.answer == solved(exercise)
    assert AnswerForm().answer(exercise.solution, True) == exercise.answer


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(0, 2**60))
def test_a_countdown_can_be_reached_with_every_number_and_is_not_given(level: int, number: int) -> None:
    exercise = letters()["countdown"].exercise(level, number)
    data = exercise.data
    assert len(data["numbers"]) == level + 1
    assert exercise.prompt == f"reach {data['target']} from {' '.join(map(str, data['numbers']))}\n"
    assert reaches(exercise.answer, data["numbers"], data["target"], "+-*", every=True)
    assert data["target"] not in data["numbers"]
    for step in AnswerForm().work(exercise.solution).split():
        left, right = step.split(":")
        assert eval(left) == int(right)


def test_levels_are_a_character_or_two_apart() -> None:
    for name, most in (("reverse", 1), ("sort", 1), ("brackets", 1), ("addition", 1), ("chain", 2)):
        family = letters()[name]
        lengths = [max(len(family.exercise(level, n).prompt) for n in range(200)) for level in family.levels]
        assert {b - a for a, b in itertools.pairwise(lengths)} == {most}, name


class Loaded(random.Random):
    """Chance that throws what it is told to."""

    def __init__(self, *throws: object):
        super().__init__(0)
        self.throws = list(throws)

    def choice(self, seq):  # type: ignore[no-untyped-def]
        return self.throws.pop(0)

    def randrange(self, *limits):  # type: ignore[no-untyped-def]
        return self.throws.pop(0)

    def randint(self, *limits):  # type: ignore[no-untyped-def]
        return self.throws.pop(0)

    def sample(self, seq, count):  # type: ignore[no-untyped-def]
        return list(seq)

    def shuffle(self, x):  # type: ignore[no-untyped-def]
        x[:] = [1, 1, -1, 1, -1, 1, 1, -1, 1, -1]


@pytest.mark.parametrize(
    ("ask", "throws", "question", "work", "answer"),
    [
        (addition, (47, 85), "add 47+85", "7+5:12 4+8+1:13", "132"),
        (chain, (20, "+", 4, "*", 5), "chain 20+4*5", "1 5", "5"),  # 24 and 5 modulo 23
        (chain, (2, "-", 9, "*", 3), "chain 2-9*3", "16 2", "2"),  # -7 and 48
        (reverse, ("a", "b", "c"), "reverse abc", "", "cba"),
        (sort, ("b", "c", "b"), "sort bcb", "", "bbc"),
        (countdown, (3, 8, "*"), "reach 24 from 3 8", "3*8:24", "3*8"),
        (brackets, tuple("([{(({"), "close ([]{}((){}", "", "))"),
    ],
)
def test_by_hand(ask: Any, throws: tuple[Any, ...], question: str, work: str, answer: str) -> None:
    asked = ask(1, Loaded(*throws))
    assert (asked.question, asked.work, asked.answer) == (f"{question}\n", work, answer)


@pytest.mark.parametrize("name", LETTER_NAMES)
def test_an_evaluation_finds_512_different_held_out_prompts_on_the_lowest_level(name: str) -> None:
    found = distinct(letters()[name], 1, "held_out", 512)
    assert len({exercise.prompt for exercise in found}) == 512


# ---------------------------------------------------------------- splits


class Digits(Family):
    """Small: a digit and a level."""

    name, levels, form = "digits", (1, 2), AnswerForm()

    def __init__(self, base: int = 10, end: bool = False):
        self.base, self.end = base, end

    def exercise(self, level: int, number: int) -> Exercise:
        return Exercise(self.name, level, f"{level} {self.digit(number)}", "x", "x", "exact")

    def digit(self, number: int) -> int:
        return number if self.end else random.Random(number).randrange(self.base)

    def size(self, level: int) -> int | None:
        return self.base if self.end else None


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(LETTER_NAMES),
    st.integers(1, 6),
    st.integers(0, 2**53),
    st.integers(0, 2**53),
    st.sampled_from(SPLITS),
)
def test_a_place_has_one_exercise_of_its_side(name: str, level: int, a: int, b: int, split: str) -> None:
    family = letters()[name]
    exercise = exercise_of(family, level, split, a)  # type: ignore[arg-type]
    assert exercise == exercise_of(letters()[name], level, split, a)  # type: ignore[arg-type]
    assert family.split(exercise) == split
    other = exercise_of(family, level, "training" if split == "held_out" else "held_out", b)
    assert exercise.prompt != other.prompt


def test_no_question_is_on_two_sides_whatever_its_family_and_level() -> None:
    sides: dict[str, set[str]] = {}
    for family in letters().values():
        for level in family.levels:
            for split in SPLITS:
                for exercise in draw(family, level, split, seed=1, num=12):
                    sides.setdefault(exercise.prompt, set()).add(split)
    assert all(len(found) == 1 for found in sides.values())
    assert split_of("sort abc\n") == letters()["reverse"].split(Exercise("other", 1, "sort abc\n", "", "", "exact"))


def test_shares_are_those_that_are_said() -> None:
    sides = [split_of(f"question {number}") for number in range(20_000)]
    for split, share in (("held_out", HELD_OUT), ("validation", VALIDATION), ("training", 1 - HELD_OUT - VALIDATION)):
        # five standard errors of a share of 20,000: sqrt(0.25 / 20000) = 0.0035 at the most
        assert abs(sides.count(split) / 20_000 - share) < 5 * 0.0035


@pytest.mark.parametrize("end", [False, True])
def test_a_small_family_ends_no_draw_and_says_what_it_has_not(end: bool) -> None:
    family = Digits(10, end)
    sides = {number: split_of(f"1 {number}") for number in range(10)}
    for split in SPLITS:
        mine = {f"1 {number}" for number, side in sides.items() if side == split}
        if mine:
            found = draw(family, 1, split, seed=3, num=200)
            assert {exercise.prompt for exercise in found} == mine
        else:
            with pytest.raises(UserError, match=rf"digits has no exercise of level 1 on the side '{split}'"):
                draw(family, 1, split, seed=3, num=1)
    num = list(sides.values()).count("training")
    assert len(distinct(family, 1, "training", num, key="report.prompts")) == num
    with pytest.raises(UserError, match=rf"report\.prompts is {num + 1}; digits has {num} different"):
        distinct(family, 1, "training", num + 1, key="report.prompts")


def test_what_has_an_end_comes_once_before_it_comes_again() -> None:
    family = Digits(1000, True)
    places = [exercise_of(family, 1, "training", number).prompt for number in range(1000)]
    own = len(set(places))
    assert 750 < own < 880  # 13 / 16 of 1000
    assert places[:own] == places[own : own * 2] or len(places) < 2 * own
    found = [exercise.prompt for exercise in draw(family, 1, "training", seed=5, num=2 * own)]
    assert sorted(found[:own]) == sorted(found[own:]) == sorted(set(places))
    assert found[:own] != found[own:]


def test_another_seed_draws_others_and_the_same_one_the_same() -> None:
    family = letters()["sort"]
    drawn = [[e.prompt for e in draw(family, 4, "training", seed=seed, num=50)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


@pytest.mark.parametrize("level", [0, 9, -1])
def test_a_level_that_is_not_there(level: int) -> None:
    for family in (letters()["sort"], Programs("program/list")):
        for call in (lambda f: draw(f, level, "training", seed=0, num=1), lambda f: f.exercise(level, 0)):
            with pytest.raises(UserError, match=rf"level is {level}; {family.name} has levels 1, 2"):
                call(family)


def test_programming_tasks_keep_their_own_sides() -> None:
    family = Programs("program/string")
    exercises = [family.exercise(2, number) for number in range(40)]
    by_side = {split: [e for e in exercises if family.split(e) == split] for split in SPLITS}
    from dsjax.data.tasks import Split, generate

    for number, exercise in enumerate(exercises):
        side = Split().side(generate("string", 2, number))
        assert (family.split(exercise) == "held_out") == (side == "composition")
    assert by_side["training"]
    assert by_side["held_out"]
    assert Programs("program/pairing").exercise(1, 0).data["side"] == "held_out"


def test_exercises_are_the_same_in_another_process() -> None:
    code = (
        "from dsjax.rl.exercises import *\n"
        "cfg = ExercisesConfig(families=tuple(map(FamilyConfig, ('sort', 'brackets', 'countdown', 'program/dict'))))\n"
        "found = families_of(cfg).values()\n"
        "import random\nrandom.seed(5)\nbefore = random.getstate()\n"
        "print([e.key for f in found for e in draw(f, 3, 'validation', seed=7, num=3)])\n"
        "assert random.getstate() == before\n"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1]
    assert told[0].count(b"'") == 2 * 12


def test_an_exercise_survives_json() -> None:
    for name in ("countdown", "program/list"):
        (family,) = families_of(ExercisesConfig(families=(FamilyConfig(name),))).values()
        exercise = draw(family, 3, "training", seed=0, num=1)[0]
        again = Exercise(**json.loads(json.dumps(dataclasses.asdict(exercise))))
        assert again == exercise
        assert again.key == exercise.key
        assert len(exercise.key) == 64


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize(
    ("mark", "text", "answer"),
    [
        ("####", "so\n#### 72", "72"),
        ("#### ", "so\n####72\n", "72"),
        ("####", "#### 1 #### 2", "2"),
        ("####", "no mark", None),
        ("####", "####", None),
        ("####", "#### \n ", None),
        ("=", "x = 3", "3"),
        ("", " abc ", "abc"),
        ("", " ", None),
        ("", "", None),
    ],
)
def test_where_an_answer_stands(mark: str, text: str, answer: str | None) -> None:
    assert AnswerForm(mark).answer(text, True) == answer
    assert AnswerForm(mark).answer(text, False) is None  # more might have followed


THINK = AnswerForm(template="think")


@pytest.mark.parametrize(
    ("text", "answer", "follows"),
    [
        (" <think> a </think> <answer> 5 </answer>", "5", True),
        ("<think>a</think><answer>5</answer>\n", "5", True),
        ("<think>a</think><answer>5</answer> and more", "5", False),
        ("<think>a</think><answer>5</answer><answer>6</answer>", "6", False),
        ("<answer>5</answer>", "5", False),
        ("<think>a</think><answer>5", None, False),
        ("<think>a</think><answer> </answer>", None, False),
        ("</answer><answer>", None, False),
        ("<answer></think>5<think></answer>", "</think>5<think>", False),
        ("<think> </think><answer>5</answer>", "5", False),
        ("", None, False),
    ],
)
def test_tags(text: str, answer: str | None, follows: bool) -> None:
    for ended in (True, False):  # a closing tag says that nothing is missing
        assert THINK.answer(text, ended) == answer
        assert THINK.follows(text, ended, work=True) == follows
    if "<think> </think>" in text:
        assert THINK.follows(text, True, work=False)


@pytest.mark.parametrize(
    ("text", "with_work", "without"),
    [("w\n#### 1", True, True), ("#### 1", False, True), ("w #### 1 #### 1", False, False), ("w", False, False)],
)
def test_the_mark_stands_there_once_behind_work(text: str, with_work: bool, without: bool) -> None:
    form = AnswerForm()
    assert form.follows(text, True, work=True) == with_work
    assert form.follows(text, True, work=False) == without
    assert not form.follows(text, False, work=False)


@given(st.text(), st.text(min_size=1), st.sampled_from([AnswerForm(), AnswerForm("="), AnswerForm(""), THINK]))
def test_a_solution_gives_its_answer_back(work: str, answer: str, form: AnswerForm) -> None:
    tags = ("#", "=", "<think>", "</think>", "<answer>", "</answer>")
    if any(tag in work + answer for tag in tags) or not answer.strip():
        return
    solution = form.solution(work, answer)
    assert form.answer(solution, True) == answer.strip()
    assert form.follows(solution, True, work=bool(work.strip()) and bool(form.mark))
    assert form.work(solution) == (work.strip() if form.mark else "")


@given(st.text(), st.booleans())
def test_no_text_breaks_a_form(text: str, ended: bool) -> None:
    for form in (AnswerForm(), AnswerForm(""), THINK):
        answer = form.answer(text, ended)
        assert answer is None or answer == answer.strip() != ""
        assert not form.follows(text, ended, work=False) or answer is not None


def test_a_template_changes_the_prompt_and_not_the_side() -> None:
    plain, think = letters()["sort"], letters(template="think")["sort"]
    for number in range(20):
        a, b = plain.exercise(1, number), think.exercise(1, number)
        assert (a.key, plain.split(a)) == (b.key, think.split(b))
        assert a.prompt in (f"sort {a.answer}\n", a.question)
        assert b.prompt.startswith("A conversation between User and Assistant.")
        assert f"User: {a.prompt.strip()}" in b.prompt
        assert THINK.answer(b.solution, True) == a.answer


# ---------------------------------------------------------------- configs


def test_all_levels_or_those_that_are_named() -> None:
    families = families_of(ExercisesConfig(families=(FamilyConfig("sort", (3, 1)), FamilyConfig("chain"))))
    assert families["sort"].levels == (1, 3)
    assert families["chain"].levels == tuple(range(1, 9))


def test_the_mark_of_a_config_is_in_its_solutions() -> None:
    exercise = letters(answer_mark="=")["addition"].exercise(1, 0)
    assert exercise.solution.endswith(f"\n={exercise.answer}")
    assert letters(answer_mark="")["sort"].exercise(1, 0).solution == LETTERS[1].exercise(1, 0).answer


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("answer_mark=' '", "answer_mark is ' '; it must be empty or have something that is no blank"),
        ("answer_mark=':'", "answer_mark is ':', which solutions of addition have elsewhere, too"),
        ("families.0.name=srot", "families.0.name is 'srot'; there is no such family; near ones are sort"),
        ("families.0.name=program/lists", "near ones are program/list"),
        ("families.0.name=gym/chainsum", "near ones are gym/chain_sum"),
        ("families.0.name=gym/composite", "which can not be used: it is a mixture"),
        ("families.0.name=addition", "families.1.name is 'addition', which is there already"),
        ("families.0.levels=9", "level is 9; sort has levels 1, 2"),
        ("families.0.levels=0", "families.0.levels.0 is 0; it must be an integer >= 1"),
        ("families.0.name=", "families.0.name is ''; there is no such family"),
        ("template=chat", "template is 'chat'; it must be one of plain, think"),
    ],
)
def test_a_wrong_config_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:  # noqa: PT012
        cfg = apply_overrides(ExercisesConfig((FamilyConfig("sort"), FamilyConfig("addition"))), [override])
        validate(cfg)
        families_of(cfg)
    assert sentence in str(error.value)


def test_no_family_at_all() -> None:
    with pytest.raises(UserError, match="families is empty, and so is files"):
        validate(ExercisesConfig(families=()))


def test_without_reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "reasoning_gym" else find(name))
    with pytest.raises(UserError, match=r"'gym/maze', but reasoning-gym is not installed: pip install 'dsjax\[math\]'"):
        families_of(ExercisesConfig(families=(FamilyConfig("gym/maze"),)))
