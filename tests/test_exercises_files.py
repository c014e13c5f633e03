"""Exercises from files of users: GSM8K's form, MATH's, plain lines, programming problems; what is wrong with a line."""

from __future__ import annotations

import gzip
import json
import pathlib
from typing import Any

import pytest

from dsjax.config import UserError
from dsjax.rl.exercises import AnswerForm, ExercisesConfig, FamilyConfig, distinct, draw, families_of
from dsjax.rl.exercises.exercise import numbers_of, split_of
from dsjax.rl.exercises.lines import read_families

GSM = {"question": "Two hens lay 3 eggs each. How many?", "answer": "2 * 3 = <<2*3=6>>6 eggs.\n#### 6"}
MATH = {
    "problem": "What is half of $\\frac{1}{2}$?",
    "solution": "It is $\\boxed{\\frac{1}{4}}$.",
    "level": "Level 3",
    "type": "Number Theory",
}
PLAIN = {"question": "The capital of France?", "answer": "Paris", "level": 2, "scorer": "exact"}


def write(path: pathlib.Path, *lines: Any) -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + "\n", encoding="utf-8", errors="surrogatepass")
    return str(path)


def test_gsm8k(tmp_path: pathlib.Path) -> None:
    (family,) = read_families(write(tmp_path / "gsm8k.jsonl", GSM), AnswerForm()).values()
    exercise = family.exercise(1, 0)
    assert (family.name, family.levels, family.size(1)) == ("file/gsm8k", (1,), 1)
    assert exercise.prompt == "Two hens lay 3 eggs each. How many?\n"
    assert exercise.solution == "2 * 3 = 6 eggs.\n#### 6"
    assert (exercise.answer, exercise.scorer) == ("6", "math")


def test_math(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "math.jsonl", MATH, MATH | {"problem": "other", "level": "Level ?"}, "")
    (family,) = read_families(path, AnswerForm(template="think")).values()
    exercise = family.exercise(3, 0)
    assert (family.name, family.levels, family.size(3)) == ("file/math/number theory", (3,), 1)
    assert exercise.answer == "\\frac{1}{4}"
    assert exercise.solution == " <think> It is $\\boxed{\\frac{1}{4}}$. </think> <answer> \\frac{1}{4} </answer>"
    with_answer = MATH | {"solution": "no box", "answer": "0.25"}
    (family,) = read_families(write(tmp_path / "math.jsonl", with_answer), AnswerForm()).values()
    assert family.exercise(3, 0).answer == "0.25"


def test_plain_lines_a_list_and_compressed_ones(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "quiz.json"
    path.write_text(json.dumps([PLAIN, PLAIN | {"question": "Of Italy?", "answer": "Rome"}, PLAIN]))
    packed = tmp_path / "quiz.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        (family,) = read_families(file, AnswerForm("")).values()
        assert (family.name, family.levels, family.size(2)) == ("file/quiz", (2,), 2)  # one of them was there twice
        exercise = family.exercise(2, 1)
        assert (exercise.prompt, exercise.solution, exercise.scorer) == ("Of Italy?\n", "Rome", "exact")


def test_programming_problems(tmp_path: pathlib.Path) -> None:
    plain = {"entry_point": "f", "prompt": "def f(x):\n", "solution": "    return x\n", "tests": [[[1], 1]]}
    mbpp = {
        "task_id": 2,
        "text": "Add one.",
        "code": "def g(x):\n    return x + 1",
        "test_list": ["assert g(1) == 2"],
        "test_setup_code": "",
    }
    (family,) = read_families(write(tmp_path / "problems.jsonl", plain), AnswerForm()).values()
    exercise = family.exercise(1, 0)
    assert (exercise.family, exercise.scorer, exercise.prompt) == ("file/problems", "program", "def f(x):\n")
    assert exercise.solution == "    return x\n"
    (family,) = read_families(write(tmp_path / "mbpp.jsonl", mbpp), AnswerForm()).values()
    assert "Add one." in family.exercise(1, 0).prompt
    assert family.exercise(1, 0).solution == mbpp["code"]


@pytest.mark.parametrize(
    ("fields", "scorer"),
    [
        ({"answer": "no"}, "words"),
        ({"answer": "She is Evelyn. #### Evelyn"}, "words"),
        ({"answer": "\\text{no}"}, "words"),
        ({"answer": "no", "scorer": "math"}, "math"),
        ({"answer": "x"}, "math"),
        ({"answer": "x y"}, "math"),
        ({"answer": "10 cm"}, "math"),
        ({"answer": "ab + 1"}, "math"),
    ],
)
def test_words_are_judged_as_words(tmp_path: pathlib.Path, fields: dict[str, str], scorer: str) -> None:
    (family,) = read_families(write(tmp_path / "quiz.jsonl", {"question": "x"} | fields), AnswerForm()).values()
    assert family.exercise(1, 0).scorer == scorer


def test_letters_of_maths_form_stay_mathematics(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "math.jsonl", {"problem": "a times b?", "solution": "\\boxed{ab}"})
    assert read_families(path, AnswerForm())["file/math"].exercise(1, 0).scorer == "math"


def test_problems_are_there_once_and_on_the_same_side_in_every_template(tmp_path: pathlib.Path) -> None:
    lines = [
        {"entry_point": f"f{i}", "tests": [[[1], 1]], "prompt": f"def f{i}(x):\n", "solution": "    return x\n"}
        for i in range(40)
    ]
    path = write(tmp_path / "problems.jsonl", *lines, *lines[:2], {"entry_point": "g", "tests": [[[1], 1]]})
    plain, think = (read_families(path, AnswerForm(template=t))["file/problems"] for t in ("plain", "think"))  # type: ignore[arg-type]
    assert plain.size(1) == think.size(1) == 41
    for number in range(41):
        a, b = plain.exercise(1, number), think.exercise(1, number)
        assert a.data == b.data
        assert a.prompt != b.prompt
        assert plain.split(a) == think.split(b) == split_of(a.question)


def test_of_a_file_every_solution_is_looked_at_for_the_mark(tmp_path: pathlib.Path) -> None:
    lines = [{"question": f"{n}?", "answer": f"{n} gives {n} #### {n}"} for n in range(9)]
    bad = {"question": "a?", "answer": "6 / 2 = 3 and so #### 3", "level": 2}
    config = ExercisesConfig(families=(), files=(write(tmp_path / "sums.jsonl", *lines),), answer_mark="= ")
    assert len(families_of(config)) == 1
    write(tmp_path / "sums.jsonl", *lines, bad)
    with pytest.raises(UserError, match=r"answer_mark is '= ', which solutions of file/sums have .* \('6 / 2 = 3 and"):
        families_of(config)


def test_a_level_may_have_nothing_on_a_side_that_is_not_asked(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "few.jsonl", *(GSM | {"question": f"{n}?", "level": n} for n in range(1, 25)))
    (family,) = families_of(ExercisesConfig(families=(), files=(path,))).values()
    empty = [level for level in family.levels if not numbers_of(family, level, "validation")]
    assert distinct(family, empty[0], "validation", 0) == []
    with pytest.raises(UserError, match=rf"a is 1; file/few has 0 different exercises of level {empty[0]} on the side"):
        distinct(family, empty[0], "validation", 1, key="a")
    with pytest.raises(UserError, match=rf"file/few has no exercise of level {empty[0]} on the side 'validation'"):
        draw(family, empty[0], "validation", seed=0, num=1)


def test_the_lines_of_a_file_have_sides_too(tmp_path: pathlib.Path) -> None:
    lines = [GSM | {"question": f"Question {number}?"} for number in range(300)]
    path = write(tmp_path / "many.jsonl", *lines)
    (family,) = families_of(ExercisesConfig(families=(), files=(path,))).values()
    training, held_out = (
        {e.question for e in draw(family, 1, split, seed=0, num=400)}  # type: ignore[arg-type]
        for split in ("training", "held_out")
    )
    assert not training & held_out
    assert 200 < len(training) < 275  # 13 / 16 of 300
    assert len(distinct(family, 1, "held_out", len(held_out))) == len(held_out)
    with pytest.raises(UserError, match=rf"file/many has {len(held_out)} different exercises of level 1"):
        distinct(family, 1, "held_out", 300)


def test_families_of_files_are_chosen_by_name(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "math.jsonl", MATH, MATH | {"type": "Algebra", "level": "Level 5"})
    both = families_of(ExercisesConfig(families=(FamilyConfig("sort"),), files=(path,)))
    assert list(both) == ["sort", "file/math/number theory", "file/math/algebra"]
    one = families_of(ExercisesConfig(families=(FamilyConfig("file/math/algebra", (5,)),), files=(path,)))
    assert list(one) == ["file/math/algebra"]
    with pytest.raises(UserError, match="near ones are file/math/algebra"):
        families_of(ExercisesConfig(families=(FamilyConfig("file/math/algebras"),), files=(path,)))
    other = tmp_path / "other"
    other.mkdir()
    again = write(other / "math.jsonl", MATH)
    with pytest.raises(UserError, match=r"files.1 is '.*', and another file has a family 'file/math/number theory'"):
        families_of(ExercisesConfig(families=(), files=(path, again)))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "can not be read|it is no JSON"),
        ("3", "a JSON object was expected, found int"),
        ("{}", "has neither question and answer (GSM8K's form) nor problem and solution (MATH's); it has nothing"),
        ({"text": "x"}, "it has text"),
        (GSM | {"question": ""}, "question is empty; it must be a text"),
        (GSM | {"question": "  "}, "question is '  '; it must be a text"),
        (GSM | {"question": 3}, "question is 3; it must be a text"),
        ({"question": "x"}, "answer is missing; it must be a text"),
        (GSM | {"answer": "work ####"}, "there is nothing behind the last #### of answer"),
        (GSM | {"answer": None}, "answer is None; it must be a text"),
        (GSM | {"level": 0}, "level is 0; it must be a whole number from 1"),
        (GSM | {"level": True}, "level is True"),
        (GSM | {"level": 1.5}, "level is 1.5"),
        (GSM | {"level": "hard"}, "level is 'hard'"),
        (GSM | {"scorer": "eval"}, "scorer is 'eval'; it must be one of math, exact"),
        (
            MATH | {"solution": "no box"},
            "has no \\boxed{...} with an answer, and there is no answer beside it",
        ),
        (MATH | {"solution": "\\boxed{"}, "solution has no \\boxed{...}"),
        (MATH | {"type": 3}, "type is 3; it must be a text"),
        ('{"question": "\\ud800", "answer": "1"}', "it is not UTF-8"),
        ('{"question": "\ud800", "answer": "1"}', "it is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: pathlib.Path, line: Any, sentence: str) -> None:
    path = write(tmp_path / "bad.jsonl", GSM, line)
    with pytest.raises(UserError) as error:
        read_families(path, AnswerForm())
    said = str(error.value)
    assert any(part in said for part in sentence.split("|")), said
    assert said.startswith(f"{path}, line 2")
    assert len(said) < 400


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jsonl", None, "can not be read"),
        ("empty.jsonl", b"", "has no exercises"),
        ("blank.jsonl", b"\n \n", "has no exercises"),
        ("unknown.jsonl", json.dumps(MATH | {"level": "Level ?"}).encode(), "has no exercises"),
        ("torn.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:20], "can not be read"),
        ("plain.jsonl.gz", b"{}", "can not be read"),
        ("list.json", b"[{}", "it is no JSON"),
        ("list.json", b"[3]", "item 0: a JSON object was expected, found int"),
    ],
)
def test_a_bad_file_is_named(tmp_path: pathlib.Path, name: str, content: bytes | None, sentence: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        families_of(ExercisesConfig(families=(), files=(str(path),)))
    assert sentence in str(error.value)
    assert str(path) in str(error.value)
