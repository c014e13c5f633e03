"""Gradients of groups' matrices on TPU: products over the rows of each group, summed on the chip piece by piece."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.grouped_matmul.tiles import Tiles, divisors, memory, tiles_for
from pallas_kernels.grouped_matmul.tpu_visits import (
    BLOCK,
    Piece,
    Stream,
    each_size,
    loop,
    own_tile,
    padded,
    pieces_of,
    product,
    round_up,
)


def sum_outer(
    x_RD: Array, dy_RF: Array, sizes_E: Array, *, num_rows: int, tiles: Tiles | None = None, interpret: Any = False
) -> Array:
    """``x_g.T @ dy_g`` of each group of ``num_rows`` rows, (E, D, F); 0 where it has none.

    Tiles: all rows of a group go by for each block of at most as many rows of the result as columns.
    """
    (D, F), E, dtype = (x_RD.shape[1], dy_RF.shape[1]), len(sizes_E), x_RD.dtype
    R = round_up(num_rows, BLOCK)
    if R * D * F == 0:
        return jnp.zeros((E, D, F), dtype)
    tiles = tiles or tiles_for("outer", dtype.itemsize, F, functools.partial(room, D, dtype.itemsize))
    assert tiles is not None  # why_not says so before
    tiles, across = tiles.within(R), across_of(D, tiles)
    lists = pieces_of(sizes_E, 0, R, tiles.rows)
    lists["empty"] = jnp.argsort(sizes_E > 0, stable=True).astype(jnp.int32)
    lists["num_empty"] = jnp.sum(sizes_E == 0, keepdims=True).astype(jnp.int32)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, across=across),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(D // across, F // tiles.columns),
            in_specs=(hbm, hbm),
            out_specs=hbm,
            scratch_shapes=(
                pltpu.VMEM((2, tiles.rows, across), dtype),
                pltpu.VMEM((2, tiles.rows, tiles.columns), dtype),
                pltpu.VMEM((across, tiles.columns), jnp.float32),
                pltpu.VMEM((across, tiles.columns), dtype),
                {name: pltpu.SemaphoreType.DMA((2,)) for name in ("x", "dy", "out")},
            ),
        ),
        out_shape=jax.ShapeDtypeStruct((E, D, F), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=memory(), disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * D * F,
            transcendentals=0,
            bytes_accessed=(num_rows * (D + F) + E * D * F) * dtype.itemsize,
        ),
        interpret=interpret,
        name="grouped_outer",
    )(lists, padded(x_RD, R), padded(dy_RF, R))


def across_of(D: int, tiles: Tiles) -> int:
    """Rows of the block of a result."""
    return next((n for n in divisors(D) if n <= tiles.columns), divisors(D)[-1])


def room(D: int, itemsize: int, tiles: Tiles) -> int:
    """Bytes that the kernel takes on the chip with given tiles."""
    across = across_of(D, tiles)
    between = tiles.inner * tiles.columns * 4 + tiles.rows * tiles.inner * itemsize
    pieces = 2 * tiles.rows * (across + tiles.columns) * itemsize
    return pieces + across * tiles.columns * (4 + itemsize) + between


def _kernel(lists, x_ref, dy_ref, out_ref, x_room, dy_room, total, rounded, semaphores, *,
            tiles: Tiles, across: int) -> None:  # fmt: skip
    num = lists["num"][0]
    part = [own_tile(i, size, out_ref.shape[i + 1]) for i, size in enumerate((across, tiles.columns))]
    rows = [
        Stream([x_ref], [x_room], part[0], semaphores["x"]),
        Stream([dy_ref], [dy_room], part[1], semaphores["dy"]),
    ]

    def result(group: Any) -> Any:
        return pltpu.make_async_copy(rounded, out_ref.at[group, *part], semaphores["out"].at[0])

    def fetch(piece: Piece) -> None:
        for stream in rows:
            stream.start(piece)

    def visit(p: Any, __: None) -> None:
        piece = Piece.of(lists, p)
        pl.when(p + 1 < num)(lambda: fetch(Piece.of(lists, p + 1)))
        for stream in rows:
            stream.wait(piece)
        add = functools.partial(_add, piece, x_room, dy_room, total)
        pl.when(jnp.logical_not(piece.closes))(lambda: add(total, tiles, tiles.rows))

        @pl.when(piece.closes)
        def _() -> None:
            pl.when(piece.turn > 0)(lambda: result(piece.matrix).wait())  # of the group before
            each_size(piece.count, tiles.sizes, functools.partial(add, rounded, tiles))
            result(piece.matrix).start()

    @pl.when(num > 0)
    def _() -> None:
        fetch(Piece.of(lists, 0))
        jax.lax.fori_loop(0, num, visit, None)
        result(0).wait()

    @pl.when(lists["num_empty"][0] > 0)
    def _() -> None:
        rounded[:] = jnp.zeros_like(rounded)
        copies = lists["num_empty"][0]
        jax.lax.fori_loop(0, copies, lambda i, _: result(lists["empty"][i]).start(), None)
        jax.lax.fori_loop(0, copies, lambda i, _: result(0).wait(), None)


def _add(piece: Piece, x_room: Any, dy_room: Any, total: Any, target: Any, tiles: Tiles, size: int) -> None:
    """The sum of a group so far, and what ``size`` rows of a piece add to it, go to ``target``."""
    for ref in (x_room.at[piece.slot], dy_room.at[piece.slot]):
        _clear(piece, ref, size)
    inner = next(n for n in divisors(len(total)) if n <= tiles.inner or n == divisors(len(total))[-1])

    def some(row: Any) -> None:
        rows = pl.ds(row, inner)
        more = product(x_room[piece.slot, :size, rows], dy_room[piece.slot, :size], (0, 0))
        target[rows] = (jnp.where(piece.opens, 0, total[rows]) + more).astype(target.dtype)

    loop(len(total) // inner, inner, some)


def _clear(piece: Piece, ref: Any, size: int) -> None:
    """Rows of a piece that are not its group's become 0: what stands there may be NaN."""
    row = piece.row + jax.lax.broadcasted_iota(jnp.int32, (BLOCK, 1), 0)

    def keep(offset: Any, mask: Any) -> None:
        at = pl.ds(offset, BLOCK)
        ref[at] = jnp.where(mask, ref[at].astype(jnp.float32), 0).astype(ref.dtype)

    pl.when(piece.row < piece.start)(lambda: keep(0, row >= piece.start))

    @pl.when(piece.row + size > piece.end)
    def _() -> None:
        def block(i: Any, _: None) -> None:
            offset = pl.multiple_of(i * BLOCK, BLOCK)
            keep(offset, row + offset < piece.end)

        jax.lax.fori_loop(jax.lax.div(piece.end - piece.row, BLOCK), size // BLOCK, block, None)
