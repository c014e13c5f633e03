"""Steps that do not verify: named, set aside, never deleted; the one before is taken."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import pytest
from small_runs import changed, home, saved_steps, small, state_hash
from test_checkpoint import HOST, on_device, shapes_of, state_like

from dsjax.checkpoint import Checkpoints
from dsjax.cli import run as dsjax
from dsjax.config import UserError
from dsjax.train import pretrain


def written(folder: pathlib.Path, *steps: int, keep: int = 2, about: dict[str, Any] | None = None) -> pathlib.Path:
    checkpoints = Checkpoints(folder, keep=keep, about=about)
    for step in steps:
        checkpoints.save(step, on_device(state_like(scale=step)), HOST)
    checkpoints.close()
    return folder


def names(folder: pathlib.Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def hurt(folder: pathlib.Path, step: int) -> bytes:
    """Flips a bit of a step; the whole damaged file."""
    path = next((folder / str(step) / "state" / "d").iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return bytes(content)


def test_a_damaged_step_is_named_and_set_aside_as_it_is(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = written(tmp_path / "checkpoints", 10, 20)
    content = hurt(folder, 20)
    checkpoints = Checkpoints(folder)
    found, _, step = checkpoints.restore(shapes_of(on_device(state_like())))
    checkpoints.close()
    assert step == 10
    assert float(found["params"]["w"][1, 2]) == 50.0
    assert names(folder) == {"10", "damaged-20"}
    assert content in [p.read_bytes() for p in (folder / "damaged-20" / "state" / "d").iterdir()]
    (said,) = [r.getMessage() for r in caplog.records]
    assert f"checkpoint 20 in {folder} is damaged: state/d/" in said
    assert said.endswith("it is set aside as damaged-20")


def test_what_is_set_aside_again_gets_another_name(tmp_path: pathlib.Path) -> None:
    folder = written(tmp_path / "checkpoints", 10, 20)
    for again in ("damaged-20", "damaged-20-1", "damaged-20-2"):
        hurt(folder, 20)
        checkpoints = Checkpoints(folder)
        assert checkpoints.latest() == 10
        checkpoints.close()
        assert again in names(folder)
        written(folder, 20)


def test_only_a_number_as_it_is_written_names_a_step(tmp_path: pathlib.Path) -> None:
    folder = written(tmp_path / "checkpoints", 10, 20)
    others = {"0030", "\N{FULLWIDTH DIGIT FOUR}0", "\N{SUPERSCRIPT TWO}", "3_0", "+30"}
    for name in others:
        shutil.copytree(folder / "20", folder / name)
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.latest() == 20
    checkpoints.close()
    assert names(folder) == {"10", "20", *others}


def test_a_damaged_step_that_can_not_be_set_aside_is_one_sentence(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "checkpoints", 10, 20)
    hurt(folder, 20)
    checkpoints = Checkpoints(folder)

    def refuse(*paths: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=r"checkpoint 20 in .* could not be set aside: Permission denied"):
        checkpoints.latest()
    checkpoints.close()


def test_looking_renames_nothing(tmp_path: pathlib.Path) -> None:
    folder = written(tmp_path / "checkpoints", 10, 20)
    hurt(folder, 20)
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.load_numpy()[2] == 10
    checkpoints.close()
    assert names(folder) == {"10", "20"}


def test_when_none_verifies_nothing_begins_anew(tmp_path: pathlib.Path) -> None:
    folder = written(tmp_path / "checkpoints", 10, 20)
    hurt(folder, 10)
    hurt(folder, 20)
    for _ in range(2):  # also when they were set aside before
        checkpoints = Checkpoints(folder)
        assert not checkpoints.empty()
        with pytest.raises(
            UserError, match=r"no checkpoint in .* verifies \(damaged: damaged-10, damaged-20\); to begin"
        ):
            checkpoints.restore(shapes_of(on_device(state_like())))
        checkpoints.close()


def test_the_last_good_steps_are_kept_not_the_last_ones(tmp_path: pathlib.Path) -> None:
    folder = written(tmp_path / "checkpoints", 10, 20)
    hurt(folder, 20)
    written(folder, 30)
    assert names(folder) == {"10", "30", "damaged-20"}  # 10 would have gone, had 20 been good
    written(folder, 40)
    assert names(folder) == {"30", "40", "damaged-20"}


def test_less_than_two_steps_are_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert dsjax(["train", str(home() / "small.py"), "checkpoint.keep=1", "--print-config"]) == 2
    assert "checkpoint.keep is 1; it must be an integer >= 2" in capsys.readouterr().err


def test_half_written_and_half_deleted_steps_are_cleared_away(tmp_path: pathlib.Path) -> None:
    folder = written(tmp_path / "checkpoints", 10, 20)
    shutil.copytree(folder / "20", folder / ".saving-30")
    (folder / "10").rename(folder / ".deleting-10")
    Checkpoints(folder, read_only=True).close()
    assert ".saving-30" in names(folder)
    Checkpoints(folder).close()
    assert names(folder) == {"20"}


def test_a_checkpoint_of_another_run_is_refused_by_key(tmp_path: pathlib.Path) -> None:
    folder = written(tmp_path / "checkpoints", 10, about={"config": {"train.seed": 1, "gone": 2}})
    checkpoints = Checkpoints(folder, about={"config": {"train.seed": 2, "new": 3}})
    with pytest.raises(UserError, match=r"checkpoint 10 in .* is of another run: train.seed is 1 there, 2 here"):
        checkpoints.restore(shapes_of(on_device(state_like())))
    checkpoints.close()
    assert names(folder) == {"10"}


def test_the_manifest_says_what_was_saved(tmp_path: pathlib.Path) -> None:
    config = changed(small(), train={"steps": 4}, mesh={"data": 4, "fsdp": 2})
    assert pretrain.run(config, tmp_path / "run", quiet=True) == 0
    body = json.loads((tmp_path / "run" / "checkpoints" / "4" / "manifest.json").read_text())["body"]
    assert (body["step"], body["mesh"], body["num_devices"]) == (4, {"data": 4, "fsdp": 2}, 8)
    assert body["arrays"]["params/embedding"] == {"dtype": "float32", "shape": [300, 8]}
    assert body["config"]["model.d_model"] == 8
    assert len(body["config_sha256"]) == len(body["data_fingerprint"]) == len(body["tokenizer_sha256"]) == 64
    folder = tmp_path / "run" / "checkpoints" / "4"
    held = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    del held["manifest.json"]
    assert {name: entry["bytes"] for name, entry in body["files"].items()} == held


# ---------------------------------------------------------------- through the command


@pytest.fixture(scope="module")
def control() -> pathlib.Path:
    folder = home() / "damage_control"
    assert pretrain.run(changed(small(), train={"steps": 12}), folder, quiet=True) == 0
    return folder


def test_a_run_goes_on_from_the_step_before_and_ends_as_it_would_have(
    control: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(control, run)
    hurt(run / "checkpoints", 12)
    assert dsjax(["train", str(home() / "small.py"), "train.steps=12", "--run", str(run)]) == 0
    assert "resumed at step 8 of 12" in capsys.readouterr().err
    assert state_hash(run) == state_hash(control)
    assert saved_steps(run) == [4, 8, 12]


def test_inspect_shows_what_a_resume_would_take(
    control: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(control, run)
    os.truncate(run / "checkpoints" / "12" / "host.json", 3)
    assert dsjax(["inspect", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 8


def test_another_tokenizer_is_noticed(
    control: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(control, run)
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    tokenizer["model"]["merges"][-2:] = reversed(tokenizer["model"]["merges"][-2:])  # still a tokenizer
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert dsjax(["generate", str(run), "--prompt", "a"]) == 2
    assert "tokenizer.json is not the tokenizer that checkpoint 12" in capsys.readouterr().err


def test_changed_files_of_the_data_are_named(tmp_path: pathlib.Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(home() / "corpus", corpus)
    assert pretrain.run(small(str(corpus)), tmp_path / "run", quiet=True) == 0
    (corpus / "3.txt").write_text("something else entirely")
    (corpus / "30.txt").write_text("a new one")
    with pytest.raises(
        UserError, match=r"data changed: .* \(changed in data.sources.0: 3.txt; added .*: 30.txt\); restore"
    ):
        pretrain.run(changed(small(str(corpus)), train={"steps": 12}), tmp_path / "run", quiet=True)
