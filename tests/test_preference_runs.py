"""Runs that learn from pairs: what they reach, what they keep, how they go on, and what they refuse."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import random
import shutil
import signal
from typing import Any

import numpy as np
import pytest
from small_runs import ROOT, Child, changed, home, saved, saved_steps, small, state_hash, training_records
from test_rewards import WORD, Given, Written

import dsjax
from dsjax.cli import main
from dsjax.config import UserError, load_config, validate
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.lora import LoraConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.rl.rewards import RewardConfig, Rewards
from dsjax.runs import RunFolder
from dsjax.train.optimizer import OptimConfig
from dsjax.train.preference import REFERENCE, LabelConfig, PairsConfig, Preference, run
from dsjax.train.pretrain import TrainConfig
from dsjax.train.pretrain import run as pretrain

MODEL = DecoderConfig(
    vocab_size=300,
    d_model=16,
    num_layers=1,
    groups=(LayerGroup(MLPConfig(d_ff=32), AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8)),),
)


@functools.cache
def base() -> pathlib.Path:
    """A run to begin with."""
    folder = home() / "preference_base"
    config = dataclasses.replace(changed(small(), train={"steps": 2}), model=MODEL)
    assert pretrain(config, folder, quiet=True) == 0
    return folder


@functools.cache
def pairs(num: int = 64, seed: int = 0) -> pathlib.Path:
    """Of two words, the one with an a in it is preferred."""
    words, path = random.Random(seed), home() / f"pairs_{num}_{seed}.jsonl"
    lines = []
    for _ in range(num):
        draw = lambda letters: "".join(words.choices(letters, k=4))  # noqa: E731
        chosen, rejected = [*draw("bcdefgh")], draw("bcdefgh")
        chosen[words.randrange(4)] = "a"
        lines.append({"prompt": draw("abcdefgh") + " ", "chosen": "".join(chosen), "rejected": rejected})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def learning(method: Any = "dpo", *, steps: int = 1000, epochs: int = 6, **parts: Any) -> Preference:
    plain = small()
    config = Preference(
        data=dataclasses.replace(plain.data, seq_len=40, batch_size=8, held_out_share=0.2),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, schedule="constant"),
        train=TrainConfig(steps=steps, log_every=1, eval_every=4, start_from=str(base())),
        checkpoint=dataclasses.replace(plain.checkpoint, every=4, keep=20),
        method=method,
        pairs=PairsConfig(str(pairs()), epochs=epochs),
        labels=LabelConfig(beta=0.5),
    )
    return changed(config, **parts)  # type: ignore[return-value]


def evaluated(folder: pathlib.Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if "held_out_accuracy" in r]


@pytest.fixture(scope="module")
def policy() -> pathlib.Path:
    """DPO, without interruption, on eight devices."""
    folder = home() / "dpo"
    assert run(learning(), folder, quiet=True) == 0
    return folder


def test_dpo_begins_at_its_reference_and_prefers_what_was_chosen(policy: pathlib.Path) -> None:
    records, held_out = training_records(policy), evaluated(policy)
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the same weights, by another program
    assert records[0]["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["loss"] < 0.3
    assert held_out[-1]["held_out_accuracy"] > 0.8
    assert held_out[-1]["held_out_margin"] > 1
    assert held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]
    steps = RunFolder(policy).read_config().train.steps
    kept = json.loads((policy / REFERENCE).read_text())["log_probs"]
    assert sum(map(len, kept)) == 64
    assert steps == -(-len(kept[0]) * 6 // 8) == saved_steps(policy)[-1]
    assert dsjax.load(policy).logits([[1, 2, 3]]).shape == (1, 3, 300)  # a run like any other


def test_the_reference_is_what_the_base_says(policy: pathlib.Path) -> None:
    model, config = dsjax.load(base()), RunFolder(policy).read_config()
    (first, *_), _ = json.loads((policy / REFERENCE).read_text())["log_probs"]
    lines = [json.loads(line) for line in pathlib.Path(config.pairs.path).read_text().splitlines()]
    said = []
    for line in lines:
        prompt, text = (model.tokenizer.encode(line[key]).tolist() for key in ("prompt", "chosen"))
        logits = np.asarray(model.logits([[0, *prompt, *text]]), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = [*prompt, *text, 0]
        said.append(sum(log_p[at, targets[at]] for at in range(len(prompt), len(targets))))
    assert min(abs(first[0] - x) for x in said) < 1e-4  # float32 through a layer, sums of five


def test_a_run_that_goes_on_ends_where_the_other_does(policy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder, last = tmp_path / "run", saved_steps(policy)[-1]
    shutil.copytree(policy, folder)
    shutil.rmtree(folder / "checkpoints" / str(last))  # as if killed while it was written
    kept = (folder / REFERENCE).read_bytes()
    assert run(changed(learning(), train={"start_from": str(tmp_path / "gone")}), folder, quiet=True) == 0
    assert (folder / REFERENCE).read_bytes() == kept
    a, b = saved(folder), saved(policy)
    for name, x in a[0].items():  # eight threads: sums are not bit for bit the same
        np.testing.assert_allclose(x, b[0][name], rtol=1e-3, atol=1e-4)
    assert a[1]["data"] == b[1]["data"]


def test_what_decides_the_loss_may_not_change_on_the_way(policy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(policy, folder)
    with pytest.raises(UserError, match=r"was trained with labels\.beta=0\.5, now it is 0\.1"):
        run(learning(labels={"beta": 0.1}), folder, quiet=True)
    with pytest.raises(UserError, match="was trained with method=dpo, now it is reward"):
        run(dataclasses.replace(learning(), method="reward"), folder, quiet=True)
    with pytest.raises(UserError, match="the training data changed"):
        run(learning(pairs={"path": str(pairs(seed=1))}), folder, quiet=True)


def test_a_damaged_reference_is_made_again(policy: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder, last = tmp_path / "run", saved_steps(policy)[-1]
    shutil.copytree(policy, folder)
    shutil.rmtree(folder / "checkpoints" / str(last))
    kept = json.loads((folder / REFERENCE).read_text())
    (folder / REFERENCE).write_text((folder / REFERENCE).read_text()[:100])
    assert run(learning(), folder, quiet=True) == 0
    again = json.loads((folder / REFERENCE).read_text())
    for x, y in zip(again["log_probs"], kept["log_probs"], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)  # eight threads


@functools.cache
def model_of_rewards() -> pathlib.Path:
    """A run that gives texts with an a in them more."""
    folder = home() / "model_of_rewards"
    assert run(learning("reward", pairs={"held_out": str(pairs(seed=1))}), folder, quiet=True) == 0
    return folder


def test_a_model_of_rewards_learns_what_is_preferred() -> None:
    folder = model_of_rewards()
    records, held_out = training_records(folder), evaluated(folder)
    assert records[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)  # its head begins with 0
    assert held_out[-1]["held_out_accuracy"] > 0.9
    assert held_out[-1]["held_out_chosen"] > held_out[-1]["held_out_rejected"]
    assert not (folder / REFERENCE).exists()
    assert "params/w_values" in saved(folder)[0]


def test_a_model_of_rewards_gives_texts_what_it_gave_them_in_training() -> None:
    model = dsjax.load(model_of_rewards())
    given = [json.loads(line) for line in pairs(seed=1).read_text().splitlines()]
    prompts, chosen = [line["prompt"] for line in given], [line["chosen"] for line in given]
    chosen_N, rejected_N = model.rewards(prompts, chosen), model.rewards(prompts, [line["rejected"] for line in given])
    # The same texts, where they were the second of a row and in other batches.
    told = evaluated(model_of_rewards())[-1]
    assert np.mean(chosen_N) == pytest.approx(told["held_out_chosen"], rel=1e-3)
    assert np.mean(chosen_N - rejected_N) == pytest.approx(told["held_out_margin"], rel=1e-3)
    np.testing.assert_allclose(model.rewards(prompts[:3], chosen[:3], batch_size=2), chosen_N[:3], rtol=1e-4)
    assert model.rewards([], []).shape == (0,)
    with pytest.raises(UserError, match="there are 1 prompts and 0 texts; each text has its own prompt"):
        model.rewards(["b"], [])
    with pytest.raises(UserError, match="batch_size is 0; it must be a whole number from 1"):
        model.rewards([], [], batch_size=0)
    with pytest.raises(UserError, match="a text has 102 tokens with its prompt; the model is meant for 40 positions"):
        model.rewards(["b"], ["\u00e9" * 49 + "a"])
    with pytest.raises(UserError, match="the model gives no rewards: it has no head for them"):
        dsjax.load(base()).rewards([], [])


def test_what_a_model_of_rewards_gives_is_a_part_of_rewards() -> None:
    exercise, cfg = WORD, RewardConfig(correct=0.0, learned=0.5, model=str(model_of_rewards()))
    texts = ("abcd", "bcde", "\ud800", "\u00e9" * 99)
    with Rewards(cfg, {exercise.family: Given(exercise)}) as rewards:
        found = rewards([exercise] * len(texts), [Written(text) for text in texts])
    by_hand = dsjax.load(model_of_rewards()).rewards([exercise.prompt] * 2, texts[:2])
    np.testing.assert_allclose(found.parts["learned"][:2], by_hand, rtol=1e-4)
    assert found.total_N[0] > found.total_N[1]
    np.testing.assert_array_equal(found.total_N, 0.5 * found.parts["learned"])
    assert found.known_N.tolist() == [True, True, True, False]
    assert set(found.reasons) == {"no answer"}
    with pytest.raises(UserError, match=r"rewards\.model is .*, which gives no rewards; name there a run of"):
        Rewards(dataclasses.replace(cfg, model=str(base())), {})


def test_low_rank_pairs_learn_from_pairs(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(learning(epochs=1), lora=LoraConfig(targets=("attention", "mlp"), rank=2, alpha=4.0))
    assert run(config, tmp_path / "run", quiet=True) == 0
    records = training_records(tmp_path / "run")
    assert records[0]["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert records[-1]["loss"] < records[0]["loss"]


def config_file(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "learning.py"
    path.write_text(
        '"""The config of the tests."""\n\nimport pathlib\n\nimport small_runs\nimport test_preference_runs as t\n'
        f"\n\ndef get_config():\n    small_runs.home = lambda: pathlib.Path({str(home())!r})\n"
        f"    t.pairs = lambda: pathlib.Path({str(pairs())!r})\n"
        f"    t.base = lambda: pathlib.Path({str(base())!r})\n    return t.learning(epochs=2)\n"
    )
    return path


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path: pathlib.Path) -> None:
    path = config_file(tmp_path)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    code, _, said = Child("train", str(path), "--run", str(straight), "checkpoint.every=3").end(timeout=300)
    assert code == 0, said
    for moment in ("reference:", "first step", "held_out_accuracy"):
        child = Child("train", str(path), "--run", str(killed), "checkpoint.every=3")
        child.wait_for(moment)
        child.send(signal.SIGKILL).end()
    code, _, said = Child("train", str(path), "--run", str(killed), "checkpoint.every=3").end(timeout=300)
    assert code == 0, said
    assert "reference:" not in said  # it was kept
    assert state_hash(killed) == state_hash(straight)
    assert (killed / REFERENCE).read_bytes() == (straight / REFERENCE).read_bytes()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"pairs": {"path": "none.jsonl"}}, r"none\.jsonl can not be read: No such file"),
        ({"data": {"seq_len": 8}}, r"data\.seq_len is 8; of \d+ pairs to learn from none fits into a row"),
        ({"train": {"start_from": "nowhere"}}, "no run folder nowhere"),
    ],
)
def test_what_can_not_be_is_told_before_anything_is_written(parts: Any, sentence: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=sentence):
        run(learning(**parts), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_bad_keys_are_told() -> None:
    for parts, sentence in (
        ({"train": {"start_from": ""}}, r"train\.start_from is empty; name there the run whose model is to learn"),
        ({"labels": {"label_smoothing": 0.5}}, r"labels\.label_smoothing is 0\.5; it must be"),
        ({"labels": {"beta": 0.0}}, r"labels\.beta is 0\.0; it must be"),
    ):
        with pytest.raises(UserError, match=sentence):
            validate(learning(**parts))


def test_pairs_that_do_not_fit_are_counted(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    long = {"prompt": "x " * 40, "chosen": "a", "rejected": "b"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(pairs().read_text() + json.dumps(long) + "\n")
    assert run(learning(steps=1, pairs={"path": str(path)}), tmp_path / "run") == 0
    assert "1 of" in (said := capsys.readouterr().err)
    assert "do not fit into data.seq_len: left out" in said


def test_the_command_ends_with_2_and_one_sentence(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, sentence in (
        (["method=dqo"], "method is 'dqo'; it must be one of dpo, reward; did you mean dpo?"),
        (["train.start_from=nowhere"], "no run folder nowhere"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["train", str(ROOT / "configs" / "preference.py"), *arguments, "--run", str(tmp_path / "run")])
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_config_loads() -> None:
    validate(load_config(ROOT / "configs" / "preference.py"))
