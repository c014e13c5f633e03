"""Attention of new positions to what a cache holds of their rows and to each other: one softmax over both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.cache import POOL, LayerCache, held_positions, own_part
from dsjax.nn.masks import AttentionMask, ByHead, Causal, sees
from dsjax.sharding import current_mesh, map_shards, shard
from pallas_kernels.cost import useful_flops
from pallas_kernels.paged_attention import ALWAYS, NEVER, paged_attention
from pallas_kernels.segmented_attention import Segments
from pallas_kernels.segmented_attention.selection import best_segments


def cached_attention(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    cache: LayerCache,
    lengths_B: Int[Array, B],
    mask: AttentionMask,
) -> Float[Array, "B T K G H"]:
    """T new positions of each row against what its cache holds of the ``lengths_B`` before, and against each other.

    On a mesh each device looks at its own pages, for all query heads of its key/value heads; what is exchanged are
    queries, and maxima, sums and outputs of the softmax. The cache's sums of tails are those with the new positions.
    """
    assert not isinstance(mask, ByHead)  # has no slots (dsjax.nn.cache.check_slots)
    q_BTKGH = shard(q_BTKGH, "batch", None, "kv_heads", None, None)
    position_BT = lengths_B[:, None] + jnp.arange(q_BTKGH.shape[1])
    chosen_BTKX = None
    if isinstance(mask, Segments) and chooses(mask):
        chosen_BTKX = chosen_tails(q_BTKGH, cache.state.tail_sums_BJKH, position_BT, mask)
    held, held_log = attend_held(q_BTKGH, cache, lengths_B, mask, chosen_BTKX)
    new, new_log = attend_new(q_BTKGH, k_BTKH, v_BTKH, position_BT, mask, chosen_BTKX)
    log_BTKG = jnp.logaddexp(held_log, new_log)  # a position sees itself: finite
    held, new = (out * jnp.exp(log - log_BTKG)[..., None] for out, log in ((held, held_log), (new, new_log)))
    return (held + new).astype(q_BTKGH.dtype)


def attend_new(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    position_BT: Int[Array, "B T"],
    mask: AttentionMask,
    chosen_BTKX: Int[Array, "B T K X"] | None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """New positions against each other: output, and logarithm of the softmax' sum, float32."""
    # Causal positions see by their distance, wherever they stand.
    at_BKT = position_BT[:, None] if isinstance(mask, Segments) else jnp.arange(position_BT.shape[1])[None, None]
    chosen = None if chosen_BTKX is None else chosen_BTKX.swapaxes(1, 2)[..., None, :]
    sees_BKTS = sees(mask, at_BKT[..., None], at_BKT[:, :, None], chosen)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32)
    scores = jnp.where(sees_BKTS[:, :, None], scores * q_BTKGH.shape[-1] ** -0.5, -jnp.inf)
    log_BKGT = jax.nn.logsumexp(scores, axis=-1)
    p_BKGTS = jnp.exp(scores - log_BKGT[..., None]).astype(v_BTKH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BTKH, preferred_element_type=jnp.float32)
    return out, jnp.moveaxis(log_BKGT, 3, 1)


def attend_held(
    q_BTKGH: Float[Array, "B T K G H"],
    cache: LayerCache,
    lengths_B: Int[Array, B],
    mask: AttentionMask,
    chosen_BTKX: Int[Array, "B T K X"] | None,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
    """New positions against the pages of their rows: output, and logarithm of the softmax' sum, float32."""
    current, H = current_mesh(), q_BTKGH.shape[-1]
    over = () if current is None else current[1].slots
    scale = H**-0.5
    wide = [(0, 0)] * 4 + [(0, cache.pages.k_LMKPH.shape[-1] - H)]  # pages may be wider than heads

    def attend(q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number, chosen_bTkX=None):
        if chosen_bTkX is None:
            room = table_bJ.shape[1] * own_part()[1] * k_LmkPH.shape[3]
            with useful_flops(min((cache.slots or room) / room, 1)):  # the rest fills pages up
                out, log = _all_pages(q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number, mask, scale)
        else:
            assert isinstance(mask, Segments)
            choice = (chosen_bTkX, mask, scale)
            out, log = _chosen_pages(q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number, *choice)
        out = out[..., :H]
        if not over:
            return out, log
        top = jax.lax.pmax(log, over)
        share = jnp.where(log > -jnp.inf, jnp.exp(log - top), 0)
        total = jax.lax.psum(share, over)
        out = jax.lax.psum(out * share[..., None], over) / jnp.where(total > 0, total, 1)[..., None]
        return out, top + jnp.log(total)

    q, log = ("batch", None, "kv_heads", None, None), ("batch", None, "kv_heads", None)
    axes = [q, POOL, POOL, ("batch", "slots"), ("batch",), ()]
    arrays = [jnp.pad(q_BTKGH, wide), cache.pages.k_LMKPH, cache.pages.v_LMKPH, cache.pages.table_BJ, lengths_B]
    arrays.append(jnp.asarray(cache.number))
    if chosen_BTKX is not None:
        axes, arrays = [*axes, log], [*arrays, chosen_BTKX]
    return map_shards(attend, tuple(axes), (q, log))(*arrays)


def _all_pages(q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number, mask: AttentionMask, scale):
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
    out, log = paged_attention(
        q_bTkGH.reshape(b, T, k * G, H),
        k_LmkPH.reshape(L * m, k, P, H),
        v_LmkPH.reshape(L * m, k, P, -1),
        page_bI,
        position_bIP,
        first_bT,
        scale=scale,
    )
    return out.reshape(b, T, k, G, -1), log.reshape(b, T, k, G)


def _chosen_pages(q_bTkGH, k_LmkPH, v_LmkPH, table_bJ, lengths_b, number, chosen_bTkX, mask: Segments, scale):
    """The pages of the open segment's head, of the chosen tails, and of the own one: a list for each query and head.

    So each (row, position, head) is a row of the kernel's, and each (page, head) a page.
    """
    (b, T, k, G, H), (L, m, _, P, _), (part, parts) = q_bTkGH.shape, k_LmkPH.shape, own_part()
    head, w, position_bT = mask.size - mask.window, mask.window, lengths_b[:, None] + jnp.arange(T)
    own_bTk1 = jnp.broadcast_to(mask.of(position_bT)[..., None, None], (b, T, k, 1))
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
    position = visible_from(mask, slots, lengths_b[:, None, None, None, None])
    position = jnp.where(there, position, NEVER)
    first_bT = first_seen(mask, position_bT)
    column = logical // parts
    seen = (position >= first_bT[:, :, None, None, None]).any(axis=-1) & (column < table_bJ.shape[1])
    seen &= logical % parts == part
    take = jax.vmap(lambda table_J, column: table_J[jnp.clip(column, 0, len(table_J) - 1)])
    page = take(table_bJ, column)
    page = jnp.where(seen & (page >= 0), (number * m + page) * k + jnp.arange(k)[:, None], -1)
    out, log = paged_attention(
        q_bTkGH.reshape(b * T * k, 1, G, H),
        k_LmkPH.reshape(L * m * k, 1, P, H),
        v_LmkPH.reshape(L * m * k, 1, P, -1),
        page.reshape(b * T * k, -1),
        position.reshape(b * T * k, -1, P),
        jnp.repeat(first_bT.reshape(-1), k)[:, None],
        scale=scale,
    )
    return out.reshape(b, T, k, G, -1), log.reshape(b, T, k, G)


def visible_from(mask: AttentionMask, slots: Int[Array, ...], lengths: Int[Array, ...]) -> Int[Array, ...]:
    """For :func:`paged_attention`: the position in each slot, ALWAYS where later segments see it, too."""
    position = held_positions(mask, slots, lengths)
    if isinstance(mask, Segments):
        position = jnp.where((position >= 0) & mask.in_tail(position), ALWAYS, position)
    return position


def first_seen(mask: AttentionMask, position: Int[Array, ...]) -> Int[Array, ...]:
    """The first position that one sees, tails apart."""
    if isinstance(mask, Segments):
        return jnp.maximum(mask.of(position) * mask.size - mask.shift, 0)
    assert isinstance(mask, Causal)
    return jnp.maximum(position - mask.window + 1, 0) if mask.window is not None else jnp.zeros_like(position)


# ---------------------------------------------------------------- chosen tails


def chooses(segments: Segments) -> bool:
    """Whether a position looks at some tails only."""
    return segments.top is not None and segments.window > 0


def with_new_tails(
    sums_BJKH: Float[Array, "B J K H"],
    k_BTKH: Float[Array, "B T K H"],
    ids_BT: Int[Array, "B T"],
    lengths_B: Int[Array, B],
    segments: Segments,
) -> Float[Array, "B J K H"]:
    """The sums of tails with the keys of T positions behind ``lengths_B``; those with id 0 do not count."""
    position_BT1 = (lengths_B[:, None] + jnp.arange(k_BTKH.shape[1]))[..., None]
    into_BTJ = segments.in_tail(position_BT1) & (segments.of(position_BT1) == jnp.arange(sums_BJKH.shape[1]))
    into_BTJ &= (ids_BT > 0)[..., None]
    with useful_flops(0):  # a sum, written as a product
        k_BTKH, into_BTJ = k_BTKH.astype(jnp.float32), into_BTJ.astype(jnp.float32)
        return sums_BJKH + jnp.einsum("BTJ,BTKH->BJKH", into_BTJ, k_BTKH, precision="highest")


def chosen_tails(
    q_BTKGH: Float[Array, "B T K G H"],
    sums_BJKH: Float[Array, "B J K H"],
    position_BT: Int[Array, "B T"],
    segments: Segments,
) -> Int[Array, "B T K X"]:
    """The segments whose tails a position sees, as :func:`pallas_kernels.segmented_attention.selection.choose` has it.

    Here of rows of one document each, from the sums of their tails.
    """
    assert segments.top is not None
    W, w, J = segments.size, segments.window, sums_BJKH.shape[1]
    keys_J = jnp.where(jnp.arange(J) == 0, min(w, W - segments.shift), w)  # the first segment may be cut short
    mean_BJKH = sums_BJKH / keys_J[:, None, None]
    mean_BTKH = q_BTKGH.astype(jnp.float32).mean(axis=3)
    there_BTJ = jnp.ones((*position_BT.shape, J), bool)
    return best_segments(mean_BTKH, mean_BJKH, there_BTJ, segments.of(position_BT), segments.top)
