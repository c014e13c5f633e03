"""What the data layer hands to a training step: one batch of fixed shape."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Float32, Int32

from dsjax.nn.masks import Documents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of T positions; numpy on the host, jax arrays once placed on devices.

    tokens_BT: the input token at each position.
    targets_BT: the token to predict there. Explicit, so that a row of T tokens trains T positions and so that
        fine-tuning and RL may set targets of their own.
    loss_weight_BT: weight of each target in the loss; 0 where there is nothing to learn (padding).
    documents: which document each position belongs to (0 = padding) and its place in it.
    """

    tokens_BT: Int32[np.ndarray | jax.Array, "B T"]
    targets_BT: Int32[np.ndarray | jax.Array, "B T"]
    loss_weight_BT: Float32[np.ndarray | jax.Array, "B T"]
    documents: Documents
