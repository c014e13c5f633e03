"""The chunked loss is the plain one, in value and in every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.nn.history import Copy
from dsjax.nn.losses import cross_entropy, token_losses


def inputs(B=2, T=12, D=8, V=20, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weight = jnp.asarray(rng.random((B, T)) * (rng.random((B, T)) < 0.8), jnp.float32)
    copy = Copy(jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32), jnp.asarray(rng.normal(size=(B, T)), jnp.float32))
    return hidden, w, targets, weight, copy


def plain(hidden, w, targets, weight, copy):
    logits = hidden @ w
    if copy is not None:
        logits = logits + jax.nn.one_hot(copy.token_BT, w.shape[1]) * copy.bonus_BT[..., None]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * weight)


@pytest.mark.parametrize("chunk", [0, 1, 3, 4, 5, 12, 100])
@pytest.mark.parametrize("with_copy", [False, True])
def test_chunks_change_neither_loss_nor_gradients(chunk: int, with_copy: bool) -> None:
    hidden, w, targets, weight, copy = inputs()

    def run(loss):
        def of(hidden, w, bonus):
            return 0.5 * loss(hidden, w, targets, weight, Copy(copy.token_BT, bonus) if with_copy else None)

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2)))(hidden, w, copy.bonus_BT)

    got, want = run(lambda *x: cross_entropy(*x, chunk=chunk)), run(plain)
    # float32 sums of 24 terms of order 1
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-6), got, want)


def test_the_loss_of_a_uniform_model_is_log_v() -> None:
    hidden, w, targets, _, _ = inputs(V=20)
    np.testing.assert_allclose(token_losses(hidden, w * 0, targets), np.log(20), rtol=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_target() -> None:
    hidden, w, targets, weight, _ = inputs()
    loss, grads = jax.value_and_grad(lambda h: cross_entropy(h, w, targets, weight))(hidden * 1e4)
    assert np.isfinite(loss)
    assert np.isfinite(grads).all()


def test_logits_of_a_batch_never_exist_as_a_whole() -> None:
    B, T, D, V = 4, 256, 16, 4096
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((B, T, D), "float32"), ((D, V), "float32"), ((B, T), "int32"))]
    weight = jax.ShapeDtypeStruct((B, T), jnp.float32)

    def memory(chunk: int) -> int:
        loss = jax.grad(lambda h, w, t, m: cross_entropy(h, w, t, m, chunk=chunk), argnums=(0, 1))
        return jax.jit(loss).lower(*shapes, weight).compile().memory_analysis().temp_size_in_bytes

    logits = B * T * V * 4
    assert memory(16) < logits / 4 < logits <= memory(0)
