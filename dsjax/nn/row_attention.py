"""Attention over whole rows: each device attends for its own rows and heads, over the keys of the whole row."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.nn.masks import AttentionMask, ByHead, Documents, parts_of
from dsjax.sharding import current_mesh, map_shards
from pallas_kernels.causal_attention import causal_attention
from pallas_kernels.segmented_attention import Segments, context_parallel_attention, segmented_attention


def row_attention(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    documents: Documents,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    heads: tuple[str, str | None] = ("kv_heads", "heads_per_kv"),
    closes_BTK: Int[Array, "B T K"] | None = None,
) -> Float[Array, "B T K G U"]:
    """softmax(scale q k) v over what each query sees of its row.

    With segments, rows stay cut by positions as well: of other devices' keys only the tails come.

    Args:
        q_BTKGH: queries, by the key/value head that they share.
        k_BTKH, v_BTKU: keys and values.
        documents: which document each position belongs to.
        mask: what a query sees.
        scale: of the scores; None: 1 / sqrt(H).
        heads: the logical axes of the dimensions K and G.
        closes_BTK: the position of the row from which on a key is not seen any more; None: all are seen to the end.
    """
    axes = whole_segments(mask, q_BTKGH.shape[1])
    apart = heads_apart(mask, heads[0]) if isinstance(mask, ByHead) else lambda f: functools.partial(f, mask)

    def attend(ids_bT, closes_bTk, mask, q_bTkGH, k_bTkH, v_bTkU):
        b, T, k, G, H = q_bTkGH.shape
        q_bTnH = q_bTkGH.reshape(b, T, k * G, H)
        if isinstance(mask, Segments):
            out_bTnU = segmented_attention(
                q_bTnH,
                k_bTkH,
                v_bTkU,
                segment_size=mask.size,
                window=mask.window,
                shift=mask.shift,
                top_segments=mask.top,
                documents=ids_bT,
                scale=scale,
            )
        else:
            out_bTnU = causal_attention(q_bTnH, k_bTkH, v_bTkU, ids_bT, mask.window, scale=scale, closes_BTK=closes_bTk)
        return out_bTnU.reshape(b, T, k, G, -1)

    def run(q_bTkGH, k_bTkH, v_bTkU, ids_bT, closes_bTk=None):
        if not axes:
            return apart(functools.partial(attend, ids_bT, closes_bTk))(q_bTkGH, k_bTkH, v_bTkU)
        b, t, k, G, H = q_bTkGH.shape
        options = {"axis": axes, "segments": parts_of(mask), "apart": apart, "documents": ids_bT, "scale": scale}
        out_btnU = context_parallel_attention(q_bTkGH.reshape(b, t, k * G, H), k_bTkH, v_bTkU, **options)
        return out_btnU.reshape(b, t, k, G, -1)

    length = "length" if axes else None
    q, kv = ("batch", length, *heads, None), ("batch", length, heads[0], None)
    arrays, specs = [q_BTKGH, k_BTKH, v_BTKU, documents.ids_BT], [q, kv, kv, ("batch", length)]
    if closes_BTK is not None:
        assert not isinstance(mask, (Segments, ByHead))  # a config says so
        arrays, specs = [*arrays, closes_BTK], [*specs, ("batch", None, heads[0])]
    return map_shards(run, tuple(specs), q)(*arrays)


def heads_apart(mask: ByHead, axis: str = "kv_heads") -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    """``apart(f)(*arrays)`` is ``f(part, *some)`` of heads that see different things, inside a :func:`map_shards`.

    Heads stand in dimension 2 of all arrays, and of what ``f`` returns. Neighbours that see the same go together.
    Devices that share heads out, over the logical ``axis``, have what stands at the places of their own: so they do not
    run the same ``f``, and in it nothing may travel between them.
    """
    num = len(mask.parts)

    def own(f: Callable[..., jax.Array], first: int, *arrays: jax.Array) -> jax.Array:
        masks = [mask.parts[(first + i) % num] for i in range(arrays[0].shape[2])]
        out, begin = [], 0
        for part, alike in itertools.groupby(masks):
            end = begin + len(list(alike))
            out.append(f(part, *(x[:, :, begin:end] for x in arrays)))
            begin = end
        return jnp.concatenate(out, axis=2)

    def run(f: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        current = current_mesh()
        over = () if current is None else getattr(current[1], axis)
        devices = 1 if current is None else math.prod(current[0].shape[a] for a in over)
        # The first head's place, device by device, until it repeats.
        firsts = list(dict.fromkeys(device * arrays[0].shape[2] % num for device in range(devices)))
        runs = [functools.partial(own, f, first) for first in firsts]
        place = jax.lax.axis_index(over) % len(firsts) if over else 0
        return jax.lax.switch(place, runs, *arrays)

    return lambda f: functools.partial(run, f)


def segments_of(mask: AttentionMask) -> Segments | None:
    """What is cut the same way in all heads; None: there are no segments."""
    mask = mask.parts[0] if isinstance(mask, ByHead) else mask
    return mask if isinstance(mask, Segments) else None


def whole_segments(mask: AttentionMask, length: int) -> tuple[str, ...]:
    """The mesh axes over which rows of ``length`` positions are cut into whole segments; none: they are not."""
    current, segments = current_mesh(), segments_of(mask)
    if current is None or segments is None:
        return ()
    mesh, rules = current
    parts = math.prod(mesh.shape[axis] for axis in rules.length)
    return tuple(rules.length) if parts > 1 and length % (parts * segments.size) == 0 else ()
