"""The decode cache: keys and values of what has been computed, lengths once for all layers.

Full attention keeps position p in slot p. Segmented attention keeps the tails of all segments and, of the open segment,
what stands before its tail, its *head*: the W - w first slots are those of the head, used anew by each segment, and
behind them stands tail after tail. That is S w / W + W - w slots for S positions. Which position a slot holds, and into
which slot a position goes, is arithmetic with the lengths (:func:`held_positions`, :func:`slots_of`).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dsjax.nn.masks import AttentionMask, Leaf
from dsjax.sharding import current_mesh, map_shards
from pallas_kernels.segmented_attention import Segments
from pallas_kernels.segmented_attention.selection import cut, tails


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer keeps (a group of layers: one more leading dimension), S slots a row.

    Attributes:
        k_BSKH, v_BSKH: keys and values.
        conv_BCD: inputs of the last C positions, for a short convolution (C is 0 without one).
        tail_sums_BJKH: the sum of each tail's keys, float32, by which a position chooses what it looks at (J is 0
            where it does not choose).
    """

    k_BSKH: Leaf
    v_BSKH: Leaf
    conv_BCD: Leaf
    tail_sums_BJKH: Leaf


# ---------------------------------------------------------------- slots


def num_tails(segments: Segments, length: int) -> int:
    """Segments of ``length`` positions that have come to their tail."""
    if segments.window == 0:
        return 0
    return max(0, -(-(length + segments.shift - segments.size + segments.window) // segments.size))


def num_slots(mask: AttentionMask, length: int) -> int:
    """Slots that ``length`` positions of a row need."""
    if isinstance(mask, Segments):
        return mask.size - mask.window + mask.window * num_tails(mask, length)
    return length


def held_positions(mask: AttentionMask, num_slots: int, lengths_B: Int[Array, B]) -> Int[Array, "B S"]:
    """The position that each slot holds, of ``lengths_B`` that have been written; -1: none."""
    slot_S, length_B1 = jnp.arange(num_slots), lengths_B[:, None]
    position_BS = jnp.broadcast_to(slot_S, (len(lengths_B), num_slots))
    if isinstance(mask, Segments):
        W, w, head = mask.size, mask.window, mask.size - mask.window
        in_head_BS = mask.of(length_B1 - 1) * W + slot_S
        in_tail_S = (slot_S - head) // max(w, 1) * W + head + (slot_S - head) % max(w, 1)
        position_BS = jnp.where(slot_S < head, in_head_BS, in_tail_S) - mask.shift
    return jnp.where((position_BS >= 0) & (position_BS < length_B1), position_BS, -1)


def slots_of(mask: AttentionMask, lengths_B: Int[Array, B], num_new: int, real_B: Int[Array, B]) -> Int[Array, "B T"]:
    """The slot of each of ``num_new`` positions behind ``lengths_B``, of which ``real_B`` count; -1: it is not kept."""
    position_BT = lengths_B[:, None] + jnp.arange(num_new)
    if not isinstance(mask, Segments):
        return position_BT  # what does not count stands behind all that does: it is never seen, and written over
    W, w, head = mask.size, mask.window, mask.size - mask.window
    last_B1 = (lengths_B + real_B)[:, None] - 1
    offset_BT, segment_BT = (position_BT + mask.shift) % W, mask.of(position_BT)
    kept_BT = (position_BT <= last_B1) & ((offset_BT >= head) | (segment_BT == mask.of(last_B1)))
    slot_BT = jnp.where(offset_BT < head, offset_BT, offset_BT + segment_BT * w)
    return jnp.where(kept_BT, slot_BT, -1)


# ---------------------------------------------------------------- writing


def append(
    cache_BSX: Shaped[Array, "B S ..."], new_BTX: Shaped[Array, "B T ..."], lengths_B: Int[Array, B]
) -> Shaped[Array, "B S ..."]:
    """Writes T new positions of each row behind the ``lengths_B`` that it holds."""

    def write(row: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), at, axis=0)

    return jax.vmap(write)(cache_BSX, new_BTX, lengths_B)


def filled(
    new_BTKH: Float[Array, "B T K H"], mask: AttentionMask, num_slots: int, lengths_B: Int[Array, B]
) -> Float[Array, "B S K H"]:
    """The slots of one layer that held nothing, with what is kept of the first ``lengths_B`` of T positions.

    Each device makes its own slots. What does not fit is dropped.
    """

    def fill(new_bTkH, lengths_b):
        all_bSkH = new_bTkH
        if isinstance(mask, Segments):
            head, (b, _, *kH) = mask.size - mask.window, new_bTkH.shape
            cut_bJWkH = cut(new_bTkH, mask)
            head_bSkH = cut_bJWkH[jnp.arange(b), mask.of(lengths_b - 1), :head]
            all_bSkH = jnp.concatenate([head_bSkH, cut_bJWkH[:, :, head:].reshape(b, -1, *kH)], axis=1)
        all_bSkH = _resized(all_bSkH, num_slots)
        first, num_own = _own_slots(num_slots)
        return jax.lax.dynamic_slice_in_dim(all_bSkH, first, num_own, axis=1)

    new, cache = ("batch", None, "kv_heads", None), ("batch", "slots", "kv_heads", None)
    return map_shards(fill, (new, ("batch",)), cache)(new_BTKH, lengths_B)


def tail_sums(
    k_BTKH: Float[Array, "B T K H"], ids_BT: Int[Array, "B T"], segments: Segments, num_tails: int
) -> Float[Array, "B J K H"]:
    """The sum of each tail's keys, float32, of rows of one document each."""
    k_BTKH = jnp.where((ids_BT > 0)[..., None, None], k_BTKH.astype(jnp.float32), 0)
    return _resized(tails(k_BTKH, segments).sum(axis=2), num_tails)


def _resized(x_BS: Array, size: int) -> Array:
    """The second dimension cut, or lengthened with zeros."""
    widths = [(0, 0)] * x_BS.ndim
    widths[1] = (0, max(size - x_BS.shape[1], 0))
    return jnp.pad(x_BS, widths)[:, :size]


def _own_slots(num_slots: int) -> tuple[jax.Array | int, int]:
    """Inside a :func:`map_shards`: the first slot of this device, and how many it has of ``num_slots``."""
    current = current_mesh()
    axes = () if current is None else current[1].slots
    if current is None or not axes:
        return 0, num_slots
    num_own = num_slots // math.prod(current[0].shape[axis] for axis in axes)
    return jax.lax.axis_index(axes) * num_own, num_own


def written(cache: LayerCache, new: LayerCache, slots_PBT: Int[Array, "P B T"] | None) -> LayerCache:
    """The cache of a stack of layers with what all of them made of T new positions.

    At once and behind the last layer: if it is written in the loop over layers, a TPU copies all of it for each.

    Args:
        cache: (L, B, S, K, H).
        new: (L, B, T, K, H), stacked over the layers; what is no slot takes the place of the old.
        slots_PBT: where the positions go, -1: nowhere; layer l has slots l modulo P. None: ``new`` is the cache.
    """
    if slots_PBT is None:
        return new
    k_LBSKH, v_LBSKH = (
        write_slots(old, made, slots_PBT) for old, made in ((cache.k_BSKH, new.k_BSKH), (cache.v_BSKH, new.v_BSKH))
    )
    return dataclasses.replace(new, k_BSKH=k_LBSKH, v_BSKH=v_LBSKH)


def write_slots(
    cache_LBSKH: Float[Array, "L B S K H"], new_LBTKH: Float[Array, "L B T K H"], slots_PBT: Int[Array, "P B T"]
) -> Float[Array, "L B S K H"]:
    """T new positions of each row in their slots, those of layer l in ``slots_PBT[l % P]``.

    Only those are written, so that a cache that is given away is changed in place. Each device writes what lies in
    its own slots. What does not fit is dropped.
    """
    P, num_slots = len(slots_PBT), cache_LBSKH.shape[2]
    place_L = jnp.arange(len(cache_LBSKH)) % P

    def write(cache_LbskH, new_LbTkH, slots_PbT):
        b, T = new_LbTkH.shape[1:3]
        first, num_own = _own_slots(num_slots)
        slots_PbT = slots_PbT - first
        if T == 1:  # a scatter makes a TPU bring the whole cache into another layout and back
            return jax.lax.fori_loop(0, b, functools.partial(write_row, new_LbTkH, slots_PbT), cache_LbskH)
        slots_PbT = jnp.where(slots_PbT < 0, num_own, slots_PbT)  # a negative index would count from the end
        row_b1 = jnp.arange(b)[:, None]
        if P == 1:
            at = cache_LbskH.at[:, row_b1, slots_PbT[0]]
        else:
            at = cache_LbskH.at[jnp.arange(place_L.size)[:, None, None], row_b1, slots_PbT[place_L]]
        return at.set(new_LbTkH, mode="drop", unique_indices=True)

    def write_row(new_LbTkH, slots_PbT, row, cache_LbskH):
        num_own = cache_LbskH.shape[2]
        new_LbTkH = jax.lax.dynamic_slice_in_dim(new_LbTkH, row, 1, axis=1)
        for place in range(P):
            slot = slots_PbT[place, row, 0]
            at = (0, row, jnp.clip(slot, 0, num_own - 1), 0, 0)
            old = jax.lax.dynamic_slice(cache_LbskH, at, new_LbTkH.shape)
            here_L = (slot >= 0) & (slot < num_own) & (place_L == place)
            new = jnp.where(here_L[:, None, None, None, None], new_LbTkH, old)
            cache_LbskH = jax.lax.dynamic_update_slice(cache_LbskH, new, at)
        return cache_LbskH

    cache, new = ("layers", "batch", "slots", "kv_heads", None), ("layers", "batch", None, "kv_heads", None)
    return map_shards(write, (cache, new, (None, "batch", None)), cache)(cache_LBSKH, new_LBTKH, slots_PBT)


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
