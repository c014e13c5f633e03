"""Expected risk of a model's own texts (minimum risk training, Shen et al. 2016; Edunov et al. 2018).

Of each prompt x there are K texts y_k, each with a reward r_k in [0, 1]:

    q_k  =  softmax_k ( alpha * s_k ),       s_k = log p(y_k | x) / |y_k|,  or without the division
    risk =  sum_k q_k (1 - r_k)

    d risk / d s_k  =  alpha q_k ( mean reward under q  -  r_k )

So likelihood moves from texts below the mean to those above it, and what all texts share does not count.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsjax.data.batch import Batch
from dsjax.models.decoder import Decoder
from dsjax.nn.masks import Documents, Leaf
from dsjax.rl.log_probs import log_probs_and_entropies

_OUT = -1e30  # the score of a text that does not count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Candidates:
    """K texts for each of P prompts, in rows of T positions that begin with the prompt.

    tokens_PKT, targets_PKT: int32, as in a ``Batch``.
    learned_PKT: float32, 1 at each target that belongs to the text, its end included; 0 in the prompt and behind.
    ids_PKT: int32, 1 at each input of the row, 0 behind.
    reward_PK: float32, from 0 to 1.
    counts_PK: bool, whether the text is among those compared: it was judged, and is none of the others again.
    weight_P: float32, the prompt's share of the whole batch: 1 over all prompts, micro-batches and devices together.
    told_PKT: float32, log-probabilities that the program that sampled gave the targets; NaN where it gave none.
    features_PKTC: int16, as in a ``Batch``.
    """

    tokens_PKT: Leaf
    targets_PKT: Leaf
    learned_PKT: Leaf
    ids_PKT: Leaf
    reward_PK: Leaf
    counts_PK: Leaf
    weight_P: Leaf
    told_PKT: Leaf
    features_PKTC: Leaf = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JudgedBatch(Batch):
    """A batch, and judged texts of the model's own beside it."""

    candidates: Candidates | None = None


def expected_risk(
    score_PK: Float[Array, "P K"], reward_PK: Float[Array, "P K"], counts_PK: Bool[Array, "P K"], alpha: float
) -> Float[Array, " P"]:
    """The risk of each prompt; what does not count has no part in it. Without any text the mean of 1 - reward."""
    q_PK = jax.nn.softmax(jnp.where(counts_PK, alpha * score_PK, _OUT), axis=-1)
    return jnp.sum(q_PK * (1 - reward_PK), axis=-1)


def target_log_probs(model: Decoder, candidates: Candidates) -> Float[Array, "P K T"]:
    """log p of each target, by one pass over all rows."""
    shape = candidates.tokens_PKT.shape
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (candidates.tokens_PKT, candidates.targets_PKT))
    tokens_RT, targets_RT = flat
    ids_RT = candidates.ids_PKT.reshape(tokens_RT.shape)
    features = candidates.features_PKTC
    features_RTC = None if features is None else features.reshape(*tokens_RT.shape, features.shape[-1])
    positions_RT = jnp.where(ids_RT > 0, jnp.arange(shape[-1], dtype=jnp.int32), 0)
    out = model(tokens_RT, Documents(ids_RT, positions_RT), features_BTC=features_RTC)
    return log_probs_and_entropies(model, out, targets_RT)[0].reshape(shape)


def risk(
    model: Decoder, candidates: Candidates, *, alpha: float, per_token: bool
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The risk, summed over the prompts by their weights, and metrics that add up like it.

    ``risk/reward``: the mean reward of the texts; ``risk/log_prob_gap``: by how many nats a token's log-probability
    here is off from what the program that sampled it said, on average; ``risk/length``: tokens of a text.
    """
    log_prob_PKT = target_log_probs(model, candidates)
    counts_PK, learned_PKT = candidates.counts_PK, candidates.learned_PKT
    length_PK = jnp.maximum(jnp.sum(learned_PKT, axis=-1), 1)
    score_PK = jnp.sum(log_prob_PKT * learned_PKT, axis=-1) / (length_PK if per_token else 1)
    risk_P = expected_risk(score_PK, candidates.reward_PK, counts_PK, alpha)

    def mean(x_PK: Float[Array, "P K"]) -> Float[Array, ""]:
        """Over the texts that count, then over the prompts."""
        of_P = jnp.sum(jnp.where(counts_PK, x_PK, 0), axis=-1) / jnp.maximum(jnp.sum(counts_PK, axis=-1), 1)
        return jnp.sum(of_P * candidates.weight_P)

    said_PKT = jnp.isfinite(candidates.told_PKT) & (learned_PKT > 0)
    off_PKT = jnp.where(said_PKT, jnp.abs(log_prob_PKT - candidates.told_PKT), 0)
    gap_PK = jnp.sum(off_PKT, axis=-1) / jnp.maximum(jnp.sum(said_PKT, axis=-1), 1)
    metrics = {
        "risk/reward": mean(candidates.reward_PK),
        "risk/log_prob_gap": mean(gap_PK),
        "risk/length": mean(length_PK),
    }
    return jnp.sum(risk_P * candidates.weight_P), metrics
