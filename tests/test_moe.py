"""The layer of experts: a loop over tokens and experts, for every way to route and any capacity."""

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

from dsjax.config import UserError, validate
from dsjax.nn.mlp import MLP
from dsjax.nn.moe import DynamicCapacity, MoE, MoEConfig, set_capacity
from dsjax.nn.routing_losses import EntropyConstraint
from dsjax.sharding import INFERENCE, MeshConfig, Rules, make_mesh, use_mesh

D, F = 6, 4
B, T, E = 3, 7, 8


def moe(cfg: MoEConfig, *, factor: float | None = None, width: int = D) -> MoE:
    layer = MoE(cfg, width, rngs=nnx.Rngs(0))
    layer.capacity_factor = factor
    if cfg.bias_update_rate:
        layer.selection_bias[...] = jnp.asarray(np.random.default_rng(5).normal(size=cfg.num_experts) * 0.2)
    return layer


@jax.jit
def run(layer: MoE, x: jax.Array, counted: jax.Array) -> Any:
    """Outputs and statistics, compiled."""
    return layer(x, counted)


def scores_of(cfg: MoEConfig, logits: Any) -> Any:
    return jax.nn.softmax(logits) if cfg.scoring == "softmax" else jax.nn.sigmoid(logits)


def chosen_by_hand(cfg: MoEConfig, scores: np.ndarray, bias: np.ndarray) -> list[int]:
    """The experts of one token, best first."""
    size = cfg.num_experts // cfg.num_groups
    groups = np.split(scores + bias, cfg.num_groups)
    best = [np.sort(group)[::-1][: 1 if cfg.group_score == "max" else 2].sum() for group in groups]
    kept = np.argsort(-np.array(best), kind="stable")[: cfg.top_groups]
    allowed = [e for e in range(cfg.num_experts) if e // size in kept]
    return sorted(allowed, key=lambda e: (-(scores + bias)[e], e))[: cfg.top_k]


def choices_by_hand(layer: MoE, x: np.ndarray, counted: np.ndarray, room: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Which experts each token chose, and which of those computed it: two masks B x T x E."""
    cfg = layer.cfg
    scores = np.asarray(scores_of(cfg, jnp.asarray(x) @ layer.w_router[...]))
    bias = np.asarray(layer.selection_bias[...]) if cfg.bias_update_rate else np.zeros(cfg.num_experts)
    chosen, kept = np.zeros(scores.shape, bool), np.zeros(scores.shape, bool)
    for b, t in np.argwhere(counted > 0):
        for e in chosen_by_hand(cfg, scores[b, t], bias):
            kept[b, t, e] = room is None or chosen[..., e].sum() < room
            chosen[b, t, e] = True
    return chosen, kept


def dense(cfg: MoEConfig, chosen: np.ndarray, kept: np.ndarray, weights: dict[str, Any], x: Any) -> Any:
    """The layer with every expert computing every token, and what was not kept multiplied by 0."""
    scores = jnp.where(chosen, scores_of(cfg, x @ weights["w_router"]), 0)
    if cfg.normalize_weights:
        total = jnp.sum(scores, axis=-1, keepdims=True)
        scores = scores / jnp.where(total > 0, total, 1)
    gates = jnp.where(kept, cfg.routed_scale * scores, 0)
    h = jax.nn.silu(jnp.einsum("BTD,EDF->BTEF", x, weights["w_gate"]))
    h = h * jnp.einsum("BTD,EDF->BTEF", x, weights["w_up"])
    y = jnp.einsum("BTEF,EFD,BTE->BTD", h, weights["w_down"], gates)
    if cfg.num_shared_experts:
        shared = weights["shared"]
        y = y + (jax.nn.silu(x @ shared["w_gate"]) * (x @ shared["w_up"])) @ shared["w_down"]
    return y


PADDED = np.ones((B, T), np.float32)
PADDED[0, 5:] = PADDED[2, :] = 0  # the end of a row, and a row
KINDS = {
    "plain": ({}, None),
    "deepseek_v2": ({"num_groups": 4, "top_groups": 2, "normalize_weights": False, "routed_scale": 16.0}, None),
    "deepseek_v3": (
        {
            "scoring": "sigmoid",
            "num_groups": 4,
            "top_groups": 2,
            "group_score": "top2",
            "routed_scale": 2.5,
            "bias_update_rate": 0.1,
            "num_shared_experts": 1,
            "top_k": 3,
        },
        None,
    ),
    "biased": ({"bias_update_rate": 0.1, "routed_scale": 1.5}, None),
    "shared": ({"num_shared_experts": 2}, 0.7),
    "tight": ({"scoring": "sigmoid"}, 0.5),
    "one_each": ({"top_k": 1}, 0.01),
    "roomy": ({}, 100.0),
    "all": ({"top_k": 8}, 1.0),
}


@pytest.mark.parametrize("name", KINDS)
def test_outputs_gradients_and_counts_are_those_of_a_loop(name: str) -> None:
    options, factor = KINDS[name]
    cfg = MoEConfig(**{"num_experts": E, "top_k": 2, "d_ff": F} | options)
    layer, x = moe(cfg, factor=factor), jax.random.normal(jax.random.key(1), (B, T, D)) * 2
    room = None if factor is None else max(1, int(np.ceil(factor * B * T * cfg.top_k / E)))
    chosen, kept = choices_by_hand(layer, np.asarray(x), PADDED, room)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    weights, scale = nnx.to_pure_dict(params), jax.random.normal(jax.random.key(2), (B, T, D))

    @jax.jit
    def ours(weights, x):
        y, stats = nnx.merge(graph, weights, rest)(x, jnp.asarray(PADDED))
        return jnp.sum(scale * y), (y, stats.sums)

    @jax.jit
    def want(weights, x):
        y = dense(cfg, chosen, kept, weights, x)
        return jnp.sum(scale * y), y

    (_, (y, sums)), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(weights, x)
    (_, y_want), gradients_want = jax.value_and_grad(want, argnums=(0, 1), has_aux=True)(weights, x)
    # Float32 sums over D, F and experts in another order; values up to about 100 with V2's scale of 16.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(y, y_want)
    jax.tree.map(close, gradients, gradients_want)
    assert sums.load_E.tolist() == chosen.sum(axis=(0, 1)).tolist()
    assert sums.kept_E.tolist() == kept.sum(axis=(0, 1)).tolist()
    assert sums.dropped_E.tolist() == (chosen & ~kept).sum(axis=(0, 1)).tolist()
    assert (int(sums.tokens), int(sums.pairs)) == (PADDED.sum(), PADDED.sum() * cfg.top_k)
    if name in ("tight", "shared", "one_each"):
        assert int(sums.dropped_E.sum()) > 0, "nothing was dropped: the test says nothing of it"


def test_one_expert_is_a_dense_layer() -> None:
    layer, alone = moe(MoEConfig(num_experts=1, top_k=1, d_ff=F)), MLP(D, F, rngs=nnx.Rngs(1))
    for name in MoE.EXPERTS:
        getattr(alone, name)[...] = getattr(layer, name)[...][0]
    x = jax.random.normal(jax.random.key(1), (2, 5, D))
    np.testing.assert_allclose(run(layer, x, jnp.ones((2, 5)))[0], alone(x), rtol=1e-5, atol=1e-6)


def test_padding_visits_no_routed_expert() -> None:
    layer, x = moe(MoEConfig(num_experts=E, d_ff=F)), jax.random.normal(jax.random.key(1), (B, T, D))
    assert not np.asarray(run(layer, x, jnp.asarray(PADDED))[0])[PADDED == 0].any()
    nothing, stats = run(layer, x, jnp.zeros((B, T)))
    assert not np.asarray(nothing).any()
    assert not stats.load_E.any()


# ---------------------------------------------------------------- conservation


@functools.cache
def looking(factor: float | None, top_k: int) -> Any:
    """A layer whose logits are its inputs, jitted: (logits, counted) -> sums, and the sum of squares of a gradient."""
    cfg = MoEConfig(num_experts=E, top_k=top_k, d_ff=F, scoring="sigmoid")
    layer = moe(cfg, factor=factor, width=E)
    layer.w_router[...] = jnp.eye(E)

    @jax.jit
    def run(x, counted):
        def loss(x):
            y, stats = layer(x, counted)
            return jnp.sum(y**2), stats.sums

        gradient, sums = jax.grad(loss, has_aux=True)(x)
        return sums, jnp.sum(gradient**2)

    return run


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from([None, 0.01, 0.5, 1.0, 2.0]),
    st.sampled_from([1, 3]),
    st.sampled_from(["normal", "same expert", "ties", "extreme", "infinite"]),
    st.integers(0, 10**6),
)
def test_dispatched_and_dropped_are_all_pairs(factor: float | None, top_k: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = {
        "normal": rng.normal(size=(B, T, E)),
        "same expert": rng.normal(size=(B, T, E)) + 9 * np.eye(E)[0],
        "ties": rng.integers(0, 2, (B, T, E)),
        "extreme": rng.normal(size=(B, T, E)) * 1e4,
        "infinite": rng.choice([0.0, np.inf, -np.inf, np.nan], (B, T, E)),
    }[kind]
    counted = (rng.random((B, T)) < rng.random()).astype(np.float32)
    sums, size = looking(factor, top_k)(jnp.asarray(logits, jnp.float32), counted)
    assert sums.kept_E.sum() + sums.dropped_E.sum() == counted.sum() * top_k == sums.load_E.sum()
    if factor is not None:
        assert sums.kept_E.max() <= max(1, np.ceil(factor * B * T * top_k / E))
    if kind != "infinite":
        assert np.isfinite(size)
        assert np.isfinite(sums.entropy)


def test_what_each_factor_would_drop_is_what_it_drops() -> None:
    cfg = MoEConfig(num_experts=E, top_k=2, d_ff=F, capacity=DynamicCapacity((0.5, 0.75, 1.5)))
    x = jax.random.normal(jax.random.key(1), (B, T, D)) * 2
    for factor in (None, 0.5, 0.75, 1.5):
        sums = run(moe(cfg, factor=factor), x, jnp.asarray(PADDED))[1].sums
        told = {name: int(dropped) for name, dropped in sums.dropped_at.items()}
        if factor is None:
            want = told
            assert int(sums.dropped_E.sum()) == 0
            assert told["0.5"] > told["0.75"] > told["1.5"] == 0
        else:
            assert int(sums.dropped_E.sum()) == told[str(factor)]
        assert told == want  # whichever is in force


def test_a_trainer_turns_capacities_on_and_nothing_else_does() -> None:
    for capacity, dynamic, want in ((None, 1.5, None), (1.25, 1.5, 1.25), (DynamicCapacity(), 1.5, 1.5)):
        layer = moe(MoEConfig(num_experts=E, d_ff=F, capacity=capacity))
        assert layer.capacity_factor is None
        set_capacity(layer, dynamic)
        assert layer.capacity_factor == want
    set_capacity(layer)
    assert layer.capacity_factor == 2.0


@pytest.mark.parametrize("capacity", [1e7, 1e37, DynamicCapacity((1.0, 1e9))])
def test_any_capacity_that_is_allowed_has_a_program(capacity: float | DynamicCapacity) -> None:
    cfg = MoEConfig(num_experts=E, d_ff=F, capacity=capacity)
    validate(cfg)
    layer, x = moe(cfg, factor=cfg.training_factor()), jax.ShapeDtypeStruct((1, 4096, D), jnp.float32)
    y, _ = nnx.eval_shape(lambda layer, x: layer(x, jnp.ones(x.shape[:2])), layer, x)
    assert y.shape == x.shape


# ---------------------------------------------------------------- numbers and devices


def test_bfloat16_routes_as_float32_does() -> None:
    cfg = MoEConfig(num_experts=E, top_k=2, d_ff=32, scoring="sigmoid", num_shared_experts=1)
    x = jax.random.normal(jax.random.key(1), (B, T, 32)).astype(jnp.bfloat16)
    layer = moe(cfg, width=32)
    y16, stats16 = run(layer, x, jnp.ones((B, T)))
    y32, stats32 = run(layer, x.astype(jnp.float32), jnp.ones((B, T)))
    assert y16.dtype == jnp.bfloat16
    assert stats16.load_E.tolist() == stats32.load_E.tolist()
    assert float(stats16.sums.entropy) == float(stats32.sums.entropy)  # the router is float32 either way
    # Weights, the inner layer and each expert's output are rounded to 8 bits: 2^-8 each, and sums of about 1.
    np.testing.assert_allclose(y16.astype(jnp.float32), y32, atol=4 * 2**-8 * float(jnp.abs(y32).max()))
    assert float(jnp.abs(y16.astype(jnp.float32) - y32).max()) > 0


@pytest.mark.parametrize("batch", [("data", "fsdp", "expert"), ("data",)], ids=["tokens-cut", "tokens-everywhere"])
@pytest.mark.parametrize("rules", [Rules(), INFERENCE], ids=["training", "inference"])
def test_experts_on_a_mesh_give_what_one_device_gives(rules: Rules, batch: tuple[str, ...]) -> None:
    """Whether the devices of the expert axis have a part of the tokens each, or all of them."""
    cfg = MoEConfig(num_experts=4, top_k=2, d_ff=F, bias_update_rate=0.1, sequence_coef=1.0, z_coef=1.0)
    layer, x = moe(cfg, factor=0.75), jax.random.normal(jax.random.key(1), (4, 5, D))
    counted = jnp.ones((4, 5)).at[1, 2:].set(0)
    want, stats = run(layer, x, counted)
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))

    @jax.jit
    def on_mesh(x):
        with use_mesh(mesh, dataclasses.replace(rules, batch=batch)):
            return layer(x, counted)

    assert int(stats.sums.dropped_E.sum()) > 0
    y, found = on_mesh(x)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    # rtol: float32 sums over devices.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, stats)


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top_k": 9}, "top_k is 9; it must be at most num_experts, 8"),
        ({"num_groups": 3}, "num_groups is 3; it must divide num_experts, 8"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups is 3; it must be at most num_groups, 2"),
        ({"num_groups": 4, "top_k": 3}, "top_k is 3; the top_groups=1 chosen groups have 2 experts"),
        ({"num_experts": 1, "top_k": 1, "entropy": EntropyConstraint()}, "entropy is set, but num_experts is 1"),
        ({"entropy": EntropyConstraint(0.5, 0.4)}, "entropy.token_low is 0.5; it must be less than token_high, 0.4"),
        ({"capacity": DynamicCapacity(())}, "capacity.factors is"),
        ({"capacity": DynamicCapacity((1.5, 1.0))}, "capacity.factors is"),
        ({"capacity": 0.0}, "capacity is 0.0; it must be a number > 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(MoEConfig(**options))
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
