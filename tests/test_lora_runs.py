"""Runs that train low-rank pairs beside a converted checkpoint: what they save, how they go on, and the way back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from hf_folders import deepseek, random_tensors, write_folder
from small_runs import changed, home, saved, small, state_hash, training_records

import dsjax
from dsjax import manifest
from dsjax.cli import main
from dsjax.config import UserError, load_config, to_dict
from dsjax.convert.command import Request
from dsjax.convert.command import run as convert
from dsjax.data.batch import Batch
from dsjax.data.tokenizer import load_tokenizer
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.lora import FrozenWeight, LoraConfig
from dsjax.nn.masks import Documents
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.quantize import Kind
from dsjax.runs import Base, RunFolder
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import Pretrain, build, run
from dsjax.train.start import Start
from dsjax.train.step import TrainState

TARGETS = ("attention", "mlp", "experts")


def base_files(folder: pathlib.Path) -> dict[str, str]:
    """The digest of each file of a run."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@functools.cache
def base() -> pathlib.Path:
    """A DeepSeek-V3 as a run: latent attention, a dense layer, then experts; with the tokenizer of the small runs."""
    assert run(changed(small(), train={"steps": 1}), home() / "tokens", quiet=True) == 0
    config = deepseek(vocab_size=300, eos_token_id=0, num_hidden_layers=2)
    source = write_folder(home() / "v3", config, random_tensors(config), shards=2)
    (source / "tokenizer.json").write_bytes((home() / "tokens" / "tokenizer.json").read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    assert convert(Request(source, home() / "base", quiet=True)) == 0
    return home() / "base"


@pytest.fixture
def converted() -> pathlib.Path:
    return base()


def tuning(converted: pathlib.Path, *, steps: int = 8, **lora: Any) -> Pretrain:
    """Some steps beside it."""
    config = changed(small(), data={"tokenizer_path": str(converted / "tokenizer.json")})
    return dataclasses.replace(
        changed(config, train={"steps": steps, "start_from": str(converted)}),
        model=load_config(converted / "config.json").model,
        optim=OptimConfig(lr=3e-2, warmup_steps=2, schedule="constant"),
        lora=LoraConfig(**{"targets": TARGETS, "rank": 2, "alpha": 4.0} | lora),
    )


@functools.cache
def tuned_run(kind: Kind | None) -> pathlib.Path:
    """Eight steps beside the base, which stays as it is."""
    folder, before = home() / f"tuned-{kind}", base_files(base())
    assert run(tuning(base(), base=kind), folder, quiet=True) == 0
    assert base_files(base()) == before
    return folder


@pytest.fixture(params=[pytest.param(None, marks=pytest.mark.slow), "nf4"])
def tuned(request: pytest.FixtureRequest) -> pathlib.Path:
    return tuned_run(request.param)


def trained_logits(folder: pathlib.Path, tokens_BT: Any) -> jax.Array:
    """Logits of a run's model as it is trained: products with frozen weights and with pairs apart."""
    config = RunFolder(folder).read_config()
    _, trainer = build(changed(config, mesh={"data": 1}), jax.devices()[:1])
    with contextlib.closing(RunFolder(folder).open_checkpoints()) as checkpoints:
        state: TrainState = checkpoints.restore(trainer.shapes.moving)[0]
    words = load_tokenizer(RunFolder(folder).tokenizer, end_token=config.data.end_token)
    source = Start(pathlib.Path(config.train.start_from), words, RunFolder(folder).base())
    variables = dataclasses.replace(state, frozen=source.frozen(trainer)).variables

    @jax.jit
    def forward(variables: Any, tokens_BT: Any) -> jax.Array:
        model = nnx.merge(trainer.graph, variables)
        return model.logits(model(tokens_BT))

    return forward(variables, jnp.asarray(tokens_BT))


def test_the_export_computes_what_the_trained_model_does(tuned: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert convert(Request(tuned, tmp_path / "exported", quiet=True)) == 0
    loaded, exported = dsjax.load(tuned), dsjax.load(tmp_path / "exported")
    assert loaded.config == exported.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, exported.params)
    tokens_BT = np.random.default_rng(0).integers(0, 300, (2, 9))
    # x W + s (x a) b is another order of the sums of x (W + s a b); logits have a standard deviation near 1.
    np.testing.assert_allclose(exported.logits(tokens_BT), trained_logits(tuned, tokens_BT), atol=2e-5, rtol=0)
    assert (tmp_path / "exported" / "tokenizer_config.json").is_file()


def test_a_checkpoint_holds_pairs_alone(tuned: pathlib.Path, converted: pathlib.Path) -> None:
    arrays, whole = saved(tuned)[0], saved(converted)[0]
    params = {name for name in arrays if name.startswith("params/")}
    assert params
    assert all(name.endswith(("/a", "/b")) for name in params)
    assert all(np.abs(arrays[name]).max() > 1e-3 for name in params)  # second halves began at 0
    (biases,) = (name for name in arrays if name.endswith("selection_bias"))
    np.testing.assert_array_equal(arrays[biases], whole[biases])
    there = RunFolder(tuned).base()
    assert there is not None
    assert (there.path, there.step) == (str(converted.resolve()), 0)


def test_a_model_without_buffers_begins_too(converted: pathlib.Path) -> None:
    """With its weights as they were saved, frozen, and pairs whose products are 0."""
    source = converted.parent / "tokens"
    config = changed(small(), mesh={"data": 1}, train={"start_from": str(source)})
    _, trainer = build(dataclasses.replace(config, lora=LoraConfig(("attention", "mlp"), rank=2)), jax.devices()[:1])
    start = Start(source, load_tokenizer(source / "tokenizer.json", end_token="<|end|>"))
    state = start.with_weights(trainer, trainer.init(0))
    assert not np.any(state.params["group_0"]["ffn"]["w_up"]["b"])
    frozen, arrays = traverse_util.flatten_dict(start.frozen(trainer)), saved(source)[0]
    assert {"/".join(("params", *path)) for path in frozen} == {n for n in arrays if n.startswith("params/")}
    for path, w in frozen.items():
        np.testing.assert_array_equal(
            w.stored if isinstance(w, FrozenWeight) else w, arrays["/".join(("params", *path))]
        )


def ended(*words: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([*words])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_it_goes_on_bit_for_bit(converted: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    """From the command line, over an interruption, and with the base in another place than before."""
    plain = dataclasses.replace(tuning(converted), lora=LoraConfig())
    (tmp_path / "config.json").write_text(json.dumps(to_dict(plain)))
    moved = tmp_path / "moved"
    shutil.copytree(converted, moved)
    lora = ["lora.targets=attention,mlp,experts", "lora.rank=2", "lora.alpha=4", "lora.base=nf4"]
    command = ["train", str(tmp_path / "config.json"), *lora, "--quiet", "--run", str(tmp_path / "run")]

    assert ended(*command, f"train.start_from={moved}", "train.steps=4") == 0
    shutil.rmtree(moved)
    assert ended(*command, f"train.start_from={moved}") == 2
    assert f"trained beside checkpoint 0 of {moved}: there is no such folder" in capsys.readouterr().err
    assert ended(*command, f"train.start_from={converted}") == 0
    assert state_hash(tmp_path / "run") == state_hash(tuned_run("nf4"))
    assert [r["step"] for r in training_records(tmp_path / "run")] == [1, 4, 5, 8]


def test_a_base_that_changed_is_told(converted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(converted, tmp_path / "base")
    there = RunFolder(tmp_path / "base")
    known = Base.at(there, 0)
    assert known.run("nowhere").path == there.path.resolve()
    body = manifest.read(there.checkpoints / "0")
    files = body.pop("files")
    manifest.write(there.checkpoints / "0", body | {"more": 1}, files)
    with pytest.raises(UserError, match="checkpoint 0 there is another one now; bring it back, or name the folder"):
        known.run("nowhere")
    assert known.run(str(converted)).path == converted  # the same bytes elsewhere


def test_what_can_not_be_is_said(converted: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    """In one sentence, before anything is written."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tuning(converted))))
    for words, sentence in (
        (["lora.targets=attn"], "lora.targets is 'attn'; it must be one of attention, mlp, experts"),
        (["lora.rank=0"], "lora.rank is 0; it must be an integer >= 1"),
        (["lora.base=int2"], "lora.base is 'int2'; it must be one of int8, int4, nf4 or none"),
        (["lora.targets=", "lora.base=nf4"], "lora.base is nf4, but targets is empty"),
        (["train.start_from="], "lora.targets is attention,mlp,experts, but train.start_from is empty"),
    ):
        assert ended("train", str(tmp_path / "config.json"), *words, "--run", str(tmp_path / "run")) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    dense = changed(tuning(converted), mesh={"data": 1})
    with pytest.raises(UserError, match=r"has experts, of which the model has no weights; it has attention, mlp$"):
        build(dataclasses.replace(dense, model=small().model), jax.devices()[:1])


def test_what_does_not_go_with_a_run_of_pairs_is_said(converted: pathlib.Path, tuned: pathlib.Path) -> None:
    there = RunFolder(tuned).read_config()
    with pytest.raises(UserError, match=r"was trained with lora\.rank=2, now it is 3"):
        run(changed(there, lora={"rank": 3}), tuned, quiet=True)
    words = load_tokenizer(converted / "tokenizer.json", end_token="<|end|>")
    with pytest.raises(UserError, match="holds low-rank pairs and not the weights that they belong to"):
        Start(tuned, words)


def test_a_model_that_is_shifted_is_followed() -> None:
    """Beside frozen weights as far as with all of them trained, nearly; and those stay as they are."""
    ids, V = np.arange(16), 16

    def batch(step: int, rule: np.ndarray) -> Batch:
        """Sequences in which each token says the next."""
        rows = [np.random.default_rng(step).integers(0, V, 8)]
        for _ in range(16):
            rows.append(rule[rows[-1]])
        tokens = np.stack(rows, axis=1).astype(np.int32)
        shape = tokens[:, 1:].shape
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), shape)
        ones = np.ones(shape, np.float32)
        return Batch(tokens[:, :-1], tokens[:, 1:], ones, Documents(ones.astype(np.int32), positions))

    model = DecoderConfig(
        vocab_size=300,
        d_model=16,
        num_layers=2,
        groups=(LayerGroup(MLPConfig(d_ff=32), AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)),),
    )
    config = Pretrain(model=model, optim=OptimConfig(lr=1e-2, warmup_steps=5, schedule="constant", weight_decay=0.0))
    whole = build(changed(config, mesh={"data": 1}), jax.devices()[:1])[1]
    lora = dataclasses.replace(
        changed(config, mesh={"data": 1}, train={"start_from": "base"}), lora=LoraConfig(("attention", "mlp"), rank=8)
    )
    pairs = build(lora, jax.devices()[:1])[1]
    assert pairs.base is not None

    def losses(trainer: Any, state: TrainState, rule: np.ndarray, steps: int) -> tuple[list[float], TrainState]:
        out = []
        for step in range(steps):
            state, metrics = trainer.step(state, batch(step, rule), jnp.int32(steps))
            out.append(float(metrics["loss"]))
        return out, state

    first, state = losses(whole, whole.init(0), (ids * 3 + 1) % V, 100)
    assert first[-1] < 0.3
    copy = jax.tree.map(jnp.array, state.params)
    shifted = (ids * 3 + 1 + 4 * (ids < 5)) % V
    by_all = losses(whole, state, shifted, 60)[0]
    weights = traverse_util.flatten_dict(copy)
    kept = traverse_util.unflatten_dict({path: pairs.base.freeze(path, x) for path, x in weights.items()})
    before = jax.tree.map(np.array, kept)
    by_pairs, after = losses(pairs, dataclasses.replace(pairs.init(0), frozen=kept), shifted, 60)
    np.testing.assert_allclose(by_pairs[0], by_all[0], rtol=1e-5)  # they begin alike
    assert by_all[0] - by_pairs[-1] > 0.9 * (by_all[0] - by_all[-1]) > 0.5
    jax.tree.map(np.testing.assert_array_equal, before, after.frozen)
