"""Causal attention in plain XLA, block by block: no T x T scores, and most of what is masked is never computed.

Queries are cut into at most ``Tiles.spans`` spans. The keys of a span end where the span ends, and with a window
begin where its first query's window does. Within a span a scan goes over blocks of queries, so that the scores that
exist at a time are block x S. The backward pass computes them again from the saved log-sum-exp (FlashAttention-2, Dao
2023). Products over the rows of both operands are written so that the narrow one is transposed, which is what XLA:CPU
runs fast.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cost import useful_flops
from pallas_kernels.platforms import by_platform

LOG2_E = math.log2(math.e)
MASKED = -1e30  # finite: a row that is all padding must not give NaN


@dataclasses.dataclass(frozen=True)
class Tiles:
    """``block``: queries whose scores exist at a time; ``spans``: cuts of the query axis."""

    block: int = 128
    spans: int = 8


# A span is a loop of its own in the program: fewer of them halve the time of compiling for a TPU, whose matrix unit
# wants more rows at a time anyway.
ACCELERATOR_TILES = Tiles(block=512, spans=4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def causal_attention_xla(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    ids_BT: Int[Array, "B T"],
    window: int | None = None,
    scale: float | None = None,
    tiles: Tiles | None = None,
    closes_BTK: Int[Array, "B T K"] | None = None,
) -> Float[Array, "B T N U"]:
    """See :func:`pallas_kernels.causal_attention.causal_attention`; ``tiles``: None, what suits the platform."""
    return _forward(q_BTNH, k_BTKH, v_BTKU, ids_BT, window, scale, tiles, closes_BTK)[0]


@dataclasses.dataclass(frozen=True)
class _Span:
    """Queries [start, end) against keys [first_key, end)."""

    start: int
    end: int
    first_key: int


def _spans(T: int, window: int | None, tiles: Tiles) -> tuple[int, int, list[_Span]]:
    """Block size, T rounded up to blocks, and the spans."""
    block = min(tiles.block, T)
    num_blocks = -(-T // block)
    per_span = -(-num_blocks // tiles.spans)
    spans = []
    for first in range(0, num_blocks, per_span):
        start, end = first * block, min(first + per_span, num_blocks) * block
        first_key = 0 if window is None else max(0, start - window + 1) // block * block
        spans.append(_Span(start, end, first_key))
    return block, num_blocks * block, spans


def _useful_share(T: int, window: int | None, tiles: Tiles) -> float:
    """Of the (query, key) pairs that are computed, those that a query sees in a document as long as the row."""
    w = min(window or T, T)
    seen = w * (w + 1) / 2 + (T - w) * w
    return seen / sum((span.end - span.start) * (span.end - span.first_key) for span in _spans(T, window, tiles)[2])


def _pad(x: jax.Array, length: int, value: int = 0, axis: int = 1) -> jax.Array:
    """Lengthens an axis."""
    extra = length - x.shape[axis]
    widths = [(0, extra if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if extra else x


def _heads_first(x_BTNH: jax.Array, K: int) -> jax.Array:
    """(B, T, K * G, H) -> (B, K, G, T, H)."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _heads_last(x_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _closes(closes_BTK: jax.Array | None, length: int) -> jax.Array | None:
    """(B, T, K) -> (B, K, length)."""
    return None if closes_BTK is None else _pad(closes_BTK, length).transpose(0, 2, 1)


def _blocks(x: jax.Array, span: _Span, block: int, axis: int) -> jax.Array:
    """The span's part of an axis, cut into blocks on a new leading axis."""
    x = jax.lax.slice_in_dim(x, span.start, span.end, axis=axis)
    cut = x.reshape(*x.shape[:axis], (span.end - span.start) // block, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)


def _unblocks(x: jax.Array, axis: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _scan(one: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """A scan over blocks; a single block needs no loop."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(one, carry, xs)
    carry, ys = one(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


def _scores(q_BKGtH, k_BKSH, ids_Bt, ids_BS, first_query, first_key, window, closes_BKS=None):
    """Masked scores in base 2 of one block of queries, float32: (B, K, G, t, S)."""
    B, K, G, t, H = q_BKGtH.shape
    scores = jnp.einsum("BKTH,BKSH->BKTS", q_BKGtH.reshape(B, K, G * t, H), k_BKSH)
    scores = scores.reshape(B, K, G, t, -1).astype(jnp.float32)
    query = first_query + jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], 0)
    key = first_key + jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], 1)
    sees = (ids_Bt[:, :, None] == ids_BS[:, None, :]) & (query >= key)
    if window is not None:
        sees &= query - key < window
    if closes_BKS is None:
        return jnp.where(sees[:, None, None], scores, MASKED)
    sees_BKtS = sees[:, None] & (query < closes_BKS[:, :, None])
    return jnp.where(sees_BKtS[:, :, None], scores, MASKED)


def _for_platform(f, tiles: Tiles | None, *arguments):
    """``f(tiles, *arguments)``, with the tiles of the platform that the program is compiled for if none are given."""
    if tiles is not None:
        return f(tiles, *arguments)
    on = {"cpu": functools.partial(f, Tiles()), "default": functools.partial(f, ACCELERATOR_TILES)}
    return by_platform(*arguments, **on)


def _forward(q_BTNH, k_BTKH, v_BTKU, ids_BT, window, scale, tiles, closes_BTK):
    arrays = (q_BTNH, k_BTKH, v_BTKU, ids_BT, closes_BTK)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    out_BTNU, log_BKGT1 = _for_platform(functools.partial(_forward_tiled, window, scale), tiles, *arrays)
    return out_BTNU, (*arrays, out_BTNU, log_BKGT1)


def _forward_tiled(window, scale, tiles, q_BTNH, k_BTKH, v_BTKU, ids_BT, closes_BTK):
    """The output, and the log-sum-exp of each query's scores in base 2."""
    T, K = q_BTNH.shape[1], k_BTKH.shape[2]
    block, padded, spans = _spans(T, window, tiles)
    share = _useful_share(T, window, tiles)
    # The factor turns exp into exp2.
    q = _heads_first(_pad(q_BTNH * jnp.asarray(scale * LOG2_E, q_BTNH.dtype), padded), K)
    k, v = (_pad(x, padded).transpose(0, 2, 1, 3) for x in (k_BTKH, v_BTKU))
    ids, closes = _pad(ids_BT, padded, value=-1), _closes(closes_BTK, padded)
    outs, logs = [], []
    for span in spans:
        keys = slice(span.first_key, span.end)
        k_span, v_span, ids_span = k[:, :, keys], v[:, :, keys], ids[:, keys]
        closes_span = None if closes is None else closes[:, :, keys]

        def one(_, xs, k=k_span, v=v_span, ids_BS=ids_span, first_key=span.first_key, closes=closes_span):
            q, ids_Bt, first_query = xs
            B, K, G, t, _ = q.shape
            with useful_flops(share):
                scores = _scores(q, k, ids_Bt, ids_BS, first_query, first_key, window, closes)
            top = scores.max(axis=-1, keepdims=True)
            p = jnp.exp2(scores - top)
            total = p.sum(axis=-1, keepdims=True)
            p = p.reshape(B, K, G * t, -1).astype(v.dtype)
            with useful_flops(share):
                out = jnp.einsum("BKTS,BKSU->BKTU", p, v).reshape(B, K, G, t, -1)
            return None, ((out / total).astype(q.dtype), top + jnp.log2(total))

        first_queries = jnp.arange(span.start, span.end, block, dtype=jnp.int32)
        xs = (_blocks(q, span, block, 3), _blocks(ids, span, block, 1), first_queries)
        _, (out, log) = _scan(one, None, xs)
        outs.append(_unblocks(out, 3))
        logs.append(_unblocks(log, 3))
    return _heads_last(jnp.concatenate(outs, axis=3))[:, :T], jnp.concatenate(logs, axis=3)[:, :, :, :T]


def _backward(window, scale, tiles, saved, do_BTNU):
    scale = saved[0].shape[-1] ** -0.5 if scale is None else scale
    return *_for_platform(functools.partial(_backward_tiled, window, scale), tiles, *saved, do_BTNU), None, None


def _backward_tiled(window, scale, tiles, q_BTNH, k_BTKH, v_BTKU, ids_BT, closes_BTK, out_BTNU, log_BKGT1, do_BTNU):
    (B, T, _, H), (K, U) = q_BTNH.shape, v_BTKU.shape[2:]
    block, padded, spans = _spans(T, window, tiles)
    share = _useful_share(T, window, tiles)
    q = _heads_first(_pad(q_BTNH * jnp.asarray(scale * LOG2_E, q_BTNH.dtype), padded), K)
    do = _heads_first(_pad(do_BTNU, padded), K)
    log = _pad(log_BKGT1, padded, axis=3)
    along_BTN = jnp.sum(do_BTNU.astype(jnp.float32) * out_BTNU.astype(jnp.float32), axis=-1)
    along = _heads_first(_pad(along_BTN, padded)[..., None], K)
    k, v = (_pad(x, padded).transpose(0, 2, 1, 3) for x in (k_BTKH, v_BTKU))
    ids, closes = _pad(ids_BT, padded, value=-1), _closes(closes_BTK, padded)
    dq: list[jax.Array] = []
    sums: tuple[jax.Array, ...] | None = None  # dk and dv, (B, K, H or U, S)
    for span in reversed(spans):  # the last span sees the most keys: its sums are the ones that the others add to
        keys = slice(span.first_key, span.end)
        k_span, v_span, ids_span = k[:, :, keys], v[:, :, keys], ids[:, keys]
        closes_span = None if closes is None else closes[:, :, keys]

        def one(sums, xs, k=k_span, v=v_span, ids_BS=ids_span, first_key=span.first_key, closes=closes_span):
            q, do, log, along, ids_Bt, first_query = xs
            _, _, G, t, _ = q.shape
            with useful_flops(0):  # the forward pass had them
                scores = _scores(q, k, ids_Bt, ids_BS, first_query, first_key, window, closes)
            p = jnp.exp2(scores - log)
            q, do = q.reshape(B, K, G * t, H), do.reshape(B, K, G * t, U)
            with useful_flops(share):
                dp = jnp.einsum("BKTU,BKSU->BKTS", do, v).reshape(p.shape).astype(jnp.float32)
                ds = (p * (dp - along)).reshape(B, K, G * t, -1).astype(q.dtype)
                p = p.reshape(B, K, G * t, -1).astype(q.dtype)
                dq = jnp.einsum("BKTS,BKSH->BKTH", ds, k).reshape(B, K, G, t, H)
                dk = jnp.einsum("BKHT,BKTS->BKHS", q.swapaxes(2, 3), ds)
                dv = jnp.einsum("BKUT,BKTS->BKUS", do.swapaxes(2, 3), p)
            new = (dk.astype(jnp.float32), dv.astype(jnp.float32))
            return new if sums is None else jax.tree.map(jnp.add, sums, new), dq

        first_queries = jnp.arange(span.start, span.end, block, dtype=jnp.int32)
        parts = tuple(_blocks(x, span, block, 3) for x in (q, do, log, along))
        one_block = span.end - span.start == block
        zeros = tuple(jnp.zeros((B, K, width, span.end - span.first_key), jnp.float32) for width in (H, U))
        xs = (*parts, _blocks(ids, span, block, 1), first_queries)
        new, dq_span = _scan(one, None if one_block else zeros, xs)
        if sums is None:
            sums = tuple(jnp.pad(x, ((0, 0),) * 3 + ((span.first_key, 0),)) for x in new)
        else:
            sums = tuple(total.at[..., keys].add(x) for total, x in zip(sums, new, strict=True))
        dq.insert(0, _unblocks(dq_span, 3))
    assert sums is not None
    dk_BKHS, dv_BKUS = sums
    dq_BTNH = _heads_last(jnp.concatenate(dq, axis=3))[:, :T] * jnp.asarray(scale, q_BTNH.dtype)
    dk_BTKH, dv_BTKU = (x.transpose(0, 3, 1, 2)[:, :T] for x in (dk_BKHS / LOG2_E, dv_BKUS))
    return dq_BTNH.astype(q_BTNH.dtype), dk_BTKH.astype(k_BTKH.dtype), dv_BTKU.astype(v_BTKU.dtype)


causal_attention_xla.defvjp(_forward, _backward)
