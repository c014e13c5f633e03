"""The forward kernel for Hopper.

A thread block computes 128 queries of one head: two warpgroups with 64 each, and a third one that copies keys and
values (TMA) into rings of buffers. The two take turns: while one multiplies (wgmma), the other takes exponentials
(Shah et al. 2024, FlashAttention-3).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.segmented_attention.gpu_tiles import (
    GROUPS,
    LOG2_E,
    MATRIX,
    ROW,
    ROWS,
    TILE,
    Setting,
    Transposed,
    Visit,
    across,
    longest_first,
    swizzled,
)

KEYS = 128
STAGES = 2
LEAST = -1e30  # where the running maximum begins: finite, so that a row that has seen nothing has exp2(-inf) = 0


def attend(setting: Setting, q_BSNH, k_BSKH, v_BSKU, tails: Any, spans_BI8, ids: Any) -> tuple[jax.Array, jax.Array]:
    """The output, (B, S, N, U), and the logarithms of the softmax's sums, (B, N, S), float32.

    ``tails``: keys and values of the tails, (B, P, K, ...), P a multiple of ``KEYS``; ``spans``:
    :func:`~pallas_kernels.segmented_attention.gpu_tiles.key_spans`; ``ids``: none, or those of queries and of keys.
    """
    (B, S, N, H), U = q_BSNH.shape, v_BSKU.shape[-1]
    out_type = (jax.ShapeDtypeStruct((B, S, N, U), jnp.bfloat16), jax.ShapeDtypeStruct((B, N, S), jnp.float32))
    scratch = {
        "q_smem": swizzled(GROUPS, ROWS, H),
        "k_smem": swizzled(STAGES, KEYS, H),
        "v_smem": swizzled(STAGES, KEYS, U),
        "log_smem": plgpu.SMEM((GROUPS, ROWS), jnp.float32),
        "q_here": plgpu.Barrier(num_barriers=GROUPS),
        "k_here": plgpu.Barrier(num_barriers=STAGES),
        "v_here": plgpu.Barrier(num_barriers=STAGES),
        "k_done": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
        "v_done": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
        "turn": plgpu.Barrier(num_arrivals=GROUPS),
    }
    call = setting.call(segmented_attention_forward, out_type, (B, N, S // TILE), scratch)
    return call(q_BSNH, k_BSKH, v_BSKU, *tails, spans_BI8, *ids)


def segmented_attention_forward(
    setting: Setting,
    q_ref,  # (B, S, N, H)
    k_ref,  # (B, S, K, H)
    v_ref,  # (B, S, K, U)
    tail_k_ref,  # (B, P, K, H)
    tail_v_ref,  # (B, P, K, U)
    spans_ref,  # (B, I, 8)
    *refs,  # ids (B, S) and (B, P + S), out (B, S, N, U), log (B, N, S)
    k_smem,
    v_smem,
    k_here,
    v_here,
    k_done,
    v_done,
    **scratch,
):
    """The kernel: two warpgroups that compute and one that copies; ``scratch`` is what only the former need."""
    *ids_refs, out_ref, log_ref = refs
    head, batch, group = (jax.lax.axis_index(name) for name in ("head", "batch", "group"))
    visit = Visit(setting, spans_ref, ids_refs, batch, longest_first(q_ref.shape[1]), KEYS)

    @pl.when(group == GROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = jax.lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))
        ring = ((tail_k_ref, k_ref, k_smem, k_here, k_done), (tail_v_ref, v_ref, v_smem, v_here, v_done))
        visit.copy(lambda block: (batch, pl.ds(block * KEYS, KEYS), kv_head), ring, STAGES)

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        keys, values = (k_smem, k_here, k_done), (v_smem, v_here, v_done)
        _softmax(setting, visit, keys, values, q_ref, out_ref, log_ref, **scratch)


def _softmax(setting, visit, keys, values, q_ref, out_ref, log_ref, *, q_smem, log_smem, q_here, turn):
    """The part of one of the computing warpgroups: 64 queries."""
    head, batch, group = (jax.lax.axis_index(name) for name in ("head", "batch", "group"))
    first = longest_first(q_ref.shape[1]) * TILE + group * ROWS
    H, U = q_ref.shape[-1], out_ref.shape[-1]
    (k_smem, k_here, k_done), (v_smem, v_here, v_done) = keys, values
    factor = setting.scale * LOG2_E
    mine = (batch, pl.ds(first, ROWS), head)
    plgpu.copy_gmem_to_smem(q_ref.at[mine], q_smem.at[group], q_here.at[group])
    plgpu.barrier_wait(q_here.at[group])

    def take_turn() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def one(step, carry):
        out, top, total = carry  # top in base 2: exp2(x * factor - top) is one multiply-add and one exponential
        slot = jax.lax.rem(step, jnp.int32(STAGES))
        plgpu.barrier_wait(k_here.at[slot])
        product = ((ROWS, KEYS), q_smem.at[group], Transposed(k_smem.at[slot]))
        (scores,) = setting.products(product, meanwhile=take_turn)
        plgpu.barrier_arrive(k_done.at[slot])
        scores = visit.mask(scores, step, first)
        new_top = jnp.maximum(top, scores.max(axis=1) * factor)
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(scores * factor - across(new_top, scores.shape))
        total = total * shrink + p.sum(axis=1)
        out, p = out * across(shrink, out.shape), p.astype(jnp.bfloat16)
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_here.at[slot])
        plgpu.barrier_wait(turn)
        (out,) = setting.products((out, p, v_smem.at[slot]))
        plgpu.barrier_arrive(v_done.at[slot])
        return out, new_top, total

    start = (setting.full((ROWS, U), 0, MATRIX), setting.full((ROWS,), LEAST, ROW), setting.full((ROWS,), 0, ROW))
    pl.when(group == 1)(take_turn)
    out, top, total = jax.lax.fori_loop(0, visit.count, one, start)
    pl.when(group == 0)(take_turn)
    if U == H:
        out_smem = q_smem.at[group]
    else:
        take_turn()  # both are done with the values
        out_smem = v_smem.at[0, pl.ds(group * ROWS, ROWS)]
    out_smem[...] = (out * across(1 / total, out.shape)).astype(jnp.bfloat16)
    log_smem[group] = top * (1 / LOG2_E) + jnp.log(total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_ref.at[mine])
    plgpu.copy_smem_to_gmem(log_smem.at[group], log_ref.at[batch, head, pl.ds(first, ROWS)])
    plgpu.wait_smem_to_gmem(0)
