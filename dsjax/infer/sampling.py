"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeFloat, NonNegativeInt, Share


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """``temperature`` below 0.001 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: NonNegativeFloat = 0.8
    top_k: NonNegativeInt = 0
    top_p: Share = 0.95


def sample(logits_BV: Float[Array, "B V"], key: jax.Array, cfg: SamplingConfig) -> Int[Array, B]:
    """One token for each row (nucleus sampling: Holtzman et al. 2020)."""
    if cfg.temperature < 1e-3:  # scaled logits would overflow
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / cfg.temperature
    if cfg.top_k and cfg.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, cfg.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if cfg.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=-1) - jax.nn.softmax(sorted_BV)
        # The first token is always kept, also at top_p = 0.
        kept_BV = (before_BV < cfg.top_p).at[:, 0].set(True)
        least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
