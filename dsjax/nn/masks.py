"""What a query may see: documents in a row and descriptions of masks (never a T x S array outside a reference)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# A field of a dataclass that is a pytree: an array, or whatever stands for one in a mapped tree (its shape, its
# sharding). So the field's name tells the shape, and run-time checks are made where arrays enter functions.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
    """Which document each token of a packed row belongs to.

    Attributes:
        ids_BT: 1, 2, ... along a row; 0 marks padding.
        positions_BT: position within the document (or within its part of the row), from 0.
    """

    ids_BT: Leaf
    positions_BT: Leaf

    @classmethod
    def single(cls, tokens_BT: Int[Array, "B T"]) -> Documents:
        """Every row one document."""
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        return cls(ids_BT=jnp.ones((B, T), jnp.int32), positions_BT=positions_BT)


@dataclasses.dataclass(frozen=True)
class Causal:
    """Query t sees keys j <= t of its document; with ``window`` only the last ``window`` of them."""

    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Full:
    """Every query sees every key of its document (encoders)."""


AttentionMask = Causal | Full
