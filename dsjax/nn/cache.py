"""The decode cache: keys and values of what has been computed, lengths once for all layers."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Int, Shaped

from dsjax.nn.masks import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer keeps (a group of layers: one more leading dimension), S slots a row.

    Attributes:
        k_BSKH, v_BSKH: keys and values.
        conv_BCD: inputs of the last C positions, for a short convolution (C is 0 without one).
    """

    k_BSKH: Leaf
    v_BSKH: Leaf
    conv_BCD: Leaf


def append(
    cache_BSX: Shaped[Array, "B S ..."], new_BTX: Shaped[Array, "B T ..."], lengths_B: Int[Array, B]
) -> Shaped[Array, "B S ..."]:
    """Writes T new positions of each row behind the ``lengths_B`` that it holds."""

    def write(row: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), at, axis=0)

    return jax.vmap(write)(cache_BSX, new_BTX, lengths_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All layers' caches by group, and how many positions of each row are filled.

    Attributes:
        groups: one :class:`LayerCache` for each layer group, stacked over its layers.
        lengths_B: filled slots; what lies behind them is never seen.
        tokens_BS: the token of each slot, for what looks tokens up.
    """

    groups: tuple[LayerCache, ...]
    lengths_B: Leaf
    tokens_BS: Leaf
