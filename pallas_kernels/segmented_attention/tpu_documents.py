"""What the TPU kernels know of documents: the ids themselves, and which of them a block or a chunk can hold."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.segmented_attention.tpu_layout import Layout

NOTHING = np.iinfo(np.int32).max  # lowest id of what holds no position


def _range(ids_Bn: Array, size: int) -> tuple[Array, Array]:
    """Lowest and highest id of each ``size`` neighbours; -1 is no position."""
    ids = ids_Bn.reshape(len(ids_Bn), -1, size)
    return jnp.where(ids < 0, NOTHING, ids).min(axis=2), ids.max(axis=2)


def by_chunk(ids_BC: Array, layout: Layout) -> Array:
    """(B, C) -> (B, parts, 1, part), so that a chunk is a slice of a leading dimension."""
    return ids_BC.reshape(len(ids_BC), -1, 1, layout.part)


def document_tables(ids_BT: Array | None, layout: Layout) -> tuple[dict[str, Array], dict[str, Array]]:
    """Arrays of ids (rows and tails by part, and each block's as a row), and tables for the scalar memory.

    The tables hold, for each sequence one after another, the range of ids of each block and of each chunk of keys, and
    the first chunk that a block can see something of.
    """
    if ids_BT is None:
        return {}, {}
    ids_BT = ids_BT.astype(jnp.int32) + 1  # so that filling up gives -1
    rows, tails = layout.rows(ids_BT) - 1, layout.tails(ids_BT) - 1
    low, high = _range(rows, layout.block)
    arrays, tables = {"block": rows.reshape(-1, layout.num_blocks, 1, layout.block)}, {"low": low, "high": high}
    # Where a segment is longer than a block, chunks of rows do not straddle blocks.
    for name, ids in (("tails", tails), ("rows", rows)):
        if not layout.uses(name):
            continue
        chunk_low, chunk_high = _range(ids, layout.keys)
        meets = (chunk_low[:, None] <= high[..., None]) & (chunk_high[:, None] >= low[..., None])
        arrays[name] = by_chunk(ids, layout)
        if name == "rows":  # of the own segment
            starts = (np.arange(layout.num_blocks) * layout.block - layout.before) // layout.keys
            meets &= np.arange(chunk_low.shape[1]) >= starts[:, None]
        tables |= {f"{name}_low": chunk_low, f"{name}_high": chunk_high, f"{name}_first": first_true(meets)}
    return arrays, {name: table.reshape(-1) for name, table in tables.items()}


def first_true(x: Array) -> Array:
    """Index of the first True along the last axis, its length if there is none."""
    return jnp.where(x.any(axis=-1), jnp.argmax(x, axis=-1), x.shape[-1]).astype(jnp.int32)


def meeting(tables: Any, name: str, block: Any, chunk: Any) -> tuple[Any, Any]:
    """Whether a block and a chunk can hold the same id, and whether they hold one id only, the same."""
    low, high = tables["low"][block], tables["high"][block]
    chunk_low, chunk_high = tables[f"{name}_low"][chunk], tables[f"{name}_high"][chunk]
    meet = (chunk_low <= high) & (chunk_high >= low)
    return meet, meet & (low == high) & (chunk_low == chunk_high)
