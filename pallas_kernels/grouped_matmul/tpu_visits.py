"""What the TPU kernels go through: pieces of each group's rows, in order, and how rows get on the chip and off it.

Pieces begin at multiples of BLOCK rows, the least that can be copied, so that a group's first piece may begin with rows
of groups before it, and its last piece end with rows of those behind it.
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

BLOCK = 16  # rows of a tile of bfloat16 numbers in memory


def round_up(x: Any, to: int) -> Any:
    """The next multiple."""
    return (x + to - 1) // to * to


def padded(x_RK: Array, R: int) -> Array:
    """With at least ``R`` rows."""
    return jnp.pad(x_RK, ((0, max(R - len(x_RK), 0)), (0, 0)))


def pieces_of(sizes_E: Array, first: Array | int, num_rows: int, rows: int, *, even: bool = False) -> dict[str, Array]:
    """The pieces of all groups that have rows, as lists for scalar memory.

    By piece: ``row`` it begins with, ``count`` of rows that are copied, a multiple of BLOCK up to ``rows``; ``start``
    and ``end`` of its group's rows; ``matrix`` of its group in the stack; ``turn``, which is how many groups with rows
    come before its own; and ``following``, the first piece of the next group. ``num`` pieces are there, in front;
    ``behind`` is the first row that no piece has. All pieces of a group but the last are full; if ``even``, the last
    two share their rows evenly.
    """
    ends_E = jnp.cumsum(sizes_E)
    starts_E = ends_E - sizes_E
    lows_E = starts_E // BLOCK * BLOCK
    pieces_E = jnp.where(sizes_E > 0, (round_up(ends_E, BLOCK) - lows_E + rows - 1) // rows, 0)
    stops_E = jnp.cumsum(pieces_E)
    most = (num_rows + len(sizes_E) * (BLOCK + rows - 2)) // rows
    piece_P = jnp.arange(most, dtype=jnp.int32)
    group_P = jnp.minimum(jnp.sum(stops_E <= piece_P[:, None], axis=1), len(sizes_E) - 1)
    left_P, span_P = stops_E[group_P] - piece_P, round_up(ends_E[group_P], BLOCK) - lows_E[group_P]
    full_P = (pieces_E[group_P] - left_P) * rows  # rows in front, if all pieces there are full
    half_P = jnp.zeros_like(full_P)
    if even:  # rows that the last piece but one leaves to the last
        spare_P = rows - (span_P - (pieces_E[group_P] - 1) * rows)
        half_P = jnp.where(pieces_E[group_P] > 1, spare_P // 2 // BLOCK * BLOCK, 0)
    begin_P = full_P - jnp.where(left_P == 1, half_P, 0)
    stop_P = jnp.where(left_P == 1, span_P, full_P + rows - jnp.where(left_P == 2, half_P, 0))
    row_P = lows_E[group_P] + begin_P
    found = {
        "row": row_P,
        "count": stop_P - begin_P,
        "start": starts_E[group_P],
        "end": ends_E[group_P],
        "matrix": group_P + first,
        "turn": (jnp.cumsum(sizes_E > 0) - 1)[group_P],
        "following": stops_E[group_P],
        "num": stops_E[-1:],
        "behind": round_up(ends_E[-1:], BLOCK),
    }
    return {name: x.astype(jnp.int32) for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece, as scalars: see :func:`pieces_of`."""

    number: Any
    row: Any
    count: Any
    start: Any
    end: Any
    matrix: Any
    turn: Any
    following: Any

    @staticmethod
    def of(lists: dict[str, Any], number: Any) -> Piece:
        """Piece ``number`` of lists in scalar memory."""
        fields = {f.name: lists[f.name][number] for f in dataclasses.fields(Piece) if f.name != "number"}
        return Piece(number=number, **fields | {"row": pl.multiple_of(fields["row"], BLOCK)})

    @property
    def slot(self) -> Any:
        """Which of two buffers it has."""
        return jax.lax.rem(self.number, 2)

    @property
    def group_slot(self) -> Any:
        """Which of two buffers its group's matrix has."""
        return jax.lax.rem(self.turn, 2)

    @property
    def opens(self) -> Any:
        """It is its group's first."""
        return self.row <= self.start

    @property
    def closes(self) -> Any:
        """It is its group's last."""
        return self.row + self.count >= self.end


def each_part(count: Any, rows: int, act: Callable[[Any, int], None]) -> None:
    """``act(offset, size)`` for parts of static sizes that make up ``count`` rows, a multiple of BLOCK."""

    def part(size: int) -> None:
        pl.when((count & size) != 0)(lambda: act(pl.multiple_of(count & -(2 * size), size), size))

    @pl.when(count == rows)
    def _() -> None:
        act(0, rows)

    @pl.when(count < rows)
    def _() -> None:
        size = rows // 2
        while size >= BLOCK:
            part(size)
            size //= 2


def each_size(count: Any, sizes: Sequence[int], act: Callable[[int], None]) -> None:
    """``act(size)`` with the least of some sizes that holds ``count`` rows."""
    if len(sizes) == 1:
        act(sizes[0])
    else:
        half = len(sizes) // 2
        few, many = (functools.partial(each_size, count, some, act) for some in (sizes[:half], sizes[half:]))
        jax.lax.cond(count <= sizes[half - 1], few, many)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows of arrays in HBM that come into one of two buffers each, or go from it.

    Attributes:
        arrays: in HBM, (rows, width).
        buffers: for each, (2, rows of a piece, columns).
        columns: which columns of the arrays are meant.
        semaphores: (2,), for DMA.
        out: from the buffers to HBM.
    """

    arrays: list[Any]
    buffers: list[Any]
    columns: Any
    semaphores: Any
    out: bool = False

    def _each(self, piece: Piece, act: Callable[[Any], None]) -> None:
        def part(offset: Any, size: int) -> None:
            for array, buffer in zip(self.arrays, self.buffers, strict=True):
                far = array.at[pl.ds(pl.multiple_of(piece.row + offset, BLOCK), size), self.columns]
                near = buffer.at[piece.slot, pl.ds(offset, size)]
                pair = (near, far) if self.out else (far, near)
                act(pltpu.make_async_copy(*pair, self.semaphores.at[piece.slot]))

        if self.arrays:
            each_part(piece.count, self.buffers[0].shape[1], part)

    def start(self, piece: Piece) -> None:
        """Begins to copy."""
        self._each(piece, lambda copy: copy.start())

    def wait(self, piece: Piece) -> None:
        """Until it is copied."""
        self._each(piece, lambda copy: copy.wait())


def product(a: Array, b: Array, over: tuple[int, int] = (1, 0)) -> Array:
    """A matrix product over one dimension of each, summed in float32; float32 numbers keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def own_tile(axis: int, size: int, width: int) -> Any:
    """Which ``size`` columns, or rows, of ``width`` the place in the grid means."""
    return pl.ds(0, width) if size == width else pl.ds(pl.multiple_of(pl.program_id(axis) * size, size), size)


def loop(num: int, step: int, body: Callable[[Any], None]) -> None:
    """``body(offset)`` for ``num`` multiples of ``step``; without a loop where there is one."""
    if num == 1:
        body(0)
    else:
        jax.lax.fori_loop(0, num, lambda i, _: body(pl.multiple_of(i * step, step)), None)
