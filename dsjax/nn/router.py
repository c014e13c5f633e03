"""Routing tokens to experts: scores, top-k, weights, and what is reported of it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.masks import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """What one MoE layer's router did with a batch (padding excluded).

    Attributes:
        load_E: (token, expert) pairs each expert received.
        entropy: mean entropy of the routing distribution of a token, nats.
        balance_loss: Switch balance loss (Fedus et al. 2021), 1 when balanced.
        z_loss: mean squared log-sum-exp of the logits (Zoph et al. 2022).
    """

    load_E: Leaf
    entropy: Leaf
    balance_loss: Leaf
    z_loss: Leaf


def route(
    logits_BTE: Float[Array, "B T E"],
    counted_BT: Float[Array, "B T"],
    *,
    top_k: int,
    normalize: bool,
    bias_E: Float[Array, " E"] | None = None,
) -> tuple[Int[Array, "B T X"], Float[Array, "B T X"], RouterStats]:
    """Softmax top-k routing in float32.

    Args:
        logits_BTE: router outputs.
        counted_BT: 1 for real tokens, 0 for padding, which is routed but not reported.
        top_k: experts for each token.
        normalize: make the weights of a token sum to 1 over its chosen experts.
        bias_E: added to the probabilities when experts are chosen, and nowhere else (see :func:`moved_bias`).

    Returns:
        The chosen experts, their weights, and the statistics.
    """
    num_experts = logits_BTE.shape[-1]
    log_probs_BTE = jax.nn.log_softmax(logits_BTE.astype(jnp.float32))
    probs_BTE = jnp.exp(log_probs_BTE)
    if bias_E is None:
        weights_BTX, experts_BTX = jax.lax.top_k(probs_BTE, top_k)
    else:
        experts_BTX = jax.lax.top_k(jax.lax.stop_gradient(probs_BTE + bias_E), top_k)[1]
        weights_BTX = jnp.take_along_axis(probs_BTE, experts_BTX, axis=-1)
    if normalize:
        weights_BTX = weights_BTX / jnp.sum(weights_BTX, axis=-1, keepdims=True)

    tokens = jnp.maximum(jnp.sum(counted_BT), 1.0)
    chosen_BTE = jnp.sum(jax.nn.one_hot(experts_BTX, num_experts), axis=-2)
    load_E = jnp.einsum("BTE,BT->E", chosen_BTE, counted_BT)
    mean_prob_E = jnp.einsum("BTE,BT->E", probs_BTE, counted_BT) / tokens
    entropy_BT = -jnp.sum(probs_BTE * log_probs_BTE, axis=-1)
    z_BT = jax.nn.logsumexp(logits_BTE.astype(jnp.float32), axis=-1) ** 2
    stats = RouterStats(
        load_E=load_E,
        entropy=jnp.sum(entropy_BT * counted_BT) / tokens,
        balance_loss=num_experts * jnp.sum(load_E / (tokens * top_k) * mean_prob_E),
        z_loss=jnp.sum(z_BT * counted_BT) / tokens,
    )
    return experts_BTX, weights_BTX, stats


def moved_bias(
    bias_E: Float[Array, "*layers E"], load_E: Float[Array, "*layers E"], rate: float
) -> Float[Array, "*layers E"]:
    """A selection bias behind a step: up by ``rate`` where an expert got less than the mean load, down where more.

    This balances loads without a loss whose gradient would disturb the model (Wang et al. 2024, arXiv 2408.15664;
    DeepSeek-V3, arXiv 2412.19437). Loads are counts of the whole batch, so every layout of devices moves it alike.
    """
    return bias_E + rate * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)
