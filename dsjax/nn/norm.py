"""RMSNorm (Zhang & Sennrich 2019)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.sharding import param


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rms_normalize(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """``x`` divided by its root mean square over the last dimension; statistics in float32.

    The backward pass is written out: it keeps one number a row instead of the normalised row.
    """
    return _forward(x, eps)[0]


def _forward(x, eps):
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype), (x, inverse)


def _backward(eps, saved, dy):
    x, inverse = saved
    x32, dy32 = x.astype(jnp.float32), dy.astype(jnp.float32)
    along = jnp.mean(dy32 * x32, axis=-1, keepdims=True) * inverse * inverse
    return ((inverse * (dy32 - x32 * along)).astype(x.dtype),)


rms_normalize.defvjp(_forward, _backward)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale per channel."""

    def __init__(self, d: int, *, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, (d,), ("norm",), value=1.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_normalize(x, self.eps) * self.scale[...].astype(x.dtype)
