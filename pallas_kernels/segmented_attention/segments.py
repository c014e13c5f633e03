"""What segmented attention means: which keys a query sees."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Segments:
    """How a sequence is cut, and what is seen of what lies behind.

    Position t lies in segment ``(t + shift) // size``. Query t sees key j <= t if both lie in one segment, or if j is
    among the last ``window`` positions of its segment: its *tail*. All that it sees is under one softmax.

    Attributes:
        size: positions in a segment, W.
        window: positions in a tail, w; 0: a query sees its own segment only; W: all that is behind it.
        shift: positions by which the cuts are moved towards the start, 0 ... W - 1.
        top: of the earlier segments, a position's queries of one key/value head see the tails of the first, the
            previous and the ``top`` best ones (:mod:`pallas_kernels.segmented_attention.selection`); None: all tails.
    """

    size: int
    window: int
    shift: int = 0
    top: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"segment_size is {self.size}; it must be at least 1")
        if not 0 <= self.window <= self.size:
            raise ValueError(f"window is {self.window}; it must be 0 ... segment_size, {self.size}")
        if not 0 <= self.shift < self.size:
            raise ValueError(f"shift is {self.shift}; it must be 0 ... segment_size - 1, {self.size - 1}")
        if self.top is not None and self.top < 0:
            raise ValueError(f"top_segments is {self.top}; it must be None or at least 0")

    def of(self, position: Any) -> Any:
        """The segment of a position (ints or arrays)."""
        return (position + self.shift) // self.size

    def in_tail(self, position: Any) -> Any:
        """Whether a position is one of the last ``window`` of its segment."""
        return (position + self.shift) % self.size >= self.size - self.window

    def count(self, length: int) -> int:
        """Segments that a sequence has, the last one perhaps open."""
        return -(-(length + self.shift) // self.size)

    def within(self, length: int) -> Segments:
        """What means the same for up to ``length`` positions, by segments and tails no longer than that."""
        size = min(self.size, length)
        first = min(self.size - self.shift, size)  # positions of the first segment
        return Segments(size, min(self.window, size), size - first, self.top)

    def visible_pairs(self, length: int) -> int:
        """(query, key) pairs of one document of ``length`` positions; with ``top``, at most that many."""
        pairs, start, behind = 0, 0, 0
        tails: list[int] = []
        for segment in range(self.count(length)):
            end = min((segment + 1) * self.size - self.shift, length)
            rows = end - start
            kept = behind if self.top is None else sum(tails[:1] + tails[1:][-(self.top + 1) :])
            pairs += rows * (rows + 1) // 2 + rows * kept
            tails.append(min(self.window, rows))
            behind += tails[-1]
            start = end
        return pairs
