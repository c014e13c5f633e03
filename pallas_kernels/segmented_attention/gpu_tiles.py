"""What the Mosaic GPU kernels share: tiles, which blocks a tile visits, masks, and products."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.segmented_attention.gpu import TILE
from pallas_kernels.segmented_attention.segments import Segments

ROWS = 64  # of a warpgroup: what one wgmma instruction takes
GROUPS = 2  # warpgroups that compute; one more copies
assert ROWS * GROUPS == TILE
# The axes of the grid, the fastest last: the thread blocks that run at a time share keys and values in the L2 cache.
GRID = ("batch", "head", "tile")
LOG2_E = math.log2(math.e)

MATRIX = plgpu.Layout.WGMMA
ROW = MATRIX.reduce(1)  # a number for each row of a matrix
COLUMN = MATRIX.reduce(0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a kernel is compiled for.

    Attributes:
        segments: how rows are cut.
        scale: of the scores.
        pairs: (query, key) that the definition asks for, in a row.
        interpret: None, or the parameters of the interpreter.
    """

    segments: Segments
    scale: float
    pairs: int
    interpret: Any = None

    def call(self, kernel: Any, out_type: Any, grid: tuple[int, int, int], scratch: dict[str, Any]) -> Any:
        """``kernel(setting, *refs, **scratch)`` as a function of arrays, the first of which are q, k and v."""
        call = plgpu.kernel(
            functools.partial(kernel, self),
            out_type=out_type,
            scratch_types=scratch,
            grid=grid,
            grid_names=GRID,
            num_threads=GROUPS + 1,
            thread_name="group",
            kernel_name=kernel.__name__,
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=self.interpret,
        )

        def run(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, *more: jax.Array) -> Any:
            # For those who count FLOPs from the program: each kernel has one product of either width that is asked for.
            (B, _, N, H), U = q_BSNH.shape, v_BSKU.shape[-1]
            with jax.named_scope(f"kernel_flops={2 * self.pairs * B * N * (H + U)}"):
                return call(q_BSNH, k_BSKH, v_BSKU, *more)

        return run

    def laid_out(self, x: Any, layout: Any) -> Any:
        """Says which thread holds what; the interpreter knows no threads within a warpgroup."""
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def load(self, ref: Any, layout: Any) -> Any:
        """A few numbers, to the threads that want them."""
        return ref[...] if self.interpret else plgpu.load(ref, (), layout=layout, optimized=False)

    def full(self, shape: tuple[int, ...], value: float, layout: Any) -> Any:
        return self.laid_out(jnp.full(shape, value, jnp.float32), layout)

    def positions(self, shape: tuple[int, int]) -> tuple[Any, Any]:
        """The row and the column of each element."""
        iotas = (jax.lax.broadcasted_iota(jnp.int32, shape, dimension) for dimension in (0, 1))
        row, column = (self.laid_out(iota, MATRIX) for iota in iotas)
        return row, column

    def products(self, *wanted: Any, meanwhile: Callable[[], None] = lambda: None) -> tuple[Any, ...]:
        """``into + a @ b`` for each (into, a, b), all on their way together.

        ``into`` is an array, or the shape of zeros; ``a`` in shared memory or an array; ``b`` in shared memory, perhaps
        :class:`Transposed`. ``meanwhile`` is called between the start and the wait. The interpreter has no product with
        an operand that is transposed or in registers: there, XLA computes what wgmma does.
        """
        into = tuple(self.full(x, 0, MATRIX) if isinstance(x, tuple) else x for x, _, _ in wanted)
        if self.interpret:
            terms = (jnp.dot(a[...], b[...], preferred_element_type=jnp.float32) for _, a, b in wanted)
            found = tuple(x + term for x, term in zip(into, terms, strict=True))
            meanwhile()
            return found

        def start(refs: Any) -> None:
            for ref, (_, a, b) in zip(refs, wanted, strict=True):
                plgpu.wgmma(ref, a, b.swapped if isinstance(b, Transposed) else b)
            meanwhile()

        return pl.run_state(start)(tuple(plgpu.ACC.init(x) for x in into))


class Transposed:
    """A matrix in shared memory, read with its axes swapped."""

    def __init__(self, ref: Any):
        self.ref = ref

    @property
    def swapped(self) -> Any:
        return plgpu.transpose_ref(self.ref, (1, 0))

    def __getitem__(self, index: Any) -> Any:
        return self.ref[index].T


def longest_first(num_rows: int) -> Any:
    """The tile of queries of this thread block: the last ones see the most, and begin first."""
    return num_rows // TILE - 1 - jax.lax.axis_index("tile")


def swizzled(*shape: int, width: int = 64) -> Any:
    """Shared memory, arranged as wgmma reads it without bank conflicts, by ``width`` numbers of a row."""
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def across(x: Any, shape: tuple[int, int]) -> Any:
    """A number for each row, along the row."""
    return jax.lax.broadcast_in_dim(x, shape, [0])


def down(x: Any, shape: tuple[int, int]) -> Any:
    """A number for each column, along the column."""
    return jax.lax.broadcast_in_dim(x, shape, [1])


# ---------------------------------------------------------------- which blocks a tile visits


def extents(ids_BS: Any, block: int) -> tuple[Any, Any]:
    """The least and the greatest id of each block."""
    blocks = ids_BS.reshape(ids_BS.shape[0], -1, block)
    return blocks.min(-1), blocks.max(-1)


def spans(table_I4: np.ndarray, tiles: Any, blocks: Any, batch: int) -> jax.Array:
    """For each tile: first block to visit, first and end of those without a mask, end. (B, I, 4), int32.

    ``table`` says it for one document. ``tiles`` and ``blocks`` are :func:`extents` of ids, or None. A block that holds
    other ids than the tile needs a mask too, and those at the start that hold none of its ids are left out: all that
    hold none, where documents follow each other.
    """
    if tiles is None:
        return jnp.broadcast_to(jnp.asarray(table_I4, jnp.int32), (batch, *table_I4.shape))
    (low_BI, high_BI), (least_BJ, most_BJ) = tiles, blocks
    start, unmasked, masked, end = (jnp.asarray(x, jnp.int32)[:, None] for x in table_I4.T)
    j = jnp.arange(least_BJ.shape[1], dtype=jnp.int32)
    meets = (low_BI[..., None] <= most_BJ[:, None]) & (least_BJ[:, None] <= high_BI[..., None])
    first_BI = jnp.min(jnp.where(meets & (j >= start) & (j < end), j, end), axis=-1)
    alike = (low_BI == high_BI)[..., None] & (least_BJ == most_BJ)[:, None] & meets
    mixed = ~alike & (j >= first_BI[..., None]) & (j < masked)
    unmasked_BI = jnp.maximum(jnp.max(jnp.where(mixed, j + 1, unmasked), axis=-1), first_BI)
    ends = (jnp.broadcast_to(x[:, 0], first_BI.shape) for x in (masked, end))
    return jnp.stack([first_BI, unmasked_BI, *ends], axis=-1)


def key_spans(segments: Segments, ids: Any, tail_ids: Any, count: int, keys: int, batch: int) -> jax.Array:
    """Which blocks of ``keys`` keys each of ``count`` tiles of queries visits: of the tails, and of its segment.

    (B, I, 8): :func:`spans` of either, one after the other.
    """
    first_I = np.arange(count) * TILE
    segment_I = first_I // segments.size
    behind_I = segment_I * segments.window
    zero_I = np.zeros_like(first_I)
    of_tails = np.stack([zero_I, zero_I, behind_I // keys, -(-behind_I // keys)], axis=-1)
    start_I = segment_I * segments.size // keys
    of_own = np.stack([start_I, start_I, first_I // keys, (first_I + TILE) // keys], axis=-1)
    tiles = None if ids is None else extents(ids, TILE)
    parts = ((of_tails, tail_ids), (of_own, ids))
    both = [spans(table, tiles, None if ids is None else extents(x, keys), batch) for table, x in parts]
    return jnp.concatenate(both, axis=-1)


def query_spans(segments: Segments, ids: Any, count: int, queries: int, batch: int) -> jax.Array:
    """Which blocks of ``queries`` queries see each of ``count`` tiles of keys: (B, I, 4), as :func:`spans`."""
    first_I = np.arange(count) * TILE
    end_I = (first_I // segments.size + 1) * segments.size
    tail_I = end_I - segments.window
    last_I = np.where(first_I + TILE > tail_I, count * TILE, end_I)
    masked_I = np.where(first_I >= tail_I, last_I, end_I)  # later segments see a part of the tile
    table = np.stack([first_I, first_I + TILE, masked_I, last_I], axis=-1) // queries
    if ids is None:
        return spans(table, None, None, batch)
    # Queries look back, keys are looked at from ahead: the same, counted from the end.
    num = count * TILE // queries
    least, most = (x[:, ::-1] for x in extents(ids, queries))
    return num - spans(num - table[:, ::-1], extents(ids, TILE), (least, most), batch)[..., ::-1]


class Visit:
    """The blocks of keys that a tile of queries visits, tails first, as :func:`key_spans` says.

    ``ids_refs`` are empty, or ids of the queries, and of the keys: tails first, then all.
    """

    def __init__(self, setting: Setting, spans_ref: Any, ids_refs: Any, batch: Any, tile: Any, keys: int):
        self.setting, self.ids_refs, self.batch, self.keys = setting, ids_refs, batch, keys
        self.tails, self.own = (tuple(spans_ref[batch, tile, 4 * part + i] for i in range(4)) for part in (0, 1))
        self.num_tails = self.tails[3] - self.tails[0]
        self.count = self.num_tails + self.own[3] - self.own[0]
        segment = jax.lax.div(tile * TILE, jnp.int32(setting.segments.size))
        self.behind = segment * setting.segments.window  # keys in the tails of earlier segments

    def block(self, step: Any) -> tuple[Any, Any]:
        """Whether it is one of the tails, and which."""
        of_tails = step < self.num_tails
        return of_tails, jnp.where(of_tails, self.tails[0] + step, self.own[0] + step - self.num_tails)

    def copy(self, rows: Callable[[Any], Any], ring: Any, stages: int) -> None:
        """Copies what is visited into rings of ``stages`` buffers.

        ``rows(block)`` indexes global memory. ``ring`` holds, for each array, its tails, all of it, the buffers, and
        barriers for "it is here" and "it is no longer needed".
        """

        @pl.loop(0, self.count + stages)  # at the end it only waits
        def _(step):
            slot = jax.lax.rem(step, jnp.int32(stages))
            of_tails, block = self.block(step)
            for tail_ref, ref, smem, here, done in ring:
                pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, done.at[slot]))
                for source, wanted in ((tail_ref, of_tails), (ref, ~of_tails & (step < self.count))):
                    copy = functools.partial(plgpu.copy_gmem_to_smem, source.at[rows(block)], smem.at[slot])
                    pl.when(wanted)(functools.partial(copy, here.at[slot]))

    def mask(self, scores: Any, step: Any, first_query: Any) -> Any:
        """Scores of the queries from ``first_query`` on; -inf for what they do not see."""
        of_tails, block = self.block(step)

        def plain(span: Any) -> Any:
            return (block >= span[1]) & (block < span[2])

        def masked() -> Any:
            row, column = self.setting.positions(scores.shape)
            # In the tails: those of earlier segments; in its own segment: what is not behind the query.
            limit = jnp.where(of_tails, self.behind - 1, first_query)
            sees = column + (block * self.keys - limit) <= row * jnp.where(of_tails, 0, 1)
            if self.ids_refs:
                query_ids_ref, key_ids_ref = (ref.at[self.batch] for ref in self.ids_refs)
                num_tail_keys = key_ids_ref.shape[0] - query_ids_ref.shape[0]
                first_key = block * self.keys + jnp.where(of_tails, 0, num_tail_keys)
                query_ids = self.setting.load(query_ids_ref.at[pl.ds(first_query, ROWS)], ROW)
                key_ids = self.setting.load(key_ids_ref.at[pl.ds(first_key, self.keys)], COLUMN)
                sees &= across(query_ids, scores.shape) == down(key_ids, scores.shape)
            return jnp.where(sees, scores, -jnp.inf)

        all_seen = (of_tails & plain(self.tails)) | (~of_tails & plain(self.own))
        return jax.lax.cond(all_seen, lambda: scores, masked)
