"""What a router is trained by beside the model's loss: balance, small logits, entropies inside their bounds.

All of them may be on at once. Each page that explains one begins with the equation that stands here: docs/routing.md.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeFloat, PositiveFloat, Share, UserError
from dsjax.nn.router import RouterSums, load_entropy


@dataclasses.dataclass(frozen=True)
class EntropyConstraint:
    """Bounds on a layer's routing entropies, as shares of log E, held by multipliers.

    See docs/entropy_constrained_routing.md.

    Attributes:
        token_low, token_high: band for the mean entropy of a token's routing distribution.
        marginal: what the batch as a whole is distributed like: its ``loads``, the pairs that chose each expert, whose
            gradient is that of the mean probabilities, as in the Switch loss; or these ``probabilities`` themselves.
        marginal_low: floor of the entropy of that.
        rate: how far a violation moves its multiplier in a step (dual ascent).
        damping: what a violation of this very batch adds to its multiplier: it acts at once, and multipliers that
            overshot do not swing.
        max_multiplier: where both together stop.
    """

    token_low: Share = 0.3
    token_high: Share = 0.8
    marginal: Literal["loads", "probabilities"] = "loads"
    marginal_low: Share = 0.98
    rate: PositiveFloat = 0.005
    damping: NonNegativeFloat = 0.25
    max_multiplier: PositiveFloat = 0.25

    def validate(self) -> None:
        if self.token_low >= self.token_high:
            raise UserError(f"token_low is {self.token_low}; it must be less than token_high, {self.token_high}")


def switch_loss(
    load_E: Int[Array, " E"], mean_prob_E: Float[Array, " E"], tokens: Float[Array, ""], top_k: int
) -> Float[Array, ""]:
    """``E * sum_e f_e P_e``: share of the pairs times mean probability (Fedus et al. 2021, eq. 4); 1 if balanced."""
    return load_E.shape[-1] * jnp.sum(load_E / (tokens * top_k) * mean_prob_E)


def sequence_loss(
    scores_BTE: Float[Array, "B T E"], probs_BTE: Float[Array, "B T E"], counted_BT: Float[Array, "B T"], top_k: int
) -> Float[Array, ""]:
    """The same balance within each row, averaged over rows (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20).

    ``f_e`` counts what the scores alone would choose, without bias and groups: eq. 18. With packing a row holds several
    documents. Rows of padding do not count.

    Args:
        scores_BTE: s; what is chosen.
        probs_BTE: s divided by its sum over the experts.
        counted_BT: 1 for tokens, 0 for padding.
        top_k: experts of a token.
    """
    E = scores_BTE.shape[-1]
    tokens_B = jnp.sum(counted_BT, axis=1)
    best_BTX = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), top_k)[1]
    chosen_BTE = jnp.sum(jax.nn.one_hot(best_BTX, E), axis=2)
    per_token_B = (jnp.maximum(tokens_B, 1.0))[:, None]
    share_BE = jnp.einsum("BTE,BT->BE", chosen_BTE, counted_BT) / (per_token_B * top_k)
    mean_prob_BE = jnp.einsum("BTE,BT->BE", probs_BTE, counted_BT) / per_token_B
    loss_B = E * jnp.sum(share_BE * mean_prob_BE, axis=-1)
    return jnp.sum(loss_B) / jnp.maximum(jnp.sum(tokens_B > 0), 1)  # rows of padding are 0


def z_loss(
    logits_BTE: Float[Array, "B T E"], counted_BT: Float[Array, "B T"], tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """Mean squared log-sum-exp of the logits (Zoph et al. 2022, eq. 5): keeps them small."""
    z_BT = jax.nn.logsumexp(logits_BTE.astype(jnp.float32), axis=-1) ** 2
    return jnp.sum(z_BT * counted_BT) / tokens


def entropy_gaps(cfg: EntropyConstraint, sums: RouterSums) -> Float[Array, "*layers constraints"]:
    """How far each of the three constraints is violated, in units of log E; negative where one is slack.

    With h the mean over tokens of the entropy of p_t, and m the entropy of the loads or of the mean of p_t, both over
    log E: ``token_low - h, h - token_high, marginal_low - m``.
    """
    tokens = jnp.maximum(sums.tokens, 1).astype(jnp.float32)
    mean_E = sums.prob_E / tokens[..., None]
    log_E = jnp.log(float(mean_E.shape[-1]))
    h = sums.entropy / tokens / log_E
    if cfg.marginal == "probabilities":
        m = jnp.sum(-mean_E * jnp.log(jnp.maximum(mean_E, 1e-30)), axis=-1) / log_E  # at 0 it is 0, its slope finite
    else:
        # Counts have no gradient. An entropy's by its distribution is -log f - 1, and the 1 is the same for all.
        share_E = (sums.load_E + 0.5) / jnp.sum(sums.load_E + 0.5, axis=-1, keepdims=True)
        moved_E = mean_E - jax.lax.stop_gradient(mean_E)  # 0
        m = (load_entropy(sums.load_E) - jnp.sum(jnp.log(share_E) * moved_E, axis=-1)) / log_E
    return jnp.stack([cfg.token_low - h, h - cfg.token_high, cfg.marginal_low - m], axis=-1)


def entropy_loss(
    cfg: EntropyConstraint, multipliers: Float[Array, " constraints"], sums: RouterSums
) -> Float[Array, ""]:
    """The constraints' part of the damped Lagrangian: what the weights descend.

    ``sum_i w_i gap_i`` with ``w_i = clip(lambda_i + damping * gap_i, 0, max_multiplier)``, of which no gradient is
    taken: the gradient is that of the method of multipliers (Platt & Barr 1988).
    """
    gaps = entropy_gaps(cfg, sums)
    weights = jnp.clip(multipliers + cfg.damping * gaps, 0.0, cfg.max_multiplier)
    return jnp.sum(jax.lax.stop_gradient(weights) * gaps)


def moved_multipliers(
    cfg: EntropyConstraint, multipliers: Float[Array, "*layers constraints"], sums: RouterSums
) -> Float[Array, "*layers constraints"]:
    """The multipliers behind a step: up where a constraint was violated, down where it was slack, never below 0.

    ``lambda_i <- clip(lambda_i + rate * gap_i, 0, max_multiplier)``: projected dual ascent. ``sums`` are those of the
    whole batch. A batch of padding moves nothing.
    """
    moved = jnp.clip(multipliers + cfg.rate * entropy_gaps(cfg, sums), 0.0, cfg.max_multiplier)
    return jnp.where((sums.tokens > 0)[..., None], moved, multipliers)
