"""The decode cache: keys and values of what has been computed, lengths once for all layers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dsjax.nn.masks import Leaf
from dsjax.sharding import current_mesh, map_shards


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


def written(cache: LayerCache, new: LayerCache, lengths_B: Int[Array, B] | None) -> LayerCache:
    """The cache of a stack of layers with what all of them made of T new positions.

    At once and behind the last layer: if it is written in the loop over layers, a TPU copies all of it for each.

    Args:
        cache: (L, B, S, K, H).
        new: (L, B, T, K, H), stacked over the layers; a convolution's inputs take the place of the old ones.
        lengths_B: slots that the cache holds; None: none, so that nothing of it is read.
    """
    k_LBSKH, v_LBSKH = (
        write_slots(old, made, lengths_B) for old, made in ((cache.k_BSKH, new.k_BSKH), (cache.v_BSKH, new.v_BSKH))
    )
    return LayerCache(k_LBSKH, v_LBSKH, new.conv_BCD)


def write_slots(
    cache_LBSKH: Float[Array, "L B S K H"], new_LBTKH: Float[Array, "L B T K H"], lengths_B: Int[Array, B] | None
) -> Float[Array, "L B S K H"]:
    """T new positions behind the ``lengths_B`` that each row holds; None: the first ones.

    Only those are written, so that a cache that is given away is changed in place. Each device writes what lies in
    its own slots. What does not fit is dropped.
    """
    current = current_mesh()
    cut = () if current is None else current[1].slots
    extra = cache_LBSKH.shape[2] - new_LBTKH.shape[2]

    def first_slot(num_slots: int) -> jax.Array | int:
        return jax.lax.axis_index(cut) * num_slots if cut else 0

    def fill(cache_LbskH, new_LbTkH):
        num_slots = cache_LbskH.shape[2]
        all_LbSkH = jnp.pad(new_LbTkH, ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0)))
        return jax.lax.dynamic_slice_in_dim(all_LbSkH, first_slot(num_slots), num_slots, axis=2)

    def write(cache_LbskH, new_LbTkH, lengths_b):
        b, T, num_slots = new_LbTkH.shape[1], new_LbTkH.shape[2], cache_LbskH.shape[2]
        if T == 1:  # a scatter makes a TPU bring the whole cache into another layout and back
            return jax.lax.fori_loop(0, b, functools.partial(write_row, new_LbTkH, lengths_b), cache_LbskH)
        slot_bT = lengths_b[:, None] + jnp.arange(T) - first_slot(num_slots)
        slot_bT = jnp.where(slot_bT < 0, num_slots, slot_bT)  # a negative index would count from the end
        at = cache_LbskH.at[:, jnp.arange(b)[:, None], slot_bT]
        return at.set(new_LbTkH, mode="drop", unique_indices=True)

    def write_row(new_LbTkH, lengths_b, row, cache_LbskH):
        num_slots = cache_LbskH.shape[2]
        slot = lengths_b[row] - first_slot(num_slots)
        at = (0, row, jnp.clip(slot, 0, num_slots - 1), 0, 0)
        new = jax.lax.dynamic_slice_in_dim(new_LbTkH, row, 1, axis=1)
        old = jax.lax.dynamic_slice(cache_LbskH, at, new.shape)
        new = jnp.where((slot >= 0) & (slot < num_slots), new, old)
        return jax.lax.dynamic_update_slice(cache_LbskH, new, at)

    cache, new = ("layers", "batch", "slots", "kv_heads", None), ("layers", "batch", None, "kv_heads", None)
    if lengths_B is None:
        return map_shards(fill, (cache, new), cache)(cache_LBSKH, new_LBTKH)
    return map_shards(write, (cache, new, ("batch",)), cache)(cache_LBSKH, new_LBTKH, lengths_B)


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
