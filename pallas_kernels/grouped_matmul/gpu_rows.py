"""The kernel whose result has rows sorted by group: tiles of rows, each with its group's matrix.

A tile begins at a multiple of 8 rows (copies are by tiles of 8) and reaches over its group's ends; what is there is
multiplied, and not written. Rows of no group are tiles without a matrix: zeros are written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu import BEGIN, COUNT, END, MATRIX_NUMBER, ROW, TILE
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
    write,
)


@dataclasses.dataclass(frozen=True)
class Product:
    """What is computed for each tile.

    Attributes:
        name: of the kernel.
        finish: from a chunk of each sum, and of each array beside, float32, to a chunk of each result.
        outputs: how many results.
        sums: how many sums; each has its own matrices.
        terms: how many arrays of rows are multiplied, one after the other, into the same sums.
        beside: how many arrays ``finish`` wants, of the result's shape.
        transposed: the matrices are (columns of the result, columns of the rows).
    """

    name: str
    finish: Callable[..., tuple[Any, ...]]
    outputs: int = 1
    sums: int = 1
    terms: int = 1
    beside: int = 0
    transposed: bool = False

    def split(self, refs: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """Rows, matrices by term and sum, arrays beside, results."""
        rows, rest = refs[: self.terms], refs[self.terms :]
        num = self.terms * self.sums
        weights = [rest[i : i + self.sums] for i in range(0, num, self.sums)]
        return rows, weights, rest[num : num + self.beside], rest[num + self.beside :]


def multiply(
    product: Product, setting: Setting, visits_V5: jax.Array, *arrays: jax.Array, out_rows: int
) -> tuple[jax.Array, ...]:
    """The results, (out_rows, F) each; ``arrays``: rows, matrices and arrays beside, as in :class:`Product`."""
    _, weights, _, _ = product.split(arrays)
    F = weights[0][0].shape[1 if product.transposed else 2]
    columns = columns_of(F, 256 // product.sums)
    block = (columns, DEPTH) if product.transposed else (DEPTH, columns)
    chunks = (1 + 1 + product.beside) * GROUPS * ROWS * CHUNK
    stages = stages_for((TILE + product.sums * columns) * DEPTH, chunks)
    scratch = {
        "x_smem": swizzled(stages, TILE, DEPTH),
        "w_smem": swizzled(stages, product.sums, *block),
        "out_smem": swizzled(GROUPS, ROWS, CHUNK),
        "plain_smem": plgpu.SMEM((GROUPS, ROWS, CHUNK), jnp.bfloat16),
        **Ring.barriers(stages, copies=1 + product.sums),
    }
    if product.beside:
        scratch["beside_smem"] = swizzled(GROUPS, product.beside, ROWS, CHUNK)
        scratch["beside_here"] = plgpu.Barrier(num_arrivals=product.beside, num_barriers=GROUPS)
    out_type = tuple(jax.ShapeDtypeStruct((out_rows, F), jnp.bfloat16) for _ in range(product.outputs))
    kernel, tiles = functools.partial(_kernel, product, setting), len(visits_V5) * pl.cdiv(F, columns)
    return setting.call(kernel, product.name, out_type, scratch, tiles)(visits_V5, *arrays)


def _kernel(product: Product, setting: Setting, visits_ref, *refs, x_smem, w_smem, here, done, **mine):
    rows_refs, weights_refs, beside_refs, out_refs = product.split(refs)
    steps = rows_refs[0].shape[1] // DEPTH
    columns = w_smem.shape[2 if product.transposed else 3]
    ring = Ring(here, done, x_smem.shape[0])
    turns = Turns(visits_ref[0, COUNT], pl.cdiv(out_refs[0].shape[1], columns))
    group = jax.lax.axis_index("group")

    def num_steps(visit):
        """For a tile: none without a matrix."""
        return jnp.where(visits_ref[visit, MATRIX_NUMBER] < 0, 0, steps)

    @pl.when(group == GROUPS)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def tile(visit, column, before):
            matrix, row, num = visits_ref[visit, MATRIX_NUMBER], visits_ref[visit, ROW], num_steps(visit)
            for term, (rows_ref, w_refs) in enumerate(zip(rows_refs, weights_refs, strict=True)):

                @pl.loop(0, num)
                def _(k, term=term, rows_ref=rows_ref, w_refs=w_refs):
                    step = before + term * num + k
                    slot, depth, width = ring.slot(step), pl.ds(k * DEPTH, DEPTH), pl.ds(column * columns, columns)
                    block = (matrix, width, depth) if product.transposed else (matrix, depth, width)
                    weights = [(ref.at[block], w_smem.at[slot, i]) for i, ref in enumerate(w_refs)]
                    ring.fill(step, [(rows_ref.at[pl.ds(row, TILE), depth], x_smem.at[slot]), *weights])

            return before + product.terms * num

        ring.finish(turns.loop(tile))

    @pl.when(group < GROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")

        def tile(visit, column, before):
            count = product.terms * num_steps(visit)

            def operands(step):
                slot = ring.wait(before + step)
                x = x_smem.at[slot, pl.ds(group * ROWS, ROWS)]
                weights = [w_smem.at[slot, i] for i in range(product.sums)]
                return [(x, Transposed(w) if product.transposed else w) for w in weights]

            finish = _Finish(product, setting, beside_refs, out_refs, **mine)
            finish.at(visits_ref, visit, column * columns)
            sums = setting.sums(count, product.sums, columns, operands, lambda step: ring.release(before + step))
            finish.write(sums)
            return before + count

        turns.loop(tile)
        plgpu.wait_smem_to_gmem(0)


class _Finish:
    """From a tile's sums to its results, chunk by chunk; arrays beside come while the sums are made."""

    def __init__(
        self, product, setting, beside_refs, out_refs, *, out_smem, plain_smem, beside_smem=None, beside_here=None
    ):
        group = jax.lax.axis_index("group")
        self.product, self.setting, self.out_refs, self.beside_refs = product, setting, out_refs, beside_refs
        self.out_smem, self.plain_smem = out_smem.at[group], plain_smem.at[group]
        if beside_refs:
            self.beside_smem, self.beside_here = beside_smem.at[group], beside_here.at[group]

    def at(self, visits_ref, visit, column) -> None:
        """Of which tile."""
        self.row = visits_ref[visit, ROW] + jax.lax.axis_index("group") * ROWS
        self.begin, self.end, self.column = visits_ref[visit, BEGIN], visits_ref[visit, END], column
        self._ask_for(0)

    def _ask_for(self, chunk: int) -> None:
        where = (pl.ds(self.row, ROWS), pl.ds(self.column + chunk * CHUNK, CHUNK))
        for i, ref in enumerate(self.beside_refs):
            plgpu.copy_gmem_to_smem(ref.at[where], self.beside_smem.at[i], self.beside_here)

    def _beside(self) -> list[Any]:
        if not self.beside_refs:
            return []
        plgpu.barrier_wait(self.beside_here)
        loaded = [self.setting.laid_out(self.beside_smem[i], MATRIX) for i in range(len(self.beside_refs))]
        plgpu.commit_smem()  # all threads have read before one of them asks for more
        return [x.astype(jnp.float32) for x in loaded]

    def write(self, sums) -> None:
        def is_there(chunk: int) -> Any:  # the last tile may reach over the last column
            return self.column + chunk * CHUNK < self.out_refs[0].shape[1]

        chunks = sums[0].shape[1] // CHUNK
        for chunk in range(chunks):

            @pl.when(is_there(chunk))
            def _(chunk=chunk):
                beside = self._beside()
                if chunk + 1 < chunks:
                    pl.when(is_there(chunk + 1))(functools.partial(self._ask_for, chunk + 1))
                columns = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
                results = self.product.finish(*(x[:, columns] for x in sums), *beside)
                for value, ref in zip(results, self.out_refs, strict=True):
                    place = (self.row, self.column + chunk * CHUNK, self.begin, self.end)
                    write(value, ref, *place, self.out_smem, self.plain_smem)
