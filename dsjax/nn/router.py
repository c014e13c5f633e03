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
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from dsjax.nn.masks import Leaf
from pallas_kernels.expert_dispatch import Choice
from pallas_kernels.expert_dispatch.plan import positions

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
class Decisions:
    """The experts of each token, best first; -1 at padding.

    Attributes:
        used_BTX: those that it was sent to.
        own_BTX: those that the router chose by itself: the same, unless it was given others to use.
    """

    used_BTX: Leaf
    own_BTX: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Of one layer and these rows: what adds up, and the layer's auxiliary losses by name, not yet weighted.

    ``decisions`` are there if they were asked for.
    """

    sums: RouterSums
    losses: dict[str, Leaf]
    decisions: Decisions | None = None

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


def replayed(own: Choice, scores_TE: Float[Array, "T E"], experts_TX: Int[Array, "T X"]) -> Choice:
    """The choice in which tokens go to ``experts_TX`` instead of where they chose to go themselves.

    A token whose entries are not X different experts (-1: no decision) goes where it chose; one that does not count
    goes nowhere. Scores are those of the experts that are used, so the router learns from them.
    """
    num_experts = scores_TE.shape[1]
    numbers_E, experts_TX = jnp.arange(num_experts), experts_TX.astype(own.experts_TX.dtype)
    given_TE = jnp.any(experts_TX[..., None] == numbers_E, axis=1)
    decided_T = jnp.sum(given_TE, axis=1) == experts_TX.shape[1]
    counted_T = own.experts_TX[:, 0] < num_experts
    used_TX = jnp.where((decided_T & counted_T)[:, None], experts_TX, own.experts_TX)
    scores_TX = jnp.sum(jnp.where(used_TX[..., None] == numbers_E, scores_TE[:, None], 0), axis=2)
    return Choice(used_TX, scores_TX, *positions(used_TX, num_experts))


def agreement(
    told: Int[Array, "B T L K"] | Int[np.ndarray, "B T L K"],
    chosen: Int[Array, "B T L K"] | Int[np.ndarray, "B T L K"],
    mask_BT: Shaped[Array, "B T"] | Shaped[np.ndarray, "B T"],
) -> Float[Array, ""]:
    """The share of expert choices that are in both, from 0 to 1, over positions of ``mask_BT`` and all layers.

    A position's K experts of a layer are a set: their order does not count. Places without a decision in ``told`` (-1)
    are left out; without any decision it is 1. ``mask_BT`` may be weights.
    """
    told, chosen = jnp.asarray(told), jnp.asarray(chosen)
    both = jnp.any(told[..., :, None] == chosen[..., None, :], axis=-1)
    weight = jnp.asarray(mask_BT, jnp.float32)[..., None, None] * (told >= 0)
    total = jnp.sum(weight)
    return jnp.where(total > 0, jnp.sum(weight * both) / jnp.maximum(total, 1e-30), 1.0)


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
    mean_L, entropy_L = jnp.mean(load_LE, axis=-1), load_entropy(load_LE)
    lost_L = jnp.sum(load_LE - sums.kept_E, axis=-1)
    missing_L = sums.pairs - jnp.sum(sums.kept_E + sums.dropped_E, axis=-1)
    metrics = {
        "max_over_mean_load": jnp.mean(jnp.max(load_LE, axis=-1) / jnp.where(mean_L > 0, mean_L, 1)),
        "load_entropy": jnp.mean(entropy_L),
        "min_load_entropy": jnp.min(entropy_L),
        "dead_experts": jnp.mean(load_LE == 0),
        "entropy": jnp.mean(sums.entropy / tokens_L),
        "drop_rate": _over_layers(lost_L) / jnp.maximum(_over_layers(jnp.sum(load_LE, axis=-1)), 1),
        "unaccounted": _over_layers(jnp.abs(missing_L)),
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def drop_rates(router: Mapping[str, RouterSums]) -> dict[str, Float[Array, ""]]:
    """Share of the pairs that each factor of a dynamic capacity would have dropped, in all layers that have one."""
    dynamic = [sums for sums in router.values() if sums.dropped_at]
    pairs = sum(_over_layers(jnp.sum(sums.load_E, axis=-1)) for sums in dynamic)
    factors = dynamic[0].dropped_at if dynamic else ()
    return {
        factor: sum(_over_layers(sums.dropped_at[factor]) for sums in dynamic) / jnp.maximum(pairs, 1)
        for factor in factors
    }


def _over_layers(counts_L: Int[Array, " L"]) -> Float[Array, ""]:
    """Their sum in float32: int32 has room for the pairs of one layer, not for those of all (DeepSeek-V3: 2.9e10)."""
    return jnp.sum(counts_L, dtype=jnp.float32)


def capacity_of(factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """Pairs that one expert has room for: ``factor`` times its even share of those of all ``tokens``, rounded up.

    Never more than one of each token, which is all that there can be.
    """
    # Rounded first: 1.1 * 80 / 8 must not become 12 by the last bit of a product.
    return max(1, math.ceil(min(round(factor * (tokens * top_k) / num_experts, 6), tokens)))
