"""How large the pieces are that the TPU kernels work on."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from pallas_kernels.segmented_attention.tile_table import TABLE


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel's pieces; :func:`pallas_kernels.segmented_attention.tpu_layout.lay_out` fits them to a length.

    Attributes:
        queries: rows of a block.
        keys: keys that are fetched at a time.
        part: keys of one product; a power of two.
        span: keys whose gradients are summed on the chip at a time (backward).
        ones: 1: sum probabilities in their product with the values, by a column of ones (forward): free where a matrix
            unit has columns to spare, as on v6e with heads of 128.
    """

    queries: int
    keys: int
    part: int
    span: int = 0
    ones: int = 0


Kernel = Literal["forward", "backward"]

# What fits into the 16 MiB of the smallest chip.
ANYWHERE: dict[Kernel, Tiles] = {"forward": Tiles(1024, 512, 512), "backward": Tiles(512, 512, 512, 2048)}


def chip() -> str:
    """The kind of chip that is compiled for, as far as it can be told: of the mesh in use, or of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def tiles_for(kernel: Kernel, itemsize: int, width: int) -> Tiles:
    """The tiles of a kernel for heads of ``width`` lanes of numbers of ``itemsize`` bytes, on the chip in use."""
    found = TABLE.get((chip(), kernel, itemsize))
    tiles = Tiles(*found) if found else ANYWHERE[kernel]
    # They are for bfloat16 numbers and 128 lanes; what is wider takes fewer rows.
    share = max(itemsize * -(-width // 128) // 2, 1)
    return dataclasses.replace(tiles, queries=max(tiles.queries // share, 256), span=tiles.span // share)
