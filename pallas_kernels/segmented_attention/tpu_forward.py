"""Segmented attention on TPU, forward: a block of queries stays, the keys that it sees stream by (FlashAttention-2)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.segmented_attention.segments import Segments
from pallas_kernels.segmented_attention.tiles import Tiles, tiles_for
from pallas_kernels.segmented_attention.tpu_documents import document_tables, meeting
from pallas_kernels.segmented_attention.tpu_layout import LANES, Layout, lay_out
from pallas_kernels.segmented_attention.tpu_stream import (
    LOG2_E,
    MASKED,
    VMEM_LIMIT,
    across,
    both,
    buffers_for,
    heads_first,
    heads_last,
    lanes_of,
    own_mask,
    product,
    row_of,
    stream,
)


def forward(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKU: Array,
    ids_BT: Array | None,
    *,
    segments: Segments,
    scale: float,
    interpret: Any = False,
    tiles: Tiles | None = None,
) -> tuple[Array, Array]:
    """See :mod:`pallas_kernels.segmented_attention.attend`; ``tiles``: None, those of the chip."""
    (B, T, N, H), (K, U) = q_BTNH.shape, v_BTKU.shape[2:]
    tiles = tiles or tiles_for("forward", q_BTNH.dtype.itemsize, max(H, U))
    layout = lay_out(T, segments, tiles)
    # The factor turns exp into exp2.
    q = heads_first(layout.rows((q_BTNH.astype(jnp.float32) * (scale * LOG2_E)).astype(q_BTNH.dtype)))
    k, v = (heads_first(layout.rows(x)) for x in (k_BTKH, v_BTKU))
    far = {"rows": [k, v]} if layout.uses("rows") else {}
    if layout.uses("tails"):
        far["tails"] = [heads_first(layout.tails(x)) for x in (k_BTKH, v_BTKU)]
    ids, tables = document_tables(ids_BT, layout)
    for name in far:
        far[name] += [ids[name]] if ids else []
    tables |= {"seen": jnp.asarray(layout.seen), "before": jnp.asarray(layout.before)}

    pairs, lanes = B * N * sum(layout.pairs.values()), v.shape[2]
    block = functools.partial(_block, layout.block)
    out, log = pl.pallas_call(
        functools.partial(_kernel, layout=layout, N=N, K=K),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B * N, layout.num_blocks),
            in_specs=(
                block(q.shape[2]),
                (block(k.shape[2], N // K), block(lanes, N // K)),
                pl.BlockSpec((1, 1, 1, layout.block), lambda h, b, _: (jax.lax.div(h, N), b, 0, 0)) if ids else None,
                {name: [pl.BlockSpec(memory_space=pltpu.HBM)] * len(far[name]) for name in far},
            ),
            out_specs=(block(lanes), pl.BlockSpec((1, 1, 1, layout.block), lambda h, b, _: (h, b, 0, 0))),
            scratch_shapes=(
                sums_of(layout.block, lanes, bool(tiles.ones) and lanes % (2 * LANES) > 0),
                [pltpu.VMEM((layout.block, LANES), jnp.int32)] if ids else [],
                buffers_for(layout, [k, v], bool(ids)) if far else [],
                [pltpu.SemaphoreType.DMA((2, 3))] if far else [],
            ),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((B * N, layout.num_blocks * layout.block, lanes), q.dtype),
            jax.ShapeDtypeStruct((B * N, layout.num_blocks, 1, layout.block), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (H + U),
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v, q)),
        ),
        interpret=interpret,
        name="segmented_attention_forward",
    )(tables, q, (k, v), ids.get("block"), far)
    log_BTN = layout.positions(log.reshape(B, N, -1).swapaxes(1, 2))
    return layout.positions(heads_last(out, B))[..., :U], log_BTN


def _block(rows: int, lanes: int, heads: int = 1) -> pl.BlockSpec:
    """A block of rows of one of ``heads`` heads that share it."""
    return pl.BlockSpec((1, rows, lanes), lambda h, b, _: (jax.lax.div(h, heads), b, 0))


Piece = tuple[Array, Array, Array | None]


def sums_of(rows: int, lanes: int, ones: bool) -> list[Any]:
    """Room for the sums of :func:`see`: the largest score, the sum of exponentials, and the sum of values.

    The first has equal lanes, the second one number for each lane; with ``ones`` the second stands, in equal lanes,
    behind the third.
    """
    return [pltpu.VMEM((rows, n), jnp.float32) for n in (LANES, 0 if ones else LANES, lanes + LANES * ones) if n]


def see(sums: list[Any], rows: slice, q: Array, pieces: list[Piece], first: bool = False) -> None:
    """Adds what some rows see in some keys to their sums, which are relative to the largest score so far.

    Args:
        sums: references to room as :func:`sums_of` says.
        rows: which of their rows.
        q: queries of these rows, scaled for exp2.
        pieces: keys, values, and a mask (True: seen) or None, of as many keys as one product takes.
        first: the sums begin here.
    """
    top_ref, *sum_refs = sums
    scores = [product(q, k, over=(1, 1)) for k, _, _ in pieces]
    scores = [s if mask is None else jnp.where(mask, s, MASKED) for s, (_, _, mask) in zip(scores, pieces, strict=True)]
    top = functools.reduce(jnp.maximum, [jnp.max(s, axis=1, keepdims=True) for s in scores])
    top = jnp.broadcast_to(top, (len(q), LANES)) if first else jnp.maximum(top_ref[rows], top)
    if first:
        totals = [jnp.zeros((len(q), ref.shape[1]), jnp.float32) for ref in sum_refs]
    else:
        shrink = jnp.exp2(top_ref[rows] - top)
        totals = [ref[rows] * across(shrink, ref.shape[1]) for ref in sum_refs]
    for s, (_, v, _) in zip(scores, pieces, strict=True):
        p = jnp.exp2(s - across(top, s.shape[1]))
        if len(totals) == 1:
            v = jnp.concatenate([v, jnp.ones((len(v), LANES), v.dtype)], axis=1)
        added = [_by_lane(p), product(p.astype(v.dtype), v)][-len(totals) :]
        totals = [total + more for total, more in zip(totals, added, strict=True)]
    for ref, x in zip(sums, [top, *totals], strict=True):
        ref[rows] = x


def _by_lane(x: Array) -> Array:
    """(n, keys) -> (n, LANES): sums of every LANES-th number, which cost no move between lanes."""
    if x.shape[1] % LANES:
        return jnp.pad(jnp.sum(x, axis=1, keepdims=True), ((0, 0), (0, LANES - 1)))
    return functools.reduce(jnp.add, [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)])


def result(sums: list[Any], dtype: Any) -> tuple[Array, Array]:
    """The output (rows, lanes) and the logarithm (1, rows) that belong to sums."""
    if len(sums) == 2:
        top, acc, total = sums[0][:], sums[1][:, :-LANES], sums[1][:, -LANES:]
    else:
        top, acc = sums[0][:], sums[2][:]
        total = jnp.broadcast_to(jnp.sum(sums[1][:], axis=1, keepdims=True), top.shape)
    log = (row_of(top) + jnp.log2(row_of(total))) / LOG2_E
    return (acc / across(total, acc.shape[1])).astype(dtype), log


def _kernel(tables, q_ref, own_refs, ids_ref, far_refs, out_ref, log_ref, sums, ids_scratch, buffers, semaphores, *,
            layout: Layout, N: int, K: int) -> None:  # fmt: skip
    head, block = pl.program_id(0), pl.program_id(1)
    batch, kv_head = jax.lax.div(head, N), jax.lax.div(head, N // K)
    k_ref, v_ref = own_refs
    part, num_parts = layout.part, layout.block // layout.part

    def same_document(rows: slice, key_ids: Array) -> Array | None:
        return None if ids_ref is None else across(ids_scratch[0][rows], key_ids.shape[1]) == key_ids

    def own() -> None:
        if ids_ref is not None:
            ids_scratch[0][:] = lanes_of(ids_ref[0, 0])
        for i in range(num_parts):
            rows, pieces = slice(i * part, (i + 1) * part), []
            for j in range(i + 1):
                if (seen := layout.own_part(i, j)) == "none":
                    continue
                keys = slice(j * part, (j + 1) * part)
                mask = own_mask(layout, i, j) if seen == "some" else None
                if ids_ref is not None:
                    mask = both(mask, same_document(rows, ids_ref[0, 0][:, keys]))
                pieces.append((k_ref[0, keys], v_ref[0, keys], mask))
            see(sums, rows, q_ref[0, rows], pieces, first=True)

    everything = slice(0, layout.block)

    def whole(name: str, refs: list[Any], c: Any) -> None:
        def visit(masked: bool) -> None:
            for j in range(layout.keys // part):
                keys = slice(j * part, (j + 1) * part)
                mask = same_document(everything, refs[2][j]) if masked else None
                see(sums, everything, q_ref[0], [(refs[0][keys], refs[1][keys], mask)])

        if ids_ref is None:
            visit(masked=False)
            return
        chunks = far_refs[name][0].shape[1] // layout.keys
        meet, one = meeting(tables, name, batch * layout.num_blocks + block, batch * chunks + c)
        pl.when(one)(lambda: visit(masked=False))
        pl.when(meet & ~one)(lambda: visit(masked=True))

    def rest(refs: list[Any], count: Any) -> None:
        def one(j: Any, _: None) -> None:
            keys = pl.ds(pl.multiple_of(j * part, part), part)
            mask = jax.lax.broadcasted_iota(jnp.int32, (1, part), 1) + j * part < count
            if ids_ref is not None:
                mask = both(mask, same_document(everything, refs[2][j]))
            see(sums, everything, q_ref[0], [(refs[0][keys], refs[1][keys], mask)])

        jax.lax.fori_loop(0, jax.lax.div(count + part - 1, part), one, None)

    meanwhile = own
    for name, refs in far_refs.items():
        before = block * layout.block - tables["before"][block]
        first, stop = (
            (0, tables["seen"][block]) if name == "tails" else (jax.lax.div(before, layout.keys), block * layout.block)
        )
        if ids_ref is not None:
            first = tables[f"{name}_first"][batch * layout.num_blocks + block]
        sources = [ref.at[kv_head] for ref in refs[:2]] + [ref.at[batch] for ref in refs[2:]]
        stream(
            sources, buffers, semaphores[0], first, stop, layout.keys,
            whole=functools.partial(whole, name), rest=rest if layout.has_rest(name) else None, meanwhile=meanwhile,
        )  # fmt: skip
        meanwhile = lambda: None  # noqa: E731
    meanwhile()

    out_ref[0], log_ref[0, 0] = result(sums, out_ref.dtype)
