"""What a query may see: documents in a row and descriptions of masks (never a T x S array outside a reference)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dsjax.config import NonNegativeInt, PositiveInt, UserError
from pallas_kernels.segmented_attention import Segments

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
        closes_BS: for heads that see only what is still open: the position of a row from which on each of its positions
            is not seen any more (of what a cache holds and of the new ones, if there is a cache). None: there are none.
    """

    ids_BT: Leaf
    positions_BT: Leaf
    closes_BS: Leaf = None

    @classmethod
    def single(cls, tokens_BT: Int[Array, "B T"]) -> Documents:
        """Every row one document."""
        B, T = tokens_BT.shape
        positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        return cls(ids_BT=jnp.ones((B, T), jnp.int32), positions_BT=positions_BT)


@dataclasses.dataclass(frozen=True)
class Segmented:
    """Segmented attention for a group of layers (docs/segmented_attention.md).

    Attributes:
        segment_size: positions of a segment, W.
        window: the last positions of a segment, w, which later segments see, too; none: half of it.
        shift: positions by which the cuts are moved towards the start. ``alternate``: by none in the even layers of the
            model, by w in the odd ones, so that with half a segment two layers see every position between them;
            ``cycle``: by w more in each layer, so that W / w layers do, rounded up. With w = W / 2 that is the same.
            ``heads``: by w more from head to head of keys and values, so that a layer of W / w such heads sees every
            position; of several times as many, those that cut alike stand together; of fewer, the next layer goes on
            (docs/decisions/0019-shifts-by-head.md).
        top_segments: of the earlier segments a position looks at the first, the previous and this many best ones; none:
            at all.
    """

    segment_size: PositiveInt = 1024
    window: NonNegativeInt | None = None
    shift: Literal["alternate", "cycle", "heads"] | NonNegativeInt = "alternate"
    top_segments: NonNegativeInt | None = None

    def validate(self) -> None:
        if self.window is not None and self.window > self.segment_size:
            raise UserError(f"window is {self.window}; it must be at most segment_size, {self.segment_size}")
        if isinstance(self.shift, int) and self.shift >= self.segment_size:
            raise UserError(f"shift is {self.shift}; it must be less than segment_size, {self.segment_size}")

    def layers(self, num_kv_heads: int) -> tuple[Segments | ByHead, ...]:
        """What the layers of a model do in turn: layer n what stands at n modulo the length."""
        W, K = self.segment_size, num_kv_heads
        w = W // 2 if self.window is None else self.window
        if isinstance(self.shift, int):
            return (Segments(W, w, self.shift, self.top_segments),)
        turns = 2 if self.shift == "alternate" else -(-W // max(w, 1))
        cuts = [Segments(W, w, shift, self.top_segments) for shift in sorted({n * w % W for n in range(turns)})]
        if self.shift != "heads" or len(cuts) == 1:
            return tuple(cuts)
        if K % len(cuts) == 0:
            return (ByHead(tuple(cut for cut in cuts for _ in range(K // len(cuts)))),)
        heads = [cuts[n % len(cuts)] for n in range(math.lcm(len(cuts), K))]
        return tuple(ByHead(tuple(heads[n : n + K])) for n in range(0, len(heads), K))


@dataclasses.dataclass(frozen=True)
class Causal:
    """Query t sees keys j <= t of its document; with ``window`` only the last ``window`` of them."""

    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Full:
    """Every query sees every key of its document (encoders)."""


@dataclasses.dataclass(frozen=True)
class ByHead:
    """Key/value heads see different things: head k what stands at k modulo the length."""

    parts: tuple[Segments, ...]


AttentionMask = Causal | Segments | ByHead


def parts_of(mask: AttentionMask) -> tuple[Causal | Segments, ...]:
    """What key/value heads see in turn: head k what stands at k modulo the length."""
    return mask.parts if isinstance(mask, ByHead) else (mask,)


def chooses(mask: AttentionMask) -> bool:
    """Whether a position looks at some tails only."""
    part = parts_of(mask)[0]
    return isinstance(part, Segments) and part.top is not None and part.window > 0


def by_head(mask: AttentionMask, place_k: Int[Array, " k"], f: Callable[[Any], Array], axis: int) -> Array:
    """``f`` of what each of some heads sees, those at ``place_k`` of :func:`parts_of`.

    What ``f`` returns has one entry along ``axis``, or one for each head. Of one mask for all, it is returned as it is.
    """
    parts = parts_of(mask)
    first, *others = distinct = list(dict.fromkeys(parts))
    out, number_k = f(first), jnp.asarray([distinct.index(part) for part in parts])[place_k]
    for number, part in enumerate(others, start=1):
        here = jnp.expand_dims(number_k == number, [a for a in range(out.ndim) if a != axis % out.ndim])
        out = jnp.where(here, f(part), out)
    return out


def sees(
    mask: AttentionMask, t: Int[Array, ...], j: Int[Array, ...], chosen: Int[Array, "... X"] | None = None
) -> Bool[Array, ...]:
    """Whether the query at position t of a document may see the key at position j; all are broadcast.

    ``chosen``: the segments whose tails the query looks at, -1 for none; None: all.
    """
    assert not isinstance(mask, ByHead)  # what one head sees is asked
    if isinstance(mask, Segments):
        tails = mask.in_tail(j)
        if chosen is not None:
            tails &= (chosen == mask.of(j)[..., None]).any(axis=-1)
        return (j <= t) & ((mask.of(j) == mask.of(t)) | tails)
    return (j <= t) if mask.window is None else (j <= t) & (j > t - mask.window)
