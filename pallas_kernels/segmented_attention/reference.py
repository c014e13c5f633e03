"""The specification of segmented attention, and the loop over segments that it equals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.segmented_attention.segments import Segments
from pallas_kernels.segmented_attention.selection import choose


def visible(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], ids_BT: Int[Array, "B T"], segments: Segments
) -> Bool[Array, "B K T T"]:
    """Which keys (last) the queries of a position (before it) see; queries and keys matter with ``top`` alone."""
    T, K = k_BTKH.shape[1:3]
    t, j = jnp.arange(T)[:, None], jnp.arange(T)
    own, earlier = segments.of(j) == segments.of(t), (segments.of(j) < segments.of(t)) & segments.in_tail(j)
    sees = jnp.broadcast_to(own | earlier, (len(ids_BT), K, T, T))
    if segments.top is not None:
        chosen_BTKX = choose(q_BTNH, k_BTKH, ids_BT, segments)
        among_BKTT = (chosen_BTKX[:, :, :, None] == segments.of(j)[:, None]).any(axis=-1).swapaxes(1, 2)
        sees = own | (earlier & among_BKTT)
    ids = ids_BT[:, None]
    return sees & (j <= t) & (ids[..., :, None] == ids[..., None, :]) & (ids > 0)[..., None]


def segmented_attention_reference(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    ids_BT: Int[Array, "B T"],
    segments: Segments,
    scale: float,
) -> Float[Array, "B T N U"]:
    """softmax(scale q k) v over the visible keys, float32 inside; a query that sees none (padding) gives 0."""
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    q_BTKGH, k_BTKH, v_BTKU = (x.astype(jnp.float32) for x in (q_BTNH.reshape(B, T, K, N // K, H), k_BTKH, v_BTKU))
    sees_BK1TT = visible(q_BTNH, k_BTKH, ids_BT, segments)[:, :, None]
    scores_BKGTS = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, precision="highest")
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1, where=sees_BK1TT)
    out_BTKGU = jnp.einsum("BKGTS,BSKU->BTKGU", probs_BKGTS, v_BTKU, precision="highest")
    return jnp.where((ids_BT > 0)[:, :, None, None], out_BTKGU.reshape(B, T, N, -1), 0).astype(q_BTNH.dtype)


def segmented_attention_loop(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    ids_BT: Int[Array, "B T"],
    segments: Segments,
    scale: float,
) -> Float[Array, "B T N U"]:
    """The same, segment by segment: each is a softmax of its own, and their log-sum-exps say what each counts for."""
    (B, T, N, H), K = q_BTNH.shape, k_BTKH.shape[2]
    q_BTKGH, k_BTKH, v_BTKU = (x.astype(jnp.float32) for x in (q_BTNH.reshape(B, T, K, N // K, H), k_BTKH, v_BTKU))
    sees_BK1TT = visible(q_BTNH, k_BTKH, ids_BT, segments)[:, :, None]
    outs, logs = [], []
    for segment in range(segments.count(T)):
        here = slice(max(segment * segments.size - segments.shift, 0), (segment + 1) * segments.size - segments.shift)
        scores = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH[:, here], precision="highest")
        sees = sees_BK1TT[..., here]
        logs.append(jax.nn.logsumexp(scores, axis=-1, where=sees))
        probs = jax.nn.softmax(scores, axis=-1, where=sees)
        outs.append(jnp.einsum("BKGTS,BSKU->BKGTU", probs, v_BTKU[:, here], precision="highest"))
    share = jax.nn.softmax(jnp.stack(logs), axis=0, where=jnp.isfinite(jnp.stack(logs)))
    out_BKGTU = jnp.einsum("JBKGT,JBKGTU->BKGTU", share, jnp.stack(outs), precision="highest")
    out_BTNU = out_BKGTU.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)
    return jnp.where((ids_BT > 0)[:, :, None, None], out_BTNU, 0).astype(q_BTNH.dtype)
