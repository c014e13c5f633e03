"""Router decisions that are told and used again: in the model, on devices, with capacities, in every gradient."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ATTENTION, DENSE, V, graph, random_tokens, weights

from dsjax.config import UserError
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.masks import Documents
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoE, MoEConfig
from dsjax.nn.router import agreement, chosen_weights, replayed
from dsjax.sharding import MeshConfig, make_mesh, use_mesh
from pallas_kernels.expert_dispatch import top_k_route

HEADS = dataclasses.replace(ATTENTION, num_heads=4, num_kv_heads=4, qk_norm=False, conv_taps=0)
LATENT = LatentAttentionConfig(num_heads=4, q_rank=8, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=4)
SOFTMAX = MoEConfig(num_experts=8, top_k=2, d_ff=8, num_shared_experts=1, balance_coef=0.01)
SIGMOID = MoEConfig(
    num_experts=8, top_k=2, d_ff=8, scoring="sigmoid", num_groups=4, top_groups=2, group_score="top2",
    routed_scale=2.5, bias_update_rate=0.01, balance_coef=0.0, sequence_coef=0.01, z_coef=0.01,
)  # fmt: skip
MODELS = {
    "softmax": DecoderConfig(V, 16, 3, (LayerGroup(MLPConfig(24), HEADS, 1), LayerGroup(SOFTMAX, HEADS))),
    "V3": DecoderConfig(V, 16, 3, (LayerGroup(MLPConfig(24), LATENT, 1), LayerGroup(SIGMOID, LATENT))),
    "two kinds": DecoderConfig(
        V, 16, 3,
        (LayerGroup(SOFTMAX, HEADS, 1), LayerGroup(dataclasses.replace(SIGMOID, top_k=1), HEADS)),
    ),
}  # fmt: skip
B, T = 2, 12


def batch(seed: int = 0) -> tuple[jax.Array, Documents]:
    """Two rows, the second with padding at its end; of one document each."""
    ids_BT = np.ones((B, T), np.int32)
    ids_BT[1, 9:] = 0
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return jnp.asarray(random_tokens(B, T, seed, V)), Documents(jnp.asarray(ids_BT), jnp.asarray(positions_BT))


def other_experts(told_BTLK: Any, seed: int = 1) -> np.ndarray:
    """Different experts for every decision that was made, drawn at random."""
    rng, out = np.random.default_rng(seed), np.array(told_BTLK)
    for place in np.ndindex(out.shape[:3]):
        made = out[place] >= 0
        out[place][made] = rng.permutation(8)[: made.sum()]
    return out


# How each is computed: written out, as a scan, and as a scan over groups that differ; both ways of remat.
COMPUTE: dict[str, dict[str, Any]] = {
    "softmax": {"unroll": True, "remat": "full"},
    "V3": {"remat": "dots"},
    "two kinds": {},
}


@functools.cache
def run(name: str) -> Any:
    """(params, experts) -> (loss, (hidden, told and own decisions, loads)), gradients; compiled once for each model."""
    definition, (tokens_BT, documents) = graph(MODELS[name], **COMPUTE[name]), batch()

    def loss(params: Any, experts_BTLK: Any) -> Any:
        out = nnx.merge(definition, params)(tokens_BT, documents, experts_BTLK=experts_BTLK, tell_experts=True)
        total = jnp.mean(jnp.sin(jnp.arange(16.0)) * out.hidden_BTD * documents.ids_BT[..., None])
        total += sum(out.losses.values())
        return total, (out.hidden_BTD, out.experts_BTLK, out.own_experts_BTLK, out.loads)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def free(name: str) -> np.ndarray:
    """Nothing is decided."""
    return np.full((B, T, *MODELS[name].decisions), -1, np.int16)


@functools.cache
def freely(name: str) -> Any:
    return run(name)(weights(MODELS[name]), free(name))


# ---------------------------------------------------------------- in the model


@pytest.mark.parametrize("name", ["softmax", "V3", pytest.param("two kinds", marks=pytest.mark.slow)])
def test_a_model_that_is_given_its_own_decisions_does_the_same(name: str) -> None:
    """Losses, loads and gradients, that of the router included; and what was given is what it would have chosen."""
    cfg = MODELS[name]
    (loss, (hidden, told, own, loads)), grads = freely(name)
    assert told.shape == (B, T, *cfg.decisions) == (B, T, 3 if name == "two kinds" else 2, 2)
    assert told.dtype == np.int16
    np.testing.assert_array_equal(told, own)
    assert (np.asarray(told)[1, 9:] == -1).all(), "padding goes nowhere"
    (loss2, (hidden2, told2, own2, loads2)), grads2 = run(name)(weights(cfg), np.asarray(told))
    # It is the same program, and the same numbers go through it.
    jax.tree.map(np.testing.assert_array_equal, (told2, own2, loads2, hidden2, loss2), (told, own, loads, hidden, loss))
    jax.tree.map(np.testing.assert_array_equal, grads2, grads)
    assert np.abs(grads["group_1"]["ffn"]["w_router"]).max() > 1e-5


def test_a_model_that_is_asked_for_nothing_computes_what_it_did() -> None:
    """Another program, so that sums have another order: three layers of float32 numbers up to 2."""
    model = nnx.merge(graph(MODELS["V3"]), weights(MODELS["V3"]))
    out = jax.jit(lambda: model(*batch()))()
    (_, (hidden, _, _, loads)), _ = freely("V3")
    np.testing.assert_allclose(out.hidden_BTD, hidden, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, out.loads, loads)
    assert out.experts_BTLK is None
    assert out.own_experts_BTLK is None


@pytest.mark.parametrize("name", ["softmax", "V3", pytest.param("two kinds", marks=pytest.mark.slow)])
def test_other_decisions_are_used_told_and_counted(name: str) -> None:
    (_, (hidden, told, _, _)), _ = freely(name)
    experts = other_experts(told)
    (_, (hidden2, told2, own2, loads)), grads = run(name)(weights(MODELS[name]), experts)
    np.testing.assert_array_equal(told2, experts)
    assert (np.asarray(own2) != experts).any()
    np.testing.assert_array_equal(np.asarray(own2)[:, :, 0], np.asarray(told)[:, :, 0])  # it sees the same
    assert np.abs(np.asarray(hidden2 - hidden)[0]).max() > 1e-2
    counted = np.concatenate(list(loads.values()))
    layers = np.moveaxis(experts, 2, 0)
    np.testing.assert_array_equal(counted, [np.bincount(chosen[chosen >= 0], minlength=8) for chosen in layers])
    assert np.abs(grads["group_1"]["ffn"]["w_router"]).max() > 1e-5


def test_one_decision_of_one_layer_changes_that_and_what_sees_it() -> None:
    """At position 5 of row 0: no position before it, and no other row."""
    (_, (hidden, told, _, _)), _ = freely("V3")
    experts = np.array(told)
    experts[0, 5, 1] = [e for e in range(8) if e not in experts[0, 5, 1]][:2]
    changed = run("V3")(weights(MODELS["V3"]), experts)[0][1][0]
    off_BT = np.abs(np.asarray(changed - hidden)).max(axis=-1)
    assert off_BT[0, 5] > 1e-3
    assert (off_BT[0, :5] == 0).all()
    assert (off_BT[1] == 0).all()


def test_where_nothing_was_decided_the_router_decides() -> None:
    (_, (_, told, _, _)), _ = freely("softmax")
    mixed = other_experts(told)
    mixed[0, 3:] = -1
    (_, (_, told2, own2, _)), _ = run("softmax")(weights(MODELS["softmax"]), mixed)
    np.testing.assert_array_equal(np.asarray(told2)[0, :3], mixed[0, :3])
    np.testing.assert_array_equal(np.asarray(told2)[0, 3:], np.asarray(own2)[0, 3:])


def test_a_shape_that_does_not_fit_is_refused() -> None:
    model = nnx.merge(graph(MODELS["V3"]), weights(MODELS["V3"]))
    tokens_BT, documents = batch()
    with pytest.raises(UserError, match=r"experts_BTLK has shape \(2, 12, 3, 2\); .* model: \(2, 12, 2, 2\)"):
        model(tokens_BT, documents, experts_BTLK=jnp.zeros((2, 12, 3, 2), jnp.int16))
    dense = nnx.merge(graph(DENSE), weights(DENSE))
    with pytest.raises(UserError, match=r"for these tokens and this model: \(2, 12, 0, 0\)"):
        dense(tokens_BT, documents, experts_BTLK=jnp.zeros((2, 12, 2, 2), jnp.int16))


def test_a_model_without_experts_has_nothing_to_tell() -> None:
    model = nnx.merge(graph(DENSE), weights(DENSE))
    out = jax.eval_shape(lambda: model(*batch(), tell_experts=True))
    assert out.experts_BTLK is None
    assert out.own_experts_BTLK is None


def test_modules_of_multi_token_prediction_decide_for_themselves() -> None:
    """L counts the layers of the model alone; and a step that runs no modules leaves their biases as they are."""
    cfg = dataclasses.replace(MODELS["V3"], multi_token=MultiTokenConfig())
    model, (tokens_BT, documents) = nnx.merge(graph(cfg), weights(cfg)), batch()
    out = jax.jit(lambda: model(tokens_BT, documents, experts_BTLK=jnp.asarray(free("V3")), tell_experts=True))()
    assert out.experts_BTLK.shape == (B, T, 2, 2)
    moved = model.moved_buffers({name: stats.sums for name, stats in out.router.items()})
    before = model.multi_token.block.ffn.selection_bias[...]
    np.testing.assert_array_equal(moved["multi_token"]["block"]["ffn"]["selection_bias"], before)
    assert (moved["group_1"]["ffn"]["selection_bias"] != model.group_1.ffn.selection_bias[...]).any()


# ---------------------------------------------------------------- one layer, against loops


def layer(cfg: MoEConfig, seed: int = 0) -> MoE:
    made = MoE(cfg, 6, rngs=nnx.Rngs(seed))
    if cfg.has_bias:
        made.selection_bias[...] = 0.3 * jax.random.normal(jax.random.key(seed), (cfg.num_experts,))
    return made


@pytest.mark.parametrize(
    "cfg", [dataclasses.replace(SOFTMAX, num_shared_experts=0), SIGMOID], ids=["softmax", "sigmoid"]
)
def test_outputs_and_gradients_are_those_of_a_loop_over_the_given_experts(cfg: MoEConfig) -> None:
    moe, x_BTD = layer(cfg), jax.random.normal(jax.random.key(1), (1, 5, 6))
    given_BTX = np.array([[[7, 0], [1, 2], [3, 4], [0, 7], [5, 2]]], np.int16)
    graph_, state = nnx.split(moe)

    def by_layer(state: Any, x_BTD: Any) -> jax.Array:
        y_BTD, _ = nnx.merge(graph_, state)(x_BTD, jnp.ones((1, 5)), experts_BTX=jnp.asarray(given_BTX))
        return jnp.sum(y_BTD * jnp.cos(jnp.arange(6.0))), y_BTD

    def by_loop(state: Any, x_BTD: Any) -> jax.Array:
        m, rows = nnx.merge(graph_, state), []
        scores_TE = x_BTD[0] @ m.w_router[...]
        scores_TE = jax.nn.softmax(scores_TE) if cfg.scoring == "softmax" else jax.nn.sigmoid(scores_TE)
        for t, experts in enumerate(given_BTX[0].tolist()):
            total, y = sum(scores_TE[t, e] for e in experts), 0.0
            for e in experts:
                inner = jax.nn.silu(x_BTD[0, t] @ m.w_gate[...][e]) * (x_BTD[0, t] @ m.w_up[...][e])
                y += cfg.routed_scale * scores_TE[t, e] / total * (inner @ m.w_down[...][e])
            rows.append(y)
        y_BTD = jnp.stack(rows)[None]
        return jnp.sum(y_BTD * jnp.cos(jnp.arange(6.0))), y_BTD

    (_, found), grads = jax.value_and_grad(by_layer, argnums=(0, 1), has_aux=True)(state, x_BTD)
    (_, expected), grads2 = jax.value_and_grad(by_loop, argnums=(0, 1), has_aux=True)(state, x_BTD)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)  # float32, another order of sums
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), grads, grads2)


def test_a_capacity_drops_what_is_behind_it_of_the_given_decisions() -> None:
    """All tokens are sent to experts 0 and 1, which have room for four pairs each: the first four tokens."""
    moe = layer(dataclasses.replace(SOFTMAX, num_shared_experts=0))
    moe.capacity_factor = 1.0  # 16 tokens * 2 / 8 experts: 4 pairs
    x_BTD, given_BTX = jax.random.normal(jax.random.key(1), (1, 16, 6)), jnp.tile(jnp.array([0, 1]), (1, 16, 1))
    y_BTD, stats = moe(x_BTD, jnp.ones((1, 16)), experts_BTX=given_BTX)
    assert stats.sums.load_E.tolist() == [16, 16] + [0] * 6
    assert stats.sums.kept_E.tolist() == [4, 4] + [0] * 6
    assert stats.sums.dropped_E.tolist() == [12, 12] + [0] * 6
    assert (np.abs(np.asarray(y_BTD[0])).max(axis=-1) > 0).tolist() == [True] * 4 + [False] * 12


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_decision_is_used_if_it_names_different_experts_and_the_token_counts(data: st.DataObject) -> None:
    """Against loops: -1, numbers out of range, and one expert twice are no decisions."""
    tokens, E, X = data.draw(st.integers(1, 6)), 5, data.draw(st.integers(1, 3))
    experts = np.array(data.draw(st.lists(st.lists(st.integers(-1, E), min_size=X, max_size=X), min_size=tokens,
                                          max_size=tokens)), np.int16)  # fmt: skip
    counted = np.array(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    scores = np.random.default_rng(tokens).uniform(0.1, 1, (tokens, E)).astype(np.float32)
    own = top_k_route(jnp.asarray(scores), X, counted_T=jnp.asarray(counted))
    found = replayed(own, jnp.asarray(scores), jnp.asarray(experts))
    counts = [0] * E
    for t in range(tokens):
        decided = len({e for e in experts[t].tolist() if 0 <= e < E}) == X
        expected = experts[t].tolist() if decided else np.argsort(-scores[t], kind="stable")[:X].tolist()
        expected = expected if counted[t] else [E] * X
        assert found.experts_TX[t].tolist() == expected
        for x, e in enumerate(expected):
            assert found.scores_TX[t, x] == (scores[t, e] if e < E else 0)
            if e < E:
                assert found.position_TX[t, x] == counts[e]
                counts[e] += 1
    assert found.counts_E.tolist() == counts
    # Weights that are normalised add up to 1 wherever a token goes.
    total = np.asarray(chosen_weights(found.scores_TX, normalize=True, scale=1.0)).sum(axis=1)
    np.testing.assert_allclose(total, counted.astype(float), atol=1e-6)  # float32


# ---------------------------------------------------------------- on devices


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("V3", {"expert": 2, "tensor": 2, "context": 2}),
        pytest.param("softmax", {"data": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param("softmax", {"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_use_and_tell_the_same(name: str, axes: dict[str, int]) -> None:
    definition, params = graph(MODELS[name]), weights(MODELS[name])
    tokens_BT, documents = jax.tree.map(lambda x: jnp.tile(x, (4, 1)), batch())

    def forward(mesh: Any) -> Any:
        @jax.jit
        def run(params: Any, experts_BTLK: Any) -> Any:
            with use_mesh(mesh):
                out = nnx.merge(definition, params)(tokens_BT, documents, experts_BTLK=experts_BTLK, tell_experts=True)
            return out.hidden_BTD, out.experts_BTLK, out.own_experts_BTLK, out.loads

        return run

    alone, many = forward(None), forward(make_mesh(MeshConfig(**({"data": 1} | axes))))
    undecided = jnp.tile(free(name), (4, 1, 1, 1))
    for experts in (undecided, jnp.asarray(other_experts(alone(params, undecided)[1]))):
        (hidden, *rest), (hidden8, *rest8) = alone(params, experts), many(params, experts)
        jax.tree.map(np.testing.assert_array_equal, rest8, rest)
        np.testing.assert_allclose(hidden8, hidden, rtol=1e-4, atol=1e-5)  # float32, sums over devices


# ---------------------------------------------------------------- agreement


def test_agreement_is_of_sets() -> None:
    told = np.array([[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]])  # one row, two positions, two layers
    mask = np.array([[1, 1]])
    assert agreement(told, told[..., ::-1], mask) == 1.0  # another order
    other = told.copy()
    other[0, 1, 1] = [7, 1]
    assert agreement(told, other, mask) == pytest.approx(7 / 8)
    assert agreement(told, other, np.array([[1, 0]])) == 1.0
    assert agreement(told, other, np.array([[0, 1]])) == pytest.approx(3 / 4)
    assert agreement(told, other, np.array([[3.0, 1.0]])) == pytest.approx((3 * 4 + 3) / (3 * 4 + 4))
    told[0, 1, 1] = -1  # nothing was decided there
    assert agreement(told, other, mask) == 1.0
    assert agreement(told, told + 8, mask) == 0.0
    assert agreement(np.full_like(told, -1), other, mask) == 1.0
    assert agreement(told, other, np.zeros((1, 2))) == 1.0
    assert agreement(jnp.asarray(told, jnp.int16), jnp.asarray(other, jnp.int16), jnp.ones((1, 2), bool)) == 1.0
