"""Runs that learn the best of what they write: what is picked, what is kept, how they go on, what they refuse."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import shutil
import signal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from r1_runs import r1
from small_runs import Child, changed, home, state_hash, state_hash_or_none, training_records

from dsjax.checkpoint import CheckpointConfig
from dsjax.config import UserError, load_config, validate
from dsjax.data.prepare import DataConfig
from dsjax.evals.exercises import HeldOutExercises, evaluate_exercises
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.lora import LoraConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.rl.exercises.config import ExercisesConfig, FamilyConfig, families_of
from dsjax.rl.exercises.exercise import numbers_of
from dsjax.rl.exercises.letters import BRACKETS
from dsjax.rl.preference import best_and_worst, best_of, read_pairs
from dsjax.rl.rewards import RewardConfig
from dsjax.runs import RunFolder
from dsjax.sharding import MeshConfig
from dsjax.train.best_of import PAIRS, PICKED, SHARES, BestOf, PicksConfig, TextsConfig, check, evaluated, run
from dsjax.train.kept_texts import WRITTEN, Group, Journal
from dsjax.train.optimizer import OptimConfig
from dsjax.train.preference import LabelConfig, PairsConfig, Preference
from dsjax.train.preference import run as learn_pairs
from dsjax.train.pretrain import TrainConfig
from dsjax.train.pretrain import run as pretrain
from dsjax.train.r1 import byte_tokenizer, solutions, validated_on, warm_start_run

ROOT = pathlib.Path(__file__).parent.parent
EXERCISES = ExercisesConfig((FamilyConfig("brackets", (1,)),), answer_mark="")


@functools.cache
def base() -> pathlib.Path:
    """A model of 12,000 parameters that closes two brackets now and then."""
    folder, attention = home() / "best_of_base", AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=16)
    warm = dataclasses.replace(r1().warm_start, steps=100, batch_size=16, exercises=1500)
    config = dataclasses.replace(
        changed(r1(), train={"log_every": 50}, checkpoint={"every": 1000}),
        model=DecoderConfig(vocab_size=264, d_model=32, num_layers=1, groups=(LayerGroup(MLPConfig(64), attention),)),
        exercises=EXERCISES,
        warm_start=dataclasses.replace(warm, optim=OptimConfig(lr=1e-2, warmup_steps=10)),
    )
    regime = solutions(config, families_of(EXERCISES), byte_tokenizer())
    assert pretrain(warm_start_run(config), folder, quiet=True, regime=regime) == 0
    return folder


def best(**parts: Any) -> BestOf:
    """Four texts for each of some forty exercises, in three rounds; the right ones are learned in four epochs."""
    config = BestOf(
        data=DataConfig(seq_len=32, batch_size=8),
        exercises=EXERCISES,
        rollout=TextsConfig(exercises=40, prompts=16, samples=4, max_tokens=6),
        rewards=RewardConfig(length=0.1, length_to=6, workers=1),
        picks=PicksConfig(least=0.5, epochs=4, pairs=True),
        optim=OptimConfig(lr=1e-2, weight_decay=0.0, schedule="constant", warmup_steps=1),
        train=TrainConfig(steps=100, log_every=1, start_from=str(base())),
        checkpoint=CheckpointConfig(every=4, keep=20),
    )
    return changed(config, **parts)  # type: ignore[return-value]


@functools.cache
def straight() -> pathlib.Path:
    """A run without interruption, on eight devices."""
    folder = home() / "best_of"
    assert run(best(), folder, quiet=True) == 0
    return folder


def lines(path: pathlib.Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def groups(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [group for line in lines(folder / WRITTEN)[1:] for group in line]


def closed(prompt: str) -> str:
    """What closes the brackets of a prompt."""
    left = list[str]()
    for letter in prompt.removeprefix("close ").strip():
        if letter in BRACKETS:
            left.append(BRACKETS[letter])
        else:
            assert letter == left.pop()
    return "".join(reversed(left))


# ---------------------------------------------------------------- what is picked


def test_right_texts_are_picked_and_wrong_ones_are_not() -> None:
    picked, written, shares = (
        lines(straight() / PICKED),
        groups(straight()),
        json.loads((straight() / SHARES).read_text()),
    )
    assert 0 < len(picked) < len(written)  # or nothing here is shown
    for line in picked:
        assert line["text"] == closed(line["prompt"])
        assert (line["family"], line["level"]) == ("brackets", 1)
    found = [[x == 1 for x in group["correct"]] for group in written]
    assert [len(own) for own in found] == [4] * len(written)
    level = shares["by_level"]["brackets"]["1"]
    assert level["pass@1"]["value"] == pytest.approx(np.mean(found))
    assert level["solved"] == shares["solved"] == pytest.approx(np.mean([any(own) for own in found]))
    assert level["picked"] == shares["picked"] == len(picked) == sum(any(own) for own in found)
    assert level["exercises"] == shares["exercises"] == len(written) <= 40


def test_what_was_picked_is_learned() -> None:
    records, config = training_records(straight()), RunFolder(straight()).read_config()
    epoch = len(records) // 4
    assert 4 * epoch == records[-1]["step"] == config.train.steps
    assert np.mean([r["loss"] for r in records[-epoch:]]) < 0.8 * np.mean([r["loss"] for r in records[:epoch]])
    learned = sum(len(line["text"]) + 1 for line in lines(straight() / PICKED))  # bytes, and the end
    # Rows may be there twice, where the last batch of an epoch has no others; prompts are read, and not learned.
    assert learned <= sum(r["tokens"] for r in records[:epoch]) < 2 * learned


def test_the_best_and_the_worst_are_pairs() -> None:
    pairs = read_pairs(straight() / PAIRS)
    for pair in pairs:
        assert pair.chosen == closed(pair.prompt) != pair.rejected
    some = [any(x == 1 for x in g["correct"]) and any(x == 0 for x in g["correct"]) for g in groups(straight())]
    assert 0 < len(pairs) <= sum(some)  # some texts are wrong and have no end


@pytest.mark.slow
def test_its_own_pairs_are_learned_by_dpo(tmp_path: pathlib.Path) -> None:
    """The second of two commands, of configs/preference.py."""
    config = Preference(
        data=DataConfig(seq_len=80, batch_size=8, held_out_share=0.2),
        optim=OptimConfig(lr=3e-3, warmup_steps=1, schedule="constant"),
        train=TrainConfig(steps=8, log_every=1, start_from=str(base())),
        checkpoint=CheckpointConfig(every=100),
        pairs=PairsConfig(str(straight() / PAIRS), epochs=8),
        labels=LabelConfig(beta=0.5),
    )
    assert learn_pairs(config, tmp_path / "run", quiet=True) == 0
    records = training_records(tmp_path / "run")
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the weights that wrote them
    assert records[-1]["loss"] < 0.6


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([None, math.nan, -1.0, 0.0, 1.0]), st.integers(0, 3)), max_size=5),
        max_size=3,
    )
)
@settings(max_examples=100, deadline=None)
def test_a_pair_has_a_better_and_a_worse_text(texts: list[list[tuple[float | None, int]]]) -> None:
    rewards, lengths = ([[one[i] for one in own] for own in texts] for i in (0, 1))
    found = best_and_worst(rewards, lengths, least=0.0)  # type: ignore[arg-type]
    for own, pair, best_one in zip(rewards, found, best_of(rewards, lengths, least=0.0), strict=True):  # type: ignore[arg-type]
        known = [x for x in own if x is not None and not math.isnan(x)]
        if pair is None:
            assert not known or max(known) < 0 or min(known) == max(known)
        else:
            assert pair[0] == best_one
            assert (own[pair[0]], own[pair[1]]) == (max(known), min(known))


# ---------------------------------------------------------------- interruption


def test_what_was_written_is_not_written_again(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As if killed in the middle of the last round, before anything was learned; it goes on, on another mesh."""
    folder, num = tmp_path / "run", len(groups(straight()))
    folder.mkdir()
    shutil.copy(straight() / "config.json", folder)
    *whole, last = (straight() / WRITTEN).read_bytes().splitlines(keepends=True)
    (folder / WRITTEN).write_bytes(b"".join(whole) + last[:-20])
    config = dataclasses.replace(best(), mesh=MeshConfig(data=4, fsdp=2))
    assert run(config, folder) == 0
    said = capsys.readouterr().err
    assert f"4 texts for each of {num - 32} exercises" in said
    assert (folder / WRITTEN).read_bytes().startswith(b"".join(whole))
    for name in (PICKED, PAIRS):
        assert (folder / name).read_bytes() == (straight() / name).read_bytes()
    same(folder, straight())
    # Once more there is nothing to do, and what it began with is not looked at.
    assert run(changed(config, train={"start_from": str(tmp_path / "gone")}), folder) == 0  # type: ignore[arg-type]
    assert "writing" not in capsys.readouterr().err


def config_file(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "best.py"
    path.write_text(
        '"""Of the tests."""\n\nimport pathlib\n\nimport test_best_of as t\n\n\ndef get_config():\n'
        f"    t.base = lambda: pathlib.Path({str(base())!r})\n    return t.best()\n"
    )
    return path


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path: pathlib.Path) -> None:
    path = config_file(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, said = Child("train", str(path), "--run", str(whole)).end(timeout=300)
    assert code == 0, said
    for moment in ("writing 16/", "first step after"):
        child = Child("train", str(path), "--run", str(killed))
        child.wait_for(moment).send(signal.SIGKILL).end()
    assert state_hash_or_none(killed) != state_hash(whole)
    code, _, said = Child("train", str(path), "--run", str(killed)).end(timeout=300)
    assert code == 0, said
    assert "writing" not in said
    assert state_hash(killed) == state_hash(whole)
    for name in (WRITTEN, PICKED, PAIRS, SHARES):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    same(whole, straight())  # one device and eight


def same(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    """Two runs in what they wrote and learned, but for float32 sums in another order."""
    assert [g["texts"] for g in groups(ours)] == [g["texts"] for g in groups(theirs)]
    for a, b in zip(training_records(ours), training_records(theirs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_low_rank_pairs_learn_what_their_base_wrote(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(best(), lora=LoraConfig(targets=("attention", "mlp"), rank=2, alpha=4.0))
    assert run(config, tmp_path / "run", quiet=True) == 0
    assert [g["texts"] for g in groups(tmp_path / "run")] == [g["texts"] for g in groups(straight())]
    records = training_records(tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"]
    report = evaluate_exercises(tmp_path / "run", HeldOutExercises(samples=2, limit=8), quiet=True)
    assert report["by_level"]["brackets"]["1"]["exercises"] == 8
    assert json.loads((tmp_path / "run" / "exercises.json").read_text()) == report


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"train": {"start_from": ""}}, "train.start_from is empty; name there the run whose model is to write"),
        ({"rollout": {"max_tokens": 32}}, "rollout.max_tokens is 32; data.seq_len, 32, must leave room for a prompt"),
        ({"rollout": {"samples": 0}}, "rollout.samples is 0; it must be"),
        ({"picks": {"epochs": 0}}, "picks.epochs is 0; it must be"),
    ],
)
def test_what_can_not_be_is_said_in_a_sentence(parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        validate(best(**parts))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"rollout": {"max_tokens": 20}},
            r"there is a prompt of brackets 1 with 18 tokens, and rollout\.max_tokens is 20",
        ),
        ({"train": {"start_from": "nowhere"}}, "no run folder nowhere"),
    ],
)
def test_what_can_not_be_is_told_before_anything_is_written(
    parts: dict[str, Any], sentence: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(best(**parts), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_level_without_exercises_to_validate_on_is_no_obstacle(tmp_path: pathlib.Path) -> None:
    """Neither for solutions nor for the best texts."""
    path = tmp_path / "few.jsonl"
    numbers = [1] * 99 + list(range(2, 10))  # of levels
    questions = [{"question": f"{n}?", "answer": "1", "level": level} for n, level in enumerate(numbers)]
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    families = families_of(ExercisesConfig(families=(), files=(str(path),)))
    levels = {name: tuple(n for n in f.levels if numbers_of(f, n, "training")) for name, f in families.items()}
    families = {name: dataclasses.replace(f, levels=levels[name]) for name, f in families.items()}  # type: ignore[type-var]
    solutions(r1(), families, byte_tokenizer())
    assert validated_on(r1(), families) == []
    assert evaluated(BestOf(), families) == []
    assert {e.level for e in evaluated(BestOf(train=TrainConfig(eval_every=1)), families)} == {1}
    with pytest.raises(UserError, match=r"report\.validation is 4; file/few has 3 different exercises of level 1"):
        validated_on(r1(train={"eval_every": 1}), families)


def test_texts_of_another_config_are_not_learned(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", WRITTEN):
        shutil.copy(straight() / name, folder)
    kept = (folder / WRITTEN).read_bytes()
    for parts, sentence in (
        ({"rollout": {"samples": 2}}, r"written\.jsonl was written with rollout\.samples=4, now it is 2; give another"),
        ({"data": {"seed": 1}}, r"was written with data\.seed=0, now it is 1"),
        ({"train": {"start_from": str(straight())}}, "was written by another checkpoint than train.start_from has now"),
        ({"picks": {"least": 1.5}}, r"picks\.least is 1\.5; none of the texts that came to an end has such a reward"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(best(**parts), folder, quiet=True)  # type: ignore[arg-type]
        assert (folder / WRITTEN).read_bytes() == kept


def test_a_changed_run_is_not_gone_on_with(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight(), folder)
    picked = (folder / PICKED).read_bytes()
    with pytest.raises(UserError, match=r"was trained with optim\.lr=0\.01, now it is 0\.1"):
        run(best(optim={"lr": 0.1}), folder, quiet=True)
    assert (folder / PICKED).read_bytes() == picked


def test_a_damaged_line_is_told(tmp_path: pathlib.Path) -> None:
    path, facts = tmp_path / WRITTEN, {"rollout.samples": 1}
    journal = Journal(path, facts)
    journal.written_by("a")
    group = Group(("x",), (2,), (True,), (1.0,), (None,))
    journal.add([group])
    journal.add([group, group])
    assert Journal(path, facts).groups == [group] * 3
    assert group.counted == (1.0,)
    assert dataclasses.replace(group, whole=(False,)).counted == (None,)
    content = path.read_text()
    for number, damaged in (
        (2, content.replace('"texts"', '"text"', 1)),
        (3, content[: content.rindex("[{")] + "[1]\n"),
        (1, "{}\n" + content),
    ):
        path.write_text(damaged)
        with pytest.raises(UserError, match=rf"written\.jsonl, line {number} is damaged; remove the file"):
            Journal(path, facts)


def test_the_config_of_the_laptop_is_one() -> None:
    config = load_config(ROOT / "configs" / "best_of.py")
    validate(config)
    check(config)
    assert families_of(config.exercises).keys() == {"reverse", "sort", "countdown"}
