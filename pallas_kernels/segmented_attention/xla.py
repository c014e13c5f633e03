"""Segmented attention in plain XLA: a list of the blocks that hold something, and one loop over it.

A key is seen from one position to another: by its own segment from where it stands to the segment's end, and by later
ones from there on. So each key has an interval of queries, and whether a block of queries and a block of keys have a
visible pair is known when the program is made. One loop goes over the pairs of blocks that have one, with a running
maximum and sum for each query (FlashAttention-2, Dao 2023); the backward pass goes over the same list and computes the
scores again. The program has one size, whatever the length. Rows gathered by segment are another list for the same two
loops.

On a CPU heads are taken one after another, so that all products are of two matrices, which is what it runs fast; on
an accelerator all at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.cost import useful_flops
from pallas_kernels.platforms import by_platform
from pallas_kernels.segmented_attention.far import by_head, from_heads
from pallas_kernels.segmented_attention.segments import Segments
from pallas_kernels.segmented_attention.selection import tails

LOG2_E = math.log2(math.e)
MASKED = -1e30  # finite: a row of which a block shows nothing must not give NaN


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the scores are cut.

    Attributes:
        rows: of a block of scores; queries of all heads that share keys.
        keys: columns of a block of scores.
        head_by_head: whether key/value heads are taken one after another, in float32, or all at once.
    """

    rows: int = 512
    keys: int = 512
    head_by_head: bool = True


ACCELERATOR_TILES = Tiles(rows=1024, keys=1024, head_by_head=False)


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    ids_BT: Int[Array, "B T"] | None,
    *,
    segments: Segments,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
    """See :mod:`pallas_kernels.segmented_attention.attend`; ``tiles``: None, what suits the platform."""

    def one(tiles: Tiles, ids_T: Array | None, q_TGH: Array, k_T1H: Array, v_T1U: Array) -> tuple[Array, Array]:
        blocks = _Blocks(segments, tiles, q_TGH, ids_T)
        k_JSH, v_JSU = blocks.of_keys(k_T1H[:, 0]), blocks.of_keys(v_T1U[:, 0])
        out, log = _attend(blocks.visits(tiles), tiles, scale, blocks.of_queries(q_TGH), k_JSH, v_JSU)
        return blocks.from_queries(out).astype(q_TGH.dtype), blocks.from_queries(log)

    arrays = (by_head(x, k_BTKH.shape[2]) for x in (q_BTNH, k_BTKH, v_BTKU))
    out, log = _each_head(one, tiles, ids_BT, *arrays)
    return from_heads(out), from_heads(log)


def backward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    ids_BT: Int[Array, "B T"] | None,
    out_BTNU: Float[Array, "B T N U"],
    log_BTN: Float[Array, "B T N"],
    dout_BTNU: Float[Array, "B T N U"],
    *,
    segments: Segments,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K U"]]:
    """See :mod:`pallas_kernels.segmented_attention.attend`; ``tiles``: None, what suits the platform."""

    def one(tiles: Tiles, ids_T: Array | None, *arrays: Array) -> tuple[Array, Array, Array]:
        q_TGH, log_TG, along_TG, dout_TGU, k_T1H, v_T1U = arrays
        blocks = _Blocks(segments, tiles, q_TGH, ids_T)
        q, log, along, dout = (blocks.of_queries(x) for x in (q_TGH, log_TG, along_TG, dout_TGU))
        k_JSH, v_JSU = blocks.of_keys(k_T1H[:, 0]), blocks.of_keys(v_T1U[:, 0])
        dq, dk, dv = _gradients(blocks.visits(tiles), tiles, scale, q, log, along, dout, k_JSH, v_JSU)
        dq, dk, dv = blocks.from_queries(dq), blocks.from_keys(dk)[:, None], blocks.from_keys(dv)[:, None]
        return dq.astype(q_TGH.dtype), dk.astype(k_T1H.dtype), dv.astype(v_T1U.dtype)

    along_BTN = jnp.sum(dout_BTNU.astype(jnp.float32) * out_BTNU.astype(jnp.float32), axis=-1)
    by_position = (q_BTNH, log_BTN, along_BTN, dout_BTNU, k_BTKH, v_BTKU)
    arrays = (by_head(x, k_BTKH.shape[2]) for x in by_position)
    dq, dk, dv = _each_head(one, tiles, ids_BT, *arrays)
    return from_heads(dq), from_heads(dk), from_heads(dv)


def forward_rows(
    q_BKRGH: Float[Array, "B K R G H"],
    ids_BKR: Int[Array, "B K R"],
    segment_BKI: Int[Array, "B K I"],
    k_BKJwH: Float[Array, "B K J w H"],
    v_BKJwU: Float[Array, "B K J w U"],
    ids_BJw: Int[Array, "B J w"],
    *,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B K R G U"], Float[Array, "B K R G"]]:
    """See :mod:`pallas_kernels.segmented_attention.attend`; ``tiles``: None, what suits the platform."""

    def one(tiles: Tiles, ids_Jw: Array, *arrays: Array) -> tuple[Array, Array]:
        q_RGH, ids_R, segment_I, k_JwH, v_JwU = arrays
        q_IRH = q_RGH.reshape(len(segment_I), -1, q_RGH.shape[-1])
        visits = _row_visits(tiles, ids_R, segment_I, ids_Jw, q_RGH.shape[1])
        out, log = _attend(visits, tiles, scale, q_IRH, k_JwH, v_JwU)
        return out.reshape(*q_RGH.shape[:2], -1), log.reshape(q_RGH.shape[:2])

    return _each_head(one, tiles, ids_BJw, q_BKRGH, ids_BKR, segment_BKI, k_BKJwH, v_BKJwU)


def backward_rows(
    q_BKRGH: Float[Array, "B K R G H"],
    ids_BKR: Int[Array, "B K R"],
    segment_BKI: Int[Array, "B K I"],
    k_BKJwH: Float[Array, "B K J w H"],
    v_BKJwU: Float[Array, "B K J w U"],
    ids_BJw: Int[Array, "B J w"],
    log_BKRG: Float[Array, "B K R G"],
    along_BKRG: Float[Array, "B K R G"],
    dout_BKRGU: Float[Array, "B K R G U"],
    *,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B K R G H"], Float[Array, "B K J w H"], Float[Array, "B K J w U"]]:
    """See :mod:`pallas_kernels.segmented_attention.attend`; ``tiles``: None, what suits the platform."""

    def one(tiles: Tiles, ids_Jw: Array, *arrays: Array) -> tuple[Array, Array, Array]:
        ids_R, segment_I, q_RGH, log_RG, along_RG, dout_RGU, k_JwH, v_JwU = arrays
        by_row = (q_RGH, log_RG, along_RG, dout_RGU)
        q, log, along, dout = (x.reshape(len(segment_I), -1, *x.shape[2:]) for x in by_row)
        visits = _row_visits(tiles, ids_R, segment_I, ids_Jw, q_RGH.shape[1])
        dq, dk, dv = _gradients(visits, tiles, scale, q, log, along, dout, k_JwH, v_JwU)
        return dq.reshape(q_RGH.shape), dk, dv

    by_row = (ids_BKR, segment_BKI, q_BKRGH, log_BKRG, along_BKRG, dout_BKRGU)
    return _each_head(one, tiles, ids_BJw, *by_row, k_BKJwH, v_BKJwU)


def _each_head(f: Callable, tiles: Tiles | None, ids_B: Array | None, *arrays_BK: Array) -> Any:
    """``f(tiles, ids, *arrays)`` for each sequence and key/value head, with the platform's tiles if none are given."""
    if tiles is None:
        short = arrays_BK[0].shape[2] <= 128  # so little that going from head to head would take most of the time
        on = {"cpu": Tiles(head_by_head=not short), "default": ACCELERATOR_TILES}
        each_on = {platform: functools.partial(_each_head, f, its_tiles) for platform, its_tiles in on.items()}
        return by_platform(ids_B, *arrays_BK, **each_on)
    run = functools.partial(f, tiles)
    if not tiles.head_by_head:
        per_head = jax.vmap(run, (None, *[0] * len(arrays_BK)))
        return jax.vmap(per_head, (None if ids_B is None else 0, *[0] * len(arrays_BK)))(ids_B, *arrays_BK)
    B, K = arrays_BK[0].shape[:2]
    heads = tuple(x.reshape(B * K, *x.shape[2:]) for x in arrays_BK)
    sequence = jnp.repeat(jnp.arange(B), K)
    results = jax.lax.map(lambda x: run(None if ids_B is None else ids_B[x[0]], *x[1:]), (sequence, *heads))
    return jax.tree.map(lambda x: x.reshape(B, K, *x.shape[1:]), results)


# ---------------------------------------------------------------- which blocks


def _seen_by(numpy: Any, T: int, segments: Segments, keys: int, num_own: int, num_tails: int) -> tuple[Any, Any]:
    """The first and the last query that see each key slot; last < first where none does.

    The slots are ``num_own`` blocks of ``keys`` positions in their places, and ``num_tails`` blocks of compacted tails
    behind them; without the latter, later segments see a tail in its place. ``numpy`` is the module to compute with:
    the real one while the program is made, ``jax.numpy`` within it.
    """
    j = numpy.arange(num_own * keys)
    end = (segments.of(j) + 1) * segments.size - segments.shift - 1
    forever = segments.in_tail(j) & (num_tails == 0)
    last = numpy.where(j < T, numpy.where(forever, T, end), -1)
    if not num_tails:
        return j, last
    slot = numpy.arange(num_tails * keys)
    next_segment = (slot // segments.window + 1) * segments.size - segments.shift
    exists = (next_segment < T) & (next_segment - segments.window + slot % segments.window >= 0)
    return numpy.concatenate([j, next_segment]), numpy.concatenate([last, numpy.where(exists, T, -1)])


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """The blocks of one sequence that hold a visible pair.

    Attributes:
        queries, keys: positions in a block of queries, slots in a block of keys.
        num_queries, num_own, num_tails: blocks of queries, of keys in their places, of compacted tails behind those.
        query_P, key_P: the two blocks of each visit.
        useful: the share of the computed pairs that is visible.
    """

    queries: int
    keys: int
    num_queries: int
    num_own: int
    num_tails: int
    query_P: np.ndarray
    key_P: np.ndarray
    useful: float


@functools.lru_cache(maxsize=256)
def _plan(T: int, G: int, segments: Segments, tiles: Tiles) -> _Plan:
    """What to visit, with the tails compacted if that is less."""
    half = -(-T // 256) * 128  # a short sequence is cut too: half of what is above the diagonal is spared
    queries, keys = min(max(tiles.rows // G, 1), half, T), min(tiles.keys, half, T)
    num_queries, num_own = -(-T // queries), -(-T // keys)
    num_compacted = -(-(segments.count(T) - 1) * segments.window // keys)
    plans = []
    for num_tails in sorted({0, num_compacted}):
        seen = _seen_by(np, T, segments, keys, num_own, num_tails)
        first, last = (x.reshape(-1, keys) for x in seen)
        starts = range(0, T, queries)
        meet = [((first < start + queries) & (last >= np.maximum(first, start))).any(axis=1) for start in starts]
        query_P, key_P = np.nonzero(np.stack(meet))
        query_P, key_P = query_P.astype(np.int32), key_P.astype(np.int32)
        useful = segments.visible_pairs(T) / (len(query_P) * queries * keys)
        plans.append(_Plan(queries, keys, num_queries, num_own, num_tails, query_P, key_P, useful))
    return max(plans, key=lambda plan: plan.useful)


class _Blocks:
    """One sequence and key/value head, cut as planned."""

    def __init__(self, segments: Segments, tiles: Tiles, q_TGH: Array, ids_T: Array | None):
        self.T, self.G, _ = q_TGH.shape
        self.segments, self.plan = segments, _plan(self.T, self.G, segments, tiles)
        plan = self.plan
        seen = _seen_by(jnp, self.T, segments, plan.keys, plan.num_own, plan.num_tails)
        self.first, self.last = (x.reshape(-1, plan.keys) for x in seen)
        self.ids = None if ids_T is None else (self._positions(ids_T), self.of_keys(ids_T))

    def visits(self, tiles: Tiles) -> Visits:
        query_P, key_P = jnp.asarray(self.plan.query_P), jnp.asarray(self.plan.key_P)
        # Heads that are taken together can not go different ways, and few blocks are not worth the choice.
        ids = self.ids if tiles.head_by_head and len(query_P) > 3 else None
        meet_P = None if ids is None else _meet(ids, query_P, key_P)
        return Visits(query_P, key_P, meet_P, self.sees, self.plan.useful)

    def sees(self, query: Array, key: Array) -> Array:
        """The visible pairs of two blocks, (positions * G, slots)."""
        t = (query * self.plan.queries + jnp.arange(self.plan.queries))[:, None]
        sees = (_block(self.first, key) <= t) & (t <= _block(self.last, key))
        if self.ids is not None:
            sees &= _block(self.ids[0], query)[:, None] == _block(self.ids[1], key)
        return jnp.repeat(sees, self.G, axis=0)

    def _positions(self, x_T: Array) -> Array:
        """(T, ...) -> (blocks, positions, ...)."""
        x = _lengthen(x_T, self.plan.num_queries * self.plan.queries)
        return x.reshape(self.plan.num_queries, -1, *x.shape[1:])

    def of_queries(self, x_TG: Array) -> Array:
        """(T, G, ...) -> (blocks, positions * G, ...)."""
        x = self._positions(x_TG)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    def from_queries(self, x_QR: Array) -> Array:
        """The reverse of :meth:`of_queries`."""
        return x_QR.reshape(-1, self.G, *x_QR.shape[2:])[: self.T]

    def of_keys(self, x_T: Array) -> Array:
        """(T, ...) -> (blocks, slots, ...): in place, and behind that the tails."""
        plan = self.plan
        x = _lengthen(x_T, plan.num_own * plan.keys)
        if plan.num_tails:
            tails_S = tails(x_T[None], self.segments)[0, :-1].reshape(-1, *x_T.shape[1:])
            x = jnp.concatenate([x, _lengthen(tails_S, plan.num_tails * plan.keys)])
        return x.reshape(-1, plan.keys, *x.shape[1:])

    def from_keys(self, x_JS: Array) -> Array:
        """The transpose of :meth:`of_keys`: what a key gets in its place and as part of a tail, together."""
        like = jax.ShapeDtypeStruct((self.T, *x_JS.shape[2:]), x_JS.dtype)
        return jax.linear_transpose(self.of_keys, like)(x_JS)[0]


def _row_visits(tiles: Tiles, ids_R: Array, segment_I: Array, ids_Jw: Array, G: int) -> Visits:
    """Each block of rows meets the tail of its segment."""
    I = len(segment_I)
    ids = ids_R.reshape(I, -1), ids_Jw
    query_P, key_P = jnp.arange(I), jnp.maximum(segment_I, 0)
    meet_P = (segment_I >= 0) & _meet(ids, query_P, key_P) if tiles.head_by_head else None

    def sees(block: Array, segment: Array) -> Array:
        return jnp.repeat(_block(ids[0], block)[:, None] == _block(ids[1], segment), G, axis=0)

    return Visits(query_P, key_P, meet_P, sees, useful=1)  # how many rows are in use, the caller knows


def _meet(ids: tuple[Array, Array], query_P: Array, key_P: Array) -> Array:
    """Whether two blocks may have a document in common: not if all ids of one are above those of the other."""
    (q_low, k_low), (q_high, k_high) = ([f(x, axis=1) for x in ids] for f in (jnp.min, jnp.max))
    return (q_low[query_P] <= k_high[key_P]) & (k_low[key_P] <= q_high[query_P])


def _lengthen(x_T: Array, length: int) -> Array:
    return jnp.pad(x_T, [(0, length - x_T.shape[0]), *[(0, 0)] * (x_T.ndim - 1)])


# ---------------------------------------------------------------- the two loops


@dataclasses.dataclass(frozen=True)
class Visits:
    """Which blocks of queries meet which blocks of keys.

    Attributes:
        query_P, key_P: the two blocks of each visit.
        meet_P: whether they have anything to do with each other; None: all have.
        sees: the visible pairs of two blocks, (queries, keys).
        useful: of what is computed, the share that the definition asks for.
    """

    query_P: Array
    key_P: Array
    meet_P: Array | None
    sees: Callable[[Array, Array], Array]
    useful: float

    def update(self, visit: Callable, state: tuple[Array, ...], of_keys: tuple[bool, ...]) -> tuple[Array, ...]:
        """Goes over all visits.

        The state is arrays of blocks, of keys or of queries; ``visit(query, key, old)`` gives the new blocks.
        """

        def one(state: tuple[Array, ...], place: tuple[Array, Array, Array | None]) -> tuple[tuple[Array, ...], None]:
            query, key, meet = place
            at = [key if of_key else query for of_key in of_keys]
            old = tuple(_block(x, i) for x, i in zip(state, at, strict=True))
            look = functools.partial(visit, query, key)
            new = look(old) if meet is None else jax.lax.cond(meet, look, lambda old: old, old)
            put = jax.lax.dynamic_update_index_in_dim
            return tuple(put(x, y, i, 0) for x, y, i in zip(state, new, at, strict=True)), None

        return jax.lax.scan(one, state, (self.query_P, self.key_P, self.meet_P))[0]


def _attend(visits: Visits, tiles: Tiles, scale: float, q_QRH: Array, k_JSH: Array, v_JSU: Array) -> tuple:
    """The output and the logarithm of the sum of each row, float32."""
    q, factor, k, v = _operands(tiles, scale, q_QRH, k_JSH, v_JSU)

    def visit(query: Array, key: Array, old: tuple) -> tuple:
        out_RU, top_R, sum_R = old
        with useful_flops(visits.useful):
            scores_RS = _dot(_block(q, query), _block(k, key), (1, 1)) * factor
        scores_RS = jnp.where(visits.sees(query, key), scores_RS, MASKED)
        new_top_R = jnp.maximum(top_R, scores_RS.max(axis=-1))
        p_RS = jnp.exp2(scores_RS - new_top_R[:, None])
        kept_R = jnp.exp2(top_R - new_top_R)
        with useful_flops(visits.useful):
            more_RU = _dot(p_RS.astype(v.dtype), _block(v, key), (1, 0))
        return out_RU * kept_R[:, None] + more_RU, new_top_R, sum_R * kept_R + p_RS.sum(axis=-1)

    rows = q.shape[:2]
    state = tuple(
        jnp.full(shape, x, jnp.float32) for shape, x in (((*rows, v.shape[-1]), 0), (rows, MASKED), (rows, 0))
    )
    out, top, total = visits.update(visit, state, (False, False, False))
    total = jnp.maximum(total, 1)  # as it is, unless nothing was visited
    return out / total[..., None], (top + jnp.log2(total)) / LOG2_E


def _gradients(
    visits: Visits,
    tiles: Tiles,
    scale: float,
    q_QRH: Array,
    log_QR: Array,
    along_QR: Array,
    dout_QRU: Array,
    k_JSH: Array,
    v_JSU: Array,
) -> tuple[Array, Array, Array]:
    """Gradients in q, k and v, float32.

    Scores are keys x queries here: so of five products only that of dq is over the rows of both operands, which a CPU
    does slowly.
    """
    q, factor, k, v, dout = _operands(tiles, scale, q_QRH, k_JSH, v_JSU, dout_QRU)
    log = log_QR * LOG2_E

    def visit(query: Array, key: Array, old: tuple) -> tuple:
        dq_HR, dk_SH, dv_SU = old
        q_RH, dout_RU, k_SH, v_SU = _block(q, query), _block(dout, query), _block(k, key), _block(v, key)
        with useful_flops(0):  # the forward pass had them
            scores_SR = _dot(k_SH, q_RH, (1, 1)) * factor
        scores_SR = jnp.where(visits.sees(query, key).T, scores_SR, MASKED)
        p_SR = jnp.exp2(scores_SR - _block(log, query))
        with useful_flops(visits.useful):
            dp_SR = _dot(v_SU, dout_RU, (1, 1))
            ds_SR = (p_SR * (dp_SR - _block(along_QR, query))).astype(q.dtype)
            dv_SU += _dot(p_SR.astype(q.dtype), dout_RU, (1, 0))
            dk_SH += _dot(ds_SR, q_RH, (1, 0))
            dq_HR += _dot(k_SH, ds_SR, (0, 0))
        return dq_HR, dk_SH, dv_SU

    shapes = ((q.shape[0], q.shape[2], q.shape[1]), k.shape, v.shape)
    state = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    dq, dk, dv = visits.update(visit, state, (False, True, True))
    return dq.swapaxes(1, 2) * scale, dk * (factor / LOG2_E), dv


def _operands(tiles: Tiles, scale: float, q: Array, *others: Array) -> tuple:
    """q, what remains to be multiplied to the scores to have them in base 2, and the other factors of products.

    Where all is float32, q takes the factor: that spares a pass over the scores.
    """
    factor = scale * LOG2_E
    if not tiles.head_by_head:
        return q, factor, *others
    return q.astype(jnp.float32) * factor, 1.0, *(x.astype(jnp.float32) for x in others)


def _block(x: Array, at: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, at, keepdims=False)


def _dot(x: Array, y: Array, contracted: tuple[int, int]) -> Array:
    """A product over one axis of each, summed in float32."""
    numbers = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)
