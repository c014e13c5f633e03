"""Gradient compensation: the factor by hand, on the experts' weights alone, through both optimizers and any mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_runs import OPTIM, job, random_batch, routed_by

from dsjax.config import UserError, validate
from dsjax.nn.router import RouterSums
from dsjax.sharding import MeshConfig
from dsjax.train.compensation import compensate_experts, compensation
from dsjax.train.optimizer import OptimConfig, make_optimizer
from dsjax.train.step import TrainState

AXES = {
    "group_0": {"ffn": {"w_gate": ("layers", "expert", "embed", "mlp"), "w_router": ("layers", "embed", "router")}},
    "group_1": {"ffn": {"w_gate": ("layers", "embed", "mlp")}},
}


def sums(load: list, kept: list | None = None) -> RouterSums:
    load_E = jnp.asarray(load, jnp.int32)
    kept_E = load_E if kept is None else jnp.asarray(kept, jnp.int32)
    nothing = jnp.int32(0)
    return RouterSums(nothing, nothing, load_E, kept_E, load_E - kept_E, {}, nothing, nothing)


@pytest.mark.parametrize(
    ("load", "kept", "alpha", "limit", "want"),
    [
        ([4, 4, 4, 4], None, 0.5, 4.0, [1, 1, 1, 1]),
        ([1, 4, 0, 11], None, 1.0, 9.0, [4, 1, 1, 4 / 11]),  # mean 4; of the third nothing is known
        ([1, 4, 0, 11], None, 0.5, 9.0, [2, 1, 1, (4 / 11) ** 0.5]),
        ([1, 4, 0, 11], None, 1.0, 2.0, [2, 1, 1, 1 / 2]),  # clipped on both sides
        ([8, 4, 2, 2], [4, 4, 2, 2], 0.5, 9.0, [2 * 0.5**0.5, 1, 2**0.5, 2**0.5]),  # it kept half
        ([8, 4, 2, 2], [4, 4, 2, 2], 1.0, 9.0, [1, 1, 2, 2]),
        ([0, 0, 0, 0], None, 1.0, 9.0, [1, 1, 1, 1]),  # a batch of padding
    ],
)
def test_the_factor_by_hand(load: list, kept: list | None, alpha: float, limit: float, want: list) -> None:
    np.testing.assert_allclose(compensation(sums(load, kept), alpha=alpha, limit=limit), want, rtol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 2**24), min_size=4, max_size=4), st.floats(0.01, 1), st.floats(1, 100), st.integers(0, 9)
)
def test_factors_stay_in_their_bounds_and_favour_the_starved(load: list, alpha: float, limit: float, seed: int) -> None:
    found = np.asarray(compensation(sums(load), alpha=alpha, limit=limit))
    slack = 1 + 1e-5  # the bounds and the powers are float32
    assert (found <= limit * slack).all()
    assert (found >= 1 / limit / slack).all()
    chosen = [(n, factor) for n, factor in zip(load, found, strict=True) if n]
    for n, factor in chosen:
        assert all(other <= factor * slack for more, other in chosen if more > n)
    kept = [int(n * share) for n, share in zip(load, np.random.default_rng(seed).random(4), strict=True)]
    with_drops = np.asarray(compensation(sums(load, kept), alpha=alpha, limit=limit))
    assert (with_drops * slack >= np.where(np.array(kept) > 0, found, 1)).all()  # drops are made up for, never punished


def test_it_scales_each_expert_of_each_layer_and_nothing_else() -> None:
    tx = compensate_experts(1.0, 9.0, AXES)
    rng = np.random.default_rng(0)
    shapes = {
        "group_0": {"ffn": {"w_gate": (2, 4, 3, 5), "w_router": (2, 3, 4)}},
        "group_1": {"ffn": {"w_gate": (4, 3, 5)}},  # as many layers as there are experts
    }
    gradients = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple))
    router = {"group_0": sums([[1, 4, 0, 11], [4, 4, 4, 4]])}
    found, state = tx.update(gradients, tx.init(gradients), None, router=router)
    want = np.array([[4, 1, 1, 4 / 11], [1, 1, 1, 1]])[:, :, None, None] * gradients["group_0"]["ffn"]["w_gate"]
    np.testing.assert_allclose(found["group_0"]["ffn"]["w_gate"], want, rtol=1e-5)
    assert (found["group_0"]["ffn"]["w_router"] == gradients["group_0"]["ffn"]["w_router"]).all()
    assert (found["group_1"]["ffn"]["w_gate"] == gradients["group_1"]["ffn"]["w_gate"]).all()
    assert not jax.tree.leaves(state)


def test_experts_that_a_loss_made_no_use_of_are_left_alone() -> None:
    names = ("layers", "expert", "embed", "mlp")
    group = {"ffn": {"w_gate": names}}
    tx = compensate_experts(1.0, 9.0, {"group_0": group, "multi_token": {"block": group}, "critic": {"group_0": group}})
    ones = {"ffn": {"w_gate": jnp.ones((1, 2, 3, 5))}}
    gradients = {"group_0": ones, "multi_token": {"block": ones}, "critic": {"group_0": ones}}
    router = {"group_0": sums([[2, 6]]), "critic/group_0": sums([[6, 2]])}
    found, _ = tx.update(gradients, tx.init(gradients), None, router=router)
    first = jax.tree.map(lambda x: x[0, :, 0, 0].tolist(), found)
    assert first["group_0"]["ffn"]["w_gate"] == pytest.approx([2, 2 / 3])
    assert first["critic"]["group_0"]["ffn"]["w_gate"] == pytest.approx([2 / 3, 2])
    assert first["multi_token"]["block"]["ffn"]["w_gate"] == [1, 1]


def test_the_norm_that_is_clipped_is_that_of_the_compensated_gradient() -> None:
    cfg = OptimConfig(clip_norm=1.0, expert_compensation=1.0)
    axes = {"group_0": {"ffn": {"w_gate": ("layers", "expert", "embed", "mlp")}}}
    tx = make_optimizer(cfg, axes)
    gradients = {"group_0": {"ffn": {"w_gate": jnp.ones((1, 4, 2, 2))}}}
    router = {"group_0": sums([[1, 4, 0, 11]])}
    _, state = tx.update(gradients, tx.init(gradients), gradients, router=router)
    moments = [x for x in jax.tree.leaves(state) if x.ndim == 4]
    first = moments[0] / (1 - cfg.b1)  # what Adam was given, after one step
    assert float(optax.tree.norm(first)) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(first[0, :, 0, 0] / first[0, 1, 0, 0], [4, 1, 1, 4 / 11], rtol=1e-5)


def test_without_it_the_optimizer_is_what_it_was() -> None:
    axes = {"w": ("embed", "mlp")}
    params = {"w": jnp.ones((2, 3))}
    plain, on = (make_optimizer(OptimConfig(expert_compensation=alpha), axes) for alpha in (0.0, 0.5))
    assert jax.tree.structure(plain.init(params)) != jax.tree.structure(on.init(params))
    plain.update(params, plain.init(params), params)  # no loads are needed
    with pytest.raises(TypeError, match="router"):
        on.update(params, on.init(params), params)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"expert_compensation": -0.5}, "expert_compensation is -0.5; it must be a number >= 0"),
        ({"expert_compensation_limit": 0.5}, "expert_compensation_limit is 0.5; it must be a number >= 1"),
    ],
)
def test_a_config_that_makes_no_sense_is_one_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(OptimConfig(**options))
    assert str(caught.value).startswith(sentence)


# ---------------------------------------------------------------- in training


def after(name: str, alpha: float, mesh: MeshConfig = MeshConfig(data=1), accumulate: int = 1) -> TrainState:
    """Three steps with a capacity that drops."""
    optim = dataclasses.replace(OPTIM, name=name, expert_compensation=alpha)
    place, trainer = job(routed_by(capacity=1.0), mesh, accumulate, optim)
    state = trainer.init(np.uint32(0))
    for i in range(3):
        state, metrics = trainer.step(state, place(random_batch(i)), jnp.int32(1000))
        assert float(metrics["router/group_0/drop_rate"]) > 0
        assert float(metrics["router/group_0/unaccounted"]) == 0
    return state


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_it_changes_the_experts_of_both_optimizers(name: str) -> None:
    on, off = (after(name, alpha).params["group_0"]["ffn"] for alpha in (0.5, 0.0))
    for weight in ("w_gate", "w_up", "w_down"):
        assert float(jnp.abs(on[weight] - off[weight]).max()) > 1e-5


def test_devices_compensate_as_one_does() -> None:
    one, found = (
        after("adamw", 0.5, mesh).params for mesh in (MeshConfig(data=1), MeshConfig(fsdp=2, expert=2, tensor=2))
    )
    # Float32 sums over devices, through Adam, which divides by the gradient's size: as in test_loop.py.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, one)
