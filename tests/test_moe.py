"""Routing, dispatch and experts: every (token, expert) pair is computed once, and nothing else."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.nn.mlp import MLP
from dsjax.nn.moe import MoE, MoEConfig
from dsjax.nn.router import route
from dsjax.sharding import INFERENCE, MeshConfig, Rules, make_mesh, use_mesh
from pallas_kernels.expert_dispatch import combine, combine_reference, dispatch, dispatch_reference, plan_dispatch
from pallas_kernels.grouped_matmul import grouped_swiglu

D, F = 6, 4


def chosen_experts(T: int, E: int, X: int, seed: int) -> np.ndarray:
    """X different experts for each token; skewed, so that some experts get nothing."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((T, E)) * (0.2 + np.arange(E)) ** 2, axis=1)[:, :X].astype(np.int32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.integers(0, 10**6))
def test_dispatch_and_combine_are_the_reference(T: int, E: int, X: int, foreign: int, seed: int) -> None:
    """``foreign`` experts on either side belong to other devices."""
    X = min(X, E + 2 * foreign)
    rng = np.random.default_rng(seed)
    experts = chosen_experts(T, E + 2 * foreign, X, seed) - foreign
    x, weights = rng.normal(size=(T, D)).astype(np.float32), rng.random((T, X)).astype(np.float32)
    plan = plan_dispatch(jnp.asarray(experts), E)
    rows, sizes = dispatch_reference(x, experts, E)
    assert plan.sizes_E.tolist() == sizes.tolist()
    assert int(sizes.sum()) == int(((experts >= 0) & (experts < E)).sum())  # none lost, none twice
    got = np.asarray(dispatch(jnp.asarray(x), plan))
    assert len(got) == T * min(X, E)
    np.testing.assert_array_equal(got[: len(rows)], rows)
    want = combine_reference(rows, weights, experts, E)
    np.testing.assert_allclose(combine(jnp.asarray(got), jnp.asarray(weights), plan), want, rtol=1e-5, atol=1e-6)


def test_gradients_of_dispatch_and_combine_are_those_of_plain_indexing() -> None:
    experts = jnp.asarray(chosen_experts(7, 6, 2, 0) - 1)  # experts -1 and 4 are foreign to E = 4
    plan = plan_dispatch(experts, 4)
    rng = np.random.default_rng(0)
    x, scale = jnp.asarray(rng.normal(size=(7, D))), jnp.asarray(rng.normal(size=(14, D)))
    weights = jnp.asarray(rng.random((7, 2)))
    ours = (experts >= 0) & (experts < 4)

    def fast(x, weights):
        return jnp.sum(combine(jnp.sin(dispatch(x, plan)) * scale, weights, plan) ** 2)

    def plain(x, weights):
        y = jnp.concatenate([jnp.sin(x[plan.pair_R // 2]) * scale, jnp.zeros((1, D))])
        return jnp.sum(jnp.sum(jnp.where(ours, weights, 0)[..., None] * y[plan.row_TX], axis=1) ** 2)

    got, want = (jax.grad(f, argnums=(0, 1))(x, weights) for f in (fast, plain))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("sizes", [(3, 4, 5), (0, 12, 0), (0, 0, 0), (1, 0, 6), (40, 1, 9)])
def test_grouped_swiglu_is_the_reference(implementation: str | None, sizes: tuple[int, ...]) -> None:
    R, E = sum(sizes) + 3, len(sizes)  # three rows belong to no group
    rng = np.random.default_rng(0)
    x, w_gate, w_up, w_down, dy = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((R, D), (E, D, F), (E, D, F), (E, F, D), (R, D))
    )

    @jax.jit
    def both(*arguments):
        sizes_E = jnp.asarray(sizes, jnp.int32)
        out = []
        for name in (implementation, "reference"):
            y, vjp = jax.vjp(lambda *a, name=name: grouped_swiglu(*a, sizes_E, implementation=name), *arguments)
            out.append((y, vjp(dy)))
        return out

    got, want = both(x, w_gate, w_up, w_down)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4), got, want)


def moe(cfg: MoEConfig) -> MoE:
    return MoE(cfg, D, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
@pytest.mark.parametrize("layer", [0, 2])
def test_grouped_swiglu_of_one_layer_of_a_stack(implementation: str | None, layer: int) -> None:
    rng = np.random.default_rng(layer)
    x, sizes_E = jnp.asarray(rng.normal(size=(9, D)), jnp.float32), jnp.array([3, 0, 4])
    shapes = ((3, 3, D, F), (3, 3, D, F), (3, 3, F, D))
    stack = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    want = grouped_swiglu(x, *(w[layer] for w in stack), sizes_E, implementation="reference")
    run = jax.jit(lambda layer: grouped_swiglu(x, *stack, sizes_E, layer=layer, implementation=implementation))
    np.testing.assert_allclose(run(layer), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [None, [0.5, 0.0, -0.5, 0.25, 0.0]])
def test_the_layer_is_a_loop_over_experts(bias: list | None) -> None:
    cfg = MoEConfig(num_experts=5, top_k=2, d_ff=F, routed_scale=1.5, bias_update_rate=0.0 if bias is None else 0.1)
    layer, x = moe(cfg), jax.random.normal(jax.random.key(1), (2, 7, D))
    if bias is not None:
        layer.selection_bias[...] = jnp.asarray(bias)
    y, stats = layer(x, jnp.ones((2, 7)))
    scores = np.asarray(jax.nn.softmax(jnp.asarray(x) @ layer.w_router[...]))
    want = np.zeros_like(x)
    for b in range(2):
        for t in range(7):
            best = np.argsort(-(scores[b, t] + np.array(bias or 0.0)))[:2]
            for e in best:
                h = jax.nn.silu(x[b, t] @ layer.w_gate[...][e]) * (x[b, t] @ layer.w_up[...][e])
                want[b, t] += 1.5 * scores[b, t, e] / scores[b, t, best].sum() * (h @ layer.w_down[...][e])
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    assert float(stats.load_E.sum()) == 2 * 7 * 2


def test_one_expert_is_a_dense_layer() -> None:
    layer, dense = moe(MoEConfig(num_experts=1, top_k=1, d_ff=F)), MLP(D, F, rngs=nnx.Rngs(1))
    for name in ("w_gate", "w_up", "w_down"):
        getattr(dense, name)[...] = getattr(layer, name)[...][0]
    x = jax.random.normal(jax.random.key(1), (2, 5, D))
    np.testing.assert_allclose(layer(x, jnp.ones((2, 5)))[0], dense(x), rtol=1e-5, atol=1e-6)


def test_balanced_routing_has_balance_loss_one_and_a_single_expert_has_e() -> None:
    even = jnp.asarray([[[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]]) * 20
    one = jnp.asarray([[[20.0, 0, 0, 0]] * 4])
    counted = jnp.ones((1, 4))
    assert float(route(even, counted, top_k=1, normalize=True)[2].balance_loss) == pytest.approx(1, abs=1e-4)
    assert float(route(one, counted, top_k=1, normalize=True)[2].balance_loss) == pytest.approx(4, abs=1e-4)


def test_statistics_by_hand_leave_padding_out() -> None:
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]))
    experts, weights, stats = route(logits, jnp.asarray([[1.0, 1.0, 0.0]]), top_k=1, normalize=False)
    assert experts[0, :, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(weights[0, :, 0], [0.5, 0.8, 0.6], rtol=1e-5)
    assert stats.load_E.tolist() == [1, 1, 0]
    entropy = [-(0.5 * np.log(0.5) + 0.5 * np.log(0.25)), -(0.8 * np.log(0.8) + 0.2 * np.log(0.1))]
    assert float(stats.entropy) == pytest.approx(np.mean(entropy), rel=1e-5)
    assert float(stats.z_loss) == pytest.approx(0, abs=1e-9)  # logits of a distribution sum to 1


def test_shared_experts_are_added_to_the_routed_ones() -> None:
    cfg = MoEConfig(num_experts=4, top_k=2, d_ff=F, num_shared_experts=2)
    layer, x = moe(cfg), jax.random.normal(jax.random.key(1), (1, 5, D))
    alone = moe(dataclasses.replace(cfg, num_shared_experts=0))
    routed = alone(x, jnp.ones((1, 5)))[0]
    np.testing.assert_allclose(layer(x, jnp.ones((1, 5)))[0], routed + layer.shared(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [("data", "fsdp", "expert"), ("data",)], ids=["tokens-cut", "tokens-everywhere"])
@pytest.mark.parametrize("rules", [Rules(), INFERENCE], ids=["training", "inference"])
def test_experts_on_a_mesh_give_what_one_device_gives(rules: Rules, batch: tuple[str, ...]) -> None:
    """Whether the devices of the expert axis have a part of the tokens each, or all of them."""
    layer, x = moe(MoEConfig(num_experts=4, top_k=2, d_ff=F)), jax.random.normal(jax.random.key(1), (4, 5, D))
    want = layer(x, jnp.ones((4, 5)))[0]
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))

    @jax.jit
    def run(x):
        with use_mesh(mesh, dataclasses.replace(rules, batch=batch)):
            return layer(x, jnp.ones((4, 5)))[0]

    np.testing.assert_allclose(run(x), want, rtol=1e-5, atol=1e-6)
