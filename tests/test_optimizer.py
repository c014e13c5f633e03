"""Schedules by hand; each kind of weight gets its rule; the rules do what their papers say."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import EVERYTHING

from dsjax.models.decoder import Decoder
from dsjax.sharding import logical_axes
from dsjax.train.optimizer import OptimConfig, kinds, learning_rate, make_optimizer, scale_by_row_adagrad


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("constant", 0, 0.1),  # the first of ten steps of warm-up
        ("constant", 4, 0.5),
        ("constant", 99, 1.0),
        ("wsd", 9, 1.0),
        ("wsd", 80, 1.0),  # 20 of 100 steps are left: the decay begins
        ("wsd", 90, 0.5),
        ("wsd", 99, 0.05),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.5),
        ("cosine", 100, 0.0),
    ],
)
def test_schedules_by_hand(schedule: str, step: int, share: float) -> None:
    cfg = OptimConfig(schedule=schedule, warmup_steps=10, decay_share=0.2)
    assert float(learning_rate(cfg, step, 100)) == pytest.approx(share, abs=1e-6)


def test_the_last_learning_rate_is_the_final_share() -> None:
    cfg = OptimConfig(schedule="cosine", warmup_steps=0, final_lr_share=0.1)
    assert float(learning_rate(cfg, 100, 100)) == pytest.approx(0.1)


def test_the_plan_moves_the_decay_without_another_program() -> None:
    rate = jax.jit(lambda step, total: learning_rate(OptimConfig(warmup_steps=0, decay_share=0.5), step, total))
    assert float(rate(60, 100)) == pytest.approx(0.8)
    assert float(rate(60, 80)) == pytest.approx(0.5)
    assert rate._cache_size() == 1


AXES = logical_axes(nnx.eval_shape(lambda: Decoder(EVERYTHING, rngs=nnx.Rngs(0))))


def test_every_weight_has_its_kind() -> None:
    kind = kinds(AXES)
    assert kind["embedding"] == kind["w_logits"] == kind["copy"]["candidate"] == "embedding"
    assert kind["ngram"]["tables"] == "table"
    layer = kind["group_1"]
    assert {layer["attention"][n] for n in ("w_q", "w_k", "w_v", "w_out")} == {"matrix"}
    assert {layer["ffn"][n] for n in ("w_router", "w_gate", "w_up", "w_down")} == {"matrix"}
    assert kind["ngram"]["w"] == "matrix"
    vectors = (layer["attention_norm"]["scale"], layer["attention"]["conv"]["w"], kind["copy"]["w_bonus"])
    assert {*vectors, kind["copy"]["length_embedding"]} == {"vector"}


def adamw_by_hand(p: np.ndarray, grads: list[np.ndarray], lr: float, decay: float) -> np.ndarray:
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p - lr * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + decay * p)
    return p


@pytest.mark.parametrize(("name", "axes", "decay"), [("w", ("embed", "mlp"), 0.1), ("scale", ("norm",), 0.0)])
def test_adamw_by_hand_decays_matrices_alone(name: str, axes: tuple[str, ...], decay: float) -> None:
    rng = np.random.default_rng(0)
    shape = (3, 4)[: len(axes)]
    p, grads = rng.normal(size=shape), [rng.normal(size=shape) for _ in range(4)]
    tx = make_optimizer(OptimConfig(lr=0.01, weight_decay=0.1, clip_norm=0.0), {name: axes})
    params = {name: jnp.asarray(p, jnp.float32)}
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update({name: jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params[name], adamw_by_hand(p, grads, 0.01, decay), rtol=1e-4)


def test_muon_updates_are_nearly_orthogonal_and_of_the_stated_size() -> None:
    axes = {
        "w_k": ("layers", "embed", "kv_heads", "head_dim"),
        "w_out": ("kv_heads", "heads_per_kv", "head_dim", "embed"),
    }
    rng = np.random.default_rng(0)
    params = {"w_k": jnp.zeros((2, 16, 2, 4)), "w_out": jnp.zeros((2, 1, 4, 16))}
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    tx = make_optimizer(OptimConfig(name="muon", muon_lr=1.0, weight_decay=0.0, clip_norm=0.0), axes)
    updates, _ = tx.update(grads, tx.init(params), params)
    for matrix in (*updates["w_k"].reshape(2, 16, 8), updates["w_out"].reshape(8, 16)):
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * 16**0.5)
        # five Newton-Schulz steps bring singular values into about [0.7, 1.2]
        assert singular.min() > 0.6
        assert singular.max() < 1.3


def test_row_adagrad_by_hand_leaves_untouched_rows_alone() -> None:
    tx = scale_by_row_adagrad()
    table = {"t": jnp.zeros((3, 2))}
    state = tx.init(table)
    g1, g2 = np.array([[3.0, 4.0], [0, 0], [0, 0]]), np.array([[0, 0], [0, 0], [1e-6, 0]])
    u1, state = tx.update({"t": jnp.asarray(g1)}, state)
    u2, state = tx.update({"t": jnp.asarray(g2)}, state)
    rms = np.sqrt((9 + 16) / 2)
    np.testing.assert_allclose(u1["t"], [[3 / rms, 4 / rms], [0, 0], [0, 0]], rtol=1e-5)
    np.testing.assert_allclose(u2["t"], [[0, 0], [0, 0], [np.sqrt(2), 0]], rtol=1e-3)  # tiny gradients move as much
    assert state["t"].shape == (3,)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_descends_the_whole_model(name: str) -> None:
    """Overfits one batch: every kind of weight together."""
    from models import graph, random_tokens, weights

    cfg = dataclasses.replace(EVERYTHING, num_layers=2)
    definition, params = graph(cfg), weights(cfg)
    tokens = jnp.asarray(random_tokens(2, 10))
    tx = make_optimizer(OptimConfig(name=name, lr=0.01, muon_lr=0.01, weight_decay=0.0), AXES)

    @jax.jit
    def step(params, state):
        def loss(params):
            model = nnx.merge(definition, params)
            logits = model.logits(model(tokens[:, :-1]))
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(60):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.1 < losses[0]
