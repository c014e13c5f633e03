"""Losses of a language model; the logits of a batch never exist as a whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(
    hidden_BTD: Float[Array, "B T D"], w_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32."""
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, w_VD.astype(hidden_BTD.dtype)).astype(jnp.float32)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    w_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weight_BT: Float[Array, "B T"],
    *,
    chunk: int = 0,
) -> Float[Array, ""]:
    """Weighted sum of :func:`token_losses`, ``chunk`` positions of T at a time (0: all at once).

    Each chunk's logits are computed again in the backward pass, so that B x chunk x V is the most that is held.
    """
    B, T, D = hidden_BTD.shape
    if not chunk or chunk >= T:
        return jnp.sum(token_losses(hidden_BTD, w_VD, targets_BT) * weight_BT)
    num_chunks = -(-T // chunk)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, num_chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden, targets, weight = part
        return total + jnp.sum(token_losses(hidden, w_VD, targets) * weight), None

    parts = (split(hidden_BTD), split(targets_BT), split(weight_BT))
    return jax.lax.scan(one, jnp.float32(0), parts)[0]
