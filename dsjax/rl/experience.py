"""What a policy learns from: rows of prompt and text, and what is known of each token of the text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer

from dsjax.data.batch import Batch
from dsjax.nn.masks import Documents, Leaf
from dsjax.rl.rows import WrittenRows
from dsjax.sharding import Rules, host_array_to_global

Aggregate = Literal["token", "sequence", "constant"]
Mask = Bool[Array | np.ndarray, "B T"] | Float[Array | np.ndarray, "B T"]  # True, or 1, at the tokens of the texts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experience(Batch):
    """B rows, each one prompt and the text behind it; numpy on the host, jax arrays once placed on devices. A row may
    hold several, packed as documents, once its tokens are weighted.

    Of the batch: ``loss_weight_BT`` is 1 at each target that is the text's, its end included, and 0 elsewhere. A row
    that does not count is padding from end to end, and nothing here is looked at where ``loss_weight_BT`` is 0.

    weight_BT: float32, of each target in the policy loss; adds up to 1, at the most, over the whole minibatch, and so
        over its micro-batches and devices (:func:`token_weights`).
    advantage_BT: float32, of each token over what was to be expected.
    old_log_prob_BT: float32, in nats, of the policy that wrote; None: it is the one that learns now, as it is.
    reference_log_prob_BT: float32, of the policy that this one is to stay near; None: there is none.
    old_value_BT: float32, what the critic said before it learned from these rows.
    return_BT: float32, what it is to say; None: no critic learns.
    correction_BT: float32, probability of the token under the policy as trained over that as sampled; None: 1.
    experts_BTLK: integers, the experts that each input goes to, of each layer of experts in order; -1 where the router
        is free to choose; None: it is everywhere.
    kl_coef_B: float32, the coefficient of the KL term, the same in all rows; None: that of the config.
    """

    weight_BT: Leaf = None
    advantage_BT: Leaf = None
    old_log_prob_BT: Leaf = None
    reference_log_prob_BT: Leaf = None
    old_value_BT: Leaf = None
    return_BT: Leaf = None
    correction_BT: Leaf = None
    experts_BTLK: Leaf = None
    kl_coef_B: Leaf = None


@functools.partial(jax.jit, static_argnames="aggregate")
def token_weights(mask_BT: Mask, aggregate: Aggregate, max_tokens: int | Int[Array, ""]) -> Float[Array, "B T"]:
    """The weight of each token of the texts in a loss over all of them, 0 outside of ``mask_BT``.

    ``token``: 1 / tokens of all texts (DAPO, arXiv 2503.14476). ``sequence``: 1 / (texts * tokens of its text), the
    mean in each text, then over texts (GRPO, arXiv 2402.03300). ``constant``: 1 / (texts * ``max_tokens``), so that no
    length is favoured (Dr.GRPO, arXiv 2503.20783). A row without tokens is no text. Adds up to 1; with ``constant`` to
    the mean length over ``max_tokens``.
    """
    mask_BT = jnp.asarray(mask_BT) > 0
    length_B1 = jnp.sum(mask_BT, axis=1, keepdims=True)
    num_texts = jnp.sum(length_B1 > 0)
    if aggregate == "token":
        num_B1 = jnp.broadcast_to(jnp.sum(length_B1), length_B1.shape)
    else:
        num_B1 = num_texts * (length_B1 if aggregate == "sequence" else jnp.full_like(length_B1, max_tokens))
    return jnp.where(mask_BT, 1 / jnp.maximum(num_B1, 1), 0)


def experience_of(
    rows: WrittenRows,
    counts_N: Bool[Array | np.ndarray, " N"],
    advantage_NT: Float[Array | np.ndarray, "N T"],
    old_log_prob_NT: Float[Array | np.ndarray, "N T"] | None = None,
    **further: Any,
) -> Experience:
    """All rows of an iteration, not weighted yet (:func:`minibatch` does that).

    Args:
        rows: prompts and texts.
        counts_N: whether something is known of the text.
        advantage_NT, old_log_prob_NT: see :class:`Experience`.
        further: its other float32 fields.
    """
    counts_N1 = np.asarray(counts_N)[:, None]
    given = {"advantage_BT": advantage_NT, "old_log_prob_BT": old_log_prob_NT, **further}
    return Experience(
        tokens_BT=rows.tokens_NT,
        targets_BT=rows.targets_NT,
        loss_weight_BT=rows.learned_NT * counts_N1,
        documents=Documents(rows.ids_NT * counts_N1, rows.positions_NT * counts_N1),
        features_BTC=rows.features_NTC,
        experts_BTLK=rows.experts_NTLK,
        **{name: None if x is None else np.asarray(x, np.float32) for name, x in given.items()},
    )


def minibatch(
    experience: Experience, chosen: Sequence[int] | Integer[np.ndarray, " B"], aggregate: Aggregate, max_tokens: int
) -> Experience:
    """Some of the rows, weighted.

    Args:
        experience: all rows, numpy arrays.
        chosen: which.
        aggregate, max_tokens: see :func:`token_weights`.
    """
    some = jax.tree.map(lambda x: x[np.asarray(chosen)], experience)
    return dataclasses.replace(some, weight_BT=np.asarray(token_weights(some.loss_weight_BT, aggregate, max_tokens)))


def place_experience(experience: Experience, mesh: Mesh) -> Experience:
    """The same on the devices; every process has all of it."""
    rules, axes = Rules(), ("batch", "length", None, None)
    return jax.tree.map(lambda x: host_array_to_global(x, mesh, rules.spec(*axes[: x.ndim])), experience)
