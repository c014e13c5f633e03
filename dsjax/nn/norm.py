"""RMSNorm (Zhang & Sennrich 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.sharding import param


def rms_normalize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """``x`` divided by its root mean square over the last dimension; statistics in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale per channel."""

    def __init__(self, d: int, *, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, (d,), ("norm",), value=1.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_normalize(x, self.eps) * self.scale[...].astype(x.dtype)
