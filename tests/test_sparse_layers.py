"""The layers that memory is compared with see what their papers say, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sparse_layers import block_choices, block_sparse, sliding_global, strided_mask

T, N, H = 64, 2, 4


def inputs() -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(1, T, N, H)), jnp.float32) for _ in range(3)]


def masked(q: jax.Array, k: jax.Array, v: jax.Array, sees_TT: np.ndarray) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(sees_TT)[None, None])


def test_sliding_window_with_global_positions() -> None:
    t, s = np.arange(T)[:, None], np.arange(T)
    sees = (s <= t) & ((t - s < 8) | (s < 4))
    # float32 sums of at most 12 terms near 1
    np.testing.assert_allclose(sliding_global(*inputs(), window=8, first=4), masked(*inputs(), sees), atol=1e-6)


def test_block_sparse_sees_the_chosen_blocks() -> None:
    num, block = 16, 4
    choices = block_choices(num, first=2, around=3, random=3)
    sees = np.zeros((num, num), bool)
    for i, row in enumerate(choices):
        here = row[row >= 0]
        assert len(set(here)) == len(here)
        assert {*range(min(2, i + 1)), *range(max(0, i - 2), i + 1)} <= set(here) <= set(range(i + 1))
        assert len(here) == min(i + 1, 8)
        sees[i, here] = True
    sees = np.kron(sees, np.ones((block, block), bool)) & (np.arange(T) <= np.arange(T)[:, None])
    np.testing.assert_allclose(block_sparse(*inputs(), block=block), masked(*inputs(), sees), atol=1e-6)


def test_strided_mask_by_hand() -> None:
    assert np.flatnonzero(np.asarray(strided_mask(T, 8))[20]).tolist() == [4, 12, 13, 14, 15, 16, 17, 18, 19, 20]
