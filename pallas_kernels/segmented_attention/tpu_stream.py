"""What the TPU kernels share: keys fetched chunk by chunk while the last one is worked on, masks, and products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.segmented_attention.tpu_layout import LANES, Layout, round_up

LOG2_E = math.log2(math.e)
VMEM_LIMIT = 100 * 2**20
MASKED = -1e30  # finite: a row that sees nothing must not give NaN


def product(a: Array, b: Array, over: tuple[int, int] = (1, 0)) -> Array:
    """A matrix product over one dimension of each, summed in float32; float32 numbers keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def lanes_of(row: Array) -> Array:
    """(1, n) -> (n, LANES), all lanes equal, of 32-bit numbers."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def heads_first(x_BTNH: Array) -> Array:
    """(B, T, N, H) -> (B * N, T, lanes): heads filled up to whole lanes, as they stand in memory anyway."""
    B, T, N, H = x_BTNH.shape
    x = jnp.pad(x_BTNH, ((0, 0), (0, 0), (0, 0), (0, round_up(H, LANES) - H)))
    return x.swapaxes(1, 2).reshape(B * N, T, -1)


def heads_last(x_hTH: Array, B: int) -> Array:
    """(B * N, T, ...) -> (B, T, N, ...)."""
    return x_hTH.reshape(B, -1, *x_hTH.shape[1:]).swapaxes(1, 2)


def across(x: Array, lanes: int) -> Array:
    """(n, LANES) of equal lanes -> (n, lanes)."""
    return x[:, :lanes] if lanes < LANES else jnp.tile(x, (1, lanes // LANES))


def buffers_for(layout: Layout, keys_and_values: list[Array], documents: bool) -> list[Any]:
    """Room for two chunks of keys, of values, and of their documents' ids."""
    room = [pltpu.VMEM((2, layout.keys, x.shape[2]), x.dtype) for x in keys_and_values]
    parts = (2, layout.keys // layout.part, 1, layout.part)
    return room + ([pltpu.VMEM(parts, jnp.int32)] if documents else [])


def row_of(x: Array) -> Array:
    """(n, LANES) of equal lanes -> (1, n), by sums over the diagonals of squares: cheaper than to transpose."""
    n = math.gcd(len(x), LANES)
    diagonal = jax.lax.broadcasted_iota(jnp.int32, (n, n), 0) == jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)
    rows = [jnp.where(diagonal, x[i : i + n, :n], 0).sum(axis=0, keepdims=True) for i in range(0, len(x), n)]
    return jnp.concatenate(rows, axis=1)


def own_mask(layout: Layout, row: int, key: int, keys_first: bool = False) -> Array:
    """Which keys of a part a part of the rows of the same block sees, [rows, keys] or the other way round."""
    n = layout.part
    rows, keys = ((1, n), (n, 1)) if keys_first else ((n, 1), (1, n))
    at_row = jax.lax.broadcasted_iota(jnp.int32, rows, rows.index(n)) + row * n
    at_key = jax.lax.broadcasted_iota(jnp.int32, keys, keys.index(n)) + key * n
    return layout.own(at_row, at_key)


def both(*masks: Array | None) -> Array | None:
    """What all masks let through; None lets everything through."""
    given = [m for m in masks if m is not None]
    return None if not given else given[0] if len(given) == 1 else given[0] & given[1]


def stream(
    sources: list[Any],
    buffers: list[Any],
    semaphores: Any,
    first: Any,
    stop: Any,
    chunk: int,
    *,
    whole: Callable[[list[Any], Any], None],
    rest: Callable[[list[Any], Any], None] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Visits keys of arrays that stay in HBM, a chunk at a time; the next one comes while one is worked on.

    Args:
        sources: arrays in HBM whose first dimension is the keys, one by one or in parts.
        buffers: for each, room for two chunks.
        semaphores: (2, len(sources)), for DMA.
        first: the chunk to begin with.
        stop: the first key that is not visited.
        chunk: keys of a chunk.
        whole: given a chunk's buffers and its number: all its keys count.
        rest: given the last chunk's buffers and how many of its keys count; None: never fewer than a chunk.
        meanwhile: done while the first chunk is on its way.
    """
    num_whole, num = jax.lax.div(stop, chunk), jax.lax.div(stop + chunk - 1, chunk)  # none is negative

    def copies(c: Any) -> list[Any]:
        slot, some = jax.lax.rem(c, 2), list[Any]()
        for i, (source, buffer) in enumerate(zip(sources, buffers, strict=True)):
            size = buffer.shape[1]
            part = source.at[pl.ds(pl.multiple_of(c * size, size), size)]
            some.append(pltpu.make_async_copy(part, buffer.at[slot], semaphores.at[slot, i]))
        return some

    def fetch(c: Any) -> None:
        @pl.when(c < num)
        def _() -> None:
            for copy in copies(c):
                copy.start()

    def arrived(c: Any) -> list[Any]:
        for copy in copies(c):
            copy.wait()
        return [buffer.at[jax.lax.rem(c, 2)] for buffer in buffers]

    fetch(first)
    meanwhile()

    def one(c: Any, _: None) -> None:
        refs = arrived(c)
        fetch(c + 1)
        whole(refs, c)

    jax.lax.fori_loop(first, num_whole, one, None)
    if rest is not None:

        @pl.when((num > num_whole) & (num > first))
        def _() -> None:
            rest(arrived(num_whole), stop - num_whole * chunk)
