"""Paged attention by XLA: pages are gathered a block at a time, as many blocks as the longest row needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Slots of a row, at the most, and numbers of all rows' keys together, where that is less. With one query a row the work
# is to gather: what the longest row does not fill of a block is for nothing, and a small block stays in the cache.
AT_A_TIME, AT_A_TIME_FOR_ONE = (512, 1 << 22), (128, 1 << 19)


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_MKPH: Float[Array, "M K P H"],
    v_MKPU: Float[Array, "M K P U"] | None,
    pages_BJ: Int[Array, "B J"],
    positions_BJP: Int[Array, "B J P"],
    first_BT: Int[Array, "B T"],
    *,
    scale: float,
    value_width: int,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
    """See :mod:`pallas_kernels.paged_attention.attend`."""
    (B, T, N, H), (_, K, P, _), U, J = q_BTNH.shape, k_MKPH.shape, value_width, pages_BJ.shape[1]
    slots, numbers = AT_A_TIME_FOR_ONE if T == 1 else AT_A_TIME
    C = max(min(slots // P, numbers // (B * K * P * H), J), 1)
    pages_BJ = jnp.pad(pages_BJ, ((0, 0), (0, -J % C)), constant_values=-1)
    positions_BJP = jnp.pad(positions_BJP, ((0, 0), (0, -J % C), (0, 0)))
    positions_BJP = jnp.where((pages_BJ >= 0)[..., None], positions_BJP, -1)
    used = jnp.max(jnp.where(pages_BJ >= 0, jnp.arange(pages_BJ.shape[1]) + 1, 0))
    # Instead of no page one that the row has: its numbers are finite, so that a weight of 0 times one is 0.
    pages_BJ = jnp.where(pages_BJ >= 0, pages_BJ, jnp.max(pages_BJ, axis=1, keepdims=True))

    # In a page one head's slots stand together: a gather by (page, head) gives what a product takes as it is.
    pools = [x.reshape(-1, P, x.shape[-1]) for x in (k_MKPH, v_MKPU) if x is not None]
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)
    first_BR = jnp.repeat(first_BT, N // K, axis=1)

    def block(c: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top_BKR, total_BKR, out_BKRU = sums
        pages_BC = jax.lax.dynamic_slice_in_dim(pages_BJ, c * C, C, axis=1)
        position_BS = jax.lax.dynamic_slice_in_dim(positions_BJP, c * C, C, axis=1).reshape(B, -1)
        at_BKC = jnp.maximum(pages_BC, 0)[:, None] * K + jnp.arange(K)[:, None]
        kv = [x[at_BKC].reshape(B, K, C * P, -1).astype(q_BTNH.dtype) for x in pools]
        k_BKSH, v_BKSU = kv[0], kv[-1][..., :U]
        scores = scale * jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
        sees_BRS = position_BS[:, None] >= first_BR[..., None]
        scores = jnp.where(sees_BRS[:, None], scores, -jnp.inf)
        higher_BKR = jnp.maximum(top_BKR, jnp.max(scores, axis=-1))
        base_BKR = jnp.where(jnp.isfinite(higher_BKR), higher_BKR, 0)
        p_BKRS, kept_BKR = jnp.exp(scores - base_BKR[..., None]), jnp.exp(top_BKR - base_BKR)
        more = jnp.einsum("BKRS,BKSU->BKRU", p_BKRS.astype(v_BKSU.dtype), v_BKSU, preferred_element_type=jnp.float32)
        total_BKR = total_BKR * kept_BKR + jnp.sum(p_BKRS, axis=-1)
        return higher_BKR, total_BKR, out_BKRU * kept_BKR[..., None] + more

    zeros_BKR = jnp.zeros(q_BKRH.shape[:3], jnp.float32)
    sums = (jnp.full_like(zeros_BKR, -jnp.inf), zeros_BKR, jnp.zeros((*zeros_BKR.shape, U), jnp.float32))
    if pages_BJ.shape[1] == C:
        top_BKR, total_BKR, out_BKRU = block(jnp.int32(0), sums)
    else:
        top_BKR, total_BKR, out_BKRU = jax.lax.fori_loop(0, -(-used // C), block, sums)
    log_BKR = jnp.log(total_BKR) + jnp.where(jnp.isfinite(top_BKR), top_BKR, 0)
    out_BKRU = jnp.where((total_BKR > 0)[..., None], out_BKRU / total_BKR[..., None], 0)

    def positions_first(x_BKR: Array) -> Array:
        x_BKTG = x_BKR.reshape(B, K, T, N // K, *x_BKR.shape[3:])
        return x_BKTG.swapaxes(1, 2).reshape(B, T, N, *x_BKR.shape[3:])

    return positions_first(out_BKRU), positions_first(log_BKR)
