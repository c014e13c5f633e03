"""Attention to the positions that an indexer chooses (:mod:`dsjax.nn.indexer`), a block of queries at a time.

- Whole rows, in training and in prefill: keys and values by head, with what is not chosen masked out. All products are
  made, so that a row costs what it does without an indexer, and a little more; of what has the row's length twice,
  there is never more than a block of queries has.
- New positions behind a cache: each query reads the index keys of its row, and the latents of what it chose alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.cache import POOL, LayerCache, own_part
from dsjax.nn.cached_attention import over_devices
from dsjax.nn.indexer import Index, IndexerConfig, chosen, divergence, index_scores, ranked
from dsjax.nn.masks import Causal, Documents
from dsjax.nn.row_attention import row_attention
from dsjax.sharding import current_mesh, map_shards
from pallas_kernels.cost import useful_flops

BLOCK_NUMBERS = 2**27  # that exist for a block of queries, about; each block reads all keys and values of its rows
INDEX = (("batch", None, None, None), ("batch", None, None), ("batch", None, None))  # each device has all of its heads


def indexed_row_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTNH: Float[Array, "B T N H"],
    v_BTNU: Float[Array, "B T N U"],
    index: Index,
    documents: Documents,
    cfg: IndexerConfig,
    *,
    scale: float,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T"]]:
    """softmax(scale q k) v over what the indexer chooses of each query's document; and the indexer's divergence.

    In ``warm_up``, or where there are no more than ``top_k`` positions, over all of it. The divergence is that of
    :func:`dsjax.nn.indexer.divergence` over the same positions; a program that does not use it does not compute it.
    """
    T, N = q_BTNH.shape[1:3]
    everything, current = cfg.warm_up or cfg.top_k >= T, current_mesh()
    devices_of_heads = () if current is None else current[1].heads
    # Of all pairs, those that a query of a full document sees; the products of the loss alone are had already.
    share = 0 if everything else sum(min(t, cfg.top_k) for t in range(1, T + 1)) / T**2

    def attend(q_bTnH, k_bTnH, v_bTnU, q_bThd, w_bTh, k_bTd, ids_bT):
        def block(q_bqnH, q_bqhd, w_bqh, ids_bq, at_bq):
            seen_bqT = (ids_bq[..., None] == ids_bT[:, None]) & (jnp.arange(T) <= at_bq[..., None])
            with useful_flops((T + 1) / (2 * T)):
                scores_bqT = index_scores(q_bqhd, w_bqh, k_bTd)
            if not everything:
                seen_bqT = chosen(ranked(scores_bqT, seen_bqT), cfg.top_k)
            with useful_flops(share):
                logits_bnqT = jnp.einsum("bqnH,bTnH->bnqT", q_bqnH, k_bTnH, preferred_element_type=jnp.float32) * scale
            p_bnqT = jax.nn.softmax(jnp.where(seen_bqT[:, None], logits_bnqT, -jnp.inf), axis=-1)
            total_bqT = jax.lax.stop_gradient(p_bnqT).sum(axis=1)
            if devices_of_heads:
                total_bqT = jax.lax.psum(total_bqT, devices_of_heads)
            found = divergence(total_bqT / N, scores_bqT, seen_bqT)
            if everything:
                return (found,)
            with useful_flops(share):
                return jnp.einsum("bnqT,bTnU->bqnU", p_bnqT.astype(v_bTnU.dtype), v_bTnU), found

        b, _, n, _ = q_bTnH.shape
        at_bT = jnp.broadcast_to(jnp.arange(T), ids_bT.shape)
        numbers = b * T * (n + q_bThd.shape[2])  # of a query
        return _by_blocks(block, (q_bTnH, q_bThd, w_bTh, ids_bT, at_bT), numbers)

    heads, plain = ("batch", None, "heads", None), ("batch", None)
    out_axes = (plain,) if everything else (heads, plain)
    run = map_shards(attend, (heads, heads, heads, *INDEX, plain), out_axes)
    *out, divergence_BT = run(q_BTNH, k_BTNH, v_BTNU, index.q_BThd, index.w_BTh, index.k_BTd, documents.ids_BT)
    if not everything:
        return out[0], divergence_BT
    q_BTN1H, along = q_BTNH[:, :, :, None], ("heads", None)
    out_BTN1U = row_attention(q_BTN1H, k_BTNH, v_BTNU, documents, Causal(), scale=scale, heads=along)
    return out_BTN1U[:, :, :, 0], divergence_BT


def indexed_cached_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTH: Float[Array, "B T H"],
    index: Index,
    cache: LayerCache,
    lengths_B: Int[Array, B],
    cfg: IndexerConfig,
    *,
    scale: float,
    value_width: int,
) -> Float[Array, "B T N U"]:
    """T new positions of each row against what the indexer chooses of the ``lengths_B`` before, and of each other.

    In place of values the cache holds the index keys; its one key begins with its value, ``value_width`` wide. On a
    mesh each device scores the slots that it has and takes its best; which of all devices' are the best is settled by
    their scores, and each attends to those of them that are its own.
    """
    T, H, d, top_k = k_BTH.shape[1], k_BTH.shape[-1], index.k_BTd.shape[-1], cfg.top_k
    current = current_mesh()
    over = () if current is None else current[1].slots

    def attend(q_bTnH, k_bTH, q_bThd, w_bTh, k_bTd, k_LmkPH, v_LmkPd, table_bJ, lengths_b, number):
        (b, J), (L, m, _, P, _), (part, parts) = table_bJ.shape, k_LmkPH.shape, own_part()
        room = J * P * parts
        page_bJ = number * m + jnp.maximum(table_bJ, 0)
        position_S = ((jnp.arange(J) * parts + part)[:, None] * P + jnp.arange(P)).reshape(-1)
        held_bS = (position_S < lengths_b[:, None]) & jnp.repeat(table_bJ >= 0, P, axis=1)
        index_bSd = v_LmkPd.reshape(L * m, P, -1)[page_bJ].reshape(b, J * P, -1)[..., :d]
        slots_of_pool = k_LmkPH.reshape(L * m * P, -1)

        def block(q_bqnH, q_bqhd, w_bqh, at_bq):
            new_bqT = ranked(index_scores(q_bqhd, w_bqh, k_bTd), jnp.arange(T) <= at_bq[..., None])
            with useful_flops(min((cache.slots or room) / room, 1)):  # the rest fills pages up
                held_bqS = ranked(index_scores(q_bqhd, w_bqh, index_bSd), held_bS[:, None])
            best_bqk, slot_bqk = jax.lax.top_k(held_bqS, min(top_k, J * P))
            position_bqk, new_position_b1T = position_S[slot_bqk], lengths_b[:, None, None] + jnp.arange(T)
            all_best, all_positions = best_bqk, position_bqk
            if over:
                all_best, all_positions = (
                    jax.lax.all_gather(x, over, axis=2, tiled=True) for x in (best_bqk, position_bqk)
                )
            is_chosen = among_best(
                jnp.concatenate([all_best, new_bqT], axis=-1),
                jnp.concatenate([all_positions, jnp.broadcast_to(new_position_b1T, new_bqT.shape)], axis=-1),
                top_k,
            )
            page_bqk = jnp.take_along_axis(page_bJ[:, None], slot_bqk // P, axis=2)
            kept_bqkH = slots_of_pool[page_bqk * P + slot_bqk % P][..., :H]
            with useful_flops(min(top_k, J * P) / (min(top_k, J * P) + T)):  # so many are chosen of both together
                held = _softmax(q_bqnH, kept_bqkH, is_chosen(best_bqk, position_bqk), scale, value_width)
                out, log = _softmax(q_bqnH, k_bTH, is_chosen(new_bqT, new_position_b1T), scale, value_width)
            held_out, held_log = over_devices(*held, over)
            all_log = jnp.logaddexp(held_log, log)  # something is chosen: finite
            out = held_out * jnp.exp(held_log - all_log)[..., None] + out * jnp.exp(log - all_log)[..., None]
            return (out.astype(q_bqnH.dtype),)

        n, h = q_bTnH.shape[2], q_bThd.shape[2]
        numbers = b * (h * (J * P + T) + min(top_k, J * P) * (H + n) + n * T)  # of a query
        at_bT = jnp.broadcast_to(jnp.arange(T), (b, T))
        return _by_blocks(block, (q_bTnH, q_bThd, w_bTh, at_bT), numbers)[0]

    new: tuple[str | None, ...] = ("batch", None, None, None)
    axes = (new, new[:3], *INDEX, POOL, POOL, ("batch", "slots"), ("batch",), ())
    pages, number = cache.pages, jnp.asarray(cache.number)
    index_arrays = (index.q_BThd, index.w_BTh, index.k_BTd)
    run = map_shards(attend, axes, new)
    return run(q_BTNH, k_BTH, *index_arrays, pages.k_LMKPH, pages.v_LMKPH, pages.table_BJ, lengths_B, number)


def among_best(scores_bqC: Any, positions_bqC: Any, top_k: int) -> Callable[[Any, Any], Any]:
    """Whether something of this score at this position is among the ``top_k`` best, of equal ones the earliest."""
    sorted_scores, sorted_positions = jax.lax.sort((-scores_bqC, positions_bqC), num_keys=2)
    last = min(top_k, scores_bqC.shape[-1]) - 1
    score, position = -sorted_scores[..., last:][..., :1], sorted_positions[..., last:][..., :1]

    def is_chosen(scores: Any, positions: Any) -> Any:
        best = (scores > score) | ((scores == score) & (positions <= position))
        return best & (scores > -jnp.inf)

    return is_chosen


def _softmax(q_bqnH: Any, keys: Any, seen_bqs: Any, scale: float, value_width: int) -> tuple[Any, Any]:
    """All heads over keys of each query, (b, q, s, H), or over the same ones, (b, s, H), which begin with their values.

    Output, and logarithm of the softmax' sum, float32; 0 and -inf where nothing is seen.
    """
    dims = "bqsH" if keys.ndim == 4 else "bsH"
    logits_bqns = jnp.einsum(f"bqnH,{dims}->bqns", q_bqnH, keys, preferred_element_type=jnp.float32) * scale
    logits_bqns = jnp.where(seen_bqs[:, :, None], logits_bqns, -jnp.inf)
    log_bqn = jax.nn.logsumexp(logits_bqns, axis=-1)
    p_bqns = jnp.exp(logits_bqns - jnp.where(log_bqn > -jnp.inf, log_bqn, 0)[..., None])
    values = keys[..., :value_width]
    out = jnp.einsum(f"bqns,{dims}->bqnH", p_bqns.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return out, log_bqn


def _by_blocks(f: Callable[..., tuple[Any, ...]], xs: tuple[Any, ...], numbers: int) -> tuple[Any, ...]:
    """``f`` of blocks of queries, along axis 1 of all arrays, which hold ``numbers`` for each; its results joined.

    What a block needs is computed again for the backward pass, so that it exists for one block at a time there, too.
    """
    T = xs[0].shape[1]
    blocks = min(math.ceil(T * numbers / BLOCK_NUMBERS), T)
    if blocks == 1:
        return jax.checkpoint(f)(*xs)
    size = math.ceil(T / blocks)

    def cut(x: jax.Array) -> jax.Array:  # the last query again, to fill the last block
        x = jnp.pad(x, [(0, 0), (0, blocks * size - T), *[(0, 0)] * (x.ndim - 2)], mode="edge")
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    _, found = jax.lax.scan(lambda _, xs: (None, jax.checkpoint(f)(*xs)), None, tuple(map(cut, xs)))
    return tuple(jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:])[:, :T] for y in found)
