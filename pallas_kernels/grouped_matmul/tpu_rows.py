"""Rows times their groups' matrices on TPU: a group's matrices stay on the chip while its rows go by, piece by piece.

The rows of a piece that are its group's decide how large a product is taken (:func:`each_size`), so that a group whose
size is no multiple of a piece costs little more than its rows. A block of rows that several groups share is kept on the
chip from one group to the next (``kept``), and written again with what each adds: copies to HBM are in order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.grouped_matmul.tiles import Kernel, Tiles, memory, tiles_for
from pallas_kernels.grouped_matmul.tpu_visits import (
    BLOCK,
    Piece,
    Stream,
    each_part,
    each_size,
    loop,
    own_tile,
    padded,
    pieces_of,
    product,
    round_up,
)

Finish = Callable[[list[Array], list[Array]], Sequence[Array]]
CAST_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Call:
    """What is computed: outputs are ``finish(products, beside)``, block by block.

    Attributes:
        kernel: whose tiles are taken.
        finish: of float32 products, one for each matrix, and of blocks of the arrays ``beside``.
        outs: how many outputs it has.
        transposed: matrices are (G, columns, contracted).
        zero: rows behind the last group become 0; else they are not written.
    """

    kernel: Kernel
    finish: Finish
    outs: int = 1
    transposed: bool = False
    zero: bool = False


def multiply(
    call: Call,
    wide: Sequence[Array],
    matrices: Sequence[Array],
    sizes_E: Array,
    first: Array | int,
    *,
    num_rows: int,
    beside: Sequence[Array] = (),
    scales_GN: Array | None = None,
    token_R: Array | None = None,
    spare: int = 0,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> list[Array]:
    """Outputs of ``num_rows`` rows, and ``spare`` more that hold anything, in the dtype of the rows.

    Args:
        wide: rows that are multiplied: one array for all matrices, or one for each.
        matrices: stacks of the same shape; the first group's is number ``first``.
        beside: arrays of the shape of the outputs.
        scales_GN: factors on the columns of int8 matrices.
        token_R: rows are ``wide[0][token_R]``, each of which is copied by itself.
        tiles: None: those of the chip.
    """
    R, dtype = round_up(num_rows, BLOCK), wide[0].dtype
    K, N = matrices[0].shape[1:][:: -1 if call.transposed else 1]
    if num_rows * K * N == 0:
        return [jnp.zeros((num_rows + spare, N), dtype)] * call.outs
    tiles = tiles or tiles_of(call, wide, matrices, beside, token_R is not None)
    assert tiles is not None  # why_not says so before
    tiles = tiles.within(R)
    lists = pieces_of(sizes_E, first, R, tiles.rows, even=True)
    if token_R is not None:
        lists["token"] = jnp.pad(token_R, (0, R - num_rows))
        wide = [_as_words(wide[0])]
    else:
        wide = [padded(x, R) for x in wide]
    scales = [] if scales_GN is None else [scales_GN.astype(jnp.float32)[:, None]]
    given = (wide, [padded(x, R) for x in beside], list(matrices), scales)
    arrays: list[Any] = [*wide, *beside]
    out_shape = [jax.ShapeDtypeStruct((max(R, num_rows + spare), N), dtype)] * call.outs
    in_hbm = functools.partial(jax.tree.map, lambda _: pl.BlockSpec(memory_space=pltpu.HBM))
    (outs,) = pl.pallas_call(
        functools.partial(_kernel, call=call, tiles=tiles, R=R),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(N // tiles.columns,),
            in_specs=(in_hbm(given),),
            out_specs=(in_hbm(out_shape),),
            scratch_shapes=(_scratch(call, tiles, K, dtype, given),),
        ),
        out_shape=(out_shape,),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=memory(), disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * K * N * len(matrices),
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *out_shape))
            + len(sizes_E) * sum(w[0].size * w.dtype.itemsize for w in matrices),
        ),
        interpret=interpret,
        name=f"grouped_{call.kernel}",
    )(lists, given)
    return [x[: num_rows + spare] for x in outs]


def _as_words(x_TD: Array) -> Array:
    """(T, 1, words of 32 bits): rows that stand in one piece in memory. Two halves of bfloat16 rows share words."""
    if x_TD.dtype == jnp.float32:
        return x_TD[:, None]
    low, high = (jax.lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32) for half in jnp.split(x_TD, 2, 1))
    return jax.lax.bitcast_convert_type(low | (high << 16), jnp.int32)[:, None]


def tiles_of(call: Call, wide: Any, matrices: Any, beside: Any = (), gathered: bool = False) -> Tiles | None:
    """The tiles of a call, from shapes and dtypes; None: it does not fit."""
    size = wide[0].dtype.itemsize
    K, N = matrices[0].shape[1:][:: -1 if call.transposed else 1]
    of_matrix = sum(2 * w.dtype.itemsize + (size if w.dtype != wide[0].dtype else 0) for w in matrices)

    def room(tiles: Tiles) -> int:
        rows = tiles.rows * K * size * (2 * len(wide) + gathered)
        of_columns = (tiles.rows * 2 + BLOCK) * tiles.columns * size * (len(beside) + call.outs)
        between = tiles.rows * tiles.inner * 4 * (len(matrices) + call.outs)  # what does not stay in registers
        return rows + K * tiles.columns * of_matrix + of_columns + between

    return tiles_for(call.kernel, size, N, room)


def _scratch(call: Call, tiles: Tiles, K: int, dtype: Any, given: Any) -> dict[str, Any]:
    wide, beside, matrices, scales = given
    rows, columns = tiles.rows, tiles.columns
    block = (columns, K) if call.transposed else (K, columns)
    gathered = wide[0].ndim == 3
    return {
        "wide": [
            pltpu.VMEM((2 * rows // 8, 8, x.shape[2]) if gathered else (2, rows, K), x.dtype) for x in wide
        ],
        "gathered": [pltpu.VMEM((rows, K), dtype)] if gathered else [],
        "beside": [pltpu.VMEM((2, rows, columns), x.dtype) for x in beside],
        "matrices": [pltpu.VMEM((2, *block), w.dtype) for w in matrices],
        "cast": [pltpu.VMEM(block, dtype) for w in matrices if w.dtype != dtype],
        "scales": [pltpu.VMEM((2, 1, columns), jnp.float32) for _ in scales],
        "outs": [pltpu.VMEM((2, rows, columns), dtype) for _ in range(call.outs)],
        "kept": [pltpu.VMEM((BLOCK, columns), dtype) for _ in range(call.outs)],
        "semaphores": {name: pltpu.SemaphoreType.DMA((2,)) for name in ("wide", "beside", "group", "outs")},
    }  # fmt: skip


def _kernel(lists, given, out_refs, room, *, call: Call, tiles: Tiles, R: int) -> None:
    wide, beside, matrices, scales = given
    columns = own_tile(0, tiles.columns, out_refs[0].shape[1])
    semaphores, num = room["semaphores"], lists["num"][0]
    if room["gathered"]:
        rows: Any = _Gather(lists["token"], wide[0], room["wide"][0], room["gathered"][0], semaphores["wide"])
    else:
        rows = Stream(wide, room["wide"], slice(None), semaphores["wide"])
    others = Stream(beside, room["beside"], columns, semaphores["beside"])
    outs = Stream(out_refs, room["outs"], columns, semaphores["outs"], out=True)

    def of_group(piece: Piece) -> list[Any]:
        parts = [(w.at[piece.matrix, columns] if call.transposed else w.at[piece.matrix, :, columns]) for w in matrices]
        parts += [s.at[piece.matrix, :, columns] for s in scales]
        return [
            pltpu.make_async_copy(part, buffer.at[piece.group_slot], semaphores["group"].at[piece.group_slot])
            for part, buffer in zip(parts, room["matrices"] + room["scales"], strict=True)
        ]

    def fetch(piece: Piece) -> None:
        rows.start(piece)
        others.start(piece)

    def fetch_group(piece: Piece) -> None:
        for copy in of_group(piece):
            copy.start()

    def visit(p: Any, __: None) -> None:
        piece = Piece.of(lists, p)
        pl.when(p + 1 < num)(lambda: fetch(Piece.of(lists, p + 1)))

        @pl.when(piece.opens)
        def _() -> None:
            for copy in of_group(piece):
                copy.wait()
            pl.when(piece.following < num)(lambda: fetch_group(Piece.of(lists, piece.following)))
            for buffer, cast in zip(room["matrices"], room["cast"], strict=False):
                _cast(buffer.at[piece.group_slot], cast)

        rows.wait(piece)
        others.wait(piece)
        each_size(piece.count, tiles.sizes, functools.partial(_compute, piece, room, call, tiles))
        for out, kept in zip(room["outs"], room["kept"], strict=True):
            _mend(piece, out.at[piece.slot], kept)
        pl.when(p > 0)(lambda: outs.wait(Piece.of(lists, p - 1)))
        outs.start(piece)

    @pl.when(num > 0)
    def _() -> None:
        fetch_group(Piece.of(lists, 0))
        fetch(Piece.of(lists, 0))
        jax.lax.fori_loop(0, num, visit, None)
        outs.wait(Piece.of(lists, num - 1))

    if call.zero:
        _zero(outs, lists["behind"][0], R)


def _compute(piece: Piece, room: Any, call: Call, tiles: Tiles, size: int) -> None:
    """The first ``size`` rows of a piece times all columns that are here."""
    rows = [x.at[:size] for x in room["gathered"]] or [x.at[piece.slot, :size] for x in room["wide"]]
    matrices = [w.at[:] for w in room["cast"]] or [w.at[piece.group_slot] for w in room["matrices"]]

    def some(column: Any) -> None:
        columns, products = pl.ds(column, tiles.inner), []
        for i, w in enumerate(matrices):
            x = rows[min(i, len(rows) - 1)][:]
            products.append(product(x, w[columns], (1, 1)) if call.transposed else product(x, w[:, columns]))
        for scale in room["scales"]:
            products = [p * scale[piece.group_slot, :, columns] for p in products]
        found = call.finish(products, [x[piece.slot, :size, columns] for x in room["beside"]])
        for out, values in zip(room["outs"], found, strict=True):
            out[piece.slot, :size, columns] = values.astype(out.dtype)

    loop(tiles.columns // tiles.inner, tiles.inner, some)


def _cast(source: Any, target: Any) -> None:
    """int8 numbers become the rows' dtype, some rows of the matrix at a time."""
    size = CAST_ROWS if len(target) % CAST_ROWS == 0 else len(target)

    def some(row: Any) -> None:
        target[pl.ds(row, size)] = source[pl.ds(row, size)].astype(jnp.float32).astype(target.dtype)

    loop(len(target) // size, size, some)


def _mend(piece: Piece, out: Any, kept: Any) -> None:
    """Rows that are not the group's: in front those of groups before, from ``kept``; behind 0, until others come."""
    row = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, 1), 0)

    def choose(mask: Array, a: Array, b: Array | float) -> Array:
        return jnp.where(mask, a.astype(jnp.float32), jnp.asarray(b, jnp.float32)).astype(out.dtype)

    @pl.when(piece.opens & (piece.row < piece.start))
    def _() -> None:
        out[:BLOCK] = choose(row + piece.row >= piece.start, out[:BLOCK], kept[:])

    @pl.when(piece.closes & (piece.row + piece.count > piece.end))
    def _() -> None:
        last = pl.multiple_of(piece.count - BLOCK, BLOCK)
        kept[:] = choose(row + piece.row + last < piece.end, out[pl.ds(last, BLOCK)], 0.0)
        out[pl.ds(last, BLOCK)] = kept[:]


def _zero(outs: Stream, behind: Any, R: int) -> None:
    """Rows from ``behind`` on become 0."""
    rows = outs.buffers[0].shape[1]

    @pl.when(behind < R)
    def _() -> None:
        for buffer in outs.buffers:

            def clear(row: Any, buffer: Any = buffer) -> None:
                buffer[0, pl.ds(row, BLOCK)] = jnp.zeros((BLOCK, buffer.shape[2]), buffer.dtype)

            loop(rows // BLOCK, BLOCK, clear)

        def some(i: Any, _: None) -> None:
            row = behind + i * rows
            piece = Piece(0, pl.multiple_of(row, BLOCK), jnp.minimum(R - row, rows), 0, 0, 0, 0, 0)
            outs.start(piece)
            outs.wait(piece)

        jax.lax.fori_loop(0, jax.lax.div(R - behind + rows - 1, rows), some, None)


@dataclasses.dataclass(frozen=True)
class _Gather:
    """Rows that are copied one by one, as words, and put together as they are used."""

    tokens: Any
    source: Any  # (T, 1, words)
    buffer: Any  # (2 * rows / 8, 8, words)
    rows: Any
    semaphores: Any

    def _eight(self, piece: Piece, block: Any) -> Any:
        """Where a block of a piece begins in the buffer."""
        return piece.slot * (self.rows.shape[0] // 8) + block * (BLOCK // 8)

    def start(self, piece: Piece) -> None:
        """Begins to copy."""

        def block(i: Any, _: None) -> None:
            eights = [self.buffer.at[self._eight(piece, i) + n] for n in range(BLOCK // 8)]
            for r in range(BLOCK):
                token, place = self.tokens[piece.row + i * BLOCK + r], eights[r // 8].at[pl.ds(r % 8, 1)]
                pltpu.make_async_copy(self.source.at[token], place, self.semaphores.at[piece.slot]).start()

        jax.lax.fori_loop(0, jax.lax.div(piece.count, BLOCK), block, None)

    def wait(self, piece: Piece) -> None:
        """Until they are there, and in place."""

        def part(_: Any, size: int) -> None:  # waits for as many bytes as these rows have
            place = self.buffer.at[pl.ds(0, size // 8)]
            pltpu.make_async_copy(place, place, self.semaphores.at[piece.slot]).wait()

        each_part(piece.count, self.rows.shape[0], part)

        def block(i: Any, _: None) -> None:
            words = self.buffer[pl.ds(self._eight(piece, i), BLOCK // 8)].reshape(BLOCK, -1)
            at = pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK)
            if words.dtype == self.rows.dtype:
                self.rows[at] = words
                return
            for half, bits in enumerate((words << 16, words & -(2**16))):
                width = words.shape[1]
                values = jax.lax.bitcast_convert_type(bits, jnp.float32).astype(self.rows.dtype)
                self.rows[at, half * width : (half + 1) * width] = values

        jax.lax.fori_loop(0, jax.lax.div(piece.count, BLOCK), block, None)
