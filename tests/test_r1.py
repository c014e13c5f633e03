"""Runs of R1 of seconds: they report, go on bit for bit, and are on eight devices what they are on one."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
import signal
from typing import Any

import numpy as np
import pytest
from r1_runs import VARIANTS, config_file, r1
from small_runs import Child, home, saved, state_hash, state_hash_or_none, training_records

from dsjax.config import UserError, load_config, validate
from dsjax.nn.structure import StructureConfig
from dsjax.rl.arms import Arm
from dsjax.rl.curriculum import Choice
from dsjax.rl.exercises.config import ExercisesConfig, families_of
from dsjax.rl.rewards import Rewards, Verdict
from dsjax.sharding import MeshConfig
from dsjax.train.course import Course
from dsjax.train.practice import with_room
from dsjax.train.r1 import byte_tokenizer, check, run, summary
from dsjax.train.r1_report import named_levels, plot_solved, report_of
from dsjax.train.writing import check_course, leaves_room

ROOT = pathlib.Path(__file__).parent.parent


@functools.cache
def straight(variant: str) -> pathlib.Path:
    """A run without interruption, on eight devices."""
    folder = home() / f"r1_{variant}"
    assert run(r1(variant), folder, quiet=True) == 0
    return folder


def iterations(folder: pathlib.Path) -> list[dict[str, Any]]:
    return training_records(folder)


# ---------------------------------------------------------------- what a run leaves


def test_a_run_is_three_and_a_report(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = r1(report={"control": True}, train={"eval_every": 2})
    assert run(config, tmp_path / "run") == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["levels_named"] == {"reverse": 1}
    assert report["families"]["reverse"].keys() == {"before", "after", "sft_control"}
    assert all(0 <= share <= 1 for share in report["families"]["reverse"].values())
    assert report["by_level"]["reverse"]["2"]["after"]["exercises"] == 8
    for picture in ("solved.png", "course.png", "loss.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 5000
    # The control learns about as many tokens as RL did: whole steps, whose tokens are counted by their mean.
    learned = {name: spent["tokens_learned"] for name, spent in report["spent"].items()}
    of_step = learned["before"] / config.warm_start.steps
    assert abs(learned["sft_control"] - learned["after"]) <= 2 * of_step
    assert [r["step"] for r in records(tmp_path / "run") if "validation" in r] == [2]
    said = capsys.readouterr().err
    for text in ("warm start: 8 steps", "reward ", "control: ", "reverse 1: before ", "report.json"):
        assert text in said
    # Once more there is nothing to train, and the same report.
    assert run(config, tmp_path / "run", quiet=True) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["families"] == report["families"]


@pytest.mark.slow
def test_a_model_that_is_told_the_structure_of_text_comes_to_its_report(tmp_path: pathlib.Path) -> None:
    config = r1(warm_start={"steps": 1}, train={"steps": 1}, report={"control": True, "prompts": 2})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, structure=StructureConfig()))
    assert run(config, tmp_path / "run", quiet=True) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["families"]["reverse"].keys() == {"before", "after", "sft_control"}
    assert iterations(tmp_path / "run")[0]["rl/log_prob_gap"] < 1e-5  # it is told the same where it writes and learns


@pytest.mark.filterwarnings("ignore:Attempting to set identical low and high ylims")  # the loss is 0 all along
def test_it_goes_on_where_nothing_is_known(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if all that judges were down."""
    config = r1(warm_start={"steps": 0}, train={"start_from": str(straight("grpo") / "warm_start")})
    gone = Verdict(None, "infrastructure: a judge was ended by SIGKILL")
    monkeypatch.setattr(Rewards, "verdicts", lambda self, exercises, answers: [gone] * len(exercises))
    assert run(config, tmp_path / "run", reports=False) == 0
    assert [(r["rl/unknown"], r["tokens"]) for r in iterations(tmp_path / "run")] == [(1, 0)] * 3
    said = capsys.readouterr().err
    assert "reward unknown  correct unknown  KL to the writer unknown  length " in said
    assert "warning: 14% of the rewards are unknown, the limit is 10%: what judges the texts fails" in said


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rl/kl": 0.25, "rl/kl_old": 0.5}, "reward 1.000  correct 50%  KL 0.250  length 3.0  phase 1"),
        ({"rl/kl_old": 0.5}, "reward 1.000  correct 50%  KL to the writer 0.500  length 3.0  phase 1"),
        ({"rl/kl": math.nan}, "reward 1.000  correct 50%  KL unknown  length 3.0  phase 1"),
    ],
)
def test_an_iteration_in_some_words(values: dict[str, float], sentence: str) -> None:
    assert summary({"rl/reward": 1.0, "rl/correct": 0.5, "rl/length": 3.0, "curriculum/phase": 1} | values) == sentence


def test_a_report_of_levels_that_nothing_is_known_of_is_written_all_the_same(tmp_path: pathlib.Path) -> None:
    known = {"pass@1": {"value": 0.5, "low": 0.4, "high": 0.6}, "greedy": 0.5, "exercises": 8}
    tables: Any = {
        "before": {"reverse": {1: known, 2: {"exercises": 8}}},
        "after": {"reverse": {1: {"exercises": 8}, 2: known}},
        "sft_control": {"reverse": {1: {"exercises": 8}, 2: {"exercises": 8}}},
    }
    found = json.loads(json.dumps(report_of(r1(), {"reverse": 1}, tables), allow_nan=False))
    assert found["families"]["reverse"] == {"before": 0.5, "after": None, "sft_control": None}
    assert found["mean"] == {"before": 0.5, "after": 0.5, "sft_control": None}
    plot_solved(found, tmp_path / "solved.png")
    assert (tmp_path / "solved.png").stat().st_size > 5000


def records(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_and_trainer_agree(variant: str) -> None:
    found = iterations(straight(variant))
    assert [r["step"] for r in found] == [1, 2, 3]
    for r in found:
        # float32, behind a cache and without one; of an update before which the weights are those that wrote
        assert r["rl/log_prob_gap"] < (1e-5 if variant != "ahead" or r["step"] == 1 else 0.1)
        assert r["rl/unknown"] == 0
        assert r["tokens"] > 0  # some groups teach, or nothing here is shown
        assert np.isfinite(r["loss"])
        assert {"rl/seconds_rollout", "rl/seconds_reward", "rl/entropy", "rl/length"} <= r.keys()
    if variant == "experts":
        assert [r["rl/router_agreement"] for r in found] == [1.0] * 3
        assert "loss/balance" in found[0]
    if variant == "ppo":
        assert found[0]["rl/kl"] == pytest.approx(0, abs=1e-6)  # the reference is what RL begins with
        assert found[-1]["rl/kl"] > 1e-6
        assert found[-1]["rl/kl_coef"] < r1("ppo").policy.kl_coef  # far below its target
        assert {"loss/value", "rl/explained_variance"} <= found[0].keys()
    if variant == "pairs":
        assert found[0]["rl/kl"] == pytest.approx(0, abs=1e-6)  # products of new pairs are 0
        assert found[-1]["rl/kl"] > 1e-6
        assert all(name.endswith(("/a", "/b")) for name in saved(straight(variant))[0] if name.startswith("params/"))
    if variant == "ahead":
        assert found[0]["policy/correction"] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_what_pays_is_learned(tmp_path: pathlib.Path) -> None:
    """Texts get shorter where nothing but shortness pays."""
    config = r1(train={"steps": 12}, optim={"lr": 2e-2}, checkpoint={"every": 100}, rollout={"prompts": 16})
    assert run(config, tmp_path / "run", quiet=True) == 0
    lengths = [r["rl/length"] for r in iterations(tmp_path / "run")]
    assert np.mean(lengths[-3:]) < np.mean(lengths[:3]) - 1


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("variant", [v if v == "grpo" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_killed_it_ends_as_if_it_had_not_been(variant: str, tmp_path: pathlib.Path) -> None:
    path = config_file(tmp_path, variant)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, said = Child("train", str(path), "--run", str(whole)).end(timeout=300)
    assert code == 0, said
    child = Child("train", str(path), "--run", str(killed))
    child.wait_for("reinforcement learning").wait_for("first step after").send(signal.SIGKILL).end()
    assert state_hash_or_none(killed) != state_hash(whole)
    code, _, said = Child("train", str(path), "--run", str(killed)).end(timeout=300)
    assert code == 0, said
    assert state_hash(killed, 3) == state_hash(whole, 3)
    same(iterations(whole), iterations(straight(variant)))  # one device and eight


def same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Two runs in what they told, but for float32 sums in another order."""
    for a, b in zip(ours, theirs, strict=True):
        for name in ("rl/reward", "rl/length", "rl/entropy", "loss", "grad_norm"):
            # a token whose probabilities lie that close would be another one
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    "variant", [v if v in ("ppo", "ahead") else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_it_goes_on_from_any_iteration(variant: str, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight(variant), folder)
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / str(step))  # as if killed behind the first iteration
    assert run(r1(variant), folder, quiet=True) == 0
    a, b = saved(folder), saved(straight(variant))
    assert a[1]["data"]["curriculum"] == b[1]["data"]["curriculum"]
    for name, x in a[0].items():  # eight threads: sums are not bit for bit the same (those of the test before are)
        np.testing.assert_allclose(x, b[0][name], rtol=1e-3, atol=1e-4, err_msg=name)


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [
        ("written on another", {"data": 2, "fsdp": 4}),  # two heads can not be cut over four devices, to write
        pytest.param("ppo", {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("experts", {"data": 2, "expert": 4}, marks=pytest.mark.slow),
    ],
)
def test_other_meshes_give_the_same(variant: str, mesh: dict[str, int], tmp_path: pathlib.Path) -> None:
    parts: dict[str, Any] = {}
    if variant == "written on another":
        variant, parts = "grpo", {"rollout": {"mesh": MeshConfig(data=4, tensor=2)}}
        with pytest.raises(UserError, match="can not share"):
            run(r1(variant, mesh=mesh), tmp_path / "no", quiet=True)
    assert run(r1(variant, mesh=mesh, **parts), tmp_path / "run", quiet=True) == 0
    same(iterations(tmp_path / "run"), iterations(straight(variant)))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"rollout": {"max_tokens": 32}}, "rollout.max_tokens is 32; data.seq_len, 32, must leave room for a prompt"),
        ({"update": {"minibatches": 3}}, "rollout.prompts * rollout.samples is 32; update.minibatches"),
        (
            {"algorithm": {"name": "ppo"}},
            "algorithm.name is ppo, whose advantages take a critic",
        ),
        ({"update": {"kl_target": 0.1}}, "update.kl_target is 0.1, but algorithm.kl_coef is 0"),
        ({"warm_start": {"steps": 0}}, "warm_start.steps is 0 and train.start_from is empty"),
        ({"rollout": {"one_step_off": True}}, "more_rounds is 1; with one_step_off it must be 0"),
        ({"rollout": {"temperature": 0.5}}, "temperature is 0.5; with another than 1 rescore must be true"),
        ({"rollout": {"samples": 1}}, "rollout.samples is 1; dapo compares the texts of an exercise"),
        (
            {"rollout": {"temperature": 0.5, "rescore": True, "correction_limit": 2.0}},
            "temperature is 0.5; with another than 1 correction_limit must be 0",
        ),
        ({"rollout": {"overlong": 7}}, "overlong is 7; it must be at most max_tokens, 6"),
    ],
)
def test_what_can_not_be_is_said_in_a_sentence(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        validate(r1(**overrides))
    assert sentence in str(error.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tests_runs_could_be_a_users(variant: str) -> None:
    validate(r1(variant))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"data": {"seq_len": 9}}, r"data\.seq_len is 9; there is a prompt of reverse 1 with \d+ tokens"),
        pytest.param(
            {"report": {"prompts": 2500}},
            r"report\.prompts is 2500; reverse has \d+ different exercises of level 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"report": {"validation": 2500}, "train": {"eval_every": 1}},
            r"report\.validation is 2500; reverse has \d+ different exercises of level 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_can_be_known_is_told_before_anything_is_learned(
    overrides: dict[str, Any], sentence: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(r1(**overrides), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_too_long_are_passed_over(tmp_path: pathlib.Path) -> None:
    lines = [{"question": f"{'a' * (n % 40)} {n}", "answer": f"#### {n}"} for n in range(64)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (family,) = families_of(ExercisesConfig(families=(), files=(str(path),))).values()
    tokenizer, cfg, said = byte_tokenizer(), r1().rollout, list[str]()
    check_course([family], tokenizer, cfg, 32, said.append)
    assert re.fullmatch(r"\d+ of \d+ prompts of file/sums 1 leave no room for a text: left out", said[0])
    with pytest.raises(UserError, match=r"data\.seq_len is 8; with a rollout\.max_tokens of 6 it has no room for any"):
        check_course([family], tokenizer, cfg, 8, said.append)
    course, arm = Course(r1(), {family.name: family}, "f" * 64), Arm(family.name, 1)
    for number in range(64):
        chosen = Choice(arm, number, 0)
        taken = with_room(chosen, course, tokenizer, r1())
        assert leaves_room(course.exercise(taken), tokenizer, cfg, 32)
        if leaves_room(course.exercise(chosen), tokenizer, cfg, 32):
            assert taken.number == number


def test_a_changed_run_is_not_gone_on_with(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight("grpo"), folder)
    with pytest.raises(UserError, match=r"was trained with rollout.samples=4, now it is 2"):
        run(r1(rollout={"samples": 2}), folder, quiet=True)


def test_the_config_of_the_laptop_is_one() -> None:
    config = load_config(ROOT / "configs" / "r1_cpu.py")
    validate(config)
    assert config.model.num_params() < 2e6
    assert set(named_levels(config, families_of(config.exercises))) == {"reverse", "sort", "countdown"}
    check(config)


def test_a_level_that_there_is_not_can_not_be_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"report\.named\.0 is reverse 9; the run has reverse 1/2"):
        run(r1(report={"named": (Arm("reverse", 9),)}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
