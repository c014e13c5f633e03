"""Rows times int8 matrices with factors on their columns: half the bytes of a matrix are read.

wgmma takes its second operand from shared memory, in the dtype of the first: int8 numbers, which bfloat16 holds
exactly, are made bfloat16 between the ring of buffers and the product. A warpgroup has all rows of a tile and half of
its columns, so that it waits for nobody else's conversion.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu import BEGIN, COUNT, END, MATRIX_NUMBER, ROW, TILE
from pallas_kernels.grouped_matmul.gpu_tiles import (
    CHUNK,
    COLUMN,
    DEPTH,
    GROUPS,
    MATRIX,
    ROWS,
    Ring,
    Setting,
    Turns,
    columns_of,
    stages_for,
    swizzled,
    write,
)


def multiply_int8(
    setting: Setting, visits_V5: jax.Array, x_RD: jax.Array, w_GDF: jax.Array, scales_GF: jax.Array
) -> jax.Array:
    """(R, F)."""
    R, F = len(x_RD), w_GDF.shape[2]
    columns = columns_of(F, 256, GROUPS * CHUNK)
    own = columns // GROUPS
    chunks = 2 * GROUPS * ROWS * CHUNK
    stages = stages_for(TILE * DEPTH + columns * DEPTH // 2, chunks + 2 * DEPTH * columns)
    as_wgmma_reads = (plgpu.TilingTransform((8, own)), plgpu.SwizzleTransform(own))
    scratch = {
        "x_smem": swizzled(stages, TILE, DEPTH),
        "w_smem": plgpu.SMEM((stages, GROUPS, DEPTH, own), jnp.int8, transforms=as_wgmma_reads),
        "wide_smem": swizzled(GROUPS, 2, DEPTH, own),
        "out_smem": swizzled(GROUPS, ROWS, CHUNK),
        "plain_smem": plgpu.SMEM((GROUPS, ROWS, CHUNK), jnp.bfloat16),
        **Ring.barriers(stages, copies=1 + GROUPS),
    }
    out_type = jax.ShapeDtypeStruct((R, F), jnp.bfloat16)
    kernel, tiles = functools.partial(_kernel, setting), len(visits_V5) * pl.cdiv(F, columns)
    call = setting.call(kernel, "grouped_matmul_int8", out_type, scratch, tiles)
    return call(visits_V5, x_RD, w_GDF, scales_GF)


def _kernel(
    setting: Setting,
    visits_ref,  # (V, 5)
    x_ref,  # (R, D)
    w_ref,  # (G, D, F)
    scales_ref,  # (G, F)
    out_ref,  # (R, F)
    *,
    x_smem,
    w_smem,
    wide_smem,
    out_smem,
    plain_smem,
    here,
    done,
):
    own, steps = w_smem.shape[3], x_ref.shape[1] // DEPTH
    columns = own * GROUPS
    ring = Ring(here, done, x_smem.shape[0])
    turns = Turns(visits_ref[0, COUNT], pl.cdiv(out_ref.shape[1], columns))
    group = jax.lax.axis_index("group")

    def num_steps(visit: Any) -> Any:
        return jnp.where(visits_ref[visit, MATRIX_NUMBER] < 0, 0, steps)

    @pl.when(group == GROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def tile(visit, column, before):
            @pl.loop(0, num_steps(visit))
            def _(k):
                slot, depth = ring.slot(before + k), pl.ds(k * DEPTH, DEPTH)
                x = (x_ref.at[pl.ds(visits_ref[visit, ROW], TILE), depth], x_smem.at[slot])
                matrix = w_ref.at[visits_ref[visit, MATRIX_NUMBER], depth]
                halves = [matrix.at[:, pl.ds(column * columns + g * own, own)] for g in range(GROUPS)]
                ring.fill(before + k, [x, *((half, w_smem.at[slot, g]) for g, half in enumerate(halves))])

            return before + num_steps(visit)

        ring.finish(turns.loop(tile))

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        def tile(visit, column, before):
            def operands(k):
                slot, wide = ring.wait(before + k), wide_smem.at[group, jax.lax.rem(k, 2)]
                wide[...] = setting.load(w_smem.at[slot, group], MATRIX).astype(jnp.bfloat16)
                plgpu.commit_smem()
                return [(x_smem.at[slot, pl.ds(half * ROWS, ROWS)], wide) for half in range(TILE // ROWS)]

            count = num_steps(visit)
            sums = setting.sums(count, TILE // ROWS, own, operands, lambda k: ring.release(before + k))
            matrix, row = jnp.maximum(visits_ref[visit, MATRIX_NUMBER], 0), visits_ref[visit, ROW]
            begin, end, first_column = visits_ref[visit, BEGIN], visits_ref[visit, END], column * columns + group * own
            for at in range(0, own, CHUNK):

                @pl.when(first_column + at < out_ref.shape[1])
                def _(at=at):
                    scales = setting.load(scales_ref.at[matrix, pl.ds(first_column + at, CHUNK)], COLUMN)
                    factors = jax.lax.broadcast_in_dim(scales, (ROWS, CHUNK), [1])
                    for half, total in enumerate(sums):
                        place = (row + half * ROWS, first_column + at, begin, end)
                        value = total[:, at : at + CHUNK] * factors
                        write(value, out_ref, *place, out_smem.at[group], plain_smem.at[group])

            return before + count

        turns.loop(tile)
        plgpu.wait_smem_to_gmem(0)
