"""Conversions that can not be done say so in a sentence; those that are stopped go on and end the same."""

from __future__ import annotations

import errno
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from chaos.syscalls import WRITES, Fault
from chaos.traced import Traced
from convert_child import ENVIRONMENT
from hf_folders import content, deepseek, llama, random_tensors, save_tensors, write_folder

from dsjax.cli import main
from dsjax.config import UserError
from dsjax.convert.command import Request, parsed_size, run
from dsjax.convert.journal import FILE, Journal
from dsjax.tensor_files import INDEX, SINGLE

UP = "model.layers.1.mlp.experts.1.up_proj.weight"


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    config = deepseek()
    return write_folder(tmp_path / "source", config, random_tensors(config), shards=2)


@pytest.fixture
def small(tmp_path: pathlib.Path) -> pathlib.Path:
    config = llama()
    return write_folder(tmp_path / "source", config, random_tensors(config), shards=3)


def convert(source: pathlib.Path, target: pathlib.Path, **options: Any) -> int:
    return run(Request(source, target, quiet=True, **options))


# ---------------------------------------------------------------- tensors that do not fit


def rewritten(folder: pathlib.Path, change: dict[str, Any], **fields: Any) -> pathlib.Path:
    """The model with some tensors replaced, added or (None) left out."""
    config = deepseek(**fields)
    tensors = {name: x for name, x in (random_tensors(config) | change).items() if x is not None}
    return write_folder(folder, config, tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({UP: None}, rf"tensor '{UP}' is missing; config.json describes a model that has it"),
        ({UP: None, "model.norm.weight": None}, r"tensor 'model.norm.weight' \(and 1 more\) is missing"),
        (
            {"model.other": np.ones(3)},
            r"tensor 'model.other' is unknown; the model of config.json has none of that name",
        ),
        ({"a": np.ones(3), "b": np.ones(3)}, r"tensor 'a' \(and 1 more\) is unknown"),
        ({UP: np.ones((12, 10), np.float32)}, rf"tensor '{UP}' has shape \(12, 10\); by config.json it is \(10, 12\)"),
        ({UP: np.ones((10, 12), np.int32)}, rf"tensor '{UP}' has type int32; a weight is one of float32, bfloat16"),
        ({UP: np.ones((10, 12), np.float64)}, rf"tensor '{UP}' has type float64; a weight is one of"),
        ({"model.layers.3.eh_proj.weight": np.ones(2)}, r"'model.layers.3.eh_proj.weight' is unknown"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change: dict[str, Any], said: str, tmp_path: pathlib.Path) -> None:
    source = rewritten(tmp_path / "source", change)
    with pytest.raises(UserError, match=said):
        convert(source, tmp_path / "run")
    with pytest.raises(UserError, match=said):
        run(Request(source, None, check=True, quiet=True))
    assert not (tmp_path / "run").exists()


def test_an_output_matrix_that_is_tied_must_be_the_embedding(tmp_path: pathlib.Path) -> None:
    config = llama(tie_word_embeddings=True)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    source = write_folder(tmp_path / "source", config, tensors)
    with pytest.raises(
        UserError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'; they must be equal"
    ):
        convert(source, tmp_path / "run")


def test_a_tensor_that_two_files_hold_is_named(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    one, two = sorted(source.glob("*.safetensors"))
    twice = "model.embed_tokens.weight"
    tensors = random_tensors(deepseek())
    names = [name for name, file in json.loads((source / INDEX).read_text())["weight_map"].items() if file == two.name]
    save_tensors(two, {name: tensors[name] for name in [*names, twice]})
    where = json.loads((source / INDEX).read_text())["weight_map"][twice]
    assert where == one.name
    with pytest.raises(UserError, match=rf"{two.name}: tensor '{twice}' is also in {one.name}"):
        convert(source, tmp_path / "run")
    save_tensors(two, {name: tensors[name] for name in names} | {"model.extra": np.ones(2)})
    with pytest.raises(UserError, match=rf"{two.name}: tensor 'model.extra' is not in {INDEX}"):
        convert(source, tmp_path / "run")
    save_tensors(two, {name: tensors[name] for name in names})
    assert convert(source, tmp_path / "run") == 0  # the control


def test_a_file_that_is_cut_short_is_named(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = sorted(source.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{path.name}: not a safetensors file"):
        convert(source, tmp_path / "run")
    path.unlink()
    with pytest.raises(UserError, match=rf"no file .*{path.name}"):
        convert(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mesh": "expert=3"}, "--mesh: expert is 3; it does not divide expert=4 of params/group_1/ffn/w_gate"),
        ({"mesh": "expert=-1"}, "--mesh is 'expert=-1'; it must give the number of devices along each axis, not -1"),
        ({"mesh": "experts=2"}, "unknown key experts; did you mean expert"),
        ({"dtype": "bfloat16"}, "--dtype is for converting a run; .*source is a model in Hugging Face's layout"),
        ({"max_shard_size": "5GB"}, "--max-shard-size is for converting a run"),
    ],
)
def test_options_that_can_not_be_are_refused(
    options: dict[str, Any], said: str, source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=said):
        convert(source, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parsed_size(text) for text in ("5GB", "500 mb", "2GiB", "1.5KB", "7")] == [5e9, 5e8, 2**31, 1500, 7]
    for text in ("", "0", "GB", "-1GB", "5 TB", "nan"):
        with pytest.raises(UserError, match="--max-shard-size is"):
            parsed_size(text)


def test_the_command_says_what_is_wrong_with_its_folders(
    source: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["convert", *words])
        assert stop.value.code == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    target = tmp_path / "run"
    assert says(str(tmp_path / "nowhere"), str(target)) == f"dsjax: no folder {tmp_path / 'nowhere'}\n"
    assert "holds no config.json; it is neither a run nor a model" in says(str(tmp_path / "empty"), str(target))
    assert says(str(source)) == "dsjax: DST is missing: the folder to convert into\n"
    assert f"{source} is there already; convert into a new folder" in says(str(source), str(source))
    assert f"{source / 'run'} is inside {source}; convert" in says(str(source), str(source / "run"))
    (source / "config.json").write_text("{")
    assert "is not valid JSON" in says(str(source), str(target))
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    assert "model_type is 'gpt2'" in says(str(source), str(target))


# ---------------------------------------------------------------- runs that do not fit


def test_a_damaged_part_of_a_run_is_named(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    middle, back = tmp_path / "run", tmp_path / "back"
    convert(source, middle)
    state = middle / "checkpoints" / "0" / "state"
    path = state / "params.group_1.ffn.w_up" / "c.1.2.0.0"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"checkpoint 0 in .* is damaged: state/params.group_1.ffn.w_up/c.1.2.0.0 was"):
        convert(middle, back)
    path.unlink()
    with pytest.raises(UserError, match=r"c.1.2.0.0 can not be read: No such file"):
        convert(middle, back)
    path.write_bytes(good)
    assert convert(middle, back) == 0  # goes on
    assert content(back) == content(source)


def test_a_run_whose_origin_is_damaged_is_refused(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    convert(source, tmp_path / "run")
    (tmp_path / "run" / "hf" / "files" / "README.md").write_text("# another\n")
    with pytest.raises(UserError, match=r"hf is damaged: files/README.md has 10 bytes instead of 10|was changed"):
        convert(tmp_path / "run", tmp_path / "back")


# ---------------------------------------------------------------- stopped, and gone on


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    with Traced("convert_child", ENVIRONMENT) as traced:
        yield traced


def stopped(
    traced: Traced, source: pathlib.Path, target: pathlib.Path, faults: Callable[[int], list[Fault]]
) -> Iterator[tuple[Fault, Any, dict[str, bytes]]]:
    """Converts once to the end, and then with each fault, whose target is left; the third is what there should be."""
    trace = traced.run("convert", target, source=str(source), target=str(target))
    assert trace.code == 0, trace.said
    whole = content(target)
    for fault in faults(len(trace.calls)):
        shutil.rmtree(target)
        yield fault, traced.run("convert", target, fault, source=str(source), target=str(target)), whole


def spread(calls: int) -> list[Fault]:
    """Kills at system calls that are evenly spread, every other one in the middle of a write."""
    return [Fault(1 + i * (calls - 1) // 6, "half" if i % 2 else "kill") for i in range(7)]


@pytest.mark.parametrize("direction", ["to a run", "to a folder"])
def test_a_killed_conversion_goes_on_and_ends_the_same(
    direction: str, traced: Traced, small: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = small
    target, went_on = tmp_path / "target", 0
    if direction == "to a folder":
        convert(source, tmp_path / "run")
        source = tmp_path / "run"
    for fault, trace, whole in stopped(traced, source, target, spread):
        assert trace.code == -9, f"{fault}: {trace.said}"
        noted = (target / FILE).read_text().count("\n") if (target / FILE).exists() else 0
        again = traced.run("convert", target, source=str(source), target=str(target))
        assert again.code == 0, f"{fault}: {again.said}"
        assert content(target) == whole, fault
        went_on += noted > 1
    assert went_on >= 2  # some had parts to go on from


def test_what_is_done_is_not_done_again(small: pathlib.Path, tmp_path: pathlib.Path, traced: Traced) -> None:
    source, target = small, tmp_path / "run"
    trace = traced.run("convert", target, source=str(source), target=str(target))
    files = {call.path for call in trace.calls if "/state/" in call.path and call.name in WRITES}
    shutil.rmtree(target)
    traced.run("convert", target, Fault(len(trace.calls) * 2 // 3), source=str(source), target=str(target))
    noted = [json.loads(line) for line in (target / FILE).read_text().splitlines()[1:]]
    done = {name for line in noted for entry in line.values() for name in entry}
    again = traced.run("convert", target, source=str(source), target=str(target))
    written = {call.path for call in again.calls if "/state/" in call.path and call.name in WRITES}
    assert len(done) > 3
    assert not [path for path in written if any(path.endswith(name) for name in done)]
    assert len(written) < len(files)


def test_what_a_journal_has_and_the_disk_has_lost_is_written_again(
    small: pathlib.Path, tmp_path: pathlib.Path, traced: Traced
) -> None:
    target = tmp_path / "run"
    trace = traced.run("convert", target, source=str(small), target=str(target))
    whole = content(target)
    shutil.rmtree(target)
    traced.run("convert", target, Fault(len(trace.calls) * 2 // 3), source=str(small), target=str(target))
    noted = [json.loads(line) for line in (target / FILE).read_text().splitlines()[1:3]]
    lost, cut = (file for line in noted for files in line.values() for file in files)
    state = target / "checkpoints" / ".saving-0" / "state"
    (state / lost).unlink()
    (state / cut).write_bytes(b"")
    assert convert(small, target) == 0
    assert content(target) == whole


@pytest.mark.parametrize("damage", [b"\0" * 40, b"\xff\xfe", b"[1]", b"{"])
def test_of_a_damaged_journal_what_stands_in_front_of_the_damage_counts(
    damage: bytes, small: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "run"
    with Journal(folder, "work") as journal:
        for name in "abc":
            journal.add(name, 1, [])
        journal.finish()
    first, a, _, c = (folder / FILE).read_bytes().splitlines()
    (folder / FILE).write_bytes(b"\n".join([first, a, damage, c, b""]))
    with Journal(folder, "work") as journal:
        assert journal.done == {"a": 1}
        journal.add("d", 2, [])
        journal.finish()
    assert (folder / FILE).read_bytes() == b"\n".join([first, a, b'{"d": 2}', b""])
    (folder / FILE).write_bytes(b"\n".join([damage, a, b""]))
    with pytest.raises(UserError, match=r"holds half of another conversion .*, or its .converting.jsonl is damaged"):
        convert(small, folder)


def test_half_of_another_conversion_is_not_gone_on_with(
    source: pathlib.Path, tmp_path: pathlib.Path, traced: Traced
) -> None:
    target = tmp_path / "run"
    trace = traced.run("convert", target, Fault(60), source=str(source), target=str(target))
    assert trace.code == -9
    with pytest.raises(UserError, match="holds half of another conversion"):
        convert(source, target, mesh="expert=2")
    path = source / "README.md"
    path.write_text("# changed since\n")
    with pytest.raises(UserError, match="holds half of another conversion"):
        convert(source, target)


def test_two_conversions_do_not_share_a_folder(tmp_path: pathlib.Path) -> None:
    with (
        Journal(tmp_path / "target", "one"),
        pytest.raises(UserError, match="another process converts into"),
        Journal(tmp_path / "target", "one"),
    ):
        pass


@pytest.mark.parametrize("direction", ["to a run", "to a folder"])
def test_a_full_disk_is_one_sentence_and_room_lets_it_go_on(
    direction: str, traced: Traced, small: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source, target = small, tmp_path / "target"
    if direction == "to a folder":
        convert(source, tmp_path / "run")
        source = tmp_path / "run"
    full = lambda calls: [Fault(n, "error", errno.ENOSPC, True, (*WRITES, "fsync")) for n in (2, 25)]  # noqa: E731
    for fault, trace, whole in stopped(traced, source, target, full):
        assert trace.code == 2, f"{fault}: {trace.said}"
        assert re.fullmatch(r"dsjax: [^\n]*No space left on device[^\n]*\n", trace.said), trace.said
        assert traced.run("convert", target, source=str(source), target=str(target)).code == 0
        assert content(target) == whole


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"run needs 0.00 GB more; the disk has 0.00 GB free"):
        convert(source, tmp_path / "run")
    assert not list((tmp_path / "run").glob("[!.]*"))
    assert (source / INDEX).exists()
    assert not (source / SINGLE).exists()
