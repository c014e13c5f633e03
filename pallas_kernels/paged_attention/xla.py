"""Paged attention by XLA: pages are gathered a block at a time, as many blocks as the longest row needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SLOTS_AT_A_TIME = 512  # of a row, at the most
NUMBERS_AT_A_TIME = 1 << 22  # of all rows' keys together, where that is less


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_MKPH: Float[Array, "M K P H"],
    v_MKPU: Float[Array, "M K P U"],
    pages_BJ: Int[Array, "B J"],
    positions_BJP: Int[Array, "B J P"],
    first_BT: Int[Array, "B T"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
    """See :mod:`pallas_kernels.paged_attention.attend`."""
    (B, T, N, H), (_, K, P, U), J = q_BTNH.shape, v_MKPU.shape, pages_BJ.shape[1]
    at_a_time = min(SLOTS_AT_A_TIME // P, NUMBERS_AT_A_TIME // (B * K * P * H), J)
    C = max(at_a_time, 1)
    pages_BJ = jnp.pad(pages_BJ, ((0, 0), (0, -J % C)), constant_values=-1)
    positions_BJP = jnp.pad(positions_BJP, ((0, 0), (0, -J % C), (0, 0)))
    positions_BJP = jnp.where((pages_BJ >= 0)[..., None], positions_BJP, -1)
    used = jnp.max(jnp.where(pages_BJ >= 0, jnp.arange(pages_BJ.shape[1]) + 1, 0))

    # In a page one head's slots stand together: a gather by (page, head) gives what a product takes as it is.
    k_APH, v_APU = (x.reshape(-1, P, x.shape[-1]) for x in (k_MKPH, v_MKPU))
    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, -1, H)
    first_BR = jnp.repeat(first_BT, N // K, axis=1)

    def block(c: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top_BKR, total_BKR, out_BKRU = sums
        pages_BC = jax.lax.dynamic_slice_in_dim(pages_BJ, c * C, C, axis=1)
        position_BS = jax.lax.dynamic_slice_in_dim(positions_BJP, c * C, C, axis=1).reshape(B, -1)
        at_BKC = jnp.maximum(pages_BC, 0)[:, None] * K + jnp.arange(K)[:, None]
        k_BKSH, v_BKSU = (x[at_BKC].reshape(B, K, C * P, -1).astype(q_BTNH.dtype) for x in (k_APH, v_APU))
        v_BKSU = jnp.where((position_BS >= 0)[:, None, :, None], v_BKSU, 0)
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
    out_BKRU = out_BKRU / jnp.where(total_BKR > 0, total_BKR, 1)[..., None]

    def positions_first(x_BKR: Array) -> Array:
        x_BKTG = x_BKR.reshape(B, K, T, N // K, *x_BKR.shape[3:])
        return x_BKTG.swapaxes(1, 2).reshape(B, T, N, *x_BKR.shape[3:])

    return positions_first(out_BKRU), positions_first(log_BKR)
