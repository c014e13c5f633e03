"""Runs that fine-tune for code: resumed bit for bit, on a mesh, beside frozen weights, and the best epoch kept."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest
from hf_folders import llama, random_tensors, write_folder
from small_runs import Child, changed, home, saved, saved_steps, small, state_hash, state_hash_or_none, training_records

import dsjax
from dsjax.cli import main
from dsjax.config import UserError, load_config, validate
from dsjax.convert.command import Request
from dsjax.convert.command import run as convert
from dsjax.data.corpus import Source
from dsjax.data.structure.errors import BROKEN, REPAIR, RepairConfig
from dsjax.nn.lora import LoraConfig
from dsjax.nn.structure import StructureConfig
from dsjax.rl.sandbox import Sandbox
from dsjax.runs import RunFolder
from dsjax.train import pretrain
from dsjax.train.candidates import RiskConfig
from dsjax.train.code_finetune import CodeFinetune, SelectConfig, run
from dsjax.train.curriculum import CourseConfig, Stage
from dsjax.train.selection import keep_best

SEQ_LEN, BATCH = 64, 8


@functools.cache
def material() -> pathlib.Path:
    """Functions of one line, marked as tasks are, in two sources; and problems to be solved."""
    folder = home() / "functions"
    for name, signs in {"first": "+-", "second": "*%"}.items():
        (folder / name).mkdir(parents=True)
        lines = []
        for number in range(48):
            sign, prompt = signs[number % 2], f"def f(x):\n    '''{number}'''\n"
            text = f"{prompt}    return x {sign} {number + 1}\n"
            lines.append({"text": text, "masked": [[0, len(prompt)]]})
        (folder / name / "functions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems = [
        {
            "entry_point": "f",
            "prompt": f"def f(x):\n    '''{n}'''\n",
            "solution": f"    return x + {n}\n",
            "tests": [[[1], 1 + n], [[n], 2 * n]],
        }
        for n in range(100, 112)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in problems))
    return folder


@functools.cache
def base() -> pathlib.Path:
    """A run to begin with, of one step."""
    sources = tuple(Source(str(material() / name), marked=True) for name in ("first", "second"))
    data = {"sources": sources, "special_tokens": (BROKEN, REPAIR), "seq_len": SEQ_LEN, "near_duplicate_threshold": 1.0}
    folder = home() / "code_base"
    assert pretrain.run(changed(small(), data=data, train={"steps": 1}), folder, quiet=True) == 0
    return folder


def tuning(start: pathlib.Path | None = None, **parts: dict[str, Any]) -> CodeFinetune:
    """Two epochs of a few steps with everything on."""
    start = start or base()
    plain = small()
    data = dataclasses.replace(
        plain.data,
        sources=tuple(Source(str(material() / name), marked=True) for name in ("first", "second")),
        special_tokens=(BROKEN, REPAIR),
        seq_len=SEQ_LEN,
        near_duplicate_threshold=1.0,
        repair=RepairConfig(share=0.2, per_document=1),
    )
    problems = str(material() / "problems.jsonl")
    config = CodeFinetune(
        model=plain.model,
        data=data,
        optim=plain.optim,
        train=dataclasses.replace(plain.train, steps=10**6, log_every=1, start_from=str(start)),
        checkpoint=dataclasses.replace(plain.checkpoint, every=1000, keep=2),
        course=CourseConfig(stages=(Stage(0), Stage(1, functions=2)), epochs=2),
        risk=RiskConfig(problems=problems, every=2, prompts=8, samples=2, max_tokens=8),
        select=SelectConfig(problems=problems, limit=4, max_tokens=8, workers=1),
    )
    return changed(config, **parts)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def control() -> pathlib.Path:
    """Both epochs, without interruption, on eight devices."""
    folder = home() / "code_control"
    assert run(tuning(), folder, quiet=True) == 0
    return folder


def epochs(folder: pathlib.Path) -> list[int]:
    """The steps that were evaluated."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r["step"] for r in records if "held_out_combined_score" in r]


def test_every_epoch_is_evaluated_and_saved(control: pathlib.Path) -> None:
    config = RunFolder(control).read_config()
    assert epochs(control) == saved_steps(control) == [config.train.steps // 2, config.train.steps]
    risky = [r["step"] for r in training_records(control) if "loss/risk" in r]
    assert risky == list(range(2, config.train.steps + 1, 2))
    assert all(0 <= r["risk/reward"] <= 1 for r in training_records(control) if "loss/risk" in r)
    # What sampled and what is trained agree, in float32, behind a cache and without one
    assert all(r["risk/log_prob_gap"] < 1e-4 for r in training_records(control) if "loss/risk" in r)


def test_the_best_epoch_is_a_run_of_its_own(control: pathlib.Path, tmp_path: pathlib.Path) -> None:
    best = json.loads((control / "best.json").read_text())
    scores = {r["step"]: r["held_out_combined_score"] for r in best["evaluated"]}
    assert list(scores) == epochs(control)
    assert scores[best["step"]] == best["held_out_combined_score"] == max(scores.values())
    assert saved_steps(control / "best") == [best["step"]]
    there, here = (saved(folder, best["step"])[0] for folder in (control, control / "best"))
    for name, x in here.items():
        np.testing.assert_array_equal(x, there[name])
    assert dsjax.load(control / "best").logits([[1, 2, 3]]).shape == (1, 3, 300)
    copy = tmp_path / "run"
    shutil.copytree(control, copy)
    shutil.rmtree(copy / "checkpoints")  # training removes what it has no room for
    records = [{"step": best["step"], "held_out_combined_score": 0.5}]
    keep_best(RunFolder(copy), records, say=pytest.fail)  # nothing to be done
    assert saved_steps(copy / "best") == [best["step"]]


def test_another_best_epoch_takes_the_place(control: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(control, folder)
    first, last = epochs(control)
    said: list[str] = []
    for scores in ((0.1, 0.9), (0.9, 0.1)):
        records = [{"step": step, "held_out_combined_score": x} for step, x in zip((first, last), scores, strict=True)]
        (folder / ".best-building").mkdir()  # left by a process that was killed
        keep_best(RunFolder(folder), records, say=said.append)
        chosen = last if scores[1] > scores[0] else first
        assert saved_steps(folder / "best") == [chosen]
        assert json.loads((folder / "best.json").read_text())["step"] == chosen
        assert not list(folder.glob(".best-*"))


def test_an_epoch_more_from_the_first_is_the_same(control: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(control, folder)
    shutil.rmtree(folder / "checkpoints" / str(epochs(control)[1]))  # as if killed while it was written
    assert run(tuning(), folder, quiet=True) == 0
    assert epochs(folder) == epochs(control)
    a, b = saved(folder), saved(control)
    for name, x in a[0].items():  # eight threads: sums are not bit for bit the same (the next test's are)
        np.testing.assert_allclose(x, b[0][name], rtol=1e-3, atol=1e-4)
    assert a[1]["data"] == b[1]["data"]


def config_file(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "tuning.py"
    path.write_text(
        '"""The config of the tests."""\n\nimport pathlib\n\nimport small_runs\nimport test_code_finetune_runs as t\n'
        f"\n\ndef get_config():\n    small_runs.home = lambda: pathlib.Path({str(home())!r})\n"
        f"    t.material = lambda: pathlib.Path({str(material())!r})\n"
        f"    return t.tuning(pathlib.Path({str(base())!r}))\n"
    )
    return path


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path: pathlib.Path) -> None:
    path = config_file(tmp_path)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    code, _, said = Child("train", str(path), "--run", str(straight), "checkpoint.every=3").end(timeout=300)
    assert code == 0, said
    last = saved_steps(straight)[-1]
    for _ in range(2):
        child = Child("train", str(path), "--run", str(killed), "checkpoint.every=3")
        child.wait_for("held_out_combined_score" if not killed.exists() else "JudgedBatch")
        child.send(signal.SIGKILL).end()
    assert state_hash_or_none(killed) != state_hash(straight)
    code, _, said = Child("train", str(path), "--run", str(killed), "checkpoint.every=3").end(timeout=300)
    assert code == 0, said
    assert "resumed" in said
    assert state_hash(killed, last) == state_hash(straight, last)
    assert (killed / "best.json").read_text().count('"step"') == 1 + len(epochs(straight))
    a, b = (json.loads((f / "best.json").read_text()) for f in (killed, straight))
    assert (a["step"], a["held_out_combined_score"]) == (b["step"], b["held_out_combined_score"])


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"risk": {"weight": 0.0}}, "loss/risk"),
        pytest.param({"data": {"repair": None}}, "", marks=pytest.mark.slow),
        pytest.param({"course": {"order": 0.0}}, "", marks=pytest.mark.slow),
    ],
)
def test_each_ingredient_has_a_switch(
    control: pathlib.Path, change: dict[str, Any], gone: str, tmp_path: pathlib.Path
) -> None:
    assert run(tuning(**change), tmp_path / "run", quiet=True) == 0
    ours, theirs = training_records(tmp_path / "run"), training_records(control)
    assert len(ours) == len(theirs)  # the same steps
    if gone:
        assert not any(gone in record for record in ours)
        assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)  # the same rows; another program
    assert ours[-1]["loss"] != theirs[-1]["loss"]


# ---------------------------------------------------------------- converted models


@functools.cache
def converted() -> pathlib.Path:
    """A Llama as a run, with the tokenizer of a small run that knows nothing of repairs."""
    data = {"seq_len": SEQ_LEN}
    assert pretrain.run(changed(small(), data=data, train={"steps": 1}), home() / "words", quiet=True) == 0
    config = llama(vocab_size=300, eos_token_id=0, num_hidden_layers=1)
    source = write_folder(home() / "llama", config, random_tensors(config))
    (source / "tokenizer.json").write_bytes((home() / "words" / "tokenizer.json").read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert convert(Request(source, home() / "llama_run", quiet=True)) == 0
    return home() / "llama_run"


def test_pairs_beside_a_converted_model_and_the_way_back(tmp_path: pathlib.Path) -> None:
    lora = dataclasses.asdict(LoraConfig(targets=("attention", "mlp"), rank=2))
    config = tuning(converted(), lora=lora, train={"steps": 4, "eval_every": 2})
    assert run(config, tmp_path / "run", quiet=True) == 0
    arrays = saved(tmp_path / "run")[0]
    assert all(name.endswith(("/a", "/b")) for name in arrays if name.startswith("params/"))
    records = training_records(tmp_path / "run")
    assert [r["step"] for r in records if "loss/risk" in r] == [2, 4]
    # Pairs that are added to the weights, and products beside those: float32 sums in another order
    assert all(r["risk/log_prob_gap"] < 1e-4 for r in records if "loss/risk" in r)
    assert convert(Request(tmp_path / "run" / "best", tmp_path / "exported", quiet=True)) == 0
    exported, loaded = dsjax.load(tmp_path / "exported"), dsjax.load(tmp_path / "run" / "best")
    np.testing.assert_array_equal(exported.logits([[1, 2, 3]]), loaded.logits([[1, 2, 3]]))


# ---------------------------------------------------------------- models with structure, tokens with layout


@pytest.mark.parametrize("layout", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_with_structure_is_told_the_same_where_it_writes_and_where_it_learns(
    layout: bool, tmp_path: pathlib.Path
) -> None:
    sources = tuple(Source(str(material() / name), marked=True) for name in ("first", "second"))
    structure = StructureConfig(pointers=("bracket", "name"))
    plain = small()
    plain = dataclasses.replace(plain, model=dataclasses.replace(plain.model, structure=structure))
    data = {"sources": sources, "special_tokens": (BROKEN, REPAIR), "seq_len": SEQ_LEN, "layout": layout}
    start = tmp_path / "start"
    assert pretrain.run(changed(plain, data=data, train={"steps": 8}), start, quiet=True) == 0
    tables = [x for name, x in saved(start)[0].items() if name.startswith("params/structure/")]
    assert max(np.abs(x).max() for x in tables) > 1e-2  # what is told counts
    config = tuning(start, train={"steps": 4, "eval_every": 4}, risk={"max_tokens": 12, "bleu": 1.0})
    assert run(config, tmp_path / "run", quiet=True) == 0
    gaps = [r["risk/log_prob_gap"] for r in training_records(tmp_path / "run") if "loss/risk" in r]
    assert len(gaps) == 2
    assert max(gaps) < 1e-4  # float32, behind a cache and without one


# ---------------------------------------------------------------- what users get wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"risk": {"prompts": 6}, "train": {"accumulate": 4}},
            r"risk\.prompts is 6; it must be a multiple of train\.acc",
        ),
        ({"risk": {"samples": 1}}, r"risk\.samples is 1; it must be an integer >= 2"),
        ({"course": {"epochs": 0}}, r"course\.epochs is 0"),
        ({"course": {"order": 1.5}}, r"course\.order is 1\.5"),
    ],
)
def test_wrong_values_are_told_before_anything_runs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(tuning(pathlib.Path("nowhere"), **change))


def test_what_can_not_be_is_told(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="no run folder"):
        run(tuning(tmp_path / "nothing"), folder, quiet=True)
    with pytest.raises(UserError, match=r"risk\.prompts / train\.accumulate is 4; it must divide over the 8 devices"):
        run(tuning(risk={"prompts": 4}), folder, quiet=True)
    with pytest.raises(UserError, match=r"course\.stages\.0\.source is 2"):
        run(tuning(course={"stages": (Stage(2),)}), folder, quiet=True)
    with pytest.raises(UserError, match=r"none\.jsonl can not be read"):
        run(tuning(select={"problems": str(tmp_path / "none.jsonl")}), folder, quiet=True)
    with pytest.raises(UserError, match=r"risk\.max_tokens is 60 and data\.seq_len 64: of 12 problems none"):
        run(tuning(risk={"max_tokens": 60}), folder, quiet=True)
    assert not folder.exists()
    with pytest.raises(SystemExit) as stopped:
        main(["train", "configs/code_finetune.py", "train.start_from=nowhere", "--run", str(folder), "--quiet"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("dsjax: no run folder nowhere")


def test_another_course_is_another_run(control: pathlib.Path) -> None:
    for change, key in (({"course": {"epochs": 3}}, "course.epochs"), ({"risk": {"weight": 0.5}}, "risk.weight")):
        with pytest.raises(UserError, match=f"was trained with {key}"):
            run(tuning(**change), control, quiet=True)
    with pytest.raises(UserError, match="the training data changed"):
        run(tuning(data={"batch_size": 16}), control, quiet=True)


def test_the_default_config_asks_for_what_the_recipe_says() -> None:
    config = load_config(pathlib.Path(__file__).parent.parent / "configs" / "code_finetune.py")
    validate(config)
    assert config.data.batch_size // config.train.accumulate == 8
    assert (config.train.accumulate, config.optim.lr, config.course.epochs) == (4, 2e-5, 3)
    assert config.data.repair is not None
    assert config.risk.weight > 0
    assert config.course.order > 0


def test_without_a_sandbox_nothing_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def refused(*args: object, **options: object) -> Sandbox:
        raise UserError("programs can not be isolated on this machine, so none is run")

    monkeypatch.setattr("dsjax.train.code_finetune.Sandbox", refused)
    with pytest.raises(UserError, match="can not be isolated"):
        run(tuning(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_devices() -> None:
    assert jax.device_count() == 8  # what the runs above are spread over
