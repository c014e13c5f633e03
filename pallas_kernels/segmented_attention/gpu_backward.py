"""The backward kernels for Hopper: one for the queries, one for keys and values.

Both compute the scores again from the saved logarithms (Dao 2023, FlashAttention-2), two products at a time; nothing
is added to global memory, so that gradients do not depend on the order in which blocks run. As in the forward kernel,
two warpgroups compute, with 64 rows each, and a third one copies.

What is subtracted from a product is where its sums begin: p = exp(scale (q k - log / scale)), ds = p (dout v - along).
That costs neither an instruction nor a register.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.segmented_attention.gpu_tiles import (
    COLUMN,
    GRID,
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
    down,
    longest_first,
    swizzled,
)

KEYS = 64  # in a block, for the gradient of the queries
STAGES = 2


def block_of_queries(H: int) -> int:
    """In a block, for the gradients of keys and values: beside their sums, fewer scores fit into the registers."""
    return 64 if H <= 128 else 32


def query_gradient(
    setting: Setting, q_BSNH, k_BSKH, v_BSKU, tails: Any, spans_BI8, ids: Any, dout_BSNU, bias: Any
) -> jax.Array:
    """(B, S, N, H). ``bias`` is -log / scale and -along, (B, N, S) each; the others as in the forward kernel."""
    (B, S, N, H), U = q_BSNH.shape, v_BSKU.shape[-1]
    scratch = {
        "q_smem": swizzled(GROUPS, ROWS, H),
        "dout_smem": swizzled(GROUPS, ROWS, U),
        "k_smem": swizzled(STAGES, KEYS, H),
        "v_smem": swizzled(STAGES, KEYS, U),
        "mine_here": plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
        "k_here": plgpu.Barrier(num_barriers=STAGES),
        "v_here": plgpu.Barrier(num_barriers=STAGES),
        "k_done": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
        "v_done": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
    }
    out_type = jax.ShapeDtypeStruct(q_BSNH.shape, jnp.bfloat16)
    call = setting.call(segmented_attention_dq, out_type, (B, N, S // TILE), scratch)
    return call(q_BSNH, k_BSKH, v_BSKU, *tails, dout_BSNU, *bias, spans_BI8, *ids)


def segmented_attention_dq(
    setting: Setting,
    q_ref,  # (B, S, N, H)
    k_ref,  # (B, S, K, H)
    v_ref,  # (B, S, K, U)
    tail_k_ref,  # (B, P, K, H)
    tail_v_ref,  # (B, P, K, U)
    dout_ref,  # (B, S, N, U)
    score_bias_ref,  # (B, N, S)
    dp_bias_ref,  # (B, N, S)
    spans_ref,  # (B, I, 8)
    *refs,  # ids (B, S) and (B, P + S), dq (B, S, N, H)
    q_smem,
    dout_smem,
    k_smem,
    v_smem,
    mine_here,
    k_here,
    v_here,
    k_done,
    v_done,
):
    """The kernel for the gradient of the queries: keys and values pass by, as in the forward kernel."""
    *ids_refs, dq_ref = refs
    head, batch, group = (jax.lax.axis_index(name) for name in ("head", "batch", "group"))
    tile = longest_first(q_ref.shape[1])
    visit = Visit(setting, spans_ref, ids_refs, batch, tile, KEYS)

    @pl.when(group == GROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = jax.lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))
        ring = ((tail_k_ref, k_ref, k_smem, k_here, k_done), (tail_v_ref, v_ref, v_smem, v_here, v_done))
        visit.copy(lambda block: (batch, pl.ds(block * KEYS, KEYS), kv_head), ring, STAGES)

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        first = tile * TILE + group * ROWS
        mine = (batch, pl.ds(first, ROWS), head)
        for ref, smem in ((q_ref, q_smem), (dout_ref, dout_smem)):
            plgpu.copy_gmem_to_smem(ref.at[mine], smem.at[group], mine_here.at[group])
        here = (batch, head, pl.ds(first, ROWS))
        score_bias, dp_bias = (setting.load(ref.at[here], ROW) for ref in (score_bias_ref, dp_bias_ref))
        plgpu.barrier_wait(mine_here.at[group])

        def one(step, dq):
            slot = jax.lax.rem(step, jnp.int32(STAGES))
            plgpu.barrier_wait(k_here.at[slot])
            plgpu.barrier_wait(v_here.at[slot])
            scores, dp = setting.products(
                (across(score_bias, (ROWS, KEYS)), q_smem.at[group], Transposed(k_smem.at[slot])),
                (across(dp_bias, (ROWS, KEYS)), dout_smem.at[group], Transposed(v_smem.at[slot])),
            )
            plgpu.barrier_arrive(v_done.at[slot])
            p = jnp.exp2(visit.mask(scores, step, first) * (setting.scale * LOG2_E))
            ds = (p * dp).astype(jnp.bfloat16)
            (dq,) = setting.products((dq, ds, k_smem.at[slot]))
            plgpu.barrier_arrive(k_done.at[slot])
            return dq

        dq = jax.lax.fori_loop(0, visit.count, one, setting.full((ROWS, q_ref.shape[-1]), 0, MATRIX))
        q_smem[group] = (dq * setting.scale).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[group], dq_ref.at[mine])
        plgpu.wait_smem_to_gmem(0)


def key_value_gradients(
    setting: Setting, q_BSNH, k_BSKH, v_BSKU, spans_BI4, ids: Any, dout_BSNU, bias: Any
) -> tuple[jax.Array, jax.Array]:
    """(B, S, K, H) and (B, S, K, U), of keys and values where they stand: tails are not taken apart.

    ``spans``: :func:`~pallas_kernels.segmented_attention.gpu_tiles.query_spans`; ``ids``: none, or one array.
    """
    (B, S, _, H), (K, U) = q_BSNH.shape, v_BSKU.shape[2:]
    queries = block_of_queries(H)
    scratch = {
        "k_smem": swizzled(GROUPS, ROWS, H, width=queries),
        "v_smem": swizzled(GROUPS, ROWS, U, width=queries),
        "q_smem": swizzled(STAGES, queries, H, width=queries),
        "dout_smem": swizzled(STAGES, queries, U, width=queries),
        "score_bias_smem": plgpu.SMEM((STAGES, queries), jnp.float32),
        "dp_bias_smem": plgpu.SMEM((STAGES, queries), jnp.float32),
        "mine_here": plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
        "here": plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
        "done": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
    }
    out_type = tuple(jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (k_BSKH, v_BSKU))
    call = setting.call(segmented_attention_dkv, out_type, (B, K, S // TILE), scratch)
    return call(q_BSNH, k_BSKH, v_BSKU, dout_BSNU, *bias, spans_BI4, *ids)


def segmented_attention_dkv(
    setting: Setting,
    q_ref,  # (B, S, N, H)
    k_ref,  # (B, S, K, H)
    v_ref,  # (B, S, K, U)
    dout_ref,  # (B, S, N, U)
    score_bias_ref,  # (B, N, S)
    dp_bias_ref,  # (B, N, S)
    spans_ref,  # (B, I, 4)
    *refs,  # ids (B, S), dk (B, S, K, H), dv (B, S, K, U)
    q_smem,
    dout_smem,
    score_bias_smem,
    dp_bias_smem,
    here,
    done,
    **mine,
):
    """The kernel for the gradients of keys and values: the queries that see them pass by, one head after another."""
    *ids_refs, dk_ref, dv_ref = refs
    batch, group = jax.lax.axis_index("batch"), jax.lax.axis_index("group")
    seen = Seen(setting, spans_ref, ids_refs, q_ref.shape[2] // k_ref.shape[2], q_smem.shape[1])

    @pl.when(group == GROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, seen.count + STAGES)  # at the end it only waits
        def _(step):
            slot = jax.lax.rem(step, jnp.int32(STAGES))
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(done.at[slot]))

            @pl.when(step < seen.count)
            def _():
                q_head, block = seen.block(step)
                rows = pl.ds(block * seen.queries, seen.queries)
                for ref, smem in ((q_ref, q_smem), (dout_ref, dout_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[batch, rows, q_head], smem.at[slot], here.at[slot])
                for ref, smem in ((score_bias_ref, score_bias_smem), (dp_bias_ref, dp_bias_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[batch, q_head, rows], smem.at[slot], here.at[slot])

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        arrived = (q_smem, dout_smem, score_bias_smem, dp_bias_smem)
        _accumulate(setting, seen, (k_ref, v_ref), (dk_ref, dv_ref), arrived, here, done, **mine)


def _accumulate(setting, seen, inputs, outputs, arrived, here, done, *, k_smem, v_smem, mine_here):
    """The part of one of the computing warpgroups: 64 keys; scores stand as (keys, queries)."""
    batch, head, tile, group = (jax.lax.axis_index(name) for name in (*GRID, "group"))
    first = tile * TILE + group * ROWS
    rows = (batch, pl.ds(first, ROWS), head)
    for ref, smem in zip(inputs, (k_smem, v_smem), strict=True):
        plgpu.copy_gmem_to_smem(ref.at[rows], smem.at[group], mine_here.at[group])
    plgpu.barrier_wait(mine_here.at[group])

    def one(step, carry):
        dk, dv = carry
        slot = jax.lax.rem(step, jnp.int32(STAGES))
        plgpu.barrier_wait(here.at[slot])
        q_smem, dout_smem, score_bias_smem, dp_bias_smem = (smem.at[slot] for smem in arrived)
        biases = (down(setting.load(smem, COLUMN), (ROWS, seen.queries)) for smem in (score_bias_smem, dp_bias_smem))
        score_bias, dp_bias = biases
        scores, dp = setting.products(
            (score_bias, k_smem.at[group], Transposed(q_smem)),
            (dp_bias, v_smem.at[group], Transposed(dout_smem)),
        )
        p = jnp.exp2(seen.mask(scores, step, first) * (setting.scale * LOG2_E))
        ds = (p * dp).astype(jnp.bfloat16)
        dk, dv = setting.products((dk, ds, q_smem), (dv, p.astype(jnp.bfloat16), dout_smem))
        plgpu.barrier_arrive(done.at[slot])
        return dk, dv

    zeros = tuple(setting.full((ROWS, ref.shape[-1]), 0, MATRIX) for ref in inputs)
    dk, dv = jax.lax.fori_loop(0, seen.count, one, zeros)
    k_smem[group] = (dk * setting.scale).astype(jnp.bfloat16)
    v_smem[group] = dv.astype(jnp.bfloat16)
    plgpu.commit_smem()
    for smem, ref in zip((k_smem, v_smem), outputs, strict=True):
        plgpu.copy_smem_to_gmem(smem.at[group], ref.at[rows])
    plgpu.wait_smem_to_gmem(0)


class Seen:
    """The blocks of queries that see a tile of keys, as :func:`query_spans` says; those of one head after another."""

    def __init__(self, setting: Setting, spans_ref: Any, ids_refs: Any, heads: int, queries: int):
        self.setting, self.ids_refs, self.heads, self.queries = setting, ids_refs, heads, queries
        self.batch, self.kv_head, self.tile = (jax.lax.axis_index(name) for name in GRID)
        self.span = tuple(spans_ref[self.batch, self.tile, i] for i in range(4))
        self.blocks = self.span[3] - self.span[0]
        self.count = heads * self.blocks

    def block(self, step: Any) -> tuple[Any, Any]:
        """The head, and which block."""
        return self.kv_head * self.heads + jax.lax.div(step, self.blocks), self.span[0] + jax.lax.rem(step, self.blocks)

    def mask(self, scores: Any, step: Any, first_key: Any) -> Any:
        """Scores of the keys from ``first_key`` on; -inf where they are not seen."""
        _, block = self.block(step)
        first_query = block * self.queries

        def masked() -> Any:
            segments = self.setting.segments
            row, column = self.setting.positions(scores.shape)
            end = (jax.lax.div(first_key, jnp.int32(segments.size)) + 1) * segments.size
            # From its own segment: by queries that are not before it; from later ones: if it is in the tail.
            own = first_query < end
            excess = jnp.where(own, first_query - first_key, first_key - (end - segments.window))
            sees = row * jnp.where(own, 1, -1) <= column * jnp.where(own, 1, 0) + excess
            if self.ids_refs:
                ids_ref = self.ids_refs[0].at[self.batch]
                key_ids = self.setting.load(ids_ref.at[pl.ds(first_key, ROWS)], ROW)
                query_ids = self.setting.load(ids_ref.at[pl.ds(first_query, self.queries)], COLUMN)
                sees &= across(key_ids, scores.shape) == down(query_ids, scores.shape)
            return jnp.where(sees, scores, -jnp.inf)

        return jax.lax.cond((block >= self.span[1]) & (block < self.span[2]), lambda: scores, masked)
