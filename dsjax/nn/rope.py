"""Rotary position embedding (Su et al. 2021), half-split layout as in Llama."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(positions_BT: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Float[Array, "B T h"], ...]:
    """(cos, sin) of shape (B, T, head_dim / 2) in float32: one table for all layers of a step."""
    frequencies_h = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles_BTh = positions_BT[..., None].astype(jnp.float32) * frequencies_h
    return jnp.cos(angles_BTh), jnp.sin(angles_BTh)


def apply_rope(x_BTXH: Float[Array, "B T ... H"], rope: tuple[Float[Array, "B T h"], ...]) -> Float[Array, "B T ... H"]:
    """Rotates channel pairs (i, i + H/2) of each head by the angle of the position."""
    cos, sin = (a.reshape(*a.shape[:2], *(1,) * (x_BTXH.ndim - 3), a.shape[-1]) for a in rope)
    a, b = jnp.split(x_BTXH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTXH.dtype)
