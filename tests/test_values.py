"""Values of positions: by a head or a decoder of their own, in training, on devices, and out of the way elsewhere."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import CONFIGS, DENSE, V, graph, random_tokens, weights
from small_runs import changed, home, saved, small, small_moe
from test_router_replay import MODELS

from dsjax.checkpoint import flatten
from dsjax.config import UserError, apply_overrides
from dsjax.convert.command import Request
from dsjax.convert.command import run as convert
from dsjax.data.tokenizer import load_tokenizer
from dsjax.infer.batching import Engine
from dsjax.infer.engine import complete, make_generator
from dsjax.infer.requests import Request as Prompt
from dsjax.infer.sampling import SamplingConfig
from dsjax.loaded import load
from dsjax.models.decoder import Decoder, DecoderConfig, without_values
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.masks import Documents
from dsjax.runs import RunFolder
from dsjax.sharding import MeshConfig, logical_axes, make_mesh, shardings, use_mesh
from dsjax.tensor_files import TensorFiles
from dsjax.train.pretrain import Pretrain, make_model, run
from dsjax.train.start import Start
from dsjax.train.step import make_trainer

Values = Literal["none", "head", "decoder"]
KINDS: tuple[Values, ...] = ("head", "decoder")
STILL: dict[str, Any] = {"lr": 1e-30, "weight_decay": 0.0}  # a step of that size moves no weight


def with_values(cfg: DecoderConfig, kind: Values) -> DecoderConfig:
    return dataclasses.replace(cfg, values=kind)


# ---------------------------------------------------------------- what they are


def test_a_head_reads_the_hidden_states() -> None:
    cfg = with_values(DENSE, "head")
    params = weights(cfg)
    model, tokens_BT = nnx.merge(graph(cfg), params), jnp.asarray(random_tokens(2, 6))
    out = model(tokens_BT)
    found = model.values(out, tokens_BT)
    assert found.shape == (2, 6)
    assert found.dtype == jnp.float32
    expected = np.asarray(out.hidden_BTD, np.float64) @ np.asarray(params["w_values"], np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # a sum of 16 products in float32


def test_a_decoder_of_values_is_that_decoder_with_a_head() -> None:
    """With weights of its own, over the same documents; a model of the same weights says the same."""
    cfg = with_values(MODELS["softmax"], "decoder")
    params, tokens_BT = weights(cfg), jnp.asarray(random_tokens(2, 8))
    ids_BT = jnp.array([[1] * 4 + [2] * 4, [1] * 6 + [0] * 2])
    documents = Documents(ids_BT, jnp.array([[0, 1, 2, 3] * 2, [0, 1, 2, 3, 4, 5, 0, 0]]))
    model = nnx.merge(graph(cfg), params)
    # From what the policy made of the tokens nothing is read, ...
    values = jax.jit(lambda tokens_BT: model.values(None, tokens_BT, documents))
    found = values(tokens_BT)
    alone = nnx.merge(graph(with_values(cfg, "head")), params["critic"] | {"w_logits": jnp.zeros((16, V))})
    expected = jax.jit(lambda: alone.values(alone(tokens_BT, documents), tokens_BT))()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # float32, another program
    # ... and no position sees what comes behind it, or another document.
    other = values(tokens_BT.at[0, 6].add(1))
    assert (np.asarray(other != found)[0] == [False] * 6 + [True] * 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_they_begin_at_zero_and_leave_the_other_weights_as_they_are(kind: Values) -> None:
    make = lambda cfg: jax.jit(lambda: nnx.to_pure_dict(nnx.state(Decoder(cfg, rngs=nnx.Rngs(3)))))()  # noqa: E731
    plain, found = make(DENSE), make(with_values(DENSE, kind))
    assert (found["w_values"] if kind == "head" else found["critic"]["w_values"]).tolist() == [0.0] * 16
    jax.tree.map(np.testing.assert_array_equal, {name: found[name] for name in plain}, plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [*CONFIGS.values(), dataclasses.replace(MODELS["V3"], multi_token=MultiTokenConfig())])
def test_num_params_counts_them(cfg: DecoderConfig, kind: Values) -> None:
    mine = with_values(cfg, kind)
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(mine, rngs=nnx.Rngs(0))), nnx.Param))
    assert mine.num_params() == sum(x.size for x in jax.tree.leaves(params))
    assert mine.num_active_params() == cfg.num_active_params()
    assert mine.flops_per_token(32, training=False) == cfg.flops_per_token(32, training=False)
    # By hand: a head of 16 products; a decoder without logits and the head; forward and twice that back.
    more = 16 if kind == "head" else cfg.flops_per_token(32, training=False) / 2 - V * 16 + 16
    assert mine.flops_per_token(32) - cfg.flops_per_token(32) == pytest.approx(6 * more)


def test_a_model_without_values_has_none_to_give() -> None:
    model, tokens_BT = nnx.merge(graph(DENSE), weights(DENSE)), jnp.asarray(random_tokens(2, 6))
    with pytest.raises(UserError, match=r"model\.values is none"):
        model.values(model(tokens_BT), tokens_BT)
    with pytest.raises(UserError, match="values"):
        apply_overrides(DENSE, ["values=both"])


def test_gradients_reach_what_makes_them() -> None:
    """A head's go through the policy, those of a decoder of its own leave that alone."""
    tokens_BT, target_BT = jnp.asarray(random_tokens(2, 6)), jnp.ones((2, 6))
    for kind in KINDS:
        cfg = with_values(DENSE, kind)

        def loss(params: Any, cfg: DecoderConfig = cfg) -> jax.Array:
            model = nnx.merge(graph(cfg), params)
            return jnp.sum((model.values(model(tokens_BT), tokens_BT) - target_BT) ** 2)

        grads = jax.jit(jax.grad(loss))(weights(cfg))
        of_head = grads["w_values"] if kind == "head" else grads["critic"]["w_values"]
        assert np.abs(of_head).max() > 1e-3
        assert (np.abs(grads["embedding"]).max() > 1e-3) == (kind == "head")
        assert kind == "head" or np.abs(grads["critic"]["embedding"]).max() > 1e-3


def test_experts_of_a_decoder_of_values_have_losses_loads_and_biases() -> None:
    cfg = with_values(MODELS["V3"], "decoder")
    model, tokens_BT = nnx.merge(graph(cfg), weights(cfg)), jnp.asarray(random_tokens(2, 6))
    out, own = jax.jit(lambda: (model(tokens_BT), model.values_and_output(None, tokens_BT)[1]))()
    assert own.losses.keys() == out.losses.keys()
    before = nnx.to_pure_dict(nnx.state(model))
    told = {name: stats.sums for name, stats in out.router.items()}
    moved = model.moved_buffers(told)
    bias = lambda of: of["critic"]["group_1"]["ffn"]["selection_bias"]  # noqa: E731
    np.testing.assert_array_equal(bias(moved), bias(before))  # of what is not told nothing moves
    moved = model.moved_buffers(told | {f"critic/{name}": stats.sums for name, stats in own.router.items()})
    np.testing.assert_allclose(np.abs(bias(moved) - bias(before)).max(), 0.01, rtol=1e-4)


@pytest.mark.parametrize("kind", ["decoder", pytest.param("head", marks=pytest.mark.slow)])
def test_eight_devices_say_the_same(kind: Values) -> None:
    cfg = with_values(MODELS["softmax"], kind)
    params, tokens_BT, definition = weights(cfg), jnp.asarray(random_tokens(8, 8)), graph(cfg)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = logical_axes(nnx.eval_shape(lambda: nnx.merge(definition, params)))
    placed = jax.device_put(params, shardings(params, axes, mesh))

    def found(mesh: Any, params: Any) -> jax.Array:
        @jax.jit
        def run(params: Any) -> jax.Array:
            with use_mesh(mesh):
                model = nnx.merge(definition, params)
                return model.values(model(tokens_BT), tokens_BT)

        return run(params)

    np.testing.assert_allclose(found(mesh, placed), found(None, params), rtol=1e-4, atol=1e-5)  # sums over devices


# ---------------------------------------------------------------- writing needs none


@pytest.mark.parametrize("kind", KINDS)
def test_who_writes_neither_places_nor_computes_them(kind: Values) -> None:
    cfg = with_values(DENSE, kind)
    params = weights(cfg)
    plain = {name: params[name] for name in weights(DENSE)}
    definition, left = without_values(graph(cfg), params)
    assert definition == graph(DENSE)
    assert left.keys() == plain.keys()
    options: dict[str, Any] = {"end_ids": (), "max_length": 32, "batch_size": 2}
    engines = Engine(graph(cfg), params, **options), Engine(graph(DENSE), plain, **options)
    assert engines[0].params.keys() == plain.keys()
    assert engines[0].graph == engines[1].graph
    texts = []
    for engine in engines:
        number = engine.submit(Prompt([1, 2, 3], 6, SamplingConfig(1.0), seed=1))
        texts.append(engine.run()[number][0].tokens)
    assert texts[0] == texts[1]
    greedy = {"max_tokens": 6, "end_id": 0, "max_length": 32, "sampling": SamplingConfig(0.0)}
    assert complete(graph(cfg), params, [[1, 2, 3]], **greedy) == complete(graph(DENSE), plain, [[1, 2, 3]], **greedy)
    made = make_generator(
        lambda rngs: Decoder(cfg, rngs=rngs), make_mesh(MeshConfig(), jax.devices()[:1]), batch_size=1, slots=32
    )
    assert made.shapes.keys() == plain.keys()


# ---------------------------------------------------------------- runs


def valued(config: Pretrain, kind: Values, **train: Any) -> Pretrain:
    model = dataclasses.replace(config.model, values=kind)
    return changed(dataclasses.replace(config, model=model), train={"steps": 1} | train)


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: x for name, x in saved(folder)[0].items() if name.startswith(("params/", "buffers/"))}


@pytest.fixture(scope="module")
def base() -> pathlib.Path:
    folder = home() / "without_values"
    assert run(changed(small_moe(bias_update_rate=0.01), train={"steps": 1}), folder, quiet=True) == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_with_one_that_has_none(base: pathlib.Path, kind: Values) -> None:
    """A head is new; a decoder of values begins as the decoder that is there, buffers included, with a new head."""
    folder, before = RunFolder(base), arrays(base)
    config = valued(small_moe(bias_update_rate=0.01), kind)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainer = make_trainer(lambda rngs: make_model(config, rngs), config.optim, mesh)
    tokenizer = load_tokenizer(folder.tokenizer, end_token=config.data.end_token)
    state = Start(base, tokenizer).with_weights(trainer, trainer.init(5))
    after = {name: np.asarray(x) for name, x in flatten({"params": state.params, "buffers": state.buffers}).items()}
    head = "params/w_values" if kind == "head" else "params/critic/w_values"
    assert (after.pop(head) == 0).all()
    assert any(name.startswith("buffers/critic/") for name in after) == (kind == "decoder")
    assert {name.replace("/critic/", "/") for name in after} == before.keys()
    for name, x in after.items():
        np.testing.assert_array_equal(x, before[name.replace("/critic/", "/")], err_msg=name)


@pytest.mark.slow
def test_a_run_that_begins_with_values_keeps_them(tmp_path: pathlib.Path) -> None:
    """Also if the new one has other ones."""
    assert run(valued(changed(small(), optim=STILL), "decoder"), tmp_path / "first", quiet=True) == 0
    first = arrays(tmp_path / "first")
    again = valued(changed(small(), optim=STILL), "decoder", start_from=str(tmp_path / "first"), seed=5)
    assert run(again, tmp_path / "again", quiet=True) == 0
    assert arrays(tmp_path / "again").keys() == first.keys()
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / "again"), first)
    less = valued(changed(small(), optim=STILL), "none", start_from=str(tmp_path / "first"), seed=5)
    assert run(less, tmp_path / "less", quiet=True) == 0
    assert not [name for name in arrays(tmp_path / "less") if "critic" in name]


@pytest.mark.parametrize("kind", ["decoder", pytest.param("head", marks=pytest.mark.slow)])
def test_a_run_with_values_is_loaded_and_exported_without(
    kind: Values, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(valued(small(), kind), tmp_path / "run", quiet=True) == 0
    model = load(tmp_path / "run")
    assert not {"w_values", "critic"} & model.params.keys()
    text = model.generate([[1, 2, 3]], max_new_tokens=3)
    assert convert(Request(tmp_path / "run", tmp_path / "exported")) == 0
    assert "left out: what makes the values of" in capsys.readouterr().err
    names = list(TensorFiles(tmp_path / "exported"))
    assert names
    assert not [name for name in names if "value" in name or "critic" in name]
    other = load(tmp_path / "exported")
    np.testing.assert_array_equal(other.generate([[1, 2, 3]], max_new_tokens=3, stop_at_eos=False)[:, :3], text[:, :3])
    np.testing.assert_array_equal(other.logits([[1, 2, 3]]), model.logits([[1, 2, 3]]))
