"""The decode cache: keys and values of what has been computed, in pages of a pool; lengths once for all layers.

Slots. Full attention keeps position p in slot p. Segmented attention keeps the tails of all segments and, of the open
segment, what stands before its tail, its *head*: the W - w first slots are those of the head, used anew by each
segment, and behind them stands tail after tail. That is S w / W + W - w slots for S positions. Which position a slot
holds, and into which slot a position goes, is arithmetic with the lengths (:func:`held_positions`, :func:`slots_of`).

Pages. Slot s of a row lies in slot s % P of the page that the row's table has for logical page s // P. Who hands out
pages fills the tables in (:mod:`dsjax.infer.pages`); rows of a fixed length own all pages from the start, in order.
On a mesh each device has a pool of its own for the rows and the slots that are its: logical page j lies with device j
modulo the devices that share a row, and the numbers in tables are those of the device's own pool.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Shaped

from dsjax.nn.masks import AttentionMask, Causal, Leaf, by_head, parts_of
from dsjax.sharding import Rules, current_mesh, map_shards
from pallas_kernels.paged_attention import NEVER
from pallas_kernels.segmented_attention import Segments
from pallas_kernels.segmented_attention.selection import cut, tails

PAGE_SIZE = 64  # slots
POOL = ("layers", "pages", "kv_heads", None, None)  # logical axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys and values of a group of layers.

    Attributes:
        k_LMKPH, v_LMKPH: M pages of P slots in each of L layers; finite numbers. Heads may be filled up with zeros.
            In latent attention keys begin with values, and in place of those there is what an indexer looks at (0
            wide without one).
        table_BJ: the page of each logical page of a row, the same in all layers; -1: it has none.
    """

    k_LMKPH: Leaf
    v_LMKPH: Leaf
    table_BJ: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowState:
    """What else a layer keeps of a row (a group of layers: one more leading dimension), of a fixed size.

    Attributes:
        conv_BCD: inputs of the last C positions, for a short convolution (C is 0 without one).
        tail_sums_BJKH: the sum of each tail's keys, float32, by which a position chooses what it looks at (J is 0
            where it does not choose).
    """

    conv_BCD: Leaf
    tail_sums_BJKH: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupCache:
    """What a group of layers keeps, stacked over them."""

    pages: Pages
    state: RowState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one layer looks at: the pages of its group, its number among the layers of the group, its own state.

    ``slots``: those that a row can use; its pages may have a few more.
    """

    pages: Pages
    number: Leaf
    state: RowState
    slots: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Made:
    """What a layer made of T new positions (a group: stacked): keys, values, and its state behind them.

    Of a cache that held nothing ``k_BTKH`` and ``v_BTKH`` are all its pages instead, (M, K, P, H).
    """

    k_BTKH: Leaf
    v_BTKH: Leaf
    state: RowState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """All layers' caches by group, and how many positions of each row are filled.

    Attributes:
        groups: one :class:`GroupCache` for each layer group.
        lengths_B: positions of each row that are filled; what lies behind them is never seen.
        tokens_BS: the token of each position, for what looks tokens up.
        scopes: a :class:`dsjax.nn.structure.Scopes`, of a model with heads that see only what is still open, or None.
    """

    groups: tuple[GroupCache, ...]
    lengths_B: Leaf
    tokens_BS: Leaf
    scopes: Any = None


def empty_pages(
    num_layers: int,
    batch: int,
    slots: int,
    heads: tuple[int, int, int],
    dtype: Any,
    *,
    page_size: int = PAGE_SIZE,
    parts: tuple[int, int] = (1, 1),
    lanes: int = 1,
    pool: int | None = None,
) -> Pages:
    """Pages for rows of up to ``slots`` slots.

    Args:
        num_layers: L.
        batch: rows.
        slots: of a row, at least.
        heads: key/value heads, and the width of a key and of a value.
        dtype: of keys and values.
        page_size: slots of a page.
        parts: devices over which rows are cut, and over which the slots of a row are.
        lanes: heads are filled up to a multiple of this. On a TPU 128: else it would lay the pages of a pool out as
            the numbers of a row, and bring all of it into the kernel's layout each time.
        pool: pages of the pool of each device, which no row owns yet; None: as many as all rows can use, and each row
            owns its own, in order.
    """
    rows, columns = batch // parts[0], -(-slots // (page_size * parts[1]))  # of one device
    if pool is None:
        table_BJ = (jnp.arange(batch) % rows * columns)[:, None] + jnp.arange(columns * parts[1]) % columns
    else:
        table_BJ = jnp.full((batch, columns * parts[1]), -1)
    own = rows * columns if pool is None else pool
    pool_shape, widths = (num_layers, own * math.prod(parts), heads[0], page_size), heads[1:]
    k_LMKPH, v_LMKPH = (jnp.zeros((*pool_shape, -(-width // lanes) * lanes), dtype) for width in widths)
    return Pages(k_LMKPH, v_LMKPH, table_BJ.astype(jnp.int32))


def empty_group(
    num_layers: int,
    batch: int,
    size: tuple[int, int],
    heads: tuple[int, int, int],
    conv: tuple[int, int],
    dtype: Any,
    **layout: Any,
) -> GroupCache:
    """The cache of a group of layers that holds nothing.

    Args:
        num_layers: L.
        batch: rows.
        size: slots of a row, and sums of its tails.
        heads: key/value heads, and the width of a key and of a value.
        conv: positions that a short convolution needs, and the width of its input.
        dtype: of all but the sums.
        layout: see :func:`empty_pages`.
    """
    pages = empty_pages(num_layers, batch, size[0], heads, dtype, **layout)
    sums = jnp.zeros((num_layers, batch, size[1], *heads[:2]), jnp.float32)
    return GroupCache(pages, RowState(jnp.zeros((num_layers, batch, *conv), dtype), sums))


def cache_shardings(num_groups: int, mesh: Mesh, rules: Rules, scopes: Any = None) -> Cache:
    """Where each array of a cache lives; ``scopes``: those that it has, of any kind."""

    def place(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, rules.spec(*axes))

    sums, pool = place("layers", "batch", None, "kv_heads", None), place(*POOL)
    state = RowState(place("layers", "batch", None, None), sums)
    group = GroupCache(Pages(pool, pool, place("batch", "slots")), state)
    scopes = jax.tree.map(lambda _: place("batch", None), scopes)
    return Cache((group,) * num_groups, place("batch"), place("batch", None), scopes)


# ---------------------------------------------------------------- slots


def num_tails(segments: Segments, length: int) -> int:
    """Segments of ``length`` positions that have come to their tail."""
    if segments.window == 0:
        return 0
    return max(0, -(-(length + segments.shift - segments.size + segments.window) // segments.size))


def num_slots(mask: AttentionMask, length: int) -> int:
    """Slots that ``length`` positions of a row need."""
    parts = [part for part in parts_of(mask) if isinstance(part, Segments)]
    return max((_slots_of_segments(part, length) for part in parts), default=length) if length else 0


def _slots_of_segments(segments: Segments, length: int) -> int:
    """The head and the tails that are begun; of a first segment that has not come to its tail, part of the head."""
    head, begun = segments.size - segments.window, num_tails(segments, length)
    return head + begun * segments.window if begun else min(head, length + segments.shift)


def held_positions(mask: Causal | Segments, slots: Int[Array, ...], lengths: Int[Array, ...]) -> Int[Array, ...]:
    """The position that each slot holds, of ``lengths`` that have been written (both are broadcast); NEVER: none."""
    position = slots
    if isinstance(mask, Segments):
        W, w, head = mask.size, mask.window, mask.size - mask.window
        in_head = mask.of(lengths - 1) * W + slots
        in_tail = (slots - head) // w * W + head + (slots - head) % w if w else NEVER
        position = jnp.where(slots < head, in_head, in_tail) - mask.shift
    return jnp.where((position >= 0) & (position < lengths), position, NEVER)


def slots_by_head(
    mask: AttentionMask, lengths_B: Int[Array, B], num_new: int, real_B: Int[Array, B]
) -> Int[Array, "B T n"]:
    """:func:`slots_of` what heads see in turn."""
    parts = parts_of(mask)
    found = {part: slots_of(part, lengths_B, num_new, real_B) for part in dict.fromkeys(parts)}
    return jnp.stack([found[part] for part in parts], axis=-1)


def slots_of(
    mask: Causal | Segments, lengths_B: Int[Array, B], num_new: int, real_B: Int[Array, B]
) -> Int[Array, "B T"]:
    """The slot of each of ``num_new`` positions behind ``lengths_B``, of which ``real_B`` count; -1: it is not kept."""
    position_BT = lengths_B[:, None] + jnp.arange(num_new)
    last_B1 = (lengths_B + real_B)[:, None] - 1
    kept_BT, slot_BT = position_BT <= last_B1, position_BT
    if isinstance(mask, Segments):
        W, w, head = mask.size, mask.window, mask.size - mask.window
        offset_BT, segment_BT = (position_BT + mask.shift) % W, mask.of(position_BT)
        kept_BT &= (offset_BT >= head) | (segment_BT == mask.of(last_B1))
        slot_BT = jnp.where(offset_BT < head, offset_BT, offset_BT + segment_BT * w)
    return jnp.where(kept_BT, slot_BT, -1)


def own_part() -> tuple[Array | int, int]:
    """Inside a :func:`map_shards`: which of the devices that share a row's slots this one is, and how many do."""
    current = current_mesh()
    axes = () if current is None else current[1].slots
    if current is None or not axes:
        return 0, 1
    return jax.lax.axis_index(axes), math.prod(current[0].shape[axis] for axis in axes)


def own_places(num_parts: int, num_heads: int) -> Int[Array, " k"]:
    """Inside a :func:`map_shards`: where this device's key/value heads stand among the parts of a mask."""
    current = current_mesh()
    axes = () if current is None else current[1].kv_heads
    first = jax.lax.axis_index(axes) * num_heads if axes else 0
    return (first + jnp.arange(num_heads)) % num_parts


# ---------------------------------------------------------------- writing


def append(
    cache_BSX: Shaped[Array, "B S ..."], new_BTX: Shaped[Array, "B T ..."], lengths_B: Int[Array, B]
) -> Shaped[Array, "B S ..."]:
    """Writes T new positions of each row behind the ``lengths_B`` that it holds."""

    def write(row: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), at, axis=0)

    return jax.vmap(write)(cache_BSX, new_BTX, lengths_B)


def filled(
    new_BTKH: Float[Array, "B T K H"], mask: AttentionMask, pages: Pages, lengths_B: Int[Array, B]
) -> Float[Array, "M K P H"]:
    """One layer's pages of rows that own theirs in order, with what is kept of the first ``lengths_B`` of T positions.

    Each device makes its own. What does not fit is dropped.
    """
    P, columns = pages.k_LMKPH.shape[3], pages.table_BJ.shape[1]

    def fill(new_bTkH, lengths_b):
        b, _, *kH = new_bTkH.shape

        def slots(mask):
            all_bSkH = new_bTkH
            if isinstance(mask, Segments):
                head = mask.size - mask.window
                cut_bJWkH = cut(new_bTkH, mask)
                head_bSkH = cut_bJWkH[jnp.arange(b), mask.of(lengths_b - 1), :head]
                tails_bSkH = cut_bJWkH[:, :, head:].reshape(b, cut_bJWkH.shape[1] * mask.window, *kH)  # H may be 0
                all_bSkH = jnp.concatenate([head_bSkH, tails_bSkH], axis=1)
            return _resized(all_bSkH, columns * P)

        part, parts = own_part()
        all_bSkH = by_head(mask, own_places(len(parts_of(mask)), kH[0]), slots, axis=2)
        all_bJpPkH = all_bSkH.reshape(b, columns // parts, parts, P, *kH)
        own_bJPkH = jax.lax.dynamic_index_in_dim(all_bJpPkH, part, axis=2, keepdims=False)
        return own_bJPkH.swapaxes(2, 3).reshape(b * (columns // parts), kH[0], P, kH[1])

    return map_shards(fill, (("batch", None, "kv_heads", None), ("batch",)), POOL[1:])(new_BTKH, lengths_B)


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


def written(old: GroupCache, made: Made, slots_NBTn: Int[Array, "N B T n"] | None) -> GroupCache:
    """The cache of a group of layers with what all of them made of T new positions.

    At once and behind the last layer: if it is written in the loop over layers, a TPU copies all of it for each.

    Args:
        old: the cache before.
        made: stacked over the layers.
        slots_NBTn: where the positions go, -1: nowhere; layer l has slots l modulo N, head k of it those at k modulo n.
            None: ``made`` holds all pages.
    """
    pages = old.pages
    if slots_NBTn is None:
        return GroupCache(Pages(made.k_BTKH, made.v_BTKH, pages.table_BJ), made.state)
    k_LMKPH, v_LMKPH = (
        write_slots(pool, new, pages.table_BJ, slots_NBTn)
        for pool, new in ((pages.k_LMKPH, made.k_BTKH), (pages.v_LMKPH, made.v_BTKH))
    )
    return GroupCache(Pages(k_LMKPH, v_LMKPH, pages.table_BJ), made.state)


def write_slots(
    pool_LMKPH: Float[Array, "L M K P H"],
    new_LBTKH: Float[Array, "L B T K H"],
    table_BJ: Int[Array, "B J"],
    slots_NBTn: Int[Array, "N B T n"],
) -> Float[Array, "L M K P H"]:
    """T new positions of each row in their slots, those of layer l and head k in ``slots_NBTn[l % N, ..., k % n]``.

    Only those are written, so that a pool that is given away is changed in place. Each device writes what lies in its
    own pages. What has no page is dropped.
    """
    if pool_LMKPH.shape[-1] == 0:
        return pool_LMKPH

    def write(pool_LmkPH, new_LbTkH, table_bj, slots_NbTn):
        (L, m, k, P, H), columns, (part, parts) = pool_LmkPH.shape, table_bj.shape[1], own_part()
        (N, b, _, n), layer_L = slots_NbTn.shape, jnp.arange(L)
        logical = slots_NbTn // P
        column = jnp.where(logical % parts == part, logical // parts, columns)
        clipped = jnp.clip(column, 0, columns - 1).reshape(N, b, -1)
        found = jnp.take_along_axis(table_bj[None], clipped, axis=2).reshape(column.shape)
        page = jnp.where((slots_NbTn >= 0) & (column < columns), found, -1)
        page_LbTk, slot_LbTk = (x[layer_L % N][..., own_places(n, k)] for x in (page, slots_NbTn % P))
        # As rows of one matrix: in its own shape a TPU would bring the pool into another layout and back.
        row_LbTk = ((layer_L[:, None, None, None] * m + page_LbTk) * k + jnp.arange(k)) * P + slot_LbTk
        row_LbTk = jnp.where(page_LbTk >= 0, row_LbTk, L * m * k * P)
        rows = pool_LmkPH.reshape(-1, H).at[row_LbTk.reshape(-1)]
        return rows.set(new_LbTkH.reshape(-1, H), mode="drop", unique_indices=False).reshape(pool_LmkPH.shape)

    axes = (POOL, ("layers", "batch", None, "kv_heads", None), ("batch", "slots"), (None, "batch", None, None))
    return map_shards(write, axes, POOL)(pool_LMKPH, new_LBTKH, table_BJ, slots_NBTn)
