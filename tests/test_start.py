"""Training that begins with the weights of another run, trained or converted, and what is exported of it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_folders import llama, random_tensors, write_folder
from small_runs import changed, home, saved, small, small_moe, training_records

import dsjax
from dsjax.cli import main
from dsjax.config import UserError, load_config, to_dict
from dsjax.convert.command import Request
from dsjax.convert.command import run as convert
from dsjax.data.tokenizer import train_tokenizer
from dsjax.models.decoder import LayerGroup
from dsjax.nn.indexer import IndexerConfig
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.runs import RunFolder
from dsjax.train.best_of import BestOf
from dsjax.train.code_finetune import CodeFinetune
from dsjax.train.preference import Preference
from dsjax.train.pretrain import Pretrain, run
from dsjax.train.r1 import R1
from dsjax.train.start import inherited

STILL: dict[str, Any] = {"lr": 1e-30, "weight_decay": 0.0}  # a step of that size moves no weight


@pytest.fixture(scope="module")
def trained() -> pathlib.Path:
    folder = home() / "to_start_from"
    assert run(small_moe(bias_update_rate=0.01), folder, quiet=True) == 0
    return folder


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: x for name, x in saved(folder)[0].items() if name.startswith(("params/", "buffers/"))}


def starting(config: Pretrain, source: pathlib.Path, **train: Any) -> Pretrain:
    return changed(config, train={"steps": 1, "start_from": str(source)} | train)


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "expert": 2}])
def test_weights_are_those_of_the_run(trained: pathlib.Path, tmp_path: pathlib.Path, mesh: dict[str, int]) -> None:
    """Everything but what makes a run new: its step, its optimizer, its place in the data."""
    config = changed(small_moe(bias_update_rate=0.01), optim=STILL, mesh=mesh)
    before = weights(trained)
    assert run(starting(config, trained), tmp_path / "run", quiet=True) == 0
    after, (arrays, _, step) = weights(tmp_path / "run"), saved(tmp_path / "run")
    assert step == 1
    assert int(arrays["step"]) == 1
    biases = [name for name in before if name.startswith("buffers/")]
    assert biases
    for name, x in before.items():
        if name in biases:  # one step on
            np.testing.assert_allclose(np.abs(after[name] - x), 0.01, atol=1e-6)
        else:
            np.testing.assert_array_equal(after[name], x, err_msg=name)


def test_a_run_that_goes_on_does_not_start_again(trained: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = small_moe(bias_update_rate=0.01)
    assert run(starting(config, trained, steps=4), tmp_path / "run", quiet=True) == 0
    assert run(starting(config, trained, steps=8), tmp_path / "run", quiet=True) == 0
    assert [r["step"] for r in training_records(tmp_path / "run")] == [1, 4, 5, 8]
    assert training_records(tmp_path / "run")[0]["loss"] < training_records(trained)[0]["loss"]


def test_a_buffer_that_the_run_has_not_is_new(tmp_path: pathlib.Path) -> None:
    assert run(changed(small_moe(), train={"steps": 1}), tmp_path / "plain", quiet=True) == 0
    config = changed(small_moe(bias_update_rate=0.01), optim=STILL)
    assert run(starting(config, tmp_path / "plain"), tmp_path / "run", quiet=True) == 0
    (bias,) = (x for name, x in weights(tmp_path / "run").items() if name.startswith("buffers/"))
    assert np.abs(bias).max() == pytest.approx(0.01)


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 4}])
def test_indexers_that_the_run_has_not_are_new(tmp_path: pathlib.Path, mesh: dict[str, int]) -> None:
    """The way from DeepSeek-V3 to V3.2: a model of full attention, and indexers that learn where that looks."""
    full = LatentAttentionConfig(num_heads=2, q_rank=4, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=4)
    indexed = dataclasses.replace(full, indexer=IndexerConfig(num_heads=2, head_dim=8, top_k=4, warm_up=True))
    configs = [
        changed(small(), model={"groups": (LayerGroup(MLPConfig(d_ff=16), attention),)})
        for attention in (full, indexed)
    ]
    assert run(configs[0], tmp_path / "full", quiet=True) == 0
    config = changed(configs[1], optim={"weight_decay": 0.0}, mesh=mesh)
    assert run(starting(config, tmp_path / "full", steps=8), tmp_path / "run", quiet=True) == 0
    before, after = weights(tmp_path / "full"), weights(tmp_path / "run")
    new = after.keys() - before.keys()
    assert new == {name for name in after if "/indexer/" in name}
    assert all(np.abs(after[name]).max() > 0 for name in new if "bias" not in name)
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x, err_msg=name)
    losses = [r["loss/indexer"] for r in training_records(tmp_path / "run")]
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def converted(trained: pathlib.Path) -> pathlib.Path:
    """A Llama in bfloat16, with the tokenizer of the small runs, as a run."""
    config = llama(vocab_size=300, eos_token_id=0, torch_dtype="bfloat16")
    source = write_folder(home() / "llama", config, random_tensors(config, dtype=ml_dtypes.bfloat16), shards=2)
    (source / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert convert(Request(source, home() / "converted", quiet=True)) == 0
    return home() / "converted"


def test_a_converted_model_is_tuned_and_exported(converted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The exported folder computes what the trained run does, bit for bit."""
    there = load_config(converted / "config.json")
    config = changed(small(), data={"tokenizer_path": str(converted / "tokenizer.json")})
    config = changed(dataclasses.replace(config, model=there.model), optim=STILL)
    assert run(starting(config, converted), tmp_path / "still", quiet=True) == 0
    before = saved(converted)[0]
    for name, x in weights(tmp_path / "still").items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, before[name].astype(np.float32), err_msg=name)

    config = changed(config, optim={"lr": 1e-2})
    assert run(starting(config, converted, steps=4), tmp_path / "tuned", quiet=True) == 0
    assert convert(Request(tmp_path / "tuned", tmp_path / "exported", quiet=True)) == 0
    tokens_BT = np.random.default_rng(0).integers(0, 300, (2, 9))
    tuned, exported = dsjax.load(tmp_path / "tuned"), dsjax.load(tmp_path / "exported")
    np.testing.assert_array_equal(tuned.logits(tokens_BT), exported.logits(tokens_BT))
    assert np.abs(tuned.logits(tokens_BT) - dsjax.load(tmp_path / "still").logits(tokens_BT)).max() > 1e-2
    assert (tmp_path / "exported" / "tokenizer_config.json").is_file()


def test_a_config_can_be_that_of_a_run(trained: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert load_config(trained / "config.json") == RunFolder(trained).read_config()
    words = ["train", str(trained / "config.json"), "train.steps=1", f"train.start_from={trained}", "--quiet"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--run", str(tmp_path / "run")])
    assert stop.value.code == 0


def test_what_does_not_fit_is_said(trained: pathlib.Path, converted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = changed(small(), model={"d_model": 16})
    for config, source, sentence in (
        (small_moe(), tmp_path / "nothing", "no run folder"),
        (other, trained, r"is of another model: params/embedding is float32\[300,8\] there, float32\[300,16\] here"),
        (changed(small(), data={"vocab_size": 290}), converted, "has another tokenizer; set data.tokenizer_path="),
    ):
        with pytest.raises(UserError, match=sentence):
            run(starting(config, source), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run" / "checkpoints" / "0").exists()


def test_a_tokenizer_that_the_run_has_not_is_given(tmp_path: pathlib.Path) -> None:
    """A converted folder may have none; every recipe takes that of ``data.tokenizer_path`` then."""
    folder, path = tmp_path / "run", tmp_path / "tokenizer.json"
    folder.mkdir()
    base = small("nowhere")
    (folder / "config.json").write_text(json.dumps(to_dict(base)))
    path.write_text(train_tokenizer([], 257).to_json())
    new = RunFolder(tmp_path / "new")
    for config in (small(), BestOf(), Preference(), CodeFinetune(), R1()):
        config = changed(config, train={"start_from": str(folder)})
        with pytest.raises(UserError, match=r"run, which has no tokenizer\.json; set data\.tokenizer_path$"):
            inherited(config, new)
        config = changed(config, data={"tokenizer_path": str(path), "seq_len": 64})
        found, tokenizer = inherited(config, new)
        assert (found.model, found.data.tokenizer_path) == (base.model, str(path))
        assert tokenizer.encode("ab").tolist() == train_tokenizer([], 257).encode("ab").tolist()
        with pytest.raises(UserError, match="does not exist"):
            inherited(changed(config, data={"tokenizer_path": "none.json"}), new)
