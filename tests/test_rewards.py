"""Rewards: what each scorer accepts, how parts add up, what is unknown, and that no text makes any of them raise."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import rewards as benchmark
from dsjax import hosts
from dsjax.config import UserError, apply_overrides, validate
from dsjax.rl.answers import boxed, normalised, reaches, unmarked, whole_number, words
from dsjax.rl.exercises import AnswerForm, Exercise, ExercisesConfig, Family, FamilyConfig, draw, families_of
from dsjax.rl.rewards import RewardConfig, Rewards, Verdict, answer_of, at_once, shortness

THINK = AnswerForm(template="think")
ALL = RewardConfig(correct=1.0, partial=0.5, format=0.25, work=0.125, length=0.0625, length_from=2, length_to=6)


@dataclasses.dataclass(frozen=True)
class Written:
    """A text as a rollout has it."""

    text: str
    ended: bool = True
    tokens: tuple[int, ...] = (0,)


class Given(Family):
    """A family of one exercise."""

    levels = (1,)

    def __init__(self, exercise: Exercise, form: AnswerForm = AnswerForm()):
        self.name, self.form, self._exercise = exercise.family, form, exercise

    def exercise(self, level: int, number: int) -> Exercise:
        return self._exercise

    def size(self, level: int) -> int:
        return 1


WORD = Exercise("word", 1, "say it\n", "yes no", "a b c\n#### yes no", "exact")
SUM = Exercise("sum", 1, "half of 1\n", "\\frac{1}{2}", "#### \\frac{1}{2}", "math")
REACH = Exercise(
    "reach", 1, "x", "2*3", "2*3", "arithmetic", {"numbers": [2, 3, 4], "target": 6, "operators": "+-*", "all": False}
)
PROGRAM = families_of(ExercisesConfig(families=(FamilyConfig("program/list", (1,)),)))["program/list"].exercise(1, 0)


@pytest.fixture(scope="module")
def rewards() -> Iterator[Rewards]:
    families = {e.family: Given(e) for e in (WORD, REACH)}
    with Rewards(ALL, families) as made:
        yield made


# ---------------------------------------------------------------- how parts add up


def test_parts_by_hand(rewards: Rewards) -> None:
    texts = [
        Written("a b c\n#### yes no", tokens=(1,)),  # all there; 2 tokens with its end
        Written("a b\n#### yes  no ", tokens=(1, 2, 3)),  # two of three words of work; 4 tokens
        Written("#### yes no", tokens=(1, 2, 3, 4, 5)),  # no work; 6 tokens
        Written("a x c d #### yes #### no", tokens=(1,) * 9),  # one word of four; a second mark; wrong
        Written("a b c\n#### yes no", ended=False),  # more might have followed
        Written(""),
    ]
    found = rewards([WORD] * 6, texts)
    expected = {
        "correct": [1, 1, 1, 0, 0, 0],
        "partial": [1, 1, 1, 0, 0, 0],
        "format": [1, 1, 0, 0, 0, 0],
        "work": [1, 2 / 3, 0, 1 / 6, 1, 0],
        "length": [0, -0.5, -1, -1, 0, 0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found.parts[name], values, rtol=1e-15)
    # 1 correct + 0.5 partial + 0.25 format + 0.125 work + 0.0625 length
    by_hand = [1.875, 1.5 + 0.25 + 0.125 * 2 / 3 - 0.03125, 1.5 - 0.0625, 0.125 / 6 - 0.0625, 0.125, 0]
    np.testing.assert_allclose(found.total_N, by_hand, rtol=1e-14)  # some roundings of float64
    assert found.answers == ("yes no", "yes  no", "yes no", "no", "", "")
    assert found.reasons == ("", "", "", "", "no answer", "no answer")
    assert found.known_N.all()


def test_nothing_to_judge(rewards: Rewards) -> None:
    found = rewards([], [])
    assert found.total_N.shape == (0,)
    assert found.answers == ()


def test_what_is_unknown_is_no_zero(rewards: Rewards, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict(None, "infrastructure: gone"), Verdict(0.5), Verdict(1.0)]
    monkeypatch.setattr(rewards, "verdicts", lambda exercises, answers: verdicts)
    found = rewards([WORD] * 3, [Written("#### x"), Written("#### y"), Written("#### z")])
    assert np.isnan(found.total_N[0])
    assert found.known_N.tolist() == [False, True, True]
    np.testing.assert_array_equal(found.parts["correct"], [np.nan, 0, 1])
    np.testing.assert_array_equal(found.parts["partial"], [np.nan, 0.5, 1])
    assert found.reasons[0] == "infrastructure: gone"
    monkeypatch.setattr(rewards, "_cfg", RewardConfig(correct=0.0, format=1.0))
    assert rewards([WORD] * 3, [Written("#### x")] * 3).known_N.all()  # where nothing hangs on the verdict


@given(st.lists(st.integers(0, 10**9)), st.integers(0, 10**6), st.integers(1, 10**6))
def test_longer_is_never_worth_more(lengths: list[int], begin: int, more: int) -> None:
    worth = shortness(sorted(lengths), begin, begin + more)
    assert (np.diff(worth) <= 0).all()
    assert ((worth <= 0) & (worth >= -1)).all()


def test_equal_answers_are_judged_once(rewards: Rewards, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    judged = rewards._judged

    def counted(exercises: Any, answers: Any) -> Any:
        asked.extend(answers)
        return judged(exercises, answers)

    monkeypatch.setattr(rewards, "_judged", counted)
    texts = [Written(f"w {i % 5}\n#### {i % 3}") for i in range(30)]
    found = rewards([WORD] * 30, texts)
    assert sorted(asked) == ["0", "1", "2"]
    assert found.answers == tuple(str(i % 3) for i in range(30))


def test_of_several_processes_the_first_ones_word_counts(rewards: Rewards, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def exchange(name: str, value: Any) -> list[Any]:
        told.append(value)
        return [[[0.25, "by the first"]], value]

    monkeypatch.setattr(hosts, "exchange", exchange)
    monkeypatch.setattr(hosts, "index", lambda: 1)
    assert rewards.verdicts([WORD] * 2, ["yes no"] * 2) == [Verdict(0.25, "by the first")] * 2
    assert told == [None]


def test_256_texts_take_milliseconds() -> None:
    families = families_of(ExercisesConfig(families=(FamilyConfig("sort"),)))
    exercises = draw(families["sort"], 3, "training", seed=0, num=256)
    with Rewards(RewardConfig(), families) as made:
        texts = [Written(exercise.solution) for exercise in exercises]
        begin = time.process_time()
        assert made(exercises, texts).total_N.tolist() == [1.0] * 256
        # 1.4 ms without the run-time checks of these tests, which take a hundred times as long
        assert time.process_time() - begin < 1.5


# ---------------------------------------------------------------- what is accepted here and now


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("2*3", True),
        ("(2+4)", True),
        (" 2 + 4 ", True),
        ("4*3-2*3", False),  # 3 twice
        ("2+2+2", False),
        ("6", False),
        ("4+3-2+1", False),
        ("2*3=6", False),
        ("2*03", False),
        ("2**3", False),
        ("12/2", False),
        ("-2+4*2", False),
        ("-(2-4)*3", True),
        ("2 3", False),
        ("((2*3", False),
        ("2*3)", False),
        ("()", False),
        ("", False),
        ("9**9**9", False),
        ("2*3" + " " * 100_000, False),
        ("٢*3", False),
    ],
)
def test_expressions(text: str, right: bool) -> None:
    assert reaches(text, [2, 3, 4], 6, "+-*", every=False) == right


def test_expressions_with_fractions_and_every_number() -> None:
    assert reaches("6/(1-3/4)", [1, 3, 4, 6], 24, "+-*/", every=True)
    assert not reaches("4*6", [1, 3, 4, 6], 24, "+-*/", every=True)
    assert not reaches("1/(3-3)", [1, 3, 3], 1, "+-*/", every=True)
    assert reaches("", [], 0, "+", every=True) is False


@given(st.text(alphabet="0123456789+-*/() ", max_size=40))
def test_expressions_agree_with_pythons(text: str) -> None:
    import ast
    import fractions
    import re

    numbers = [int(n) for n in re.findall(r"\d+", text)]
    value = None
    try:
        tree = ast.parse(text.strip(), mode="eval")
        plain = all(isinstance(node.op, ast.USub) for node in ast.walk(tree) if isinstance(node, ast.UnaryOp))
        floors = any(isinstance(node, (ast.FloorDiv, ast.Pow, ast.Call, ast.Tuple)) for node in ast.walk(tree))
        if plain and not floors:
            value = eval(re.sub(r"(\d+)", r"fractions.Fraction(\1)", text.strip()), {"fractions": fractions})
    except (SyntaxError, ZeroDivisionError):
        pass
    if value is not None and value.denominator == 1 and len(text) <= 20 * max(len(numbers), 1):
        assert reaches(text, numbers, int(value), "+-*/", every=True)
    if value is None:
        assert not any(reaches(text, numbers, target, "+-*/", every=True) for target in range(-3, 4))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        (" -1,234 ", -1234),
        ("$5", 5),
        ("+3", 3),
        ("1,23", None),
        ("1.0", None),
        ("٣", None),
        ("9" * 19, None),
    ],
)
def test_whole_numbers(text: str, number: int | None) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("so \\boxed{1} and \\boxed{\\frac{1}{2}} x", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed 5", "5"),
        ("\\boxed  {7}", "7"),
        ("$\\boxed\\frac{1}{2}$ so", "\\frac{1}{2}"),
        ("\\boxed-5, then", "-5"),
        ("\\boxed 1,200.5$", "1,200.5"),
        ("\\boxed x^2", "x"),
        ("\\fbox{3} and \\fbox{5}", "5"),
        ("\\fbox{3} \\boxed{4}", "4"),
        ("\\boxed{", None),
        ("\\boxed{1} \\boxed{2", None),
        ("\\boxed{}", None),
        ("\\boxed", None),
        ("\\boxed{" * 50_000, None),
        ("none", None),
    ],
)
def test_boxes(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("18.", "18"),
        ("$18.", "$18"),
        ("18.00.", "18.00"),
        ("18 dollars.", "18"),
        ("\\frac{1}{2}.", "\\frac{1}{2}"),
        ("5.0", "5.0"),
        ("...", "..."),
        ("dollars", "dollars"),
    ],
)
def test_the_end_of_a_sentence_is_none_of_an_answers(text: str, answer: str) -> None:
    assert unmarked(text) == answer


def test_sentences_around_numbers_are_judged_here() -> None:
    for right, texts in {"18": ("18.", "$18.", "18 dollars"), "0.5.": ("0.5", "0.5.")}.items():
        for text in texts:
            answer = answer_of(dataclasses.replace(SUM, answer=right), Written(text), AnswerForm(""))
            assert at_once(dataclasses.replace(SUM, answer=right), answer) == Verdict(1.0), (right, text)


@pytest.mark.parametrize(
    ("right", "text", "score"),
    [
        ("no", "no.", 1),
        ("no", "No", 1),
        ("no", "on", 0),
        ("no", "n o", 0),
        ("no", "So it is \\boxed{\\text{no}}", 1),
        ("no", "\\boxed{\\text{on}}", 0),
        ("no", "$no$", 1),
        ("no", "0", 0),
        ("\\text{no}", "no", 1),
        ("New York", "new  york", 1),
        ("Tom, Mary", "Mary, Tom", 1),
        ("Tom, Mary", "Tom, yarM", 0),
        ("A dollar", "7", 0),  # without its currency it is a variable
    ],
)
def test_words_are_right_as_they_are_spelt(right: str, text: str, score: float) -> None:
    exercise = dataclasses.replace(SUM, answer=right, scorer="words")
    verdict = at_once(exercise, answer_of(exercise, Written(text), AnswerForm("")))
    assert verdict == Verdict(score)


@pytest.mark.parametrize("text", ["x", "x y", "2", "ab+c", "\\pi", "f(xy)", "", "\ud800", "\\text{", "$", ","])
def test_what_is_no_word(text: str) -> None:
    assert words(text) is None


def test_a_long_answer_is_looked_at_where_the_right_one_is_unknown() -> None:
    unknown = dataclasses.replace(SUM, scorer="gym", answer="")
    assert at_once(unknown, "x" * 5000) is None
    assert at_once(unknown, "x" * 20_000) == Verdict(0.0, "too long")
    assert at_once(SUM, "x" * 5000) == Verdict(0.0, "too long")


@given(st.text())
def test_no_text_breaks_what_is_judged_here(text: str) -> None:
    for exercise in (WORD, SUM, REACH, dataclasses.replace(WORD, scorer="words")):
        verdict = at_once(exercise, text)
        assert verdict is None or verdict.share in (0, 1)
    boxed(text)
    assert normalised(text) == normalised(normalised(text))


HOSTILE = (
    "9" * 1_000_000,
    "9**9**9",
    "(" * 100_000,
    "-" * 100_000,
    "[" * 5000 + "]" * 5000,
    "a\0b",
    "\ud800",
    "\\boxed{",
    "x" * 100_000,
    "####" * 25_000,
    "\u202e\u0000\ufffe",
    "__import__('os').abort()",
    "}{" * 1000,
    "<answer>" * 1000,
    "1e999999999",
    "\n" * 100_000,
)


@pytest.mark.parametrize("form", [AnswerForm(), AnswerForm(""), THINK])
def test_hostile_texts_are_wrong_and_nothing_more(form: AnswerForm) -> None:
    exercises = [WORD, REACH]
    with Rewards(ALL, {e.family: Given(e, form) for e in exercises}) as made:
        for exercise in exercises:
            bare = [Written(text) for text in HOSTILE]
            marked = [Written(f"#### {text}") for text in HOSTILE]
            tagged = [Written(f"<think>{text}</think><answer>{text}</answer>") for text in HOSTILE]
            begin = time.process_time()
            found = made([exercise] * 3 * len(HOSTILE), bare + marked + tagged)
            assert time.process_time() - begin < 5  # 100 ms in fact
            assert found.known_N.all()
            assert (found.parts["correct"] == 0).all()


# ---------------------------------------------------------------- programs

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")


@linux
@pytest.mark.parametrize("template", ["plain", "think"])
def test_programs(template: str) -> None:
    (family,) = families_of(ExercisesConfig((FamilyConfig("program/list", (1,)),), template=template)).values()  # type: ignore[arg-type]
    exercise = family.exercise(1, 0)
    exercise = dataclasses.replace(exercise, data=exercise.data | {"timeout": 0.3})
    wrap = "{}" if template == "plain" else " <think> so </think> <answer> ```python\n{}\n``` </answer>"
    head = "" if template == "plain" else exercise.data["prefix"]
    bodies = [
        exercise.solution if template == "plain" else "",
        wrap.format(f"{head}    return None\n"),
        wrap.format(f"{head}    while True: pass\n"),
        wrap.format(f"{head}    return (\n"),
        wrap.format("    import os\n    os._exit(0)\n"),
        wrap.format("    \ud800\0" + "(" * 50_000),
        "",
    ]
    bodies[0] = bodies[0] or exercise.solution
    with Rewards(RewardConfig(partial=1.0, format=1.0), {family.name: family}) as made:
        found = made([exercise] * len(bodies), [Written(body) for body in bodies])
    assert found.parts["correct"].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert found.known_N.all()
    assert found.reasons[0] == ""
    assert found.parts["format"][0] == 1
    assert found.parts["format"][-1] == 0
    assert exercise.data["prefix"] in found.answers[0]
    if template == "plain":
        assert "timeout" in found.reasons[2]
        assert found.parts["format"].tolist() == [1, 1, 1, 0, 1, 0, 0]


@linux
def test_a_program_gets_the_share_of_its_tests() -> None:
    tests = [([1], 1), ([2], 2), ([3], 3), ([4], 4)]
    from dsjax.rl.exercises.programs import asked
    from dsjax.rl.programs import Problem

    problem = Problem("p", "", "def f(x):\n", "", "f", tests, "    return x\n")
    exercise = asked("file/p", 1, problem, AnswerForm(), {})
    with Rewards(RewardConfig(), {"file/p": Given(exercise)}) as made:
        found = made([exercise] * 2, [Written("    return min(x, 3)\n"), Written("    return x\n")])
    assert found.parts["partial"].tolist() == [0.75, 1]
    assert found.parts["correct"].tolist() == [0, 1]


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("correct=-1", "correct is -1.0; it must be a number >= 0"),
        ("correct=nan", "correct is 'nan'; it must be a number"),
        ("length_from=6", "length_from is 6; it must be below length_to, 6"),
        ("learned=1", "learned is 1, and model ''; a model of rewards takes a weight and the folder of its run"),
        ("model=runs/reward", "learned is 0, and model 'runs/reward'; a model of rewards takes a weight"),
        ("workers=0", "workers is 0; it must be an integer >= 1"),
        ("seconds=0", "seconds is 0.0; it must be a number > 0"),
        ("formatt=1", "unknown key formatt; did you mean format?"),
    ],
)
def test_a_wrong_config_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        validate(apply_overrides(ALL, [override]))
    assert sentence in str(error.value)


def test_something_must_be_worth_something() -> None:
    with pytest.raises(UserError, match="correct, partial, format, work and learned are 0"):
        validate(RewardConfig(correct=0.0, length=1.0))


def test_what_judges_must_be_there_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(UserError, match=r"sum is judged by math-verify: pip install 'dsjax\[math\]'"):
        Rewards(RewardConfig(), {"word": Given(WORD), "sum": Given(SUM)})


# ---------------------------------------------------------------- what it costs


def test_costs_are_those_of_right_and_of_wrong_texts() -> None:
    figures = benchmark.measure(4, 2, ["exact", "math, fractions"])
    rows = benchmark.table(figures).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| exact", "| math, fractions"]
    for case in ("exact", "math, fractions"):
        for found in figures[case].values():
            assert 0 < found["least_ms"] <= found["median_ms"] <= found["most_ms"]
    assert figures["math, fractions"]["right"]["least_ms"] > figures["exact"]["right"]["least_ms"]


def test_a_verdict_that_is_not_the_expected_one_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "wrong", benchmark.right)
    with pytest.raises(AssertionError, match=r"sort: \[1\. 1\. 1\.\] is not all 0\.0"):
        benchmark.measure(3, 1, ["exact"])
