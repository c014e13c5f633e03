"""Log-probabilities of given tokens, and entropies; the logits of a batch never exist as a whole, backward neither."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.models.decoder import Decoder
from dsjax.models.output import DecoderOutput
from dsjax.nn.losses import output_logits, over_chunks


def log_probs_and_entropies(
    model: Decoder,
    out: DecoderOutput,
    targets_BT: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    learn_entropy: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log p of each target, and the entropy of the distribution that it is from; in nats, float32.

    Logits exist for ``compute.loss_chunk`` positions at a time, and are made again when gradients are.

    Args:
        model: what has the output matrix.
        out: of a pass of it.
        targets_BT: token ids.
        temperature: logits are divided by it.
        learn_entropy: entropies have gradients, which cost another pass over the logits.
    """
    w_DV, length = model.output_weights(), targets_BT.shape[1]
    chunk = min(model.compute.loss_chunk or length, length)

    @jax.checkpoint
    def scores(hidden_BtD: Any, targets_Bt: Any, copy: Any) -> tuple[Float[Array, "B t"], Float[Array, "B t"]]:
        logits_BtV = output_logits(hidden_BtD, w_DV.astype(hidden_BtD.dtype), copy) / temperature
        top_Bt1 = jnp.max(logits_BtV, axis=-1, keepdims=True)
        weight_BtV = jnp.exp(logits_BtV - top_Bt1)
        total_Bt = jnp.sum(weight_BtV, axis=-1)
        log_total_Bt = jnp.log(total_Bt) + top_Bt1[..., 0]
        log_prob_Bt = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0] - log_total_Bt
        # H = -sum p log p = log sum exp(l) - sum p l
        entropy_Bt = log_total_Bt - jnp.sum(weight_BtV * logits_BtV, axis=-1) / total_Bt
        return log_prob_Bt, entropy_Bt if learn_entropy else jax.lax.stop_gradient(entropy_Bt)

    def one(carry: None, part: Any) -> tuple[None, tuple[Array, Array]]:
        return carry, scores(*part)

    return over_chunks(one, None, (out.hidden_BTD, targets_BT, out.copy), chunk)[1]
