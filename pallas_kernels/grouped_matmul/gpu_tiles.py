"""What the Mosaic GPU kernels share: tiles, the setting that a kernel is traced in, rings of buffers, sums of products.

A kernel is persistent: as many thread blocks as the chip has multiprocessors take tiles of the result in turn. In each,
one warpgroup copies (TMA) into a ring of buffers, and two multiply what is in it (wgmma), 64 rows of the tile each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu import TILE, WIDTH

ROWS = 64  # of a warpgroup: what one wgmma instruction takes
GROUPS = 2  # warpgroups that compute; one more copies
DEPTH = 64  # of a block that is copied, along the sums: 128 bytes, the widest swizzle
CHUNK = 64  # columns of a result that are written together
PROGRAMS = 132  # thread blocks, at most: multiprocessors of an H100 and of an H200
SHARED_BYTES = 227 * 1024  # of a thread block, at most
MOST_STAGES = 6
assert ROWS * GROUPS == TILE
assert WIDTH == DEPTH == CHUNK

MATRIX = plgpu.Layout.WGMMA
COLUMN = MATRIX.reduce(0)  # a number for each column of a matrix


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a kernel is compiled for.

    Attributes:
        flops: what the definition asks of it.
        interpret: None, or the parameters of the simulator.
    """

    flops: int
    interpret: Any = None

    def call(self, kernel: Any, name: str, out_type: Any, scratch: dict[str, Any], tiles: int) -> Any:
        """``kernel(*refs, **scratch)`` as a function of arrays, for so many tiles at most."""
        call = plgpu.kernel(
            kernel,
            out_type=out_type,
            scratch_types=scratch,
            grid=(min(PROGRAMS, tiles),),
            grid_names=("program",),
            num_threads=GROUPS + 1,
            thread_name="group",
            kernel_name=name,
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=self.interpret,
        )

        def run(*arrays: jax.Array) -> Any:
            with jax.named_scope(f"kernel_flops={self.flops}"):  # for those who count FLOPs from the program
                return call(*arrays)

        return run

    def laid_out(self, x: Any, layout: Any) -> Any:
        """Says which thread holds what; the simulator knows no threads within a warpgroup."""
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def load(self, ref: Any, layout: Any) -> Any:
        """What stands in a reference, to the threads that want it."""
        return ref[...] if self.interpret else plgpu.load(ref, (), layout=layout, optimized=False)

    def rows(self, shape: tuple[int, int]) -> Any:
        """The row of each element."""
        return self.laid_out(jax.lax.broadcasted_iota(jnp.int32, shape, 0), MATRIX)

    def sums(
        self, count: Any, num: int, columns: int, operands: Callable[[Any], Any], release: Callable[[Any], None]
    ) -> tuple[Any, ...]:
        """``num`` sums of products, (ROWS, columns) each, over ``count`` steps.

        ``operands(step)`` waits until a step's operands are here, and gives a pair in shared memory for each sum;
        ``release(step)`` is called when they are no longer read. One step is multiplied while the next one is begun.
        The simulator has no product with an operand that is transposed: there, XLA computes what wgmma does.
        """
        shape = (ROWS, columns)
        if self.interpret:

            def one(step: Any, sums: Any) -> Any:
                terms = (jnp.dot(a[...], b[...], preferred_element_type=jnp.float32) for a, b in operands(step))
                sums = tuple(total + term for total, term in zip(sums, terms, strict=True))
                release(step)
                return sums

            return jax.lax.fori_loop(0, count, one, (jnp.zeros(shape, jnp.float32),) * num)

        def accumulate(*sum_refs: Any) -> Any:
            @pl.loop(0, count)
            def _(step: Any) -> None:
                for ref, (a, b) in zip(sum_refs, operands(step), strict=True):
                    plgpu.wgmma(ref, *(x.swapped if isinstance(x, Transposed) else x for x in (a, b)))
                plgpu.wgmma_wait(num)
                pl.when(step > 0)(lambda: release(step - 1))

            plgpu.wgmma_wait(0)
            pl.when(count > 0)(lambda: release(count - 1))
            return tuple(ref[...] for ref in sum_refs)

        return pl.run_scoped(accumulate, *[plgpu.ACC(shape)] * num)


class Transposed:
    """A matrix in shared memory, read with its axes swapped."""

    def __init__(self, ref: Any):
        self.ref = ref

    @property
    def swapped(self) -> Any:
        return plgpu.transpose_ref(self.ref, (1, 0))

    def __getitem__(self, index: Any) -> Any:
        return self.ref[index].T


def swizzled(*shape: int) -> Any:
    """Shared memory, arranged as wgmma reads it without bank conflicts, by 64 numbers of a row."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def columns_of(num: int, most: int, unit: int = CHUNK) -> int:
    """Columns of a tile, so that as few as can be cover ``num``, and reach little beyond: copies stop there."""
    tiles = pl.cdiv(num, most)
    return pl.cdiv(pl.cdiv(num, tiles), unit) * unit


def stages_for(stage_numbers: int, other_numbers: int) -> int:
    """Buffers in the ring that fit beside the other shared memory; both in bfloat16 numbers."""
    return min(MOST_STAGES, (SHARED_BYTES - 1024 - 2 * other_numbers) // (2 * stage_numbers))


class Ring:
    """Buffers that are filled in turn; ``here``: a step's copies have come, ``done``: nobody reads them any longer."""

    def __init__(self, here: Any, done: Any, stages: int):
        self.here, self.done, self.stages = here, done, stages

    @staticmethod
    def barriers(stages: int, copies: int) -> dict[str, Any]:
        return {
            "here": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            "done": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        }

    def slot(self, step: Any) -> Any:
        return jax.lax.rem(step, jnp.int32(self.stages))

    def fill(self, step: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Copies to each second of a pair, a buffer's part of ``step``, what the first one refers to."""
        slot = self.slot(step)
        self.wait_for_room(step)
        for source, target in pairs:
            plgpu.copy_gmem_to_smem(source, target, self.here.at[slot])

    def wait_for_room(self, step: Any) -> None:
        pl.when(step >= self.stages)(functools.partial(plgpu.barrier_wait, self.done.at[self.slot(step)]))

    def finish(self, steps: Any) -> None:
        """Waits until all is read; ``steps`` were filled."""
        pl.loop(steps, steps + self.stages)(self.wait_for_room)

    def wait(self, step: Any) -> Any:
        plgpu.barrier_wait(self.here.at[self.slot(step)])
        return self.slot(step)

    def release(self, step: Any) -> None:
        plgpu.barrier_arrive(self.done.at[self.slot(step)])


@dataclasses.dataclass(frozen=True)
class Turns:
    """The tiles of a result, (visits, columns), that this thread block computes, one of so many in a row.

    Those that run at a time are neighbours in a band of columns: they share rows and matrices in the L2 cache.
    """

    visits: Any
    columns: int
    widest: int = 8

    def loop(self, body: Callable[[Any, Any, Any], Any]) -> Any:
        """``body(visit, column, steps before it) -> steps after it`` for each; the number of steps of all."""
        program, programs = jax.lax.axis_index("program"), jax.lax.axis_size("program")
        turns = jax.lax.div(self.visits * self.columns - program + programs - 1, jnp.int32(programs))
        band = max(width for width in range(1, self.widest + 1) if self.columns % width == 0)

        def one(turn: Any, steps: Any) -> Any:
            tile = program + turn * programs
            of_band = self.visits * band
            within = jax.lax.rem(tile, of_band)
            column = jax.lax.div(tile, of_band) * band + jax.lax.rem(within, jnp.int32(band))
            return body(jax.lax.div(within, jnp.int32(band)), column, steps)

        return jax.lax.fori_loop(0, turns, one, jnp.int32(0))


def powers_below(size: int) -> Iterator[int]:
    """Powers of two that are less than ``size``, one of them, the greatest first."""
    while (size := size // 2) > 0:
        yield size


def write(value: Any, ref: Any, row: Any, column: Any, begin: Any, end: Any, smem: Any, plain: Any) -> None:
    """Writes rows ``begin`` to ``end`` of a chunk of a warpgroup, whose first row is ``row``, to global memory.

    Copies have sizes that are known when the kernel is compiled: a part of the rows goes out in pieces of 32, 16, ...
    rows, and from memory that is not swizzled, of which any row can begin a piece.
    """
    value = value.astype(jnp.bfloat16)
    columns = pl.ds(column, CHUNK)
    all_rows = (begin <= row) & (row + ROWS <= end)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of what was there before

    @pl.when(all_rows)
    def _whole() -> None:
        smem[...] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, ref.at[pl.ds(row, ROWS), columns])

    @pl.when(~all_rows)
    def _pieces() -> None:
        plain[...] = value
        plgpu.commit_smem()
        first = jnp.clip(begin - row, 0, ROWS)
        count = jnp.clip(end - row, first, ROWS) - first
        for size in powers_below(ROWS):
            at = first + (count & -(2 * size))
            piece = functools.partial(
                plgpu.copy_smem_to_gmem, plain.at[pl.ds(at, size)], ref.at[pl.ds(row + at, size), columns]
            )
            pl.when((count & size) != 0)(piece)
