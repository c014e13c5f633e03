"""What positions see through tails that were gathered: those of chosen segments, or of all segments on other devices.

Both are merged into what a position sees in its own row by the log-sum-exps of the two. ``run`` calls a function of the
backend (:mod:`pallas_kernels.segmented_attention.attend`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.segmented_attention.segments import Segments
from pallas_kernels.segmented_attention.selection import Rows, choose_among, gather_rows

POSITIONS_AT_A_TIME = 8192  # whose rows are gathered together
ROWS_IN_A_BLOCK = 128  # of one segment
KEYS_IN_A_CHUNK = 2048  # of a prefix: as many as hide the time in which partial results come and go


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tails:
    """Tails of segments, with their documents.

    Attributes:
        k_BJwKH, v_BJwKU: keys and values.
        ids_BJw: document of each; 0: nothing is there.
        before: how many of the J segments lie in front of the row (an int32 scalar); its own segments follow.
    """

    k_BJwKH: Any  # in a tree of gradients some are None
    v_BJwKU: Any
    ids_BJw: Any
    before: Any

    def by_head(self) -> tuple[Array, Array, Array]:
        """k_BKJwH, v_BKJwU, ids_BJw."""
        return *(jnp.moveaxis(x, 3, 1) for x in (self.k_BJwKH, self.v_BJwKU)), self.ids_BJw


def by_head(x_BTNH: Array, K: int) -> Array:
    """(B, T, K * G, ...) -> (B, K, T, G, ...)."""
    B, T, N = x_BTNH.shape[:3]
    return jnp.moveaxis(x_BTNH.reshape(B, T, K, N // K, *x_BTNH.shape[3:]), 2, 1)


def from_heads(x_BKTG: Array) -> Array:
    """The reverse of :func:`by_head`."""
    x = jnp.moveaxis(x_BKTG, 1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def merged(some: tuple[Array, Array], more: tuple[Array, Array]) -> tuple[Array, Array]:
    """One softmax out of two over different keys, each given by its output and the logarithm of its sum."""
    (out, log), (more_out, more_log) = some, more
    both = jnp.logaddexp(log, more_log)
    return out * jnp.exp(log - both)[..., None] + more_out * jnp.exp(more_log - both)[..., None], both


# ---------------------------------------------------------------- chosen segments


def add_chosen(
    run: Callable, q_BTNH: Array, ids_BT: Array, tails: Tails, segments: Segments, out_BTNU: Array, log_BTN: Array
) -> tuple[Array, Array]:
    """With what positions see in the segments that they choose."""
    K = tails.k_BJwKH.shape[3]
    spans = _Spans(q_BTNH.shape[1], K)

    def one(_, span):
        q_BKtGH, ids_BKt, chosen_BKtX, out_BKtGU, log_BKtG = span
        rows = _rows(chosen_BKtX, tails)
        q_BKRGH, ids_BKR = (_take(x, rows.position_BKR) for x in (q_BKtGH, ids_BKt))
        found = run("forward_rows", q_BKRGH, ids_BKR, rows.segment_BKI, *tails.by_head())

        def merge(x, carry):
            row_BKt = jnp.moveaxis(rows.row_BTKX[..., x], 2, 1)
            more, more_log = (_take(f, row_BKt) for f in found)
            more_log = jnp.where((row_BKt >= 0)[..., None], more_log, -jnp.inf)
            return merged(carry, (more, more_log))

        return None, jax.lax.fori_loop(0, chosen_BKtX.shape[-1], merge, (out_BKtGU.astype(jnp.float32), log_BKtG))

    q, out, log = (spans.cut(by_head(x, K)) for x in (q_BTNH, out_BTNU, log_BTN))
    _, (out, log) = jax.lax.scan(one, None, (q, *spans.choices(q_BTNH, ids_BT, tails, segments), out, log))
    return spans.whole(out).astype(out_BTNU.dtype), spans.whole(log)


def chosen_gradients(
    run: Callable,
    q_BTNH: Array,
    ids_BT: Array,
    tails: Tails,
    segments: Segments,
    log_BTN: Array,
    along_BTN: Array,
    dout_BTNU: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of q and of the tails' k and v through the chosen segments, float32."""
    K = tails.k_BJwKH.shape[3]
    spans = _Spans(q_BTNH.shape[1], K)

    def one(sums, span):
        ids_BKt, chosen_BKtX, *by_position = span
        rows = _rows(chosen_BKtX, tails)
        ids, q, log, along, dout = (_take(x, rows.position_BKR) for x in (ids_BKt, *by_position))
        given = (q, ids, rows.segment_BKI, *tails.by_head(), log, along, dout)
        dq_BKRGH, *more = run("backward_rows", *given)

        def gather(x, dq_BKtGH):
            return dq_BKtGH + _take(dq_BKRGH, jnp.moveaxis(rows.row_BTKX[..., x], 2, 1))

        zeros = jnp.zeros((*chosen_BKtX.shape[:3], *dq_BKRGH.shape[3:]), jnp.float32)
        return jax.tree.map(jnp.add, sums, tuple(more)), jax.lax.fori_loop(0, chosen_BKtX.shape[-1], gather, zeros)

    by_position = tuple(spans.cut(by_head(x, K)) for x in (q_BTNH, log_BTN, along_BTN, dout_BTNU))
    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in tails.by_head()[:2])
    (dk, dv), dq = jax.lax.scan(one, sums, (*spans.choices(q_BTNH, ids_BT, tails, segments), *by_position))
    return spans.whole(dq), jnp.moveaxis(dk, 1, 3), jnp.moveaxis(dv, 1, 3)


def _rows(chosen_BKtX: Array, tails: Tails) -> Rows:
    return gather_rows(jnp.moveaxis(chosen_BKtX, 1, 2), tails.ids_BJw.shape[1], ROWS_IN_A_BLOCK)


def _take(x_BKTG: Array, at_BKR: Array) -> Array:
    """Rows of the third axis; what is -1 gives zeros."""
    ones = [1] * (x_BKTG.ndim - 3)
    taken = jnp.take_along_axis(x_BKTG, at_BKR.reshape(*at_BKR.shape, *ones) % x_BKTG.shape[2], axis=2)
    return jnp.where((at_BKR >= 0).reshape(*at_BKR.shape, *ones), taken, 0)


class _Spans:
    """Positions cut into spans, so that the rows of one span exist at a time."""

    def __init__(self, T: int, K: int):
        self.T, self.K = T, K
        self.length = min(POSITIONS_AT_A_TIME, -(-T // ROWS_IN_A_BLOCK) * ROWS_IN_A_BLOCK)
        self.count = -(-T // self.length)

    def choices(self, q_BTNH: Array, ids_BT: Array, tails: Tails, segments: Segments) -> tuple[Array, Array]:
        """Documents and chosen segments of the positions; those behind the last one choose none."""
        chosen_BTKX = choose_among(q_BTNH, ids_BT, tails.k_BJwKH, tails.ids_BJw, segments, before=tails.before)
        ids_BKT = jnp.broadcast_to(ids_BT[:, None], (len(ids_BT), self.K, self.T))
        return self.cut(ids_BKT), self.cut(jnp.moveaxis(chosen_BTKX, 2, 1) + 1) - 1

    def cut(self, x_BKT: Array) -> Array:
        """(B, K, T, ...) -> (spans, B, K, t, ...), with zeros at the end."""
        x = _lengthened(x_BKT, self.count * self.length)
        return jnp.moveaxis(x.reshape(*x.shape[:2], self.count, self.length, *x.shape[3:]), 2, 0)

    def whole(self, x: Array) -> Array:
        """(spans, B, K, t, G, ...) -> (B, T, N, ...)."""
        x = jnp.moveaxis(x, 0, 2)
        return from_heads(x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, : self.T])


def _lengthened(x: Array, length: int, axis: int = 2) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


# ---------------------------------------------------------------- all segments before


def add_before(
    run: Callable, q_BTNH: Array, ids_BT: Array, tails: Tails, out_BTNU: Array, log_BTN: Array
) -> tuple[Array, Array]:
    """With what all positions see in the segments before the row."""
    chunks = _Chunks(q_BTNH, ids_BT, tails)

    def one(c, carry):
        return merged(carry, run("forward_rows", *chunks.rows(q_BTNH), chunks.everywhere(c), *chunks.tails))

    start = (chunks.by_row(out_BTNU).astype(jnp.float32), chunks.by_row(log_BTN))
    out, log = chunks.over_used(one, start)
    return chunks.from_rows(out).astype(out_BTNU.dtype), chunks.from_rows(log)


def gradients_before(
    run: Callable, q_BTNH: Array, ids_BT: Array, tails: Tails, log_BTN: Array, along_BTN: Array, dout_BTNU: Array
) -> tuple[Array, Array, Array]:
    """Gradients of q and of the tails' k and v through the segments before the row, float32."""
    chunks = _Chunks(q_BTNH, ids_BT, tails)
    by_row = [chunks.by_row(x) for x in (log_BTN, along_BTN, dout_BTNU)]

    def one(c, sums):
        given = (*chunks.rows(q_BTNH), chunks.everywhere(c), *chunks.tails, *by_row)
        return jax.tree.map(jnp.add, sums, run("backward_rows", *given))

    like = (chunks.rows(q_BTNH)[0], *chunks.tails[:2])
    dq, dk, dv = chunks.over_used(one, tuple(jnp.zeros(x.shape, jnp.float32) for x in like))
    return chunks.from_rows(dq), chunks.uncut(dk), chunks.uncut(dv)


def pairs_before(length: int, num_segments: int, window: int) -> int:
    """(row, key) pairs that :func:`add_before` may go through."""
    per_chunk = min(max(KEYS_IN_A_CHUNK // window, 1), num_segments)
    keys = -(-num_segments // per_chunk) * per_chunk * window
    return -(-length // ROWS_IN_A_BLOCK) * ROWS_IN_A_BLOCK * keys


class _Chunks:
    """Tails before a row as few long ones, each seen by all positions, and the positions as rows."""

    def __init__(self, q_BTNH: Array, ids_BT: Array, tails: Tails):
        self.T, self.K, (B, J, w) = q_BTNH.shape[1], tails.k_BJwKH.shape[3], tails.ids_BJw.shape
        self.num_rows = -(-self.T // ROWS_IN_A_BLOCK) * ROWS_IN_A_BLOCK
        self.J, self.per_chunk = J, min(max(KEYS_IN_A_CHUNK // w, 1), J)
        self.used = -(-tails.before // self.per_chunk)
        k_BKJwH, v_BKJwU, ids_BJw = tails.by_head()
        ids_BJw = jnp.where((jnp.arange(J) < tails.before)[:, None], ids_BJw, 0)  # what follows is not before the row
        self.tails = (self._cut(k_BKJwH), self._cut(v_BKJwU), self._cut(ids_BJw[:, None])[:, 0])
        self.ids = _lengthened(jnp.broadcast_to(ids_BT[:, None], (B, self.K, self.T)), self.num_rows)

    def over_used(self, one: Callable, start: Any) -> Any:
        """``one(chunk, carry)`` over the chunks that hold something; how many there can be is known to the program."""

        def some(c: Array, carry: Any) -> Any:
            return jax.lax.cond(c < self.used, one, lambda c, carry: carry, c, carry)

        return jax.lax.fori_loop(0, self.tails[0].shape[2], some, start)

    def _cut(self, x_BKJw: Array) -> Array:
        x = _lengthened(x_BKJw, -(-self.J // self.per_chunk) * self.per_chunk)
        return x.reshape(*x.shape[:2], -1, self.per_chunk * x.shape[3], *x.shape[4:])

    def uncut(self, x_BKCs: Array) -> Array:
        """(B, K, chunks, ...) -> (B, J, w, K, ...)."""
        B, K, C, s = x_BKCs.shape[:4]
        x = x_BKCs.reshape(B, K, C * self.per_chunk, s // self.per_chunk, *x_BKCs.shape[4:])
        return jnp.moveaxis(x[:, :, : self.J], 1, 3)

    def by_row(self, x_BTNH: Array) -> Array:
        """(B, T, N, ...) -> (B, K, R, G, ...)."""
        return _lengthened(by_head(x_BTNH, self.K), self.num_rows)

    def from_rows(self, x_BKRG: Array) -> Array:
        """The reverse of :meth:`by_row`."""
        return from_heads(x_BKRG[:, :, : self.T])

    def rows(self, q_BTNH: Array) -> tuple[Array, Array]:
        """Queries and documents of the rows."""
        return self.by_row(q_BTNH), self.ids

    def everywhere(self, c: Array) -> Array:
        """All blocks of rows look at this chunk."""
        return jnp.full((*self.ids.shape[:2], self.num_rows // ROWS_IN_A_BLOCK), c, jnp.int32)
