"""Segmented attention on TPU over gathered rows: each block of rows looks at the tail of one segment.

A prefetched list says which tail that is, and consecutive blocks that look at the same tail fetch it once. The heads
that share a key/value head stand side by side as rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.segmented_attention.tpu_backward import pull
from pallas_kernels.segmented_attention.tpu_forward import result, see, sums_of
from pallas_kernels.segmented_attention.tpu_layout import LANES, round_up
from pallas_kernels.segmented_attention.tpu_stream import LOG2_E, VMEM_LIMIT, across, lanes_of

PART, MOST_ROWS = 512, 1024  # keys and rows of one product, the latter for bfloat16 heads of 128


def _tail(entry: Any) -> Any:
    """The tail that a block of rows has at hand: an entry of the list, or its complement where it holds no rows."""
    return jnp.maximum(entry, ~entry)


class _Rows:
    """Arrays as the kernels take them, and where their blocks are."""

    def __init__(self, q_BKRGH: Array, ids_BKR: Array, segment_BKI: Array, k_BKJwH: Array, v_BKJwU: Array,
                 ids_BJw: Array, scale: float):  # fmt: skip
        self.B, self.K, self.R, self.G, self.H = q_BKRGH.shape
        self.J, w, self.U = v_BKJwU.shape[2:]
        rows = self.R // segment_BKI.shape[2] * self.G
        wide = self.lanes(max(self.H, self.U)) // LANES * q_BKRGH.dtype.itemsize // 2
        # Many heads or wide ones: a block goes in pieces.
        pieces = next(
            n for n in range(1, rows + 1) if rows % n == 0 and (rows // n) * wide <= max(MOST_ROWS, LANES * wide)
        )
        self.rows, self.num = rows // pieces, segment_BKI.shape[2] * pieces
        self.part = min(PART, round_up(w, LANES))
        self.window = round_up(w, self.part)
        q = (q_BKRGH.astype(jnp.float32) * (scale * LOG2_E)).astype(q_BKRGH.dtype)  # exp becomes exp2
        ids_row = self.row(jnp.broadcast_to(ids_BKR[..., None], q.shape[:4]).astype(jnp.int32))
        k, v = (self.tail(x) for x in (k_BKJwH, v_BKJwU))
        key_ids = jnp.pad(ids_BJw.astype(jnp.int32), ((0, 0), (0, 0), (0, self.window - w)), constant_values=-1)
        key_ids = key_ids.reshape(self.B, self.J, -1, 1, self.part)
        self.given = (self.wide(q), k, v, ids_row, key_ids)
        segment = jnp.repeat(segment_BKI.reshape(self.B * self.K, -1), pieces, axis=1)
        # Blocks without rows stand at the end; they keep the tail that is there, and say so by its complement.
        last = jnp.maximum(jax.lax.cummax(segment, axis=1), 0)
        self.segments = jnp.where(segment < 0, ~last, segment)
        kv_tail = [self.of_tail(x.shape[3]) for x in (k, v)]
        ids_tail = pl.BlockSpec(
            (1, 1, *key_ids.shape[2:]), lambda h, i, s: (jax.lax.div(h, self.K), _tail(s[h, i]), 0, 0, 0)
        )
        self.specs = (self.of_rows(self.lanes(self.H)), *kv_tail, self.of_row, ids_tail)

    @staticmethod
    def lanes(width: int) -> int:
        return round_up(width, LANES)

    def wide(self, x_BKRG: Array) -> Array:
        """(B, K, R, G, width) -> (B * K, blocks, rows, lanes)."""
        x = x_BKRG.reshape(self.B * self.K, self.num, self.rows, -1)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.lanes(x.shape[3]) - x.shape[3])))

    def row(self, x_BKRG: Array) -> Array:
        """(B, K, R, G) -> (B * K, blocks, 1, rows)."""
        return x_BKRG.reshape(self.B * self.K, self.num, 1, self.rows)

    def tail(self, x_BKJw: Array) -> Array:
        """(B, K, J, w, width) -> (B * K, J, window, lanes)."""
        x = x_BKJw.reshape(self.B * self.K, self.J, *x_BKJw.shape[3:])
        more = (self.window - x.shape[2], self.lanes(x.shape[3]) - x.shape[3])
        return jnp.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))

    def of_rows(self, lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.rows, lanes), lambda h, i, _: (h, i, 0, 0))

    @property
    def of_row(self) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, 1, self.rows), lambda h, i, _: (h, i, 0, 0))

    def of_tail(self, lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, self.window, lanes), lambda h, i, s: (h, _tail(s[h, i]), 0, 0))

    def shape(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.B * self.K, *shape), jnp.float32)

    def run(self, kernel: Any, more: tuple, more_specs: tuple, out_specs: tuple, out_shape: tuple, scratch: tuple,
            products: int, interpret: Any) -> Any:  # fmt: skip
        """The kernel over all blocks of rows."""
        # At most: how many blocks hold rows is not known before.
        pairs = self.B * self.K * self.num * self.rows * self.window
        moved = sum(x.size * x.dtype.itemsize for x in (*self.given, *more, *out_shape))
        return pl.pallas_call(
            functools.partial(kernel, part=self.part),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(self.B * self.K, self.num),
                in_specs=((*self.specs, *more_specs),),
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * pairs * products * (self.H + self.U), transcendentals=pairs, bytes_accessed=moved
            ),
            interpret=interpret,
            name=f"segmented_attention_rows{kernel.__name__}",
        )(self.segments, (*self.given, *more))


def forward_rows(
    q_BKRGH: Array,
    ids_BKR: Array,
    segment_BKI: Array,
    k_BKJwH: Array,
    v_BKJwU: Array,
    ids_BJw: Array,
    *,
    scale: float,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """See :mod:`pallas_kernels.segmented_attention.attend`."""
    r = _Rows(q_BKRGH, ids_BKR, segment_BKI, k_BKJwH, v_BKJwU, ids_BJw, scale)
    lanes = r.lanes(r.U)
    out, log = r.run(
        _forward, (), (), (r.of_rows(lanes), r.of_row), (r.shape(r.num, r.rows, lanes), r.shape(r.num, 1, r.rows)),
        (sums_of(r.rows, lanes, ones=False),), 1, interpret,
    )  # fmt: skip
    out_BKRGU = out[..., : r.U].reshape(r.B, r.K, r.R, r.G, r.U)
    return out_BKRGU, log.reshape(r.B, r.K, r.R, r.G)


def _forward(segments, refs, out_ref, log_ref, sums, *, part: int) -> None:
    q_ref, k_ref, v_ref, ids_ref, key_ids_ref = refs

    @pl.when(segments[pl.program_id(0), pl.program_id(1)] >= 0)
    def _() -> None:
        ids = across(lanes_of(ids_ref[0, 0]), part)

        def one(j: Any, first: bool = False) -> None:
            keys = pl.ds(pl.multiple_of(j * part, part), part)
            piece = (k_ref[0, 0, keys], v_ref[0, 0, keys], ids == key_ids_ref[0, 0, j])
            see(sums, slice(None), q_ref[0, 0], [piece], first)

        one(0, first=True)
        jax.lax.fori_loop(1, key_ids_ref.shape[2], lambda j, _: one(j), None)
        out_ref[0, 0], log_ref[0, 0] = result(sums, jnp.float32)


def backward_rows(
    q_BKRGH: Array,
    ids_BKR: Array,
    segment_BKI: Array,
    k_BKJwH: Array,
    v_BKJwU: Array,
    ids_BJw: Array,
    log_BKRG: Array,
    along_BKRG: Array,
    dout_BKRGU: Array,
    *,
    scale: float,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """See :mod:`pallas_kernels.segmented_attention.attend`."""
    r = _Rows(q_BKRGH, ids_BKR, segment_BKI, k_BKJwH, v_BKJwU, ids_BJw, scale)
    more = (r.wide(dout_BKRGU.astype(q_BKRGH.dtype)), r.row(log_BKRG * LOG2_E), r.row(along_BKRG))
    widths = [r.lanes(n) for n in (r.H, r.U)]
    dq, dk, dv = r.run(
        _backward, more, (r.of_rows(widths[1]), r.of_row, r.of_row),
        (r.of_rows(widths[0]), *[r.of_tail(n) for n in widths]),
        (r.shape(r.num, r.rows, widths[0]), *[r.shape(r.J, r.window, n) for n in widths]),
        (pltpu.VMEM((widths[0], r.rows), jnp.float32),), 2, interpret,
    )  # fmt: skip
    # Tails that no block looks at were never written.
    seen = (r.segments[..., None] == jnp.arange(r.J)).any(axis=1)[..., None, None]
    w = k_BKJwH.shape[3]
    dk, dv = (jnp.where(seen, x, 0)[:, :, :w].reshape(r.B, r.K, r.J, w, -1) for x in (dk, dv))
    dq_BKRGH = dq[..., : r.H].reshape(r.B, r.K, r.R, r.G, r.H) * scale
    return dq_BKRGH, dk[..., : r.H] / LOG2_E, dv[..., : r.U]


def _backward(segments, refs, dq_ref, dk_ref, dv_ref, dq_scratch, *, part: int) -> None:
    q_ref, k_ref, v_ref, ids_ref, key_ids_ref, dout_ref, log_ref, along_ref = refs
    h, i = pl.program_id(0), pl.program_id(1)
    segment = segments[h, i]

    @pl.when((segment >= 0) & ((i == 0) | (segments[h, jnp.maximum(i - 1, 0)] != segment)))
    def _() -> None:
        dk_ref[:], dv_ref[:] = jnp.zeros_like(dk_ref), jnp.zeros_like(dv_ref)

    @pl.when(segment >= 0)
    def _() -> None:
        dq_scratch[:] = jnp.zeros_like(dq_scratch)

        def one(j: Any, _: None) -> None:
            keys = pl.ds(pl.multiple_of(j * part, part), part)
            mask = across(lanes_of(key_ids_ref[0, 0, j]), dq_scratch.shape[1]) == ids_ref[0, 0]
            of_rows = (q_ref[0, 0], dout_ref[0, 0], log_ref[0, 0], along_ref[0, 0])
            dq, dk, dv = pull(*of_rows, k_ref[0, 0, keys], v_ref[0, 0, keys], mask)
            dq_scratch[:] += dq
            dk_ref[0, 0, keys] += dk
            dv_ref[0, 0, keys] += dv

        jax.lax.fori_loop(0, key_ids_ref.shape[2], one, None)
        dq_ref[0, 0] = dq_scratch[:].T
