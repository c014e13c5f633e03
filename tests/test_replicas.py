"""A model whose busiest experts have several places learns and writes what it does without."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import ATTENTION, V, graph, random_tokens, weights
from small_runs import changed, saved, small_moe, training_records
from test_sharding import random_batch, small

from dsjax.config import UserError, apply_overrides
from dsjax.infer.engine import _generator
from dsjax.infer.hot_experts import measured_loads, with_replicas
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.masks import Documents
from dsjax.nn.moe import MoEConfig
from dsjax.nn.placement import MEMORY, Placement, device_loads, place_replicas, placed_anew, slots_at_home
from dsjax.sharding import MeshConfig, make_mesh
from dsjax.train import pretrain
from dsjax.train.pretrain import Pretrain, build, expert_placement, place_batch


def replicated(model: DecoderConfig, num: int) -> DecoderConfig:
    groups = tuple(
        dataclasses.replace(g, ffn=dataclasses.replace(g.ffn, num_replicas=num)) if isinstance(g.ffn, MoEConfig) else g
        for g in model.groups
    )
    return dataclasses.replace(model, groups=groups)


def with_places(num: int, mesh: str) -> Pretrain:
    config = dataclasses.replace(small(capacity=1.0), model=replicated(small(capacity=1.0).model, num))
    return apply_overrides(config, [f"mesh={mesh}"])


# ---------------------------------------------------------------- training


def losses(config: Pretrain, devices: list | None = None) -> tuple[list[float], list[np.ndarray]]:
    """Of four steps, behind each of which the experts are placed anew if they have places; and their replicas."""
    mesh, trainer = build(config, devices)
    state, out, replicas, place = trainer.init(0), [], [], expert_placement(config, mesh)
    for i in range(4):
        state, metrics = trainer.step(state, place_batch(random_batch(config, i), mesh), jnp.int32(20))
        out.append(float(metrics["loss"]))
        assert metrics["router/group_1/unaccounted"] == 0
        if place is not None:
            state = place(state)
            replicas.append(np.asarray(state.buffers["group_1"]["ffn"]["replicas"]))
    assert trainer.step._cache_size() == 1  # no placement compiles anything
    return out, replicas


TWO_LEVELS = pytest.param("data=2,expert=4,expert_over_data=true", marks=pytest.mark.slow)


@pytest.mark.parametrize("mesh", ["fsdp=2,expert=4", TWO_LEVELS])
def test_training_with_replicas_has_the_losses_without(mesh: str) -> None:
    alone = dataclasses.replace(small(capacity=1.0), mesh=MeshConfig(data=1))
    found, replicas = losses(with_places(8, mesh))
    # rtol: float32 sums in another order, as in test_sharding
    np.testing.assert_allclose(found, losses(alone, jax.devices()[:1])[0], rtol=1e-5)
    assert any((a != b).any() for a, b in itertools.pairwise(replicas))


def test_without_replicas_there_is_nothing_of_them() -> None:
    mesh, trainer = build(small(), jax.devices()[:1])
    assert trainer.shapes.buffers == {}
    assert expert_placement(small(), mesh) is None


def test_replicas_that_do_not_divide_are_said() -> None:
    mesh, trainer = build(with_places(3, "fsdp=4,expert=2"))
    batch = place_batch(random_batch(small(), 0), mesh)
    with pytest.raises(UserError, match="num_replicas is 3; it must divide over the 2 devices of mesh expert=2"):
        trainer.step.lower(trainer.shapes, batch, jnp.int32(20))


def test_placing_anew_goes_by_the_loads_of_each_layer() -> None:
    """Against the busiest device without and with replicas, in a skewed stack of two layers."""
    load_LE = np.array([[90, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 50, 40]], np.float32)
    ffn = {"replicas": jnp.zeros((2, 4)), "mean_load": jnp.asarray(load_LE)}
    other = {"ffn": {"selection_bias": jnp.ones(3)}}
    further = {"critic": {"group_1": {"ffn": ffn}}, "multi_token": {"block": {"ffn": ffn}}}
    found = placed_anew({"group_0": other, "group_1": {"ffn": ffn}, **further}, 4)
    assert found["group_0"] == other
    assert (ffn["replicas"] == 0).all()
    replicas_LR = np.asarray(found["group_1"]["ffn"]["replicas"])
    np.testing.assert_array_equal(replicas_LR, place_replicas(load_LE, 4, 4))
    for placed in (found["critic"]["group_1"], found["multi_token"]["block"]):
        np.testing.assert_array_equal(placed["ffn"]["replicas"], replicas_LR)
    assert replicas_LR[0].tolist() == [0, 0, 0, 0]
    for load_E, replicas_R in zip(load_LE, replicas_LR, strict=True):
        slots_P = np.asarray(slots_at_home(jnp.asarray(replicas_R, jnp.int32), 8, 4))
        assert slots_P.reshape(4, 3)[:, :2].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
        busiest = device_loads(Placement(slots_P, 8), load_E, 4).max()
        assert busiest < 0.5 * load_E.reshape(4, 2).sum(axis=1).max()


def test_a_run_places_experts_and_a_resumed_one_where_it_would_have(tmp_path: pathlib.Path) -> None:
    """What the checkpoint holds is what was measured, and the places that follow from it."""
    config = changed(small_moe(), train={"place_every": 2}, checkpoint={"every": 3})
    config = dataclasses.replace(config, model=replicated(config.model, 2), mesh=MeshConfig(data=-1, expert=2))
    assert pretrain.run(config, tmp_path / "whole", quiet=True) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / str(step))
    assert pretrain.run(config, tmp_path / "resumed", quiet=True) == 0

    def buffers(run: str, step: int) -> tuple[np.ndarray, np.ndarray]:
        arrays = saved(tmp_path / run, step)[0]
        replicas, load = (next(x for n, x in arrays.items() if n.endswith(end)) for end in ("/replicas", "/mean_load"))
        return replicas, load

    replicas_LR, load_LE = buffers("whole", 8)
    np.testing.assert_array_equal(replicas_LR, place_replicas(load_LE, 2, 2))
    # Rows have 8 * 16 places, nearly all of them with tokens, of two experts each; the mean begins with 0.
    pairs = load_LE.sum() / (1 - MEMORY**8)
    assert 0.8 * 256 < pairs <= 256 * (1 + 1e-6)
    np.testing.assert_array_equal(buffers("resumed", 8)[0], replicas_LR)
    # float32 sums by threads in any order may turn a near tie of the router: a pair or two
    np.testing.assert_allclose(buffers("resumed", 8)[1], load_LE, atol=2)
    ends = [training_records(tmp_path / run)[-1]["loss"] for run in ("whole", "resumed")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


# ---------------------------------------------------------------- decoding

MODEL = DecoderConfig(V, 16, num_layers=2, groups=(LayerGroup(MoEConfig(num_experts=4, d_ff=8), ATTENTION),))
PROMPTS = random_tokens(8, 12)
IDS = np.ones_like(PROMPTS)
IDS[1, 9:] = IDS[4, 3:] = 0


def decoded(model: Any, variables: Any, mesh: str, rows: int) -> tuple[np.ndarray, str]:
    """Logits behind the prompts and behind each of three greedy tokens; the compiled step."""
    devices = jax.devices()[:1] if mesh == "data=1" else None
    placed = make_mesh(apply_overrides(MeshConfig(data=1), mesh.split(",")), devices)
    made = _generator(model, variables, placed, rows, 21)
    params = made.place(variables)
    now, cache = made.prefill(params, made.place_rows(PROMPTS[:rows]), made.place_rows(IDS[:rows]))
    out = [np.asarray(now)]
    for _ in range(3):
        now, cache = made.decode_step(params, made.place_rows(out[-1].argmax(-1).astype(np.int32)), cache)
        out.append(np.asarray(now))
    return np.stack(out), made.decode_step.trace(*made.decode_shapes()).lower().compile().as_text()


@pytest.mark.parametrize("rows", [8, pytest.param(2, marks=pytest.mark.slow)], ids=["rows cut", "same rows"])
def test_decoding_with_replicas_has_the_logits_without_and_sends_no_weight(rows: int) -> None:
    variables = weights(MODEL)
    loads = measured_loads(graph(MODEL), variables, PROMPTS, IDS)
    assert loads["group_0"].shape == (2, 4)
    assert loads["group_0"].sum(axis=1).tolist() == [2 * IDS.sum()] * 2  # of the prompts alone: two experts a token
    # Made for two devices, and the same on four.
    model, placed = with_replicas(graph(MODEL), variables, loads, num_replicas=4, num_devices=2)
    assert placed["group_0"]["ffn"]["w_gate"].shape[:2] == (2, 8)
    want, _ = decoded(graph(MODEL), variables, "data=1", rows)
    got, text = decoded(model, placed, "data=2,expert=4", rows)
    # float32 sums in another order; a logit near 0 is a difference of such, so that errors go with the largest logit
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert "reduce-scatter" not in text


@pytest.mark.slow
def test_decoding_fetches_the_weights_of_replicas_that_were_not_placed() -> None:
    """The control of the test above: with the same replicas, but weights of experts as in training."""
    variables = weights(MODEL)
    loads = measured_loads(graph(MODEL), variables, PROMPTS, IDS)
    model, placed = with_replicas(graph(MODEL), variables, loads, num_replicas=4, num_devices=4)
    replicas_LR = jnp.asarray(place_replicas(loads["group_0"], 4, 4), jnp.float32)
    only = {"replicas": replicas_LR, "mean_load": placed["group_0"]["ffn"]["mean_load"]}
    unplaced = variables | {"group_0": variables["group_0"] | {"ffn": variables["group_0"]["ffn"] | only}}
    got, text = decoded(model, unplaced, "data=2,expert=4", 8)
    want, _ = decoded(graph(MODEL), variables, "data=1", 8)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert "reduce-scatter" in text


SPECULATIVE = dataclasses.replace(MODEL, multi_token=MultiTokenConfig(1), values="decoder")


@functools.partial(jax.jit, static_argnums=0)
def hidden(definition: Any, variables: Any) -> list[jax.Array]:
    """Of the prompts, and of the module that drafts."""
    model, tokens_BT = nnx.merge(definition, variables), jnp.asarray(PROMPTS)
    out = model(tokens_BT)
    return [out.hidden_BTD, *model.further_hidden(out, tokens_BT, Documents.single(tokens_BT))[0]]


def test_a_layout_is_the_same_model_on_other_devices_and_again_for_other_loads() -> None:
    """Made for two devices, run on one; then made anew. The model drafts, and has a critic in training."""
    variables = weights(SPECULATIVE)
    load_LE = np.array([[90, 1, 1, 1], [1, 1, 50, 40]])
    once = with_replicas(graph(SPECULATIVE), variables, {"group_0": load_LE}, num_replicas=4, num_devices=2)
    assert once[1]["multi_token"]["block"]["ffn"]["replicas"].shape == (1, 8)
    again = with_replicas(*once, {"group_0": load_LE[:, ::-1]}, num_replicas=2, num_devices=1)
    assert again[1]["group_0"]["ffn"]["replicas"].tolist() == [[0, 1, 2, 3, 3, 3], [0, 1, 2, 3, 1, 0]]
    for got, right in zip(hidden(*once), hidden(graph(SPECULATIVE), variables), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    for _, placed in (once, again):
        for ffn_of in (lambda x: x["group_0"]["ffn"], lambda x: x["multi_token"]["block"]["ffn"]):
            slots_LP = np.asarray(ffn_of(placed)["replicas"], int)
            want = np.take_along_axis(np.asarray(ffn_of(variables)["w_up"]), slots_LP[..., None, None], axis=1)
            np.testing.assert_array_equal(ffn_of(placed)["w_up"], want)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_replicas": 0}, "num_replicas is 0; it must be at least 1"),
        ({"num_devices": 0}, "num_devices is 0; it must be at least 1"),
        ({"num_devices": 3}, "num_replicas is 4; it must divide over 3 devices"),
        ({"loads": {"group_7": np.ones((2, 4))}}, "loads has group_7; the groups of experts are: group_0"),
        ({"loads": {"group_0": np.ones((2, 8))}}, r"loads\[group_0\] has shape \(2, 8\); .* of it are \(2, 4\)"),
        ({"loads": {"group_0": np.ones((1, 4))}}, r"loads\[group_0\] has shape \(1, 4\); .* of it are \(2, 4\)"),
    ],
)
def test_a_layout_that_does_not_go_with_the_model_is_refused(changes: dict[str, Any], sentence: str) -> None:
    given = {"loads": {"group_0": np.ones((2, 4))}, "num_replicas": 4, "num_devices": 4} | changes
    with pytest.raises(UserError, match=sentence):
        with_replicas(graph(MODEL), weights(MODEL), **given)
