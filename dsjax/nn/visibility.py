"""What the layers of a model see, and what that costs: shared by every kind of attention."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from dsjax.nn.cache import num_slots, num_tails
from dsjax.nn.masks import AttentionMask, ByHead, Causal, Segmented, chooses, parts_of
from pallas_kernels.segmented_attention import Segments


class Visibility:
    """Of a config with the fields ``window`` and ``segmented``, and ``num_cached_heads``."""

    if TYPE_CHECKING:
        window: int | None
        segmented: Segmented | None

        @property
        def num_cached_heads(self) -> int: ...

        @property
        def pair_channels(self) -> int: ...

        @property
        def cached_pair_channels(self) -> int: ...

    def masks(self) -> tuple[AttentionMask, ...]:
        """What the layers of a model see in turn: layer n what stands at n modulo the length."""
        return (Causal(self.window),) if self.segmented is None else self.segmented.layers(self.num_cached_heads)

    def mask(self, layer: int) -> AttentionMask:
        """What the model's layer of this number sees, from 0."""
        return self.masks()[layer % len(self.masks())]

    def visible_pairs(self, length: int, layer: int = 0) -> float:
        """(query, key) pairs of a document of ``length``, mean over heads; with ``top_segments``, at most that many."""
        if isinstance(mask := self.mask(layer), ByHead):
            return sum(_pairs(part, length) for part in mask.parts) / len(mask.parts)
        if isinstance(mask, Segments):
            return _pairs(mask, length)
        w = min(self.window or length, length)
        return w * (w + 1) // 2 + (length - w) * w

    def visible_positions(self, seq_len: int, layer: int = 0) -> float:
        """Mean number of positions that a query of a full-length document sees."""
        return self.visible_pairs(seq_len, layer) / seq_len

    def pair_products(self, length: int, layer: int = 0, *, cached: bool = False) -> float:
        """Channels of all products of the (query, key) pairs of a document of ``length``; with what a cache holds."""
        return (self.cached_pair_channels if cached else self.pair_channels) * self.visible_pairs(length, layer)

    def cache_size(self, length: int) -> tuple[int, int]:
        """What a layer keeps of ``length`` positions of a row: slots, and sums of tails."""
        slots = max(num_slots(mask, length) for mask in self.masks())
        parts = [part for mask in self.masks() if chooses(mask) for part in parts_of(mask)]
        return slots, max((max(num_tails(part, length), 1) for part in parts if isinstance(part, Segments)), default=0)


_pairs = functools.lru_cache(maxsize=1024)(Segments.visible_pairs)  # a search for a mesh asks again and again
