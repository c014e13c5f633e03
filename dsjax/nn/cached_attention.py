"""Attention of new positions to what a cache holds of their rows and to each other: one softmax over both."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.cache import (
    POOL,
    LayerCache,
    Made,
    RowState,
    filled,
    held_positions,
    own_part,
    own_places,
    tail_sums,
)
from dsjax.nn.masks import AttentionMask, ByHead, Causal, by_head, chooses, parts_of, sees
from dsjax.sharding import current_mesh, map_shards, shard
from pallas_kernels.cost import useful_flops
from pallas_kernels.paged_attention import ALWAYS, NEVER, paged_attention
from pallas_kernels.segmented_attention import Segments
from pallas_kernels.segmented_attention.selection import best_segments


def cached_attention(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    cache: LayerCache,
    lengths_B: Int[Array, B],
    mask: AttentionMask,
    *,
    scale: float | None = None,
    closes_BSK: Int[Array, "B S K"] | None = None,
) -> Float[Array, "B T K G U"]:
    """T new positions of each row against what its cache holds of the ``lengths_B`` before, and against each other.

    On a mesh each device looks at its own pages, for all query heads of its key/value heads; what is exchanged are
    queries, and maxima, sums and outputs of the softmax. The cache's sums of tails are those with the new positions.
    ``scale``: of the scores; None: 1 / sqrt(H). If the cache has no values, its keys begin with them. ``closes_BSK``:
    of full attention, the position from which on a head does not see a key any more, the new ones' included.
    """
    scale = q_BTKGH.shape[-1] ** -0.5 if scale is None else scale
    q_BTKGH = shard(q_BTKGH, "batch", None, "kv_heads", None, None)
    position_BT = lengths_B[:, None] + jnp.arange(q_BTKGH.shape[1])
    chosen_BTKX = None
    if chooses(mask):
        chosen_BTKX = chosen_tails(q_BTKGH, cache.state.tail_sums_BJKH, position_BT, mask)
    closes = () if closes_BSK is None else (closes_BSK,)
    held, held_log = attend_held(q_BTKGH, cache, lengths_B, mask, chosen_BTKX, scale, v_BTKU.shape[-1], *closes)
    new, new_log = attend_new(q_BTKGH, k_BTKH, v_BTKU, position_BT, mask, chosen_BTKX, scale, *closes)
    log_BTKG = jnp.logaddexp(held_log, new_log)  # a position sees itself: finite
    held, new = (out * jnp.exp(log - log_BTKG)[..., None] for out, log in ((held, held_log), (new, new_log)))
    return (held + new).astype(q_BTKGH.dtype)


def attend_new(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    position_BT: Int[Array, "B T"],
    mask: AttentionMask,
    chosen_BTKX: Int[Array, "B T K X"] | None,
    scale: float,
    closes_BSK: Int[Array, "B S K"] | None = None,
) -> tuple[Float[Array, "B T K G U"], Float[Array, "B T K G"]]:
    """New positions against each other: output, and logarithm of the softmax' sum, float32."""
    chosen = None if chosen_BTKX is None else chosen_BTKX.swapaxes(1, 2)[..., None, :]

    def seen(mask):  # causal positions see by their distance, wherever they stand
        at_BKT = position_BT[:, None] if isinstance(mask, Segments) else jnp.arange(position_BT.shape[1])[None, None]
        return sees(mask, at_BKT[..., None], at_BKT[:, :, None], chosen)

    sees_BKTS = by_head(mask, places(mask, k_BTKH.shape[2]), seen, axis=1)
    if closes_BSK is not None:
        closes_BTK = jnp.take_along_axis(closes_BSK, position_BT[..., None], axis=1)
        sees_BKTS = sees_BKTS & (position_BT[:, None, :, None] < closes_BTK.swapaxes(1, 2)[:, :, None])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32)
    scores = jnp.where(sees_BKTS[:, :, None], scores * scale, -jnp.inf)
    log_BKGT = jax.nn.logsumexp(scores, axis=-1)
    p_BKGTS = jnp.exp(scores - log_BKGT[..., None]).astype(v_BTKU.dtype)
    out = jnp.einsum("BKGTS,BSKU->BTKGU", p_BKGTS, v_BTKU, preferred_element_type=jnp.float32)
    return out, jnp.moveaxis(log_BKGT, 3, 1)


def attend_held(
    q_BTKGH: Float[Array, "B T K G H"],
    cache: LayerCache,
    lengths_B: Int[Array, B],
    mask: AttentionMask,
    chosen_BTKX: Int[Array, "B T K X"] | None,
    scale: float,
    value_width: int,
    closes_BSK: Int[Array, "B S K"] | None = None,
) -> tuple[Float[Array, "B T K G U"], Float[Array, "B T K G"]]:
    """New positions against the pages of their rows: output, and logarithm of the softmax' sum, float32."""
    current = current_mesh()
    over = () if current is None else current[1].slots
    wide = [(0, 0)] * 4 + [(0, cache.pages.k_LMKPH.shape[-1] - q_BTKGH.shape[-1])]  # pages may be wider than heads
    attention = functools.partial(paged_attention, scale=scale)
    if cache.pages.v_LMKPH.shape[-1] == 0:
        attention = functools.partial(attention, value_width=value_width)

    def attend(q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number, more=None):
        pages = (q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number)
        if closes_BSK is not None:
            assert isinstance(mask, Causal)
            out, log = _open_pages(*pages, more, mask, attention)
        elif chosen_BTKX is not None:
            assert not isinstance(mask, Causal)
            out, log = _chosen_pages(*pages, more, mask, attention)
        else:
            room = table_bJ.shape[1] * own_part()[1] * k_LmkPH.shape[3]
            with useful_flops(min((cache.slots or room) / room, 1)):  # the rest fills pages up
                if isinstance(mask, ByHead):
                    out, log = _pages_by_head(*pages, mask, attention)
                else:
                    out, log = _all_pages(*pages, mask, attention)
        return over_devices(out[..., :value_width], log, over)

    q, log = ("batch", None, "kv_heads", None, None), ("batch", None, "kv_heads", None)
    axes = [q, POOL, POOL, ("batch", "slots"), ("batch",), ()]
    arrays = [jnp.pad(q_BTKGH, wide), cache.pages.k_LMKPH, cache.pages.v_LMKPH, cache.pages.table_BJ, lengths_B]
    arrays.append(jnp.asarray(cache.number))
    if chosen_BTKX is not None:
        axes, arrays = [*axes, log], [*arrays, chosen_BTKX]
    if closes_BSK is not None:
        axes, arrays = [*axes, ("batch", None, "kv_heads")], [*arrays, closes_BSK]
    return map_shards(attend, tuple(axes), (q, log))(*arrays)


def over_devices(
    out: Float[Array, "... U"], log: Float[Array, ...], over: tuple[str, ...]
) -> tuple[Float[Array, "... U"], Float[Array, ...]]:
    """Inside a :func:`map_shards`: one softmax over what the devices along ``over`` saw, each of its own slots."""
    if not over:
        return out, log
    top = jax.lax.pmax(log, over)
    share = jnp.where(log > -jnp.inf, jnp.exp(log - top), 0)
    total = jax.lax.psum(share, over)
    out = jax.lax.psum(out * share[..., None], over) / jnp.where(total > 0, total, 1)[..., None]
    return out, top + jnp.log(total)


def _all_pages(q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number, mask: Causal | Segments, attention):
    """All that the mask lets through; of a window only the pages in which it can lie."""
    (b, T, k, G, H), (L, m, _, P, _), (part, parts) = q_bTkGH.shape, k_LmkPH.shape, own_part()
    first_bT = first_seen(mask, lengths_b[:, None] + jnp.arange(T))
    columns = table_bJ.shape[1]
    column_bI = jnp.broadcast_to(jnp.arange(columns), (b, columns))
    if isinstance(mask, Causal) and mask.window is not None:
        some = min(columns, (mask.window - 2) // (P * parts) + 2)
        begin_b = jnp.maximum(-((part - first_bT[:, 0] // P) // parts), 0)  # the first of its pages from there on
        column_bI = begin_b[:, None] + jnp.arange(some)
    logical_bI = column_bI * parts + part
    page_bI = jnp.take_along_axis(table_bJ, jnp.minimum(column_bI, columns - 1), axis=1)
    position_bIP = visible_from(mask, logical_bI[..., None] * P + jnp.arange(P), lengths_b[:, None, None])
    seen_bI = (position_bIP >= first_bT[:, :1, None]).any(axis=-1) & (column_bI < columns)
    page_bI = jnp.where(seen_bI & (page_bI >= 0), number * m + page_bI, -1)
    out, log = attention(
        q_bTkGH.reshape(b, T, k * G, H),
        k_LmkPH.reshape(L * m, k, P, H),
        _values(v_LmkPH, L * m, k),
        page_bI,
        position_bIP,
        first_bT,
    )
    return out.reshape(b, T, k, G, -1), log.reshape(b, T, k, G)


def _pages_by_head(q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number, mask: ByHead, attention):
    """All that the heads' masks let through: each (row, head) is a row for the kernel, and each (page, head) a page."""
    (b, T, k, G, H), (L, m, _, P, _), (part, parts) = q_bTkGH.shape, k_LmkPH.shape, own_part()
    place_k, position_bT = own_places(len(mask.parts), k), lengths_b[:, None] + jnp.arange(T)
    first_bkT = by_head(mask, place_k, lambda segments: first_seen(segments, position_bT)[:, None], axis=1)
    slots_JP = (jnp.arange(table_bJ.shape[1]) * parts + part)[:, None] * P + jnp.arange(P)

    def positions(segments):
        return visible_from(segments, slots_JP, lengths_b[:, None, None])[:, None]

    position_bkJP = by_head(mask, place_k, positions, axis=1)
    seen_bkJ = (position_bkJP >= first_bkT[..., :1, None]).any(axis=-1) & (table_bJ >= 0)[:, None]
    page_bkJ = jnp.where(seen_bkJ, (number * m + table_bJ[:, None]) * k + jnp.arange(k)[:, None], -1)
    out, log = attention(
        q_bTkGH.swapaxes(1, 2).reshape(b * k, T, G, H),
        k_LmkPH.reshape(L * m * k, 1, P, H),
        _values(v_LmkPH, L * m * k, 1),
        page_bkJ.reshape(b * k, -1),
        position_bkJP.reshape(b * k, -1, P),
        first_bkT.reshape(b * k, T),
    )
    return out.reshape(b, k, T, G, -1).swapaxes(1, 2), log.reshape(b, k, T, G).swapaxes(1, 2)


def _chosen_pages(
    q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number, chosen_bTkX, mask: Segments | ByHead, attention
):
    """The pages of the open segment's head, of the chosen tails, and of the own one: a list for each query and head.

    So each (row, position, head) is a row of the kernel's, and each (page, head) a page.
    """
    (b, T, k, G, H), (L, m, _, P, _), (part, parts) = q_bTkGH.shape, k_LmkPH.shape, own_part()
    place_k, position_bT = own_places(len(parts_of(mask)), k), lengths_b[:, None] + jnp.arange(T)
    segments = parts_of(mask)[0]
    assert isinstance(segments, Segments)
    head, w = segments.size - segments.window, segments.window
    own_bTk = by_head(mask, place_k, lambda segments: segments.of(position_bT)[..., None], axis=2)
    own_bTk1 = jnp.broadcast_to(own_bTk[..., None], (b, T, k, 1))
    tail_bTkX = jnp.concatenate([chosen_bTkX, own_bTk1], axis=-1)
    start_bTkX = jnp.where(tail_bTkX >= 0, head + tail_bTkX * w, -1)  # slots of a tail: from here on
    in_a_tail = w // P if head % P == 0 and w % P == 0 else (w - 1) // P + 2
    logical_bTkXE = start_bTkX[..., None] // P + jnp.arange(in_a_tail)
    begin_bTkXE = jnp.broadcast_to(start_bTkX[..., None], logical_bTkXE.shape)

    def with_head(of_head, of_tails):
        of_head = jnp.broadcast_to(of_head, (b, T, k, -(-head // P)))
        return jnp.concatenate([of_head, of_tails.reshape(b, T, k, -1)], axis=-1)

    logical, begin = with_head(jnp.arange(-(-head // P)), logical_bTkXE), with_head(0, begin_bTkXE)
    end = with_head(head, begin_bTkXE + w)
    slots = logical[..., None] * P + jnp.arange(P)
    there = (slots >= begin[..., None]) & (slots < end[..., None]) & (begin >= 0)[..., None]
    lengths = lengths_b[:, None, None, None, None]
    position = by_head(mask, place_k, lambda segments: visible_from(segments, slots, lengths), axis=2)
    position = jnp.where(there, position, NEVER)
    first_bTk = by_head(mask, place_k, lambda segments: first_seen(segments, position_bT)[..., None], axis=2)
    first_bTk = jnp.broadcast_to(first_bTk, (b, T, k))
    column = logical // parts
    seen = (position >= first_bTk[..., None, None]).any(axis=-1) & (column < table_bJ.shape[1])
    seen &= logical % parts == part
    take = jax.vmap(lambda table_J, column: table_J[jnp.clip(column, 0, len(table_J) - 1)])
    page = take(table_bJ, column)
    page = jnp.where(seen & (page >= 0), (number * m + page) * k + jnp.arange(k)[:, None], -1)
    out, log = attention(
        q_bTkGH.reshape(b * T * k, 1, G, H),
        k_LmkPH.reshape(L * m * k, 1, P, H),
        _values(v_LmkPH, L * m * k, 1),
        page.reshape(b * T * k, -1),
        position.reshape(b * T * k, -1, P),
        first_bTk.reshape(-1)[:, None],
    )
    return out.reshape(b, T, k, G, -1), log.reshape(b, T, k, G)


def _open_pages(q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number, closes_bSk, mask: Causal, attention):
    """What the mask lets through and is still open: a list of positions for each query and head.

    So each (row, position, head) is a row of the kernel's, and each (page, head) a page. A page of which nothing is
    open is not read.
    """
    (b, T, k, G, H), (L, m, _, P, _), (part, parts) = q_bTkGH.shape, k_LmkPH.shape, own_part()
    position_bT = lengths_b[:, None] + jnp.arange(T)
    slots_JP = (jnp.arange(table_bJ.shape[1]) * parts + part)[:, None] * P + jnp.arange(P)
    there_JP = slots_JP < closes_bSk.shape[1]
    held_bJP = visible_from(mask, slots_JP, lengths_b[:, None, None])
    closes_bJPk = jnp.where(there_JP[..., None], closes_bSk[:, jnp.where(there_JP, slots_JP, 0)], 0)
    open_bTkJP = position_bT[:, :, None, None, None] < jnp.moveaxis(closes_bJPk, 3, 1)[:, None]
    first_bT = first_seen(mask, position_bT)
    position_bTkJP = jnp.where(open_bTkJP, held_bJP[:, None, None], NEVER)
    seen_bTkJ = (position_bTkJP >= first_bT[:, :, None, None, None]).any(axis=-1) & (table_bJ >= 0)[:, None, None]
    page_bTkJ = jnp.where(seen_bTkJ, (number * m + table_bJ[:, None, None]) * k + jnp.arange(k)[:, None], -1)
    out, log = attention(
        q_bTkGH.reshape(b * T * k, 1, G, H),
        k_LmkPH.reshape(L * m * k, 1, P, H),
        _values(v_LmkPH, L * m * k, 1),
        page_bTkJ.reshape(b * T * k, -1),
        position_bTkJP.reshape(b * T * k, -1, P),
        jnp.broadcast_to(first_bT[:, :, None], (b, T, k)).reshape(-1, 1),
    )
    return out.reshape(b, T, k, G, -1), log.reshape(b, T, k, G)


def _values(v_LmkPU: Float[Array, "L m k P U"], *pages: int) -> Float[Array, "M K P U"] | None:
    """The pages of values; None: keys begin with them."""
    return v_LmkPU.reshape(*pages, *v_LmkPU.shape[3:]) if v_LmkPU.shape[-1] else None


def visible_from(mask: Causal | Segments, slots: Int[Array, ...], lengths: Int[Array, ...]) -> Int[Array, ...]:
    """For :func:`paged_attention`: the position in each slot, ALWAYS where later segments see it, too."""
    position = held_positions(mask, slots, lengths)
    if isinstance(mask, Segments):
        position = jnp.where((position >= 0) & mask.in_tail(position), ALWAYS, position)
    return position


def first_seen(mask: Causal | Segments, position: Int[Array, ...]) -> Int[Array, ...]:
    """The first position that one sees, tails apart."""
    if isinstance(mask, Segments):
        return jnp.maximum(mask.of(position) * mask.size - mask.shift, 0)
    return jnp.maximum(position - mask.window + 1, 0) if mask.window is not None else jnp.zeros_like(position)


# ---------------------------------------------------------------- what is kept


def to_keep(x_BTKH: Float[Array, "B T K H"], pool_LMKPW: Float[Array, "L M K P W"]) -> Float[Array, "B T K W"]:
    """In the dtype and width of a pool, and finite: a weight of 0 times what a page holds must be 0."""
    x_BTKH = jnp.where(jnp.isfinite(x_BTKH), x_BTKH, 0)
    return jnp.pad(x_BTKH, [(0, 0)] * 3 + [(0, pool_LMKPW.shape[-1] - x_BTKH.shape[-1])]).astype(pool_LMKPW.dtype)


def all_kept(
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    cache: LayerCache,
    state: RowState,
    ids_BT: Int[Array, "B T"],
    mask: AttentionMask,
) -> Made:
    """All pages of a layer whose cache held nothing."""
    if chooses(mask):
        num = state.tail_sums_BJKH.shape[1]
        place_K = places(mask, k_BTKH.shape[2])
        sums_BJKH = by_head(mask, place_K, lambda segments: tail_sums(k_BTKH, ids_BT, segments, num), axis=2)
        state = dataclasses.replace(state, tail_sums_BJKH=sums_BJKH)
    real_B = jnp.sum(ids_BT > 0, axis=1)
    pools = ((k_BTKH, cache.pages.k_LMKPH), (v_BTKU, cache.pages.v_LMKPH))
    k_MKPH, v_MKPU = (filled(to_keep(x, pool), mask, cache.pages, real_B) for x, pool in pools)
    return Made(k_MKPH, v_MKPU, state)


# ---------------------------------------------------------------- chosen tails


def places(mask: AttentionMask, num_heads: int) -> Int[Array, " K"]:
    """Where all key/value heads stand among the parts of a mask."""
    return jnp.arange(num_heads) % len(parts_of(mask))


def with_new_tails(
    sums_BJKH: Float[Array, "B J K H"],
    k_BTKH: Float[Array, "B T K H"],
    ids_BT: Int[Array, "B T"],
    lengths_B: Int[Array, B],
    mask: AttentionMask,
) -> Float[Array, "B J K H"]:
    """The sums of tails with the keys of T positions behind ``lengths_B``; those with id 0 do not count."""
    position_BT1 = (lengths_B[:, None] + jnp.arange(k_BTKH.shape[1]))[..., None]
    k_BTKH = k_BTKH.astype(jnp.float32)

    def more(segments):
        into_BTJ = segments.in_tail(position_BT1) & (segments.of(position_BT1) == jnp.arange(sums_BJKH.shape[1]))
        into_BTJ &= (ids_BT > 0)[..., None]
        with useful_flops(0):  # a sum, written as a product
            return jnp.einsum("BTJ,BTKH->BJKH", into_BTJ.astype(jnp.float32), k_BTKH, precision="highest")

    return sums_BJKH + by_head(mask, places(mask, k_BTKH.shape[2]), more, axis=2)


def chosen_tails(
    q_BTKGH: Float[Array, "B T K G H"],
    sums_BJKH: Float[Array, "B J K H"],
    position_BT: Int[Array, "B T"],
    mask: AttentionMask,
) -> Int[Array, "B T K X"]:
    """The segments whose tails a position sees, as :func:`pallas_kernels.segmented_attention.selection.choose` has it.

    Here of rows of one document each, from the sums of their tails.
    """
    J, mean_BTKH = sums_BJKH.shape[1], q_BTKGH.astype(jnp.float32).mean(axis=3)
    there_BTJ = jnp.ones((*position_BT.shape, J), bool)

    def best(segments):
        W, w = segments.size, segments.window
        keys_J = jnp.where(jnp.arange(J) == 0, min(w, W - segments.shift), w)  # the first segment may be cut short
        mean_BJKH = sums_BJKH / keys_J[:, None, None]
        return best_segments(mean_BTKH, mean_BJKH, there_BTJ, segments.of(position_BT), segments.top)

    return by_head(mask, places(mask, q_BTKGH.shape[2]), best, axis=2)
