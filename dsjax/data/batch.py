"""What the data layer hands to a training step: one batch of fixed shape."""

from __future__ import annotations

import dataclasses

import jax

from dsjax.nn.masks import Documents, Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of T positions; numpy on the host, jax arrays once placed on devices.

    tokens_BT: int32, the input token at each position.
    targets_BT: int32, the token to predict there. Explicit, so that a row of T tokens trains T positions and so that
        fine-tuning and RL may set targets of their own.
    loss_weight_BT: float32, weight of each target in the loss; 0 where there is nothing to learn (padding).
    documents: which document each position belongs to (0 = padding) and its place in it.
    features_BTC: int16, what is known of the syntax around each input token (:mod:`dsjax.nn.fields`), for a model that
        is given it; None: nothing.
    """

    tokens_BT: Leaf
    targets_BT: Leaf
    loss_weight_BT: Leaf
    documents: Documents
    features_BTC: Leaf = None
