"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

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
    return choose(logits_BV, gumbel_noise(keys_B, logits_BV.shape[1], settings), settings)


def gumbel_noise(keys_B: jax.Array, vocab_size: int, settings: RowSampling) -> Float[Array, "B V"]:
    """What chance adds to each row's logits; zeros if all rows are greedy."""

    def draw() -> jax.Array:
        return jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,), jnp.float32))(keys_B)

    return jax.lax.cond(_is_random(settings).any(), draw, lambda: jnp.zeros((len(keys_B), vocab_size), jnp.float32))


def choose(logits_BV: Float[Array, "B V"], noise_BV: Float[Array, "B V"], settings: RowSampling) -> Int[Array, B]:
    """The token of each row whose logit, scaled and with the noise, is the largest of those that may be drawn."""
    greedy_B, random_B = _likeliest(logits_BV), _is_random(settings)

    def draw() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(random_B, settings.temperature_B, 1)[:, None]
        least_B = jnp.maximum(_least(scaled_BV, settings), jnp.max(scaled_BV, axis=-1) + jnp.log(settings.min_p_B))
        kept_BV = jnp.where(scaled_BV < least_B[:, None], -jnp.inf, scaled_BV)
        return jnp.where(random_B, _likeliest(kept_BV + noise_BV), greedy_B)

    return jax.lax.cond(random_B.any(), draw, lambda: greedy_B)


def _is_random(settings: RowSampling) -> Bool[Array, B]:
    return settings.temperature_B >= GREEDY_BELOW


def _likeliest(logits_BV: Float[Array, "B V"]) -> Int[Array, B]:
    """The first of the largest: argmax, which XLA:CPU takes four times as long for."""
    V = logits_BV.shape[1]
    at_BV = jnp.where(logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1)
    return jnp.min(at_BV, axis=-1)


def _least(logits_BV: Float[Array, "B V"], settings: RowSampling) -> Float[Array, B]:
    """The least logit that top-k and top-p keep (nucleus sampling, Holtzman et al. 2020, of the k best); -inf: all.

    Both are the last place at which something holds that holds from the largest logit down to there. So it is found by
    bisection, in 32 sums over the logits, each a small part of the time that sorting them takes.
    """
    cuts_p_B, none_B = settings.top_p_B < 1, jnp.full_like(logits_BV[:, 0], -jnp.inf)

    def kth() -> jax.Array:  # so that fewer than k are larger
        return _first_where(lambda x_B: jnp.sum(logits_BV > x_B[:, None], axis=-1) < settings.top_k_B, logits_BV)

    least_B = jax.lax.cond((settings.top_k_B > 0).any(), kth, lambda: none_B)
    least_B = jnp.where(settings.top_k_B > 0, least_B, -jnp.inf)

    def nucleus() -> jax.Array:  # so that the larger ones are less than top_p
        best_BV = jnp.where(logits_BV < least_B[:, None], -jnp.inf, logits_BV)
        p_BV = jax.nn.softmax(best_BV, axis=-1)
        above = lambda x_B: jnp.sum(jnp.where(logits_BV > x_B[:, None], p_BV, 0), axis=-1)  # noqa: E731
        return _first_where(lambda x_B: above(x_B) < settings.top_p_B, logits_BV)

    more_B = jax.lax.cond(cuts_p_B.any(), nucleus, lambda: none_B)
    return jnp.maximum(least_B, jnp.where(cuts_p_B, more_B, -jnp.inf))


def _first_where(holds: Callable[[Float[Array, B]], Bool[Array, B]], logits_BV: Float[Array, "B V"]) -> Float[Array, B]:
    """The least float from which on ``holds``; the largest logit at the most, the least one if it holds everywhere.

    By bisection between the two in the order of floats, which is that of their bits as whole numbers, if those of
    negative ones are turned over.
    """
    turned = lambda bits_B: bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF)  # noqa: E731
    ordered = lambda x_B: turned(jax.lax.bitcast_convert_type(x_B, jnp.int32))  # noqa: E731
    float_of = lambda order_B: jax.lax.bitcast_convert_type(turned(order_B), jnp.float32)  # noqa: E731

    def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = ends
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
        holds_B = holds(float_of(middle_B))
        return jnp.where(holds_B, low_B, middle_B + 1), jnp.where(holds_B, middle_B, high_B)

    ends = (ordered(jnp.min(logits_BV, axis=-1)), ordered(jnp.max(logits_BV, axis=-1)))
    return float_of(jax.lax.fori_loop(0, 32, halve, ends)[1])
