"""Routing tokens to experts: scores, weights of the chosen ones, and what is counted and reported of it.

``s = softmax(W h)`` or ``sigmoid(W h)``; the experts of a token are the top-k of ``s + b``, its weights their ``s``.
Which experts those are, `pallas_kernels.expert_dispatch.top_k_route` finds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.masks import Leaf

Scoring = Literal["softmax", "sigmoid"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """What one layer's router did with a batch, padding excluded. All of it adds up over micro-batches.

    Counts are int32, so exact. Each field may have a leading dimension of layers.

    Attributes:
        tokens: that were to be routed.
        pairs: top_k of each.
        load_E: pairs (token, expert) that chose each expert, on all devices.
        kept_E: those of them that each expert computed.
        dropped_E: those that an expert had no room for, by the capacity alone: kept + dropped is what was chosen.
        dropped_at: pairs that each factor of a DynamicCapacity would have dropped, by its text.
        prob_E: the routing distributions, summed over tokens.
        entropy: their entropies, nats, summed over tokens.
    """

    tokens: Leaf
    pairs: Leaf
    load_E: Leaf
    kept_E: Leaf
    dropped_E: Leaf
    dropped_at: dict[str, Leaf]
    prob_E: Leaf
    entropy: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Of one layer and these rows: what adds up, and the layer's auxiliary losses by name, not yet weighted."""

    sums: RouterSums
    losses: dict[str, Leaf]

    @property
    def load_E(self) -> Leaf:
        """Pairs (token, expert) that chose each expert."""
        return self.sums.load_E


def log_distribution(logits: Float[Array, "*T E"], scoring: Scoring) -> Float[Array, "*T E"]:
    """Log of the scores divided by their sum over the experts: a token's routing distribution."""
    logits = logits.astype(jnp.float32)
    return jax.nn.log_softmax(logits if scoring == "softmax" else jax.nn.log_sigmoid(logits))


def chosen_weights(scores_TX: Float[Array, "T X"], *, normalize: bool, scale: float) -> Float[Array, "T X"]:
    """How much each chosen expert counts: its score, if asked divided by the sum of a token's, times ``scale``.

    As in DeepSeek-V3 (arXiv 2412.19437, eq. 13; 1e-20 as in its code). A token whose scores are all about 0 (padding
    has 0; a sigmoid can underflow) keeps them as they are, since a quotient of such numbers has no finite gradient.
    """
    if normalize:
        total_T1 = jnp.sum(scores_TX, axis=-1, keepdims=True) + 1e-20
        scores_TX = scores_TX / jnp.where(total_T1 > 1e-15, total_T1, 1.0)
    return scores_TX * scale


def moved_bias(
    bias_E: Float[Array, "*layers E"], load_E: Int[Array, "*layers E"], rate: float
) -> Float[Array, "*layers E"]:
    """A selection bias behind a step: up by ``rate`` where an expert got less than the mean load, down where more.

    This balances loads without a loss whose gradient would disturb the model (Wang et al. 2024, arXiv 2408.15664;
    DeepSeek-V3, arXiv 2412.19437). Loads are counts of the whole batch, so every layout of devices moves it alike.
    """
    return bias_E + rate * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)


def load_entropy(load_E: Int[Array, "*layers E"]) -> Float[Array, "*layers"]:
    """Entropy of the distribution of pairs over experts, nats: log E if they are balanced; 0 of no pairs."""
    share_E = load_E / jnp.maximum(jnp.sum(load_E, axis=-1, keepdims=True), 1.0)
    return jnp.sum(jax.scipy.special.entr(share_E), axis=-1)


def router_metrics(sums: RouterSums) -> dict[str, Float[Array, ""]]:
    """What is logged of a group of layers (leading dimension L of ``sums``) and a whole batch.

    Returns:
        ``max_over_mean_load``, ``load_entropy``, ``dead_experts`` (share without a token): means over the layers.
        ``min_load_entropy``: of the layer with the least. ``entropy``: of a token's routing distribution, mean over
        tokens and layers. Entropies are in nats. ``drop_rate``: share of all pairs that no expert computed.
        ``unaccounted``: pairs that were neither computed nor dropped by the capacity; summed without
        sign over layers, 0 unless there is an error in this library.
    """
    load_LE, tokens_L = sums.load_E, jnp.maximum(sums.tokens, 1)
    mean_L = jnp.maximum(jnp.mean(load_LE, axis=-1), 1.0)
    entropy_L = load_entropy(load_LE)
    missing_L = sums.pairs - jnp.sum(sums.kept_E + sums.dropped_E, axis=-1)
    metrics = {
        "max_over_mean_load": jnp.mean(jnp.max(load_LE, axis=-1) / mean_L),
        "load_entropy": jnp.mean(entropy_L),
        "min_load_entropy": jnp.min(entropy_L),
        "dead_experts": jnp.mean(load_LE == 0),
        "entropy": jnp.mean(sums.entropy / tokens_L),
        "drop_rate": jnp.sum(load_LE - sums.kept_E) / jnp.maximum(jnp.sum(load_LE), 1),
        "unaccounted": jnp.sum(jnp.abs(missing_L)),
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def drop_rates(router: Mapping[str, RouterSums]) -> dict[str, Float[Array, ""]]:
    """Share of the pairs that each factor of a dynamic capacity would have dropped, in all layers that have one."""
    dynamic = [sums for sums in router.values() if sums.dropped_at]
    pairs = sum(jnp.sum(sums.load_E) for sums in dynamic)
    factors = dynamic[0].dropped_at if dynamic else ()
    return {
        factor: sum(jnp.sum(sums.dropped_at[factor]) for sums in dynamic) / jnp.maximum(pairs, 1) for factor in factors
    }


def capacity_of(factor: float, pairs: int, num_experts: int) -> int:
    """Pairs that one expert has room for: ``factor`` times its even share of all ``pairs`` of a batch, rounded up."""
    # Rounded first: 1.1 * 80 / 8 must not become 12 by the last bit of a product.
    return max(1, math.ceil(round(factor * pairs / num_experts, 6)))
