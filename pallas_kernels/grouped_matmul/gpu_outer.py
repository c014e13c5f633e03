"""The kernel whose result is a matrix for each group: the sum of its rows' outer products.

Rows pass by in blocks, from a multiple of 8 on. In a block that reaches over an end of the group, what is not the
group's is made 0 in both operands: it may be NaN.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu import BEGIN, END, ROW, TILE
from pallas_kernels.grouped_matmul.gpu_tiles import (
    CHUNK,
    DEPTH,
    GROUPS,
    MATRIX,
    ROWS,
    Ring,
    Setting,
    Transposed,
    Turns,
    columns_of,
    stages_for,
    swizzled,
)


def outer(setting: Setting, spans_E3: jax.Array, x_RA: jax.Array, y_RB: jax.Array) -> jax.Array:
    """(E, A, B); ``spans``: of each group, the row at which its first block begins, its first row and its end."""
    (_, A), (_, B), E = x_RA.shape, y_RB.shape, len(spans_E3)
    columns = columns_of(B, 256)
    stages = stages_for((TILE + columns) * DEPTH, GROUPS * ROWS * columns)
    scratch = {
        "x_smem": swizzled(stages, GROUPS, DEPTH, ROWS),
        "y_smem": swizzled(stages, DEPTH, columns),
        "out_smem": swizzled(GROUPS, columns // CHUNK, ROWS, CHUNK),
        "masked": plgpu.Barrier(num_arrivals=GROUPS),
        **Ring.barriers(stages, copies=GROUPS + 1),
    }
    out_type = jax.ShapeDtypeStruct((E, A, B), jnp.bfloat16)
    kernel, tiles = functools.partial(_kernel, setting), E * pl.cdiv(A, TILE) * pl.cdiv(B, columns)
    return setting.call(kernel, "grouped_outer", out_type, scratch, tiles)(spans_E3, x_RA, y_RB)


def _kernel(setting: Setting, spans_ref, x_ref, y_ref, out_ref, *, x_smem, y_smem, out_smem, masked, here, done):
    E, A, B = out_ref.shape
    columns = y_smem.shape[2]
    ring = Ring(here, done, x_smem.shape[0])
    across, down = pl.cdiv(B, columns), pl.cdiv(A, TILE)
    turns = Turns(E * down, across)
    group = jax.lax.axis_index("group")

    def place(visit, column):
        """Which matrix, and the first row and column of the tile in it."""
        return jax.lax.div(visit, jnp.int32(down)), jax.lax.rem(visit, jnp.int32(down)) * TILE, column * columns

    def num_blocks(e):
        row, begin, end = (spans_ref[e, i] for i in (ROW, BEGIN, END))
        return jnp.where(end > begin, jax.lax.div(end - row + DEPTH - 1, jnp.int32(DEPTH)), 0)

    @pl.when(group == GROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def tile(visit, column, before):
            e, a, b = place(visit, column)

            @pl.loop(0, num_blocks(e))
            def _(k):
                slot, rows = ring.slot(before + k), pl.ds(spans_ref[e, ROW] + k * DEPTH, DEPTH)
                x = [(x_ref.at[rows, pl.ds(a + g * ROWS, ROWS)], x_smem.at[slot, g]) for g in range(GROUPS)]
                ring.fill(before + k, [*x, (y_ref.at[rows, pl.ds(b, columns)], y_smem.at[slot])])

            return before + num_blocks(e)

        ring.finish(turns.loop(tile))

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        def tile(visit, column, before):
            e, a, b = place(visit, column)
            row, begin, end = (spans_ref[e, i] for i in (ROW, BEGIN, END))

            def operands(k):
                slot, first = ring.wait(before + k), row + k * DEPTH
                reaches_over = (first < begin) | (first + DEPTH > end)
                mask = functools.partial(_mask, setting, x_smem.at[slot, group], y_smem.at[slot], masked)
                pl.when(reaches_over)(functools.partial(mask, begin - first, end - first))
                return [(Transposed(x_smem.at[slot, group]), y_smem.at[slot])]

            count = num_blocks(e)
            (total,) = setting.sums(count, 1, columns, operands, lambda k: ring.release(before + k))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for chunk in range(columns // CHUNK):
                here_a, here_b = a + group * ROWS, b + chunk * CHUNK
                smem, value = out_smem.at[group, chunk], total[:, chunk * CHUNK : (chunk + 1) * CHUNK]

                @pl.when((here_a < A) & (here_b < B))  # a tile may reach over the last row and column
                def _(smem=smem, value=value, there=(e, pl.ds(here_a, ROWS), pl.ds(here_b, CHUNK))):
                    smem[...] = value.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(smem, out_ref.at[there])

            return before + count

        turns.loop(tile)
        plgpu.wait_smem_to_gmem(0)


def _mask(setting: Setting, x_smem: Any, y_smem: Any, masked: Any, begin: Any, end: Any) -> None:
    """Zeros in all rows but ``begin`` to ``end``: of this warpgroup's x, and of its share of y, which both read."""
    row = setting.rows((DEPTH, CHUNK))
    inside = (row >= begin) & (row < end)

    def keep(ref: Any) -> None:
        value = setting.laid_out(ref[...], MATRIX)
        ref[...] = jnp.where(inside, value, jnp.zeros_like(value))

    keep(x_smem)
    for chunk in range(y_smem.shape[1] // CHUNK):
        own = jax.lax.axis_index("group") == chunk % GROUPS
        pl.when(own)(functools.partial(keep, y_smem.at[:, pl.ds(chunk * CHUNK, CHUNK)]))
    plgpu.commit_smem()
    plgpu.barrier_arrive(masked)
    plgpu.barrier_wait(masked)
