"""How large the pieces are that the TPU kernels work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import jax

from pallas_kernels.grouped_matmul.tile_table import TABLE


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel's pieces.

    Attributes:
        rows: most rows of a product; a power of two.
        least: fewest rows of a product.
        step: rows between the sizes of products.
        columns: columns of the result that are worked on while all rows go by.
        inner: columns of one product.
    """

    rows: int
    least: int
    step: int
    columns: int
    inner: int

    def within(self, num_rows: int) -> Tiles:
        """With pieces that are no longer than all rows, a multiple of LEAST_ROWS."""
        rows = min(self.rows, 1 << (num_rows.bit_length() - 1))
        return dataclasses.replace(self, rows=rows, least=min(self.least, rows))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of products, the last of them ``rows``. Steps double where that wastes less than a tenth."""
        found = [self.least]
        while found[-1] < self.rows:
            found.append(min(found[-1] + self.step * (1 if found[-1] < 10 * self.step else 2), self.rows))
        return tuple(found)


Kernel = Literal["matmul", "matmul_transposed", "swiglu", "swiglu_backward", "swiglu_dx", "outer"]

LANES, LEAST_ROWS = 128, 16
ANYWHERE = Tiles(512, 128, 128, 2048, 256)
MIB = 2**20
# Of a core's fast memory; of others, what the smallest has.
MEMORY = {"TPU v5 lite": 128 * MIB, "TPU v5": 64 * MIB, "TPU v6 lite": 128 * MIB, "TPU7x": 64 * MIB}
SMALLEST = 16 * MIB


def chip() -> str:
    """The kind of chip that is compiled for, as far as it can be told: of the mesh in use, or of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def memory() -> int:
    """Bytes of fast memory of the chip in use that a kernel may take."""
    return MEMORY.get(chip(), SMALLEST) * 15 // 16


def tiles_for(kernel: Kernel, itemsize: int, width: int, room: Callable[[Tiles], int]) -> Tiles | None:
    """The tiles of a kernel for results of ``width`` columns of numbers of ``itemsize`` bytes, on the chip in use.

    Those of the table, made smaller until ``room`` of them, in bytes, is there (and a third of it for what the compiler
    adds, as parts of float32 numbers): first columns, down to an eighth, then
    rows, then columns again. None: even the smallest take too much.
    """
    found = TABLE.get((chip(), kernel, itemsize))
    wanted = Tiles(*found) if found else ANYWHERE
    if itemsize > 2:  # such products take six times as long, and twice the room
        wanted = dataclasses.replace(wanted, inner=max(wanted.inner // 4, LANES), rows=wanted.rows // 2)
    return next((tiles for tiles in _smaller(wanted, width) if room(tiles) <= memory() * 3 // 4), None)


def divisors(width: int) -> list[int]:
    """Numbers of columns, whole lanes or all, into which columns can be cut; the most first."""
    return [width, *(n for n in range((width - 1) // LANES * LANES, 0, -LANES) if width % n == 0)]


def _smaller(wanted: Tiles, width: int) -> Iterator[Tiles]:
    parts = divisors(width)
    columns = [n for n in parts if n <= wanted.columns] or parts[-1:]
    for least in (wanted.columns // 8, 0):
        rows = wanted.rows
        while rows >= LEAST_ROWS:
            for n in columns:
                if n >= least or n == columns[0]:
                    inner = next(i for i in parts if n % i == 0 and (i <= wanted.inner or i == parts[-1]))
                    yield Tiles(rows, min(wanted.least, rows), wanted.step, n, inner)
            rows //= 2
