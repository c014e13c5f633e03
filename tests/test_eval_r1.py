"""``dsjax eval`` of runs that learn from exercises: which of them a model is asked, and what is said of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any, get_args

import numpy as np
import pytest
from r1_runs import r1
from small_runs import home, small

from dsjax.cli import main
from dsjax.config import UserError, to_dict
from dsjax.evals.command import Request, Task
from dsjax.evals.command import run as evaluate
from dsjax.evals.exercises import HeldOutExercises, asked_config, markdown, refuse_without_documents, task_of
from dsjax.evals.solved import Solved
from dsjax.rl.exercises.exercise import Exercise
from dsjax.train.best_of import BestOf
from dsjax.train.preference import Preference
from dsjax.train.pretrain import Pretrain, TrainConfig
from dsjax.train.r1 import run, warm_start_run


@functools.cache
def whole() -> pathlib.Path:
    """A run of R1 of one iteration, with its report."""
    folder = home() / "eval_r1"
    assert run(r1(train={"steps": 1}, report={"prompts": 6, "samples": 3}), folder, quiet=True) == 0
    return folder


def evaluated(folder: pathlib.Path, *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(folder), *words, "--quiet"])
    assert stop.value.code == 0
    return json.loads((folder / "exercises.json").read_text())


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("name", "place"), [("after", "."), pytest.param("before", "warm_start", marks=pytest.mark.slow)]
)
def test_figures_are_those_of_the_report(name: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same exercises, texts and verdicts, by one device in place of eight."""
    report = json.loads((whole() / "report.json").read_text())["by_level"]["reverse"]
    found = evaluated(whole() / place)
    assert found["by_level"]["reverse"] == {level: figures[name] for level, figures in report.items()}
    assert (found["exercises_of_a_level"], found["samples"], found["temperature"], found["max_tokens"]) == (6, 3, 1, 6)
    said = capsys.readouterr().out
    assert "# exercises: 6 held-out ones of each level, 3 text(s) each" in said
    assert "| reverse | 2 |" in said


@pytest.mark.slow
def test_options_reach_the_figures() -> None:
    words = ("--limit", "2", "--samples", "4", "--k", "1,2", "--max-tokens", "3", "--temperature", "0.5", "--seed", "7")
    found = evaluated(whole(), *words)
    assert (found["exercises_of_a_level"], found["samples"], found["seed"]) == (2, 4, 7)
    assert (found["temperature"], found["max_tokens"]) == (0.5, 3)
    for figures in found["by_level"]["reverse"].values():
        assert {"pass@1", "pass@2", "pass@4", "greedy"} <= figures.keys()
        assert figures["exercises"] == 2


def test_pass_at_k_by_level_by_hand() -> None:
    exercises = tuple(Exercise("sort", level, f"{i}", "", "", "exact") for i, level in enumerate((1, 1, 2)))
    sampled_NK = np.array([[1, 0, 0, 0], [1, 1, 0, math.nan], [0, 0, 0, 0]])
    table = Solved(exercises, sampled_NK, np.zeros(0)).by_level((2, 9))["sort"]
    assert table[1].keys() == {"exercises", "unknown", "pass@1", "pass@2", "pass@3"}  # one has three known texts
    assert table[1]["pass@1"]["value"] == pytest.approx((1 / 4 + 2 / 3) / 2)
    assert table[1]["pass@2"]["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert table[2].keys() == {"exercises", "unknown", "pass@1", "pass@2", "pass@4"}
    assert table[2]["pass@4"]["value"] == 0


def test_the_report_for_people() -> None:
    share = {"value": 0.5, "low": 0.25, "high": 0.75}
    levels = {"1": {"pass@1": share, "pass@4": share, "greedy": 1.0}, "2": {"unknown": 3}}
    report = {"exercises_of_a_level": 2, "samples": 4, "without_verdict": 3, "mean": 0.5, "by_level": {"sort": levels}}
    assert markdown(report).splitlines() == [
        "# exercises: 2 held-out ones of each level, 4 text(s) each",
        "",
        "| | level | pass@1 | pass@4 | greedy |",
        "|---|---|---|---|---|",
        "| sort | 1 | 50.0% (25.0% to 75.0%) | 50.0% (25.0% to 75.0%) | 100.0% |",
        "| sort | 2 |  |  |  |",
        "",
        "pass@1 is 50.0% in the mean of all levels; in brackets: 95 % intervals.",
        "3 texts could not be judged and are left out.",
    ]


# ---------------------------------------------------------------- kinds of runs


def folder_of(config: Pretrain, path: pathlib.Path) -> pathlib.Path:
    """A run as far as its config tells."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    return path


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Of each kind one: in R1's folder its warm start, and one after the other begins with the one before."""
    config = r1(exercises={"answer_mark": "= "})
    found = {"r1": folder_of(config, tmp_path / "r1")}
    found["warm_start"] = folder_of(warm_start_run(config), tmp_path / "r1" / "warm_start")

    def begun(name: str) -> TrainConfig:
        return TrainConfig(start_from=str(found[name]))

    found["dpo"] = folder_of(Preference(train=begun("warm_start")), tmp_path / "dpo")
    found["reward"] = folder_of(Preference(train=begun("warm_start"), method="reward"), tmp_path / "reward")
    found["tuned"] = folder_of(dataclasses.replace(small(), train=begun("dpo")), tmp_path / "tuned")
    found["best_of"] = folder_of(BestOf(train=begun("r1")), tmp_path / "best_of")
    found["text"] = folder_of(small(), tmp_path / "text")
    found["pairs of text"] = folder_of(Preference(train=begun("text")), tmp_path / "pairs_of_text")
    return found


def test_a_run_is_asked_what_it_learned_from(runs: dict[str, pathlib.Path]) -> None:
    tasks = {name: task_of(path) for name, path in runs.items()}
    assert tasks.pop("tuned") == tasks.pop("text") == "report"
    assert set(tasks.values()) == {"exercises"}
    for name in ("r1", "warm_start", "dpo", "tuned"):
        assert asked_config(runs[name], "").exercises.answer_mark == "= ", name
    assert asked_config(runs["best_of"], "").exercises.answer_mark == "#### "  # its own
    assert asked_config(runs["text"], str(runs["warm_start"])).exercises.answer_mark == "= "


def test_what_can_not_be_asked_is_told(runs: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    for folder, source, sentence in (
        (runs["reward"], "", "is a model of rewards, which writes no texts"),
        (runs["text"], "", "text knows no exercises; name a run that learned from some: --exercises RUN"),
        (runs["pairs of text"], "", "knows no exercises"),
        (runs["r1"], str(runs["text"]), "text knows no exercises"),
        (tmp_path / "none", "", "no run folder"),
        (runs["r1"], str(tmp_path / "none"), "no run folder"),
    ):
        with pytest.raises(UserError, match=sentence):
            asked_config(folder, source)


def test_a_run_without_documents_is_not_asked_for_them(runs: dict[str, pathlib.Path]) -> None:
    for name in ("text", "tuned"):
        refuse_without_documents(runs[name], "report")
    for name, what in (("r1", "exercises"), ("warm_start", "exercises"), ("best_of", "exercises"), ("dpo", "pairs")):
        with pytest.raises(
            UserError, match=rf"learned from {what}, so there are no held-out documents for --task needle"
        ):
            refuse_without_documents(runs[name], "needle")


def test_the_command_ends_with_2_and_one_sentence(
    runs: dict[str, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, words, sentence in (
        (runs["r1"], ["--task", "report"], "learned from exercises, so there are no held-out documents"),
        (runs["r1"], [], "has no checkpoint yet; train it first"),
        (runs["pairs of text"], [], "knows no exercises"),
        (runs["r1"], ["--output", "nowhere/found.json"], "--output is nowhere/found.json; there is no folder nowhere"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["eval", str(folder), *words])
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": ()}, "--k is ; it must be whole numbers from 1"),
        ({"k": (1, 4), "samples": 2}, "--samples is 2; for pass@4 it must be at least 4"),
        ({"limit": -1}, "--limit is -1; it must be at least 0"),
        ({"max_tokens": 0}, "--max-tokens is 0; it must be at least 1"),
        ({"seed": -1}, "--seed is -1; it must be at least 0"),
        ({"temperature": -1.0}, "--temperature is -1.0; it must be"),
    ],
)
def test_options_are_checked(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        HeldOutExercises(**options).validate()
    assert sentence in str(error.value)


def test_options_of_the_command_go_together() -> None:
    for request, sentence in (
        (Request(pathlib.Path("r"), "tasks", exercises="s"), "--exercises does not go with --task tasks, but"),
        (Request(pathlib.Path("r"), samples=0), "--samples is 0; it must be at least 1"),
        (Request(pathlib.Path("r"), length=8), "--length does not go with --task report or exercises, but with needle"),
        (Request(pathlib.Path("r"), length=-1), "--length is -1; it must be at least 0"),
        (Request(pathlib.Path("r"), "repair", limit=-1), "--limit is -1; it must be at least 0"),
        (Request(pathlib.Path("r"), "report", output=pathlib.Path("o")), "--output does not go with --task report"),
        (Request(pathlib.Path("r"), "needle", seed=0), "--seed does not go with --task needle, but with repair"),
        (Request(pathlib.Path("r"), "repair", max_tokens=9), "--max-tokens does not go with --task repair"),
        (Request(pathlib.Path("r"), exercises="s", problems="p"), "--problems does not go with --task exercises"),
        (Request(pathlib.Path("r"), grammar=True), "--grammar does not go with --task report or exercises"),
    ):
        with pytest.raises(UserError) as error:
            request.check()
        assert sentence in str(error.value)


@pytest.mark.parametrize("task", get_args(Task))
def test_options_that_are_not_given_go_with_every_task(task: Task) -> None:
    Request(pathlib.Path("r"), task, quiet=True).check()


def test_what_a_run_learned_from_says_which_options_go_with_it(tmp_path: pathlib.Path) -> None:
    request = Request(folder_of(small(), tmp_path / "text"), temperature=0.5)
    request.check()
    with pytest.raises(UserError, match="--temperature does not go with --task report, but with exercises"):
        evaluate(request)
