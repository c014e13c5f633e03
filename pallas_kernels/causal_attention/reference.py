"""The specification of causal attention within documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_attention_reference(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    ids_BT: Int[Array, "B T"],
    window: int | None = None,
    scale: float | None = None,
    closes_BTK: Int[Array, "B T K"] | None = None,
) -> Float[Array, "B T N U"]:
    """softmax(scale q k) v over the keys of the query's document at or before it; float32 inside.

    A row of the softmax always holds its own position, so that padding gives finite values.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH.astype(jnp.float32))
    scores_BKGTS *= H**-0.5 if scale is None else scale
    t, s = jnp.arange(T)[:, None], jnp.arange(T)[None, :]
    sees_BTS = (ids_BT[:, :, None] == ids_BT[:, None, :]) & (s <= t)
    if window is not None:
        sees_BTS &= s > t - window
    sees_BKTS = sees_BTS[:, None]
    if closes_BTK is not None:
        sees_BKTS = sees_BKTS & (t < closes_BTK.transpose(0, 2, 1)[:, :, None])
    probs_BKGTS = jax.nn.softmax(jnp.where(sees_BKTS[:, :, None], scores_BKGTS, -jnp.inf), axis=-1)
    out_BTKGU = jnp.einsum("BKGTS,BSKU->BTKGU", probs_BKGTS, v_BTKU.astype(jnp.float32))
    return out_BTKGU.reshape(B, T, N, -1).astype(q_BTNH.dtype)
