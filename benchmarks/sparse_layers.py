"""Attention layers that people use at long lengths, written as they are in JAX: gathers, einsums, autodiff.

What dsjax is compared with in memory. All are causal, take q, k and v of one width and as many heads, and see:

    dense           all that lies behind
    block_sparse    BigBird (Zaheer et al. 2020): the first blocks, the blocks around, and random ones
    sliding_global  Longformer (Beltagy et al. 2020): a window, and the first positions
    strided         Sparse Transformer (Child et al. 2019): a window of `stride`, and every `stride`-th position
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

QKV = Float[Array, "B T N H"]


def dense(q_BTNH: QKV, k_BTNH: QKV, v_BTNH: QKV) -> QKV:
    """jax.nn.dot_product_attention, as it comes."""
    return jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, is_causal=True)


def block_sparse(
    q_BTNH: QKV, k_BTNH: QKV, v_BTNH: QKV, *, block: int = 64, first: int = 2, around: int = 3, random: int = 3
) -> QKV:
    """Each block of queries against the blocks that it looks at, gathered (as FlaxBigBird does for its middle blocks).

    BigBird's defaults: blocks of 64, of which two are global, three a window (here all of it behind), three random.
    """
    B, T, N, H = q_BTNH.shape
    num = T // block
    looks_IX = jnp.asarray(block_choices(num, first, around, random))
    q, k, v = (x.reshape(B, num, block, N, H) for x in (q_BTNH, k_BTNH, v_BTNH))
    k, v = (x[:, jnp.maximum(looks_IX, 0)] for x in (k, v))  # (B, I, X, block, N, H)
    scores = jnp.einsum("BItNH,BIXsNH->BNItXs", q, k).astype(jnp.float32) * H**-0.5
    t, s = jnp.arange(T).reshape(num, block, 1, 1), looks_IX[:, None, :, None] * block + jnp.arange(block)
    scores = jnp.where((looks_IX >= 0)[:, None, :, None] & (s <= t), scores, -1e9)
    probs = jax.nn.softmax(scores.reshape(*scores.shape[:4], -1)).reshape(scores.shape).astype(v.dtype)
    return jnp.einsum("BNItXs,BIXsNH->BItNH", probs, v).reshape(B, T, N, H)


def block_choices(num: int, first: int, around: int, random: int, seed: int = 0) -> Int[np.ndarray, "I X"]:
    """The blocks that each block looks at, -1 for none: each of them once."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(num):
        always = sorted({*range(min(first, i + 1)), *range(max(0, i - around + 1), i + 1)})
        others = np.setdiff1d(np.arange(i), always)
        row = [*always, *rng.permutation(others)[:random].tolist()]
        rows.append(row + [-1] * (first + around + random - len(row)))
    return np.array(rows, np.int32)


def sliding_global(q_BTNH: QKV, k_BTNH: QKV, v_BTNH: QKV, *, window: int = 512, first: int = 64) -> QKV:
    """Chunks of ``window`` queries against their own and the previous chunk's keys, and the first positions."""
    B, T, N, H = q_BTNH.shape
    num = T // window
    q, k, v = (x.reshape(B, num, window, N, H) for x in (q_BTNH, k_BTNH, v_BTNH))

    def with_previous(x: Array, all_BTNH: Array) -> Array:
        previous = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))
        shared = jnp.broadcast_to(all_BTNH[:, None, :first], (B, num, first, N, H))
        return jnp.concatenate([shared, previous, x], axis=2)

    k, v = with_previous(k, k_BTNH), with_previous(v, v_BTNH)
    scores = jnp.einsum("BItNH,BIsNH->BNIts", q, k).astype(jnp.float32) * H**-0.5
    t = jnp.arange(T).reshape(num, window, 1)
    near = (jnp.arange(num)[:, None, None] - 1) * window + jnp.arange(2 * window)
    sees_near = (near <= t) & (near > t - window) & (near >= 0)
    sees_first = (jnp.arange(first) <= t) & (jnp.arange(first) <= t - window)
    sees = jnp.concatenate([jnp.broadcast_to(sees_first, (num, window, first)), sees_near], axis=-1)
    probs = jax.nn.softmax(jnp.where(sees, scores, -1e9)).astype(v.dtype)
    return jnp.einsum("BNIts,BIsNH->BItNH", probs, v).reshape(B, T, N, H)


def strided_mask(T: int, stride: int) -> Array:
    """(T, T): the last ``stride`` positions, and behind them those a multiple of ``stride`` away."""
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    return (distance >= 0) & ((distance < stride) | (distance % stride == 0))
