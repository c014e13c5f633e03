"""The decode cache: keys and values of what has been computed, lengths once for all layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.masks import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer (a group of layers: one more leading dimension), S slots a row."""

    k_BSKH: Leaf
    v_BSKH: Leaf

    @classmethod
    def empty(cls, num_layers: int, batch: int, slots: int, num_kv_heads: int, head_dim: int, dtype) -> LayerCache:
        zeros = jnp.zeros((num_layers, batch, slots, num_kv_heads, head_dim), dtype)
        return cls(k_BSKH=zeros, v_BSKH=zeros)

    def append(
        self, k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"], lengths_B: Int[Array, "B"]
    ) -> LayerCache:
        """Writes T new positions of each row behind the ``lengths_B`` that it holds."""
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (at, 0, 0)))
        return LayerCache(write(self.k_BSKH, k_BTKH, lengths_B), write(self.v_BSKH, v_BTKH, lengths_B))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All layers' caches by group, and how many positions of each row are filled.

    Attributes:
        groups: one :class:`LayerCache` for each layer group, stacked over its layers.
        lengths_B: filled slots; what lies behind them is never seen.
        recent_BC: the last C token ids (oldest first, 0 before the start), for n-gram embeddings.
    """

    groups: tuple[LayerCache, ...]
    lengths_B: Leaf
    recent_BC: Leaf
