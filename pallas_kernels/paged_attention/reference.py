"""What paged attention means: every page of a row brought together, one softmax, float32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEVER, ALWAYS = -1, 2**31 - 1  # in place of a position: no query sees it, every query does


def paged_attention_reference(
    q_BTNH: Float[Array, "B T N H"],
    k_MKPH: Float[Array, "M K P H"],
    v_MKPU: Float[Array, "M K P U"] | None,
    pages_BJ: Int[Array, "B J"],
    positions_BJP: Int[Array, "B J P"],
    first_BT: Int[Array, "B T"],
    scale: float,
    value_width: int,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
    """See :func:`pallas_kernels.paged_attention.paged_attention`."""
    (B, T, N, H), K = q_BTNH.shape, k_MKPH.shape[1]
    v_MKPU = (k_MKPH if v_MKPU is None else v_MKPU)[..., :value_width]
    k_BJKPH, v_BJKPU = (x[jnp.maximum(pages_BJ, 0)].astype(jnp.float32) for x in (k_MKPH, v_MKPU))
    there_BJP = (pages_BJ >= 0)[..., None] & (positions_BJP >= 0)
    sees_BTJP = there_BJP[:, None] & (positions_BJP[:, None] >= first_BT[..., None, None])
    v_BJKPU = jnp.where(there_BJP[:, :, None, :, None], v_BJKPU, 0)
    q_BTKGH = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, H)
    scores = scale * jnp.einsum("BTKGH,BJKPH->BTKGJP", q_BTKGH, k_BJKPH, precision="highest")
    scores = jnp.where(sees_BTJP[:, :, None, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=(-2, -1), keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total_BTKG = weights.sum(axis=(-2, -1))
    out_BTKGU = jnp.einsum("BTKGJP,BJKPU->BTKGU", weights, v_BJKPU, precision="highest")
    out_BTKGU = out_BTKGU / jnp.where(total_BTKG > 0, total_BTKG, 1)[..., None]
    log_BTKG = jnp.log(total_BTKG) + jnp.where(jnp.isfinite(top), top, 0)[..., 0, 0]
    return out_BTKGU.reshape(B, T, N, -1), log_BTKG.reshape(B, T, N)
