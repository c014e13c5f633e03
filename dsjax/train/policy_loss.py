"""The loss of a policy, as the training step takes it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.config import UserError
from dsjax.data.batch import Batch
from dsjax.models.decoder import Decoder
from dsjax.models.output import DecoderOutput
from dsjax.nn.latent_attention import only_indexers_learn
from dsjax.rl.experience import Experience
from dsjax.rl.log_probs import log_probs_and_entropies
from dsjax.rl.policy import PolicyConfig, policy_objective
from dsjax.train.step import LossFunction, LossReport


def policy_loss(cfg: PolicyConfig, *, temperature: float = 1.0) -> LossFunction:
    """What is descended on :class:`~dsjax.rl.experience.Experience`: the objective of the policy, and the auxiliary
    losses of the model's routers.

    Modules that predict further tokens, and a prediction of leaves, learn nothing from it.

    Args:
        cfg: the objective.
        temperature: of the policy; that of the log-probabilities in the batches, too.
    """

    def loss_fn(
        model: Decoder, batch: Batch, key: jax.Array, total_weight: Float[Array, ""]
    ) -> tuple[Float[Array, ""], LossReport]:
        del key
        if not isinstance(batch, Experience):
            raise TypeError(f"a policy learns from Experience, found {type(batch).__name__}")
        if only_indexers_learn([group.attention for group in model.cfg.groups]):
            raise UserError("model.groups: while indexers warm up nothing else learns, so no policy can")
        replayed: dict[str, Any] = {} if batch.experts_BTLK is None else {"experts_BTLK": batch.experts_BTLK}
        out = model(batch.tokens_BT, batch.documents, features_BTC=batch.features_BTC, **replayed)
        log_prob_BT, entropy_BT = log_probs_and_entropies(
            model, out, batch.targets_BT, temperature=temperature, learn_entropy=cfg.entropy_coef > 0
        )
        value_BT, critic = None, None
        if batch.return_BT is not None:
            read = (batch.tokens_BT, batch.documents, batch.features_BTC)
            value_BT, critic = model.values_and_output(out, *read)
        loss, metrics = policy_objective(cfg, batch, log_prob_BT, entropy_BT, value_BT, total_weight)
        share = jnp.sum(batch.loss_weight_BT) / total_weight
        return with_routers(loss, metrics, share, {"": out} | ({} if critic is None else {"critic/": critic}))

    return loss_fn


def with_routers(
    loss: Float[Array, ""],
    metrics: dict[str, Float[Array, ""]],
    share: Float[Array, ""],
    outputs: dict[str, DecoderOutput],
) -> tuple[Float[Array, ""], LossReport]:
    """The loss of a batch, with the auxiliary losses of what was run for it.

    Args:
        loss, metrics: of the rows.
        share: theirs of the whole batch: by it what is a mean over them counts, so that micro-batches add up.
        outputs: by what the names of their losses and groups begin with.
    """
    metrics, router = dict(metrics), dict[str, Any]()
    for prefix, out in outputs.items():
        router |= {f"{prefix}{name}": stats.sums for name, stats in out.router.items()}
        for name, value in out.losses.items():
            metrics[f"loss/{prefix}{name}"] = value * share
            loss = loss + value * share
    return loss, LossReport(metrics | {"loss": loss}, router)
