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
FEW = 256  # of the likeliest tokens, among which the least one that is kept is looked for first


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
    greedy_B = _likeliest(logits_BV)
    random_B = settings.temperature_B >= GREEDY_BELOW

    def draw() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(random_B, settings.temperature_B, 1)[:, None]
        cuts = random_B & ((settings.top_k_B > 0) | (settings.top_p_B < 1))
        least_B = jax.lax.cond(
            cuts.any(), lambda: _least(scaled_BV, settings, cuts), lambda: jnp.full_like(scaled_BV[:, 0], -jnp.inf)
        )
        least_B = jnp.maximum(least_B, jnp.max(scaled_BV, axis=-1) + jnp.log(settings.min_p_B))
        kept_BV = jnp.where(scaled_BV < least_B[:, None], -jnp.inf, scaled_BV)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)
        return jnp.where(random_B, drawn_B, greedy_B)

    return jax.lax.cond(random_B.any(), draw, lambda: greedy_B)


def _likeliest(logits_BV: Float[Array, "B V"]) -> Int[Array, B]:
    """The first of the largest: argmax, which XLA:CPU takes four times as long for."""
    V = logits_BV.shape[1]
    at_BV = jnp.where(logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1)
    return jnp.min(at_BV, axis=-1)


def _least(logits_BV: Array, settings: RowSampling, rows_B: Array) -> Array:
    """The least logit that top-k and top-p keep (nucleus sampling, Holtzman et al. 2020, of the k best).

    Of the rows in ``rows_B``. Almost always it is among the best few; else all are sorted, which takes far longer.
    """
    V = logits_BV.shape[1]
    log_total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    least_B, known_B = _least_of(jax.lax.top_k(logits_BV, min(FEW, V))[0], V, log_total_B, settings)

    def of_all() -> Array:
        return _least_of(-jnp.sort(-logits_BV, axis=-1), V, log_total_B, settings)[0]

    return jax.lax.cond((known_B | ~rows_B).all(), lambda: least_B, of_all)


def _least_of(best_BX: Array, V: int, log_total_B: Array, settings: RowSampling) -> tuple[Array, Array]:
    """The same from the X best of V logits, best first, and whether they are enough to know it."""
    X = best_BX.shape[1]
    k_B = jnp.where(settings.top_k_B > 0, jnp.minimum(settings.top_k_B, V), V)
    kth_B = jnp.take_along_axis(best_BX, jnp.minimum(k_B, X)[:, None] - 1, axis=1)[:, 0]
    best_BX = jnp.where(best_BX < kth_B[:, None], -jnp.inf, best_BX)
    log_total_B = jnp.where(k_B < V, jax.nn.logsumexp(best_BX, axis=-1), log_total_B)
    p_BX = jnp.exp(best_BX - log_total_B[:, None])
    # The first token is always kept, also at top_p = 0; at 1 all are, whatever the sums come to.
    all_B = settings.top_p_B >= 1
    sums_BX = jnp.cumsum(p_BX, axis=-1)
    kept_BX = (sums_BX - p_BX < settings.top_p_B[:, None]).at[:, 0].set(True)
    kept_BX = (kept_BX | all_B[:, None]) & (best_BX > -jnp.inf)
    least_B = jnp.min(jnp.where(kept_BX, best_BX, jnp.inf), axis=-1)
    uncut_B = all_B & (k_B == V)
    enough_B = ~all_B & (k_B == V) & (sums_BX[:, -1] >= settings.top_p_B)
    return jnp.where(uncut_B, -jnp.inf, least_B), uncut_B | enough_B | (k_B < X) | (X == V)
