"""How the TPU kernels see a sequence: blocks of queries that see a prefix of the tails, keys in front, and themselves.

Each segment is padded to a whole number of rows, so that what a block of queries sees is one of three things:

- the first ``seen`` keys of the *tails*, which stand one behind the other in an array of their own;
- the ``before`` keys in front of the block, where a segment is longer than a block;
- its own keys, in a pattern that is the same for every block: causal, and tails where it holds several segments.

The first segment, which a shift cuts short, begins a block of its own: its keys then stand where they would without a
shift, and what follows begins a block too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.segmented_attention.segments import Segments
from pallas_kernels.segmented_attention.selection import tails
from pallas_kernels.segmented_attention.tiles import Tiles

LANES = 128


def round_up(x: int, multiple: int) -> int:
    """The next multiple."""
    return -(-x // multiple) * multiple


def _divisor(of: int, unit: int, most: int) -> int:
    """The largest multiple of ``unit`` that divides ``of`` and is at most ``most``; ``unit`` divides ``of``."""
    return max(d for d in range(unit, max(most, unit) + 1, unit) if of % d == 0)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the positions of a sequence stand in blocks of rows; made by :func:`lay_out`.

    Attributes:
        length: positions, T.
        segments: how they are cut.
        padded: rows of a segment.
        block: rows of a block: of several segments, or of a part of one.
        keys: keys of a chunk that is fetched at a time.
        part: keys, and rows of the own pattern, of one product.
    """

    length: int
    segments: Segments
    padded: int
    block: int
    keys: int
    part: int

    @property
    def first(self) -> int:
        """Positions of the first segment where a shift cuts it short; 0: there is no such segment."""
        return min(self.segments.size - self.segments.shift, self.length) if self.segments.shift else 0

    @property
    def first_rows(self) -> int:
        """Rows that the first segment takes if it is cut short."""
        return round_up(self.first, self.block)

    @property
    def num_blocks(self) -> int:
        """Blocks of a sequence; the last segment has no more of them than it needs."""
        whole, left = divmod(self.length - self.first, self.segments.size)
        return (self.first_rows + round_up(whole * self.padded + left, self.block)) // self.block

    @property
    def absent(self) -> int:
        """Positions that the tail of the first segment lacks."""
        return max(0, self.segments.shift - (self.segments.size - self.segments.window))

    @property
    def num_tail_keys(self) -> int:
        """Keys in the tails of all segments but the last, which nobody looks back at."""
        return max((self.segments.count(self.length) - 1) * self.segments.window - self.absent, 0)

    @functools.cached_property
    def seen(self) -> np.ndarray:
        """For each block, how many keys of the tails all its rows see."""
        rows = np.arange(self.num_blocks) * self.block - self.first_rows
        segment = np.where(rows < 0, 0, rows // self.padded + (self.first > 0))
        return np.maximum(segment * self.segments.window - self.absent, 0).clip(max=self.num_tail_keys).astype(np.int32)

    @functools.cached_property
    def own_start(self) -> np.ndarray:
        """The first row of each block."""
        return np.arange(self.num_blocks, dtype=np.int32) * self.block

    @functools.cached_property
    def before(self) -> np.ndarray:
        """For each block, how many rows of its segment stand in front of it."""
        rows = np.arange(self.num_blocks) * self.block
        inside = np.where(rows < self.first_rows, rows, (rows - self.first_rows) % self.padded)
        return (inside if self.padded > self.block else 0 * inside).astype(np.int32)

    @functools.cached_property
    def pairs(self) -> dict[str, int]:
        """(query, key) pairs that are seen in the ``tails``, the ``rows`` in front of a block, and its ``own``."""
        s, t = self.segments, np.arange(self.length, dtype=np.int64)
        all_tails = np.maximum(s.of(t) * s.window - self.absent, 0)
        everything = int((all_tails + np.minimum((t + s.shift) % s.size, t) + 1).sum())
        after = np.maximum(t - self.first, 0)
        row = np.where(t < self.first, t, self.first_rows + after // s.size * self.padded + after % s.size)
        positions = np.bincount(row // self.block, minlength=self.num_blocks)
        tails, rows = int(self.seen @ positions), int(self.before @ positions)
        return {"tails": tails, "rows": rows, "own": everything - tails - rows}

    def uses(self, name: str) -> bool:
        """Whether any block sees ``tails``, or ``rows`` in front of it."""
        return bool((self.seen if name == "tails" else self.before).any())

    def has_rest(self, name: str) -> bool:
        """Whether some block sees a part of a chunk of ``tails``, or of ``rows``."""
        return bool(((self.seen if name == "tails" else self.before) % self.keys).any())

    # ---------------------------------------------------------------- a block's own keys

    def own(self, row: Any, key: Any) -> Any:
        """Whether a row sees a key of its own block; both are counted from the block's first."""
        if self.padded >= self.block:
            return key <= row
        # None is negative, and only these lower without knowing the chip.
        divide, remainder = (np.floor_divide, np.mod) if isinstance(row, np.ndarray) else (jax.lax.div, jax.lax.rem)
        offset = remainder(key, self.padded)
        tail = (offset >= self.segments.size - self.segments.window) & (offset < self.segments.size)
        return (key <= row) & ((divide(key, self.padded) == divide(row, self.padded)) | tail)

    def own_part(self, row: int, key: int) -> Literal["none", "some", "all"]:
        """How much a part of the rows sees of a part of the keys."""
        here = np.arange(self.part)
        sees = self.own(row * self.part + here[:, None], key * self.part + here)
        return "all" if sees.all() else "some" if sees.any() else "none"

    # ---------------------------------------------------------------- arrays

    def rows(self, x_BT: Array) -> Array:
        """(B, T, ...) -> (B, rows, ...), zeros where there is no position."""
        first, rest = x_BT[:, : self.first], x_BT[:, self.first :]
        rest = _pad(rest, round_up(rest.shape[1], self.segments.size))
        rest = rest.reshape(rest.shape[0], -1, self.segments.size, *rest.shape[2:])
        rest = _pad(rest, self.padded, axis=2)
        rest = rest.reshape(rest.shape[0], -1, *rest.shape[3:])
        total = self.num_blocks * self.block - self.first_rows
        return jnp.concatenate([_pad(first, self.first_rows), _pad(rest[:, :total], total)], axis=1)

    def positions(self, x_BR: Array) -> Array:
        """(B, rows, ...) -> (B, T, ...): the reverse."""
        B, more = len(x_BR), x_BR.shape[2:]
        first, rest = x_BR[:, : self.first], x_BR[:, self.first_rows :]
        rest = _pad(rest, round_up(rest.shape[1], self.padded))
        rest = rest.reshape(B, -1, self.padded, *more)[:, :, : self.segments.size]
        return jnp.concatenate([first, rest.reshape(B, -1, *more)], axis=1)[:, : self.length]

    def tails(self, x_BT: Array) -> Array:
        """(B, T, ...) -> (B, C, ...): the tails, filled up to whole chunks."""
        x = tails(x_BT, self.segments)
        x = x.reshape(len(x), -1, *x.shape[3:])[:, self.absent : self.absent + self.num_tail_keys]
        return _pad(x, round_up(self.num_tail_keys, self.keys))

    def from_tails(self, x_BC: Array) -> Array:
        """(B, C, ...) -> (B, T, ...): the reverse, zeros elsewhere."""
        s = self.segments
        x, num = x_BC[:, : self.num_tail_keys], s.count(self.length)
        x = _pad(_pad(x, self.num_tail_keys + self.absent, front=True), num * s.window)
        x = _pad(x.reshape(len(x), num, s.window, *x.shape[2:]), s.size, axis=2, front=True)
        return x.reshape(len(x), -1, *x.shape[3:])[:, s.shift : s.shift + self.length]


def _pad(x: Array, length: int, axis: int = 1, front: bool = False) -> Array:
    """Zeros at the end (or in front) of an axis."""
    extra = length - x.shape[axis]
    widths = [(0, 0)] * x.ndim
    widths[axis] = (extra, 0) if front else (0, extra)
    return jnp.pad(x, widths) if extra else x


def lay_out(length: int, segments: Segments, tiles: Tiles) -> Layout:
    """Blocks near the size of the tiles that waste few rows."""
    if segments.count(length) == 1:
        segments = Segments(length, 0)  # the cuts do not matter
    W, unit = segments.size, min(tiles.part, LANES)
    if tiles.queries < W:
        num = -(-W // tiles.queries)
        block = round_up(-(-W // num), min(2 * unit, tiles.queries))
        padded = num * block
    else:
        # A segment that is smaller than a unit divides it.
        padded = max(1 << (W - 1).bit_length(), min(16, unit)) if unit > W else round_up(W, unit)
        most = round_up(segments.count(length) * padded, unit)
        block = padded * max(min(tiles.queries, most) // padded, 1)
    part = _divisor(block, unit, tiles.part)
    keys = _divisor(block, part, tiles.keys) if padded > block else part * max(tiles.keys // part, 1)
    return Layout(length, segments, padded, block, keys, part)
