"""The blocked attention is the reference, forward and backward, at every awkward length."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_attention import Tiles, causal_attention_reference, causal_attention_xla


def inputs(B: int, T: int, N: int, K: int, H: int, U: int = 0, seed: int = 0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, *nh)), jnp.float32) for nh in ((N, H), (K, H), (K, U or H)))
    ids = np.cumsum(rng.random((B, T)) < 0.15, axis=1) + 1
    ids[0, T - T // 4 :] = 0  # padding at the end of a row
    return q, k, v, jnp.asarray(ids, jnp.int32), jnp.asarray(rng.normal(size=(B, T, N, U or H)), jnp.float32)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize(
    ("T", "tiles", "U", "scale"),
    [
        (1, Tiles(), 8, None),
        (7, Tiles(4, 8), 8, None),
        (16, Tiles(4, 2), 5, 0.6),
        (33, Tiles(8, 3), 8, None),
        (33, Tiles(64, 8), 12, 0.1),
        (40, Tiles(8, 1), 8, None),
    ],
)
def test_blocked_equals_reference(T: int, tiles: Tiles, window: int | None, U: int, scale: float | None) -> None:
    q, k, v, ids, dout = inputs(2, T, 4, 2, 8, U)

    @jax.jit
    def both(q, k, v, dout):
        want, want_vjp = jax.vjp(lambda *x: causal_attention_reference(*x, ids, window, scale), q, k, v)
        got, got_vjp = jax.vjp(lambda *x: causal_attention_xla(*x, ids, window, scale, tiles), q, k, v)
        return got, want, got_vjp(dout), want_vjp(dout)

    got, want, grads, want_grads = both(q, k, v, dout)
    # float32 sums of at most 40 terms near 1, in another order
    np.testing.assert_allclose(got, want, atol=2e-6)
    for g, w in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)


def test_bfloat16_inputs_give_bfloat16_close_to_float32() -> None:
    q, k, v, ids, dout = inputs(2, 24, 4, 1, 8)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got, vjp = jax.vjp(lambda *x: causal_attention_xla(*x, ids, None, None, Tiles(8, 2)), *half)
    want = causal_attention_reference(*(x.astype(jnp.float32) for x in half), ids)
    assert got.dtype == jnp.bfloat16
    assert {g.dtype for g in vjp(dout.astype(jnp.bfloat16))} == {jnp.dtype(jnp.bfloat16)}
    # 8 bits of mantissa: 2 ** -8 relative on values up to about 3
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)


def test_no_array_of_T_by_T_at_long_lengths() -> None:
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    loss = jax.grad(lambda q, k, v, ids: causal_attention_xla(q, k, v, ids, None).sum(), argnums=(0, 1, 2))
    memory = jax.jit(loss).lower(shape, shape, shape, ids).compile().memory_analysis()
    whole = 2 * 4096 * 4096 * 4
    assert memory.temp_size_in_bytes < whole / 3
