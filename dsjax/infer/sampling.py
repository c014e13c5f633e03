"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeFloat, NonNegativeInt, Share
from dsjax.nn.masks import Leaf

GREEDY_BELOW = 1e-3  # scaled logits would overflow


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """``temperature`` below 0.001 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 keep every token.

    ``min_p``: tokens at least that probable, as a share of the most probable one's (Nguyen et al. 2024).
    """

    temperature: NonNegativeFloat = 0.8
    top_k: NonNegativeInt = 0
    top_p: Share = 0.95
    min_p: Share = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """A :class:`SamplingConfig` for each row."""

    temperature_B: Leaf
    top_k_B: Leaf
    top_p_B: Leaf
    min_p_B: Leaf

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig]) -> RowSampling:
        """The rows' settings side by side."""
        names = ("temperature", "top_p", "min_p")
        temperature, top_p, min_p = (np.array([getattr(c, name) for c in configs], np.float32) for name in names)
        return cls(temperature, np.array([c.top_k for c in configs], np.int32), top_p, min_p)


def sample(logits_BV: Float[Array, "B V"], key: jax.Array, cfg: SamplingConfig) -> Int[Array, B]:
    """One token for each row."""
    B = len(logits_BV)
    return sample_rows(logits_BV, jax.random.split(key, B), jax.tree.map(jnp.asarray, RowSampling.of([cfg] * B)))


def sample_rows(logits_BV: Float[Array, "B V"], keys_B: jax.Array, settings: RowSampling) -> Int[Array, B]:
    """One token for each row by its own key and settings: what a row gets depends on no other row."""
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    random_B = settings.temperature_B >= GREEDY_BELOW

    def draw() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(random_B, settings.temperature_B, 1)[:, None]
        cuts = random_B & ((settings.top_k_B > 0) | (settings.top_p_B < 1))
        least_B = jax.lax.cond(
            cuts.any(), lambda: _least(scaled_BV, settings), lambda: jnp.full_like(scaled_BV[:, 0], -jnp.inf)
        )
        least_B = jnp.maximum(least_B, jnp.max(scaled_BV, axis=-1) + jnp.log(settings.min_p_B))
        kept_BV = jnp.where(scaled_BV < least_B[:, None], -jnp.inf, scaled_BV)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)
        return jnp.where(random_B, drawn_B, greedy_B)

    return jax.lax.cond(random_B.any(), draw, lambda: greedy_B)


def _least(logits_BV: Array, settings: RowSampling) -> Array:
    """The least logit that top-k and top-p keep (nucleus sampling, Holtzman et al. 2020, of the k best)."""
    V = logits_BV.shape[1]
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    k_B = jnp.where(settings.top_k_B > 0, jnp.minimum(settings.top_k_B, V), V)
    sorted_BV = jnp.where(sorted_BV < jnp.take_along_axis(sorted_BV, k_B[:, None] - 1, axis=1), -jnp.inf, sorted_BV)
    p_BV = jax.nn.softmax(sorted_BV)
    # The first token is always kept, also at top_p = 0; at 1 all are, whatever the sums come to.
    kept_BV = (jnp.cumsum(p_BV, axis=-1) - p_BV < settings.top_p_B[:, None]).at[:, 0].set(True)
    kept_BV = (kept_BV | (settings.top_p_B[:, None] >= 1)) & (sorted_BV > -jnp.inf)
    return jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1)
