"""Which earlier segments a position looks back at (``top_segments``), and rows gathered by the segment they look at.

The queries of one position that share a key/value head choose together, by the product of their mean with the mean
key of each tail (as Lu et al. 2025, Mixture of Block Attention, do for whole blocks). A choice depends on nothing
behind its position, so that a token generated later can not change it. As experts in a mixture, segments then
receive the rows that chose them: one dense product for each block of rows, and the partial softmaxes are merged by
their log-sum-exp. The cost is that of ``top + 2`` tails for each position, whatever the length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.segmented_attention.segments import Segments

QUERIES_AT_A_TIME = 256  # whose scores against all segments exist together: in a CPU's cache
PARTS = 4  # of a row, each scored against the segments in front of its end alone


def cut(x_BT: Array, segments: Segments) -> Array:
    """(B, T, ...) -> (B, J, W, ...): by segments, with zeros before the first and behind the last position."""
    B, T = x_BT.shape[:2]
    num = segments.count(T)
    widths = [(0, 0)] * x_BT.ndim
    widths[1] = (segments.shift, num * segments.size - segments.shift - T)
    return jnp.pad(x_BT, widths).reshape(B, num, segments.size, *x_BT.shape[2:])


def tails(x_BT: Array, segments: Segments) -> Array:
    """(B, T, ...) -> (B, J, w, ...): the tail of each segment."""
    return cut(x_BT, segments)[:, :, segments.size - segments.window :]


def choose(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], ids_BT: Int[Array, "B T"], segments: Segments
) -> Int[Array, "B T K X"]:
    """:func:`choose_among` the tails of the same rows."""
    return choose_among(q_BTNH, ids_BT, tails(k_BTKH, segments), tails(ids_BT, segments), segments)


def choose_among(
    q_BTNH: Float[Array, "B T N H"],
    ids_BT: Int[Array, "B T"],
    k_BJwKH: Float[Array, "B J w K H"],
    ids_BJw: Int[Array, "B J w"],
    segments: Segments,
    before: Any = 0,
) -> Int[Array, "B T K X"]:
    """The earlier segments whose tails each position sees, by key/value head; -1: none. X is at most ``top + 2``.

    The first segment whose tail holds a key of the position's document, the previous one, and the ``top`` best of
    the others. A tail's mean is over the keys of the document that its last position belongs to: of a document that
    began later, no key is in it. Without gradient.

    Args:
        q_BTNH: queries.
        ids_BT: their documents.
        k_BJwKH: keys of the tails of all segments.
        ids_BJw: their documents.
        segments: how the positions at hand are cut.
        before: number of the segment that the first of them would be in without a shift; an int32 scalar.
    """
    assert segments.top is not None
    (B, T, N, H), K, num = q_BTNH.shape, k_BJwKH.shape[3], ids_BJw.shape[1]
    width = min(segments.top + 2, num)
    last_BJ = ids_BJw[:, :, -1] if segments.window else jnp.zeros((B, num), ids_BT.dtype)
    counts = ((ids_BJw == last_BJ[..., None]) & (ids_BJw > 0)).astype(jnp.float32)
    k_BJwKH = jax.lax.stop_gradient(k_BJwKH).astype(jnp.float32)
    mean_BJKH = jnp.einsum("BJw,BJwKH->BJKH", counts, k_BJwKH) / jnp.maximum(counts.sum(-1), 1)[..., None, None]
    mean_BTKH = jax.lax.stop_gradient(q_BTNH).reshape(B, T, K, N // K, H).astype(jnp.float32).mean(axis=3)

    top = segments.top

    def best(seen: int, some: Sequence[Array]) -> Array:
        mean_BtKH, ids_Bt, position_Bt = some
        own_Bt = before + segments.of(position_Bt)
        there_BtJ = (last_BJ[:, None, :seen] == ids_Bt[..., None]) & (ids_Bt > 0)[..., None]
        chosen_BtKX = best_segments(mean_BtKH, mean_BJKH[:, :seen], there_BtJ, own_Bt, top)
        return jnp.pad(chosen_BtKX, [(0, 0)] * 3 + [(0, width - chosen_BtKX.shape[-1])], constant_values=-1)

    rows, chosen = (mean_BTKH, ids_BT, jnp.broadcast_to(jnp.arange(T), (B, T))), []
    part = T if T <= QUERIES_AT_A_TIME else -(-T // PARTS)
    for start in range(0, T, part):
        stop = min(start + part, T)
        # Segments in front of the last one, at the most; one that began on another device counts here as well.
        seen = min(num - segments.count(T) + segments.of(stop - 1) + 1, num)
        chosen.append(_in_blocks(functools.partial(best, seen), [x[:, start:stop] for x in rows]))
    return jnp.concatenate(chosen, axis=1)


def _in_blocks(f: Any, rows: Sequence[Shaped[Array, "B T ..."]]) -> Array:
    """``f`` of :data:`QUERIES_AT_A_TIME` positions after the other."""
    B, T = rows[0].shape[:2]
    if T <= QUERIES_AT_A_TIME:
        return f(rows)
    num = -(-T // QUERIES_AT_A_TIME)

    def blocks(x_BT: Array) -> Array:
        x_BT = jnp.pad(x_BT, [(0, 0), (0, num * QUERIES_AT_A_TIME - T), *[(0, 0)] * (x_BT.ndim - 2)])
        return jnp.moveaxis(x_BT.reshape(B, num, QUERIES_AT_A_TIME, *x_BT.shape[2:]), 1, 0)

    out = jnp.moveaxis(jax.lax.map(f, [blocks(x) for x in rows]), 0, 1)
    return out.reshape(B, num * QUERIES_AT_A_TIME, *out.shape[3:])[:, :T]


def best_segments(
    q_BTKH: Float[Array, "B T K H"],
    mean_BJKH: Float[Array, "B J K H"],
    there_BTJ: Bool[Array, "B T J"],
    own_BT: Int[Array, "#B T"],
    top: int,
) -> Int[Array, "B T K X"]:
    """The first segment that is there, the one before the own, and the ``top`` best others; -1: none.

    Args:
        q_BTKH: mean queries, float32.
        mean_BJKH: mean keys of the tails, float32.
        there_BTJ: whether a tail holds keys of the position's document.
        own_BT: segment that each position lies in.
        top: how many.
    """
    j, num = jnp.arange(mean_BJKH.shape[1]), mean_BJKH.shape[1]
    width = min(top + 2, num)
    there_BTJ &= j < own_BT[..., None]
    first_BTJ = there_BTJ & (jnp.cumsum(there_BTJ, axis=-1) == 1)
    always_BTJ = first_BTJ | (there_BTJ & (j == own_BT[..., None] - 1))
    scores_BTKJ = jnp.einsum("BTKH,BJKH->BTKJ", q_BTKH, mean_BJKH, precision="highest")
    scores_BTKJ = jnp.where(always_BTJ[:, :, None], jnp.inf, scores_BTKJ)
    scores_BTKJ = jnp.where(there_BTJ[:, :, None], scores_BTKJ, -jnp.inf)
    score_BTKX, chosen_BTKX = jax.lax.top_k(scores_BTKJ, width)
    room_BT = top + always_BTJ.sum(axis=-1)
    kept_BTKX = (score_BTKX > -jnp.inf) & (jnp.arange(width) < room_BT[..., None, None])
    return jnp.where(kept_BTKX, chosen_BTKX, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows that look at one segment stand: in blocks of which each belongs to one segment.

    Attributes:
        position_BKR: the position whose queries a row holds; -1: an empty row.
        segment_BKI: the segment of each block of rows; -1: no row of it is used, nor of the blocks behind it.
        row_BTKX: the row of each choice; -1 for none.
    """

    position_BKR: Array
    segment_BKI: Array
    row_BTKX: Array


def gather_rows(chosen_BTKX: Int[Array, "B T K X"], num_segments: int, block: int) -> Rows:
    """A counting sort of choices by segment; each segment's rows begin with a block."""
    T, X = chosen_BTKX.shape[1], chosen_BTKX.shape[3]
    num_blocks = -(-(T * X) // block) + num_segments
    num_rows = num_blocks * block

    def sort(chosen_TX: Array) -> tuple[Array, Array, Array]:
        segment_A = jnp.where(chosen_TX < 0, num_segments, chosen_TX).reshape(-1)
        order_A = jnp.argsort(segment_A, stable=True)
        sorted_A = segment_A[order_A]
        starts_J = jnp.searchsorted(sorted_A, jnp.arange(num_segments + 1)).astype(jnp.int32)
        blocks_J = -(-jnp.diff(starts_J) // block)
        ends_J = jnp.cumsum(blocks_J)
        first_row_J = jnp.append((ends_J - blocks_J) * block, num_rows)
        row_A = first_row_J[sorted_A] + jnp.arange(T * X) - starts_J[sorted_A]
        row_A = jnp.where(sorted_A < num_segments, row_A, num_rows).astype(jnp.int32)
        position_R = jnp.full(num_rows, -1).at[row_A].set(order_A // X, mode="drop", unique_indices=False)
        segment_I = jnp.searchsorted(ends_J, jnp.arange(num_blocks), side="right")
        row_TX = jnp.zeros(T * X, jnp.int32).at[order_A].set(row_A, unique_indices=True).reshape(T, X)
        return (
            position_R,
            jnp.where(segment_I < num_segments, segment_I, -1),
            jnp.where(row_TX < num_rows, row_TX, -1),
        )

    position, segment, row = jax.vmap(jax.vmap(sort))(chosen_BTKX.swapaxes(1, 2))
    return Rows(position, segment, row.swapaxes(1, 2))
