"""Losses of a language model; the logits of a batch never exist as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.history import Copy
from dsjax.nn.linear import project
from dsjax.sharding import current_mesh
from pallas_kernels.outer import outer


def token_losses(
    hidden_BTD: Float[Array, "B T D"],
    w_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    copy: Copy | None = None,
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32."""
    logits_BTV = output_logits(hidden_BTD, w_DV.astype(hidden_BTD.dtype), copy)
    top_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    log_total_BT = jnp.log(jnp.sum(jnp.exp(logits_BTV - top_BT1), axis=-1)) + top_BT1[..., 0]
    return log_total_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    w_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    weight_BT: Float[Array, "B T"],
    copy: Copy | None = None,
    *,
    chunk: int = 0,
) -> Float[Array, ""]:
    """Weighted sum of :func:`token_losses`, ``chunk`` positions of T at a time (0: all at once).

    The gradients of hidden states and weights are made while a chunk's logits are at hand, so that B x chunk x V is
    the most that ever exists and no product is computed twice. ``weight_BT`` gets no gradient.
    """
    chunk = min(chunk or hidden_BTD.shape[1], hidden_BTD.shape[1])
    return _cross_entropy(hidden_BTD, w_DV.astype(hidden_BTD.dtype), targets_BT, weight_BT, copy, chunk)


def output_logits(
    hidden_BTD: Float[Array, "B T D"], w_DV: Float[Array, "D V"], copy: Copy | None
) -> Float[Array, "B T V"]:
    """Scores of the next token, float32; ``w_DV`` has the type of the hidden states."""
    logits_BTV = project(hidden_BTD, w_DV).astype(jnp.float32)
    if copy is None:
        return logits_BTV
    return logits_BTV + jnp.where(_one_hot(copy.token_BT, w_DV.shape[1]), copy.bonus_BT[..., None], 0)


def _one_hot(token_BT, num: int):
    return jax.lax.broadcasted_iota(jnp.int32, (*token_BT.shape, num), token_BT.ndim) == token_BT[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _cross_entropy(hidden_BTD, w_DV, targets_BT, weight_BT, copy, chunk):
    def one(total, part):
        hidden, targets, weight, copy = part
        return total + jnp.sum(token_losses(hidden, w_DV, targets, copy) * weight), None

    return over_chunks(one, jnp.float32(0), (hidden_BTD, targets_BT, weight_BT, copy), chunk)[0]


def _forward(hidden_BTD, w_DV, targets_BT, weight_BT, copy, chunk):
    def one(sums, part):
        loss, dw_DV = sums
        hidden, targets, weight, copy = part
        logits = output_logits(hidden, w_DV, copy)
        top = jnp.max(logits, axis=-1, keepdims=True)
        p = jnp.exp(logits - top)
        total = jnp.sum(p, axis=-1, keepdims=True)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        loss = loss + jnp.sum(weight * (jnp.log(total) + top - target)[..., 0])
        dlogits = p * (weight[..., None] / total) - jnp.where(_one_hot(targets, p.shape[-1]), weight[..., None], 0)
        dbonus = None if copy is None else jnp.take_along_axis(dlogits, copy.token_BT[..., None], axis=-1)[..., 0]
        dlogits = dlogits.astype(hidden.dtype)
        if current_mesh() is None:
            dw = outer(hidden.reshape(-1, hidden.shape[-1]), dlogits.reshape(-1, dlogits.shape[-1]))
        else:
            dw = jnp.einsum("BTD,BTV->DV", hidden, dlogits)
        return (loss, dw_DV + dw.astype(jnp.float32)), (project(dlogits, w_DV.T), dbonus)

    sums = (jnp.float32(0), jnp.zeros(w_DV.shape, jnp.float32))
    (loss, dw_DV), (dhidden_BTD, dbonus_BT) = over_chunks(one, sums, (hidden_BTD, targets_BT, weight_BT, copy), chunk)
    return loss, (dhidden_BTD, dw_DV.astype(w_DV.dtype), dbonus_BT)


def _backward(chunk, saved, dloss):
    dhidden_BTD, dw_DV, dbonus_BT = saved
    dcopy = None if dbonus_BT is None else Copy(None, dbonus_BT * dloss)
    return dhidden_BTD * dloss.astype(dhidden_BTD.dtype), dw_DV * dloss.astype(dw_DV.dtype), None, None, dcopy


_cross_entropy.defvjp(_forward, _backward)

_WRITTEN_OUT = 8  # up to so many chunks are written out, more are a scan


def over_chunks(one: Callable[[Any, Any], tuple[Any, Any]], carry: Any, parts: Any, chunk: int) -> tuple[Any, Any]:
    """Runs ``one`` over ``chunk`` positions of axis 1 at a time; results are put together along axis 1 again."""
    T = jax.tree.leaves(parts)[0].shape[1]
    if T % chunk or T // chunk > _WRITTEN_OUT:
        return _scan_chunks(one, carry, parts, chunk)
    outputs = []
    for start in range(0, T, chunk):
        part = jax.tree.map(lambda x, start=start: x[:, start : start + chunk], parts)
        carry, y = one(carry, part)
        outputs.append(y)
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys, axis=1), *outputs)


def _scan_chunks(one, carry, parts, chunk: int):
    """As :func:`over_chunks`; T is padded to whole chunks, whose weight is 0."""
    T = jax.tree.leaves(parts)[0].shape[1]
    num_chunks = -(-T // chunk)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], num_chunks, chunk, *x.shape[2:]), 1, 0)

    def join(y: jax.Array) -> jax.Array:
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :T]

    carry, outputs = jax.lax.scan(one, carry, jax.tree.map(split, parts))
    return carry, jax.tree.map(join, outputs)
