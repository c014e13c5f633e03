"""Objectives of policies: clipped ratios of probabilities, estimators of KL, a bonus for entropy, a critic's loss.

    loss = sum_bt w_bt ( - surrogate_bt + beta kl_bt - entropy_coef H_bt + value_coef (V_bt - R_bt)^2 / 2 )

docs/policy_optimization.md has the equations, and where each is from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import NonNegativeFloat, Share, UserError
from dsjax.rl.experience import Aggregate, Experience

Kl = Literal["k1", "k2", "k3"]
MOST = 20.0  # of a log-ratio's size: e^20 is far outside of any clip, and its products are finite


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """What is descended.

    Attributes:
        ratio: ``token``: of each token's probability to that under the policy that wrote (PPO); ``sequence``: of the
            whole text's, to the power of 1 / its length (GSPO).
        clip_low, clip_high: nothing is gained by a ratio outside of 1 - clip_low .. 1 + clip_high. Probabilities that
            rise get more room with a higher clip_high (DAPO).
        dual_clip: with a negative advantage a ratio counts up to this, so that no token costs more; 0: however high.
        kl_coef: of the KL from a reference policy. 0: there is none, and no reference.
        kl: how it is estimated of one token, x = log p - log p_ref: ``k1`` x, ``k2`` x^2 / 2, ``k3`` e^-x - 1 + x.
        kl_in: whether it is a part of the ``loss`` or, k1 of the policy that wrote, of the ``reward``.
        entropy_coef: of the entropy that is rewarded.
        value_coef: of the critic's loss, where there is a critic.
        value_clip: how far the critic may move from what it said when the texts were written; 0: as far as it likes.
        aggregate: how tokens are weighted (:func:`dsjax.rl.experience.token_weights`).
    """

    ratio: Literal["token", "sequence"] = "token"
    clip_low: Share = 0.2
    clip_high: NonNegativeFloat = 0.2
    dual_clip: NonNegativeFloat = 0.0
    kl_coef: NonNegativeFloat = 0.0
    kl: Kl = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_coef: NonNegativeFloat = 0.0
    value_coef: NonNegativeFloat = 0.5
    value_clip: NonNegativeFloat = 0.0
    aggregate: Aggregate = "token"

    def validate(self) -> None:
        if 0 < self.dual_clip <= 1:
            raise UserError(f"dual_clip is {self.dual_clip:g}; it must be above 1, or 0 for none")
        if self.kl_in == "reward" and self.kl != "k1":
            raise UserError(f"kl is {self.kl}; with kl_in=reward it must be k1, the difference of log-probabilities")


# ---------------------------------------------------------------- of one token


def log_ratio(
    kind: Literal["token", "sequence"],
    log_prob_BT: Float[Array, "B T"],
    old_log_prob_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    ids_BT: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """log of the ratio of probabilities now and under the policy that wrote; 0 outside of ``mask_BT``.

    ``ids_BT`` are those of the texts in a row.

    ``sequence`` is GSPO-token (arXiv 2507.18071, section 4.3): the value is the mean over the text, the gradient the
    token's own; where advantages are equal in a text, it is that of GSPO.
    """
    change_BT = jnp.where(mask_BT, log_prob_BT - old_log_prob_BT, 0)
    if kind == "token":
        return jnp.clip(change_BT, -MOST, MOST)
    length_BT = jnp.maximum(over_texts(mask_BT.astype(jnp.float32), ids_BT), 1)
    mean_BT = jnp.clip(over_texts(change_BT, ids_BT) / length_BT, -MOST, MOST)
    own_BT = jnp.where(mask_BT, log_prob_BT, 0)
    return jnp.where(mask_BT, jax.lax.stop_gradient(mean_BT) + own_BT - jax.lax.stop_gradient(own_BT), 0)


def over_texts(x_BT: Float[Array, "B T"], ids_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """At each position the sum over all of its text."""

    def of_row(x_T: Float[Array, " T"], ids_T: Int[Array, " T"]) -> Float[Array, " T"]:
        return jax.ops.segment_sum(x_T, ids_T, num_segments=len(ids_T) + 1)[ids_T]

    return jax.vmap(of_row)(x_BT, ids_BT)


def surrogate(
    cfg: PolicyConfig, ratio_BT: Float[Array, "B T"], advantage_BT: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """What is ascended: min(r A, clip(r) A), and with ``dual_clip`` c no less than c A where A is negative."""
    clipped_BT = jnp.clip(ratio_BT, 1 - cfg.clip_low, 1 + cfg.clip_high)
    gain_BT = jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    if not cfg.dual_clip:
        return gain_BT
    return jnp.where(advantage_BT < 0, jnp.maximum(gain_BT, cfg.dual_clip * advantage_BT), gain_BT)


def kl_estimate(
    kind: Kl, log_prob_BT: Float[Array, "B T"], other_log_prob_BT: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Of KL(p | q), from log p and log q of tokens that p wrote (Schulman 2020, "Approximating KL divergence").

    k1 is unbiased and has any sign; k2 is biased by little; k3 is unbiased and never negative.
    """
    x_BT = log_prob_BT - other_log_prob_BT
    if kind == "k1":
        return x_BT
    if kind == "k2":
        return x_BT**2 / 2
    x_BT = jnp.clip(x_BT, -MOST, MOST)
    return jnp.expm1(-x_BT) + x_BT


def value_loss(
    value_BT: Float[Array, "B T"],
    return_BT: Float[Array, "B T"],
    old_value_BT: Float[Array, "B T"] | None = None,
    clip: float = 0.0,
) -> Float[Array, "B T"]:
    """(V - R)^2 / 2; with ``clip`` the larger of that and the same of a value no further from the old one."""
    loss_BT = (value_BT - return_BT) ** 2 / 2
    if not clip:
        return loss_BT
    if old_value_BT is None:
        raise ValueError("value_clip needs old_value_BT")
    near_BT = old_value_BT + jnp.clip(value_BT - old_value_BT, -clip, clip)
    return jnp.maximum(loss_BT, (near_BT - return_BT) ** 2 / 2)


# ---------------------------------------------------------------- of a minibatch


def policy_objective(
    cfg: PolicyConfig,
    batch: Experience,
    log_prob_BT: Float[Array, "B T"],
    entropy_BT: Float[Array, "B T"],
    value_BT: Float[Array, "B T"] | None,
    total_weight: Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of the texts, and metrics; all of it adds up over micro-batches and devices.

    Args:
        cfg: which objective.
        batch: the texts; of a whole minibatch, or of a part.
        log_prob_BT, entropy_BT: of the policy as it is, in nats.
        value_BT: what its critic says; None: it has none.
        total_weight: tokens of all texts of the minibatch.

    Returns:
        The loss. Metrics by name: ``loss`` and its parts; means over tokens of what the names say (``policy/clip_low``,
        ``clip_high``, ``clip_dual``: shares of tokens that clipping holds; ``kl_old``, ``kl_reference``: k3;
        ``log_prob_gap``: the mean distance from the policy that wrote); ``value/...``: moments, for
        :func:`explained_variance`.
    """
    mask_BT = batch.loss_weight_BT > 0

    def of_texts(x_BT: Array) -> Array:
        return jnp.where(mask_BT, x_BT, 0)  # whatever else is there, also if it is no number

    def total(x_BT: Array) -> Float[Array, ""]:
        return jnp.sum(of_texts(batch.weight_BT) * of_texts(x_BT))

    def mean(x_BT: Array) -> Float[Array, ""]:
        return jax.lax.stop_gradient(jnp.sum(of_texts(x_BT)) / total_weight)

    log_prob_BT, entropy_BT = of_texts(log_prob_BT), of_texts(entropy_BT)
    now_BT = jax.lax.stop_gradient(log_prob_BT)
    old_BT = now_BT if batch.old_log_prob_BT is None else of_texts(batch.old_log_prob_BT)
    advantage_BT = of_texts(batch.advantage_BT)
    ratio_BT = jnp.exp(log_ratio(cfg.ratio, log_prob_BT, old_BT, mask_BT, batch.documents.ids_BT))
    gain_BT = surrogate(cfg, ratio_BT, advantage_BT)
    rises_BT, falls_BT = advantage_BT > 0, advantage_BT < 0
    metrics = {
        "policy/clip_low": mean(falls_BT & (ratio_BT < 1 - cfg.clip_low)),
        "policy/clip_high": mean(rises_BT & (ratio_BT > 1 + cfg.clip_high)),
        "policy/entropy": mean(entropy_BT),
        "policy/kl_old": mean(kl_estimate("k3", old_BT, now_BT)),
        "policy/log_prob_gap": mean(jnp.abs(now_BT - old_BT)),
    }
    if cfg.dual_clip:
        metrics["policy/clip_dual"] = mean(falls_BT & (ratio_BT > cfg.dual_clip))
    if batch.correction_BT is not None:
        gain_BT = gain_BT * of_texts(batch.correction_BT)
        metrics["policy/correction"] = mean(batch.correction_BT)

    losses = {"policy": -total(gain_BT)}
    if batch.reference_log_prob_BT is not None:
        reference_BT = of_texts(batch.reference_log_prob_BT)
        metrics["policy/kl_reference"] = mean(kl_estimate("k3", now_BT, reference_BT))
    if cfg.kl_in == "loss" and (cfg.kl_coef or batch.kl_coef_B is not None):
        if batch.reference_log_prob_BT is None:
            raise ValueError("a KL in the loss needs reference_log_prob_BT")
        coef_B = jnp.full(len(mask_BT), cfg.kl_coef) if batch.kl_coef_B is None else batch.kl_coef_B
        losses["kl"] = total(coef_B[:, None] * kl_estimate(cfg.kl, log_prob_BT, reference_BT))
    if cfg.entropy_coef:
        losses["entropy"] = -cfg.entropy_coef * total(entropy_BT)
    if value_BT is not None and batch.return_BT is not None:
        value_BT, return_BT = of_texts(value_BT), of_texts(batch.return_BT)
        before_BT = None if batch.old_value_BT is None else of_texts(batch.old_value_BT)
        losses["value"] = cfg.value_coef * total(value_loss(value_BT, return_BT, before_BT, cfg.value_clip))
        off_BT = return_BT - value_BT
        moments = {"return": return_BT, "return_squared": return_BT**2, "error": off_BT, "error_squared": off_BT**2}
        metrics |= {f"value/{name}": mean(x_BT) for name, x_BT in moments.items()}
    loss = functools.reduce(jnp.add, losses.values())
    return loss, {"loss": loss, **{f"loss/{name}": x for name, x in losses.items()}, **metrics}


# ---------------------------------------------------------------- on the host


def explained_variance(metrics: Mapping[str, Any]) -> float:
    """1 - Var(R - V) / Var(R), from the moments that :func:`policy_objective` tells; 0 where returns do not vary."""
    error, total = (
        float(metrics[f"value/{name}_squared"]) - float(metrics[f"value/{name}"]) ** 2 for name in ("error", "return")
    )
    return 1 - error / total if total > 0 else 0.0


def adapted_kl(coef: float, measured: float, target: float, gain: float = 0.1) -> float:
    """The coefficient of the KL for the next iteration (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    coef * (1 + gain e),   e = (measured - target) / target, between -0.2 and 0.2

    Args:
        coef: so far.
        measured: KL from the reference, in nats; if it is no number, nothing changes.
        target: that it is to have, above 0.
        gain: how fast; texts of an iteration over a horizon, 0.1 in the paper.
    """
    if not math.isfinite(measured):
        return coef
    return coef * (1 + gain * min(max((measured - target) / target, -0.2), 0.2))


def correction(
    trainer_log_prob_BT: Float[Array | np.ndarray, "B T"],
    sampler_log_prob_BT: Float[Array | np.ndarray, "B T"],
    limit: float,
) -> Float[Array, "B T"]:
    """Truncated importance weights min(p_trainer / p_sampler, limit), for texts that another engine or older weights
    wrote (Espeholt et al. 2018, arXiv 1802.01561); 1 where the sampler said nothing (NaN)."""
    change_BT = jnp.asarray(trainer_log_prob_BT - sampler_log_prob_BT, jnp.float32)
    return jnp.minimum(jnp.exp(jnp.where(jnp.isfinite(change_BT), jnp.minimum(change_BT, MOST), 0)), limit)
