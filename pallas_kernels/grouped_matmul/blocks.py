"""Work on groups of rows for the CPU: first a large block of each group, some groups at a time, then what is left.

XLA:CPU uses more than one thread only for large products, and the weights of a group are copied for each block of its
rows. So a first block has as many rows as a group has on average and an eighth more, and takes part in a product over
some groups. What larger groups have left comes in smaller blocks, one by one, in a loop that runs as often as there are
blocks. If the first blocks would be empty for the most part, all rows come that way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

ROWS_AT_ONCE = 640  # of first blocks: enough for all threads, little enough for the cache
SMALLER_BLOCK = 128
FEWEST_ON_AVERAGE = 16  # rows of a group; with fewer, many groups have none, and their weights should not be read

Block = Callable[..., tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]
Results = tuple[list[jax.Array], list[jax.Array]]


def over_groups(
    block: Block,
    weights: Any,
    rows: Sequence[tuple[jax.Array, jax.Array | None]],
    num_rows: int,
    sizes_E: jax.Array,
    first: Any,
    spare: Sequence[int] = (0,),
) -> Results:
    """``block`` of all rows.

    Args:
        block: from the weights (b, ...) of b groups and rows (b, r, ...) of theirs, which are 0 where a group has none,
            to results by row, (b, r, ...), and sums over rows, (b, ...).
        weights: a tree of arrays (G, ...), of which those from ``first`` on are the groups'.
        rows: arrays, each with the numbers of its rows that are meant (R,); None: its first R.
        num_rows: R.
        spare: how many rows to add to each result.

    Returns:
        Results by row, 0 behind the last group, and sums (E, ...): both in the dtype of the rows.
    """
    E, dtype = len(sizes_E), rows[0][0].dtype
    one = [jax.ShapeDtypeStruct((1, 1, *a.shape[1:]), a.dtype) for a, _ in rows]
    of_one = jax.tree.map(lambda w: jax.ShapeDtypeStruct((1, *w.shape[1:]), w.dtype), weights)
    like_results, like_sums = jax.eval_shape(block, of_one, *one)
    results = [jnp.zeros((num_rows + n, y.shape[-1]), dtype) for y, n in zip(like_results, spare, strict=True)]

    def no_sums(results: list[jax.Array]) -> Results:
        return results, [jnp.zeros((E, *s.shape[1:]), s.dtype) for s in like_sums]

    sums = no_sums([])[1]
    if num_rows:
        ends_E = jnp.cumsum(sizes_E)
        groups = _Groups(block, weights, rows, num_rows, ends_E - sizes_E, ends_E, first)
        done_E, first_size = jnp.zeros_like(sizes_E), _first_size(num_rows, E)
        if first_size:
            most_E = jnp.minimum(sizes_E, first_size)
            well_filled = 2 * jnp.sum(most_E) >= E * first_size
            results, sums = jax.lax.cond(well_filled, lambda y: groups.first_blocks(y, first_size), no_sums, results)
            done_E = jnp.where(well_filled, most_E, 0)
        results, sums = groups.further_blocks(results, sums, done_E, _further_size(num_rows, E))
    return results, [s.astype(dtype) for s in sums]


def _first_size(num_rows: int, num_groups: int) -> int:
    """Rows of the first block of each group; 0: there are none."""
    if num_rows < FEWEST_ON_AVERAGE * num_groups:
        return 0
    return min(math.ceil(num_rows * 9 / (8 * num_groups)), num_rows)


def _further_size(num_rows: int, num_groups: int) -> int:
    """Rows of further blocks: about half of what a group has on average."""
    return min(SMALLER_BLOCK, max(16, 1 << (num_rows // (2 * num_groups)).bit_length()), num_rows)


@dataclasses.dataclass(frozen=True)
class _Groups:
    """See :func:`over_groups`; rows from ``starts_E`` to ``ends_E`` are each group's."""

    block: Block
    weights: Any
    rows: Sequence[tuple[jax.Array, jax.Array | None]]
    num_rows: int
    starts_E: jax.Array
    ends_E: jax.Array
    first: Any

    def first_blocks(self, results: list[jax.Array], size: int) -> Results:
        """Works on the first ``size`` rows of each group, or as many as it has."""
        E = len(self.ends_E)
        neighbours = max(n for n in range(1, E + 1) if E % n == 0 and (n == 1 or n * size <= ROWS_AT_ONCE))

        def some(results: list[jax.Array], group: jax.Array) -> Results:
            return self.visit(results, group, [self.starts_E[group + i] for i in range(neighbours)], size)

        results, sums = jax.lax.scan(some, results, jnp.arange(0, E, neighbours))
        return results, [s.reshape(E, *s.shape[2:]) for s in sums]

    def further_blocks(self, results: list[jax.Array], sums: list[jax.Array], done_E: jax.Array, size: int) -> Results:
        """Works on what is left behind the first ``done_E`` rows of each group, ``size`` rows at a time."""
        blocks_E = (self.ends_E - self.starts_E - done_E + size - 1) // size
        last_E = jnp.cumsum(blocks_E)

        def one(i: jax.Array, state: Results) -> Results:
            group = jnp.searchsorted(last_E, i, side="right", method="compare_all")
            start = self.starts_E[group] + done_E[group] + (i - last_E[group] + blocks_E[group]) * size
            results, more = self.visit(state[0], group, [start], size)
            return results, [s.at[group].add(m[0]) for s, m in zip(state[1], more, strict=True)]

        return jax.lax.fori_loop(0, last_E[-1], one, (results, sums))

    def visit(self, results: list[jax.Array], group: Any, starts: Sequence[jax.Array], size: int) -> Results:
        """Works on a block of ``size`` rows of ``group`` and of each behind it, one for each of ``starts``."""
        at_b = [jnp.minimum(start, self.num_rows - size) for start in starts]  # nothing behind the last row is read
        inside_b = []
        for i, (start, at) in enumerate(zip(starts, at_b, strict=True)):
            row_r1 = at + jnp.arange(size)[:, None]
            inside_b.append((row_r1 >= start) & (row_r1 < self.ends_E[group + i]))
        blocks = [
            jnp.stack([jnp.where(inside, _read(*x, at, size), 0) for at, inside in zip(at_b, inside_b, strict=True)])
            for x in self.rows
        ]
        own = jax.tree.map(
            lambda w: jax.lax.dynamic_slice_in_dim(w, self.first + group, len(starts), axis=0), self.weights
        )
        new, sums = self.block(own, *blocks)
        written = [_write(out, y_b.astype(out.dtype), at_b, inside_b) for out, y_b in zip(results, new, strict=True)]
        return written, list(sums)


def _read(a: jax.Array, number_R: jax.Array | None, at: jax.Array, size: int) -> jax.Array:
    if number_R is None:
        return jax.lax.dynamic_slice_in_dim(a, at, size)
    return a.at[jax.lax.dynamic_slice_in_dim(number_R, at, size)].get(mode="promise_in_bounds")


def _write(out: jax.Array, y_b: jax.Array, at_b: Sequence[jax.Array], inside_b: Sequence[jax.Array]) -> jax.Array:
    for y, at, inside in zip(y_b, at_b, inside_b, strict=True):
        kept = jnp.where(inside, y, jax.lax.dynamic_slice_in_dim(out, at, len(y)))
        out = jax.lax.dynamic_update_slice_in_dim(out, kept, at, axis=0)
    return out
