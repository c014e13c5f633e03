"""Segmented attention on TPU, backward, in two kernels: a block's own keys, and the keys that stream by.

Scores stand as [keys, queries], so that what belongs to a query is a row, and no product but that for dq needs a
transposed operand. The first kernel begins dq; the second adds to it for one *span* of keys after another, whose
gradients are summed on the chip while all blocks that see the span pass.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.segmented_attention.segments import Segments
from pallas_kernels.segmented_attention.tiles import Tiles, tiles_for
from pallas_kernels.segmented_attention.tpu_documents import document_tables, meeting
from pallas_kernels.segmented_attention.tpu_layout import Layout, lay_out, round_up
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
    stream,
)

# Heads are laid out together as long as they have no more rows: what that takes in HBM is bounded.
POSITIONS_AND_HEADS = 2**18


def backward(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKU: Array,
    ids_BT: Array | None,
    out_BTNU: Array,
    log_BTN: Array,
    dout_BTNU: Array,
    *,
    segments: Segments,
    scale: float,
    interpret: Any = False,
    tiles: Tiles | None = None,
) -> tuple[Array, Array, Array]:
    """See :mod:`pallas_kernels.segmented_attention.attend`; ``tiles``: None, those of the chip."""
    arrays = (q_BTNH, k_BTKH, v_BTKU, out_BTNU, log_BTN, dout_BTNU)
    tiles = tiles or tiles_for("backward", q_BTNH.dtype.itemsize, max(x.shape[3] for x in (q_BTNH, v_BTKU)))
    some_heads = functools.partial(_some_heads, ids_BT, segments, scale, interpret, tiles)
    (B, T, N, _), K = q_BTNH.shape, k_BTKH.shape[2]
    most = max(POSITIONS_AND_HEADS // (B * T * (N // K)), 1)
    at_a_time = max(n for n in range(1, K + 1) if K % n == 0 and n <= most)
    if at_a_time == K:
        return some_heads(*arrays)

    def one(i: Array) -> Any:
        def part(x_BTN: Array) -> Array:
            n = x_BTN.shape[2] // K * at_a_time
            return jax.lax.dynamic_slice_in_dim(x_BTN, i * n, n, axis=2)

        return some_heads(*map(part, arrays))

    grads = jax.lax.map(one, jnp.arange(K // at_a_time))
    dq, dk, dv = (jnp.moveaxis(x, 0, 2).reshape(B, T, -1, x.shape[-1]) for x in grads)
    return dq, dk, dv


def _some_heads(ids_BT, segments: Segments, scale: float, interpret: Any, tiles: Tiles, q_BTNH: Array, k_BTKH: Array,
                v_BTKU: Array, out_BTNU: Array, log_BTN: Array, dout_BTNU: Array) -> Any:  # fmt: skip
    """Gradients of heads that are laid out together."""
    (B, T, N, H), (K, U) = q_BTNH.shape, v_BTKU.shape[2:]
    layout = lay_out(T, segments, tiles)
    along_BTN = jnp.sum(dout_BTNU.astype(jnp.float32) * out_BTNU.astype(jnp.float32), axis=-1)
    q_scaled = (q_BTNH.astype(jnp.float32) * (scale * LOG2_E)).astype(q_BTNH.dtype)  # exp becomes exp2
    q, dout, k, v = (heads_first(layout.rows(x)) for x in (q_scaled, dout_BTNU, k_BTKH, v_BTKU))
    log, along = (_as_rows(x, layout) for x in (log_BTN * LOG2_E, along_BTN))
    ids, tables = document_tables(ids_BT, layout)
    queries = (q, dout, log, along)
    # The scores were there before; what is new are four products.
    call = _Call(layout, B, N, K, ids, tables, tiles.span, 4 * B * N * (H + U), interpret)
    dq, *own = _own_gradients(call, queries, (k, v))
    dk_BTKH, dv_BTKU = (layout.positions(heads_last(x, B)) for x in own)
    if layout.uses("rows"):
        dq, *more = _far_gradients(call, "rows", dq, queries, (k, v))
        more = [layout.positions(heads_last(x, B)) for x in more]
        dk_BTKH, dv_BTKU = dk_BTKH + more[0], dv_BTKU + more[1]
    if layout.uses("tails"):
        tails = [heads_first(layout.tails(x)) for x in (k_BTKH, v_BTKU)]
        dq, *more = _far_gradients(call, "tails", dq, queries, tails)
        more = [layout.from_tails(heads_last(x, B)) for x in more]
        dk_BTKH, dv_BTKU = dk_BTKH + more[0], dv_BTKU + more[1]
    dq_BTNH = layout.positions(heads_last(dq, B))[..., :H] * scale
    dk_BTKH, dv_BTKU = dk_BTKH[..., :H] / LOG2_E, dv_BTKU[..., :U]
    return dq_BTNH.astype(q_BTNH.dtype), dk_BTKH.astype(k_BTKH.dtype), dv_BTKU.astype(v_BTKU.dtype)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What both kernels are told: ids and tables of :func:`document_tables`; FLOPs of a pair, over all heads."""

    layout: Layout
    B: int
    N: int
    K: int
    ids: dict[str, Array]
    tables: dict[str, Array]
    span: int
    flops: int
    interpret: Any

    def cost(self, name: str, *arrays: Array) -> pl.CostEstimate:
        """Of the pairs that one kernel goes through."""
        pairs = self.layout.pairs[name]
        moved = sum(x.size * x.dtype.itemsize for x in arrays)
        return pl.CostEstimate(flops=self.flops * pairs, transcendentals=self.B * self.N * pairs, bytes_accessed=moved)


def _as_rows(x_BTN: Array, layout: Layout) -> Array:
    """(B, T, N) -> (B * N, blocks, 1, block)."""
    x_BNR = layout.rows(x_BTN).swapaxes(1, 2)
    return x_BNR.reshape(-1, layout.num_blocks, 1, layout.block)


def pull(q: Array, dout: Array, log: Array, along: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, ...]:
    """Gradients of some queries (transposed: [lanes, queries]) and keys through each other, float32."""
    scores = product(k, q, over=(1, 1))
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    p = jnp.exp2(scores - log)
    ds = (p * (product(v, dout, over=(1, 1)) - along)).astype(q.dtype)
    return product(k, ds, over=(0, 0)), product(ds, q), product(p.astype(q.dtype), dout)


# ---------------------------------------------------------------- a block's own keys


def _own_gradients(call: _Call, queries: tuple[Array, ...], own: tuple[Array, Array]) -> tuple[Array, ...]:
    """Through a block's own keys: dq, dk, dv, float32, (heads, rows, lanes)."""
    layout, ids, B, N, K = call.layout, call.ids, call.B, call.N, call.K
    R, G = layout.num_blocks * layout.block, N // K
    wide, narrow = (
        lambda x, heads: pl.BlockSpec((1, layout.block, x.shape[2]), lambda h, b, g: (heads(h, g), b, 0)),
        lambda heads: pl.BlockSpec((1, 1, 1, layout.block), lambda h, b, g: (heads(h, g), b, 0, 0)),
    )
    query, key, sequence = (lambda h, g: h * G + g), (lambda h, g: h), (lambda h, g: jax.lax.div(h, K))
    q, dout, *per_row = queries
    return pl.pallas_call(
        functools.partial(_own_kernel, layout=layout),
        grid=(B * K, layout.num_blocks, G),
        in_specs=(
            (wide(q, query), wide(dout, query), *[narrow(query) for _ in per_row]),
            tuple(wide(x, key) for x in own),
            narrow(sequence) if ids else None,
        ),
        out_specs=(wide(q, query), *[wide(x, key) for x in own]),
        out_shape=(
            jax.ShapeDtypeStruct((B * N, R, q.shape[2]), jnp.float32),
            *[jax.ShapeDtypeStruct((B * K, R, x.shape[2]), jnp.float32) for x in own],
        ),
        scratch_shapes=[pltpu.VMEM((q.shape[2], layout.block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=call.cost("own", *queries, *own, *queries[:1], *own),
        interpret=call.interpret,
        name="segmented_attention_backward_own",
    )(queries, own, ids.get("block"))


def _own_kernel(queries, own, ids_ref, dq_ref, dk_ref, dv_ref, dq_scratch, *, layout: Layout) -> None:
    q_ref, dout_ref, log_ref, along_ref = queries
    part, num_parts = layout.part, layout.block // layout.part

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        dk_ref[:], dv_ref[:] = jnp.zeros_like(dk_ref), jnp.zeros_like(dv_ref)

    for i in range(num_parts):
        rows = slice(i * part, (i + 1) * part)
        for j in (i, *range(i)):
            if (seen := layout.own_part(i, j)) == "none":
                continue
            keys = slice(j * part, (j + 1) * part)
            mask = own_mask(layout, i, j, keys_first=True) if seen == "some" else None
            if ids_ref is not None:
                key_ids = across(lanes_of(ids_ref[0, 0][:, keys]), part)
                mask = both(mask, key_ids == ids_ref[0, 0][:, rows])
            of_rows = (q_ref[0, rows], dout_ref[0, rows], log_ref[0, 0][:, rows], along_ref[0, 0][:, rows])
            dq, dk, dv = pull(*of_rows, own[0][0, keys], own[1][0, keys], mask)
            dq_scratch[:, rows] = dq if i == j else dq_scratch[:, rows] + dq
            dk_ref[0, keys] += dk
            dv_ref[0, keys] += dv
    dq_ref[0] = dq_scratch[:].T


# ---------------------------------------------------------------- keys that stream by


def span_numbers(name: str, layout: Layout, most: int, num_keys: int) -> tuple[int, dict[str, np.ndarray]]:
    """Keys of a span, and tables: the keys that each block sees, the first and the last block that sees each span."""
    num_spans = -(-num_keys // max(most, layout.keys))
    span = round_up(-(-num_keys // num_spans), layout.keys)
    own = layout.own_start
    first, stop = (0 * own, layout.seen) if name == "tails" else (own - layout.before, own)
    edges = np.arange(-(-num_keys // span))[:, None] * span
    passing = (first < edges + span) & (stop > edges) & (first < stop)  # [spans, blocks]
    low, high = passing.argmax(axis=1), layout.num_blocks - 1 - passing[:, ::-1].argmax(axis=1)
    return span, {"first": first, "stop": stop, "low_block": low, "high_block": high}


def _far_gradients(call: _Call, name: str, dq: Array, queries: tuple[Array, ...], far: Any) -> tuple[Array, ...]:
    """Through ``tails``, or ``rows`` in front of a block: dq with what it adds, and dk, dv, float32."""
    layout, ids, B, N, K = call.layout, call.ids, call.B, call.N, call.K
    G = N // K
    span, numbers = span_numbers(name, layout, call.span, far[0].shape[1])
    num_spans = len(numbers["low_block"])
    tables = call.tables | {key: jnp.asarray(x, jnp.int32) for key, x in numbers.items()}

    def at(h: Any, s: Any, g: Any, b: Any, tables: Any) -> tuple[Any, Any]:
        """Head and block; blocks that do not see the span fetch nothing."""
        return h * G + g, jnp.clip(b, tables["low_block"][s], tables["high_block"][s])

    rows = lambda x: pl.BlockSpec((1, layout.block, x.shape[2]), lambda *i: (*at(*i), 0))  # noqa: E731
    row = pl.BlockSpec((1, 1, 1, layout.block), lambda *i: (*at(*i), 0, 0))
    ids_row = pl.BlockSpec((1, 1, 1, layout.block), lambda h, *i: (jax.lax.div(h, K), at(h, *i)[1], 0, 0))
    stays = pl.BlockSpec(memory_space=pltpu.HBM)
    far = [*far, ids[name]] if ids else list(far)
    q, dout, *per_row = queries
    return pl.pallas_call(
        functools.partial(_far_kernel, name=name, layout=layout, K=K, span=span),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B * K, num_spans, G, layout.num_blocks),
            in_specs=(
                stays,
                (rows(q), rows(dout), *[row for _ in per_row]),
                ids_row if ids else None,
                [stays] * len(far),
            ),
            out_specs=(stays, *[pl.BlockSpec((1, span, x.shape[2]), lambda h, s, *_: (h, s, 0)) for x in far[:2]]),
            scratch_shapes=(
                pltpu.VMEM((q.shape[2], layout.block), jnp.float32),
                pltpu.VMEM((layout.block, q.shape[2]), jnp.float32),
                buffers_for(layout, far[:2], bool(ids)),
                pltpu.SemaphoreType.DMA((2, len(far))),
                pltpu.SemaphoreType.DMA,
            ),
        ),
        out_shape=(
            jax.ShapeDtypeStruct(dq.shape, dq.dtype),
            *[jax.ShapeDtypeStruct((B * K, num_spans * span, x.shape[2]), jnp.float32) for x in far[:2]],
        ),
        input_output_aliases={len(tables): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=call.cost(name, dq, dq, *queries, *far[:2], *far[:2]),
        interpret=call.interpret,
        name=f"segmented_attention_backward_{name}",
    )(tables, dq, queries, ids.get("block"), far)


def _far_kernel(tables, dq_given, queries, ids_ref, far_refs, dq_hbm, dk_ref, dv_ref, dq_scratch, dq_before, buffers,
                semaphores, dq_semaphore, *, name: str, layout: Layout, K: int, span: int) -> None:  # fmt: skip
    kv_head, at_span, g, block = (pl.program_id(i) for i in range(4))
    head, batch = kv_head * pl.num_programs(2) + g, jax.lax.div(kv_head, K)
    q_ref, dout_ref, log_ref, along_ref = queries
    part, chunk = layout.part, layout.keys
    span_start = at_span * span
    stop = jnp.minimum(tables["stop"][block], span_start + span)
    first = jax.lax.div(jnp.maximum(tables["first"][block], span_start), chunk)
    if ids_ref is not None:
        first = jnp.maximum(first, tables[f"{name}_first"][batch * layout.num_blocks + block])

    @pl.when((g == 0) & (block == 0))
    def _() -> None:
        dk_ref[:], dv_ref[:] = jnp.zeros_like(dk_ref), jnp.zeros_like(dv_ref)

    def add(k: Array, v: Array, mask: Array | None, at: Any) -> None:
        of_rows = (q_ref[0], dout_ref[0], log_ref[0, 0], along_ref[0, 0])
        dq, dk, dv = pull(*of_rows, k, v, mask)
        dq_scratch[:] += dq
        at = pl.ds(pl.multiple_of(at - span_start, part), part)
        dk_ref[0, at] += dk
        dv_ref[0, at] += dv

    def same_document(key_ids: Array) -> Array | None:
        return None if ids_ref is None else across(lanes_of(key_ids), layout.block) == ids_ref[0, 0]

    def whole(refs: list[Any], c: Any) -> None:
        def visit(masked: bool) -> None:
            for j in range(chunk // part):
                keys = slice(j * part, (j + 1) * part)
                mask = same_document(refs[2][j]) if masked else None
                add(refs[0][keys], refs[1][keys], mask, c * chunk + j * part)

        if ids_ref is None:
            visit(masked=False)
            return
        chunks = far_refs[2].shape[1] * part // chunk
        meet, one = meeting(tables, name, batch * layout.num_blocks + block, batch * chunks + c)
        pl.when(one)(lambda: visit(masked=False))
        pl.when(meet & ~one)(lambda: visit(masked=True))

    def rest(refs: list[Any], count: Any) -> None:
        def one(j: Any, _: None) -> None:
            keys = pl.ds(pl.multiple_of(j * part, part), part)
            mask = jax.lax.broadcasted_iota(jnp.int32, (part, 1), 0) + j * part < count
            if ids_ref is not None:
                mask = both(mask, same_document(refs[2][j]))
            add(refs[0][keys], refs[1][keys], mask, stop - count + j * part)

        jax.lax.fori_loop(0, jax.lax.div(count + part - 1, part), one, None)

    @pl.when(stop > first * chunk)
    def _() -> None:
        here = dq_hbm.at[head, pl.ds(block * layout.block, layout.block)]
        begun = pltpu.make_async_copy(here, dq_before, dq_semaphore)
        begun.start()
        dq_scratch[:] = jnp.zeros_like(dq_scratch)
        sources = [ref.at[kv_head] for ref in far_refs[:2]] + [ref.at[batch] for ref in far_refs[2:]]
        stream(
            sources, buffers, semaphores, first, stop, chunk, whole=whole, rest=rest if layout.has_rest(name) else None
        )
        begun.wait()
        dq_before[:] += dq_scratch[:].T
        done = pltpu.make_async_copy(dq_before, here, dq_semaphore)
        done.start()
        done.wait()
