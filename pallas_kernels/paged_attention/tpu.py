"""Paged attention on TPU: the queries of a row stay, its pages stream by, a chunk of them while the last is worked on.

Only pages that are there are read, each once for all queries of a block and all heads. A chunk is several pages, so
that their copies are on their way together.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.platforms import NARROW

LANES, SUBLANES = 128, 8
LOG2_E = math.log2(math.e)
MASKED = -1e30  # finite: the difference of two is a number
WIDEST_HEAD, WIDEST_LATENT = 256, 640
QUERIES = 512  # of one key/value head, that look at a chunk together
CHUNK_BYTES = 1 << 20  # of keys: enough on its way to hide the time to the memory
SLOTS = 512  # of a chunk, at the most
ROW_BYTES = 7 << 20  # of what all queries of a block keep on the chip: 16 MiB is the least that a chip has
VMEM_LIMIT = 16 << 20


def why_not(
    q: Array, k: Array, v: Array | None, pages: Array, positions: Array, first: Array, *, value_width: int
) -> str | None:
    """Why the kernel can not take these arrays, in a sentence; None: it can."""
    if jax.enable_x64.value:
        return NARROW
    dtypes = [x.dtype for x in (q, k, v) if x is not None]
    if len(set(dtypes)) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32):
        said = ", ".join(map(str, dtypes))
        return f"the dtypes of queries, keys and values are {said}; the kernel takes all bfloat16 or all float32"
    widest = WIDEST_HEAD if v is not None else WIDEST_LATENT
    if max(q.shape[-1], value_width) > widest:
        return f"heads are {q.shape[-1]} and {value_width} wide; the kernel takes up to {widest}"
    tile = SUBLANES * 4 // q.dtype.itemsize
    if (P := k.shape[2]) % tile or P > SLOTS:
        return f"pages have {P} slots; the kernel takes multiples of {tile} up to {SLOTS}"
    return None


def forward(
    q_BTNH: Array,
    k_MKPH: Array,
    v_MKPU: Array | None,
    pages_BJ: Array,
    positions_BJP: Array,
    first_BT: Array,
    *,
    scale: float,
    value_width: int,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """See :mod:`pallas_kernels.paged_attention.attend`."""
    (B, T, N, H), (_, K, P, _), U, J = q_BTNH.shape, k_MKPH.shape, value_width, pages_BJ.shape[1]
    pools = [k_MKPH] if v_MKPU is None else [k_MKPH, v_MKPU]
    G, tile = N // K, SUBLANES * 4 // q_BTNH.dtype.itemsize
    C = chunk_pages(K, P, max(H, U), k_MKPH.dtype.itemsize, J)
    chunks = -(-J // C)
    # Queries of a block, those of a group side by side; each has its input, output, logarithm (all twice) and sums.
    row_bytes = K * (2 * H * q_BTNH.dtype.itemsize + 4 * (2 * U + 4 * LANES)) + 2 * 4 * LANES
    rows = min(QUERIES, ROW_BYTES // row_bytes // tile * tile, -(-T * G // tile) * tile)
    blocks = -(-T * G // rows)

    q_BKRH = q_BTNH.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, blocks * rows - T * G), (0, 0)))
    first_BR = jnp.pad(jnp.repeat(first_BT, G, axis=1), ((0, 0), (0, blocks * rows - T * G)))
    first_BRl = jnp.broadcast_to(first_BR[..., None], (*first_BR.shape, LANES))
    pages_BJ = jnp.pad(pages_BJ, ((0, 0), (0, chunks * C - J)), constant_values=-1)
    positions_BJP = jnp.pad(positions_BJP, ((0, 0), (0, chunks * C - J), (0, 0)))
    positions_BJP = jnp.where((pages_BJ >= 0)[..., None], positions_BJP, -1)
    used_B = jnp.max(jnp.where(pages_BJ >= 0, jnp.arange(chunks * C) // C + 1, 0), axis=1)

    slots, numbers = J * P, k_MKPH.dtype.itemsize * K * sum(pool.shape[-1] for pool in pools)
    out, log = pl.pallas_call(
        functools.partial(_kernel, C=C, scale=scale * LOG2_E),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, blocks),
            in_specs=[
                pl.BlockSpec((1, 1, chunks * C), lambda b, r, _: (b, 0, 0), memory_space=pltpu.SMEM),
                pl.BlockSpec((1, chunks, 1, C * P), lambda b, r, _: (b, 0, 0, 0)),
                pl.BlockSpec((1, rows, LANES), lambda b, r, _: (b, r, 0)),
                pl.BlockSpec((1, K, rows, H), lambda b, r, _: (b, 0, r, 0)),
                *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(pools),
            ],
            out_specs=[
                pl.BlockSpec((1, K, rows, U), lambda b, r, _: (b, 0, r, 0)),
                pl.BlockSpec((1, K, rows, LANES), lambda b, r, _: (b, 0, r, 0)),
            ],
            scratch_shapes=[
                *[pltpu.VMEM((2, K, C * P, pool.shape[-1]), pool.dtype) for pool in pools],
                pltpu.SemaphoreType.DMA((2, len(pools))),
                pltpu.VMEM((2, K, rows, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, K, blocks * rows, U), jnp.float32),
            jax.ShapeDtypeStruct((B, K, blocks * rows, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        # As if all pages were there: how many are, only the run knows.
        cost_estimate=pl.CostEstimate(
            flops=2 * B * T * N * slots * (H + U),
            transcendentals=B * T * N * slots,
            bytes_accessed=B * slots * (blocks * numbers + 4) + 4 * B * T * N * (H + U + 2),
        ),
        interpret=interpret,
        name="paged_attention",
    )(used_B, pages_BJ[:, None], positions_BJP.reshape(B, chunks, 1, C * P), first_BRl, q_BKRH, *pools)

    def positions_first(x_BKR: Array) -> Array:
        x_BKTG = x_BKR[:, :, : T * G].reshape(B, K, T, G, *x_BKR.shape[3:])
        return x_BKTG.swapaxes(1, 2).reshape(B, T, N, *x_BKR.shape[3:])

    return positions_first(out), positions_first(log[..., 0])


def chunk_pages(K: int, P: int, width: int, itemsize: int, J: int) -> int:
    """How many pages stream by together."""
    page_bytes = K * P * width * itemsize
    return max(1, min(CHUNK_BYTES // page_bytes, SLOTS // P, J))


def _kernel(used_ref, pages_ref, positions_ref, first_ref, q_ref, *refs, C: int, scale: float) -> None:
    *rest, semaphores, sums_ref = refs
    num_pools = (len(rest) - 2) // 2  # keys and values, or keys that begin with the values
    pools, (out_ref, log_ref), buffers = rest[:num_pools], rest[num_pools : num_pools + 2], rest[num_pools + 2 :]
    k_ref, v_ref = buffers[0], buffers[-1]
    (K, P), U = pools[0].shape[1:3], out_ref.shape[-1]
    num = used_ref[pl.program_id(0)]

    def for_pages(c: Any, do: Any) -> None:
        """Calls ``do`` with each page of chunk c that is there, and where it goes."""

        def one(i: Any, _: None) -> None:
            page, slots = pages_ref[0, 0, c * C + i], pl.ds(pl.multiple_of(i * P, P), P)
            do(page, jax.lax.rem(c, 2), slots)

        jax.lax.fori_loop(0, C, one, None)

    def copies(page: Any, half: Any, slots: Any) -> list[Any]:
        return [
            pltpu.make_async_copy(pool.at[page], buffer.at[half, :, slots], semaphores.at[half, i])
            for i, (pool, buffer) in enumerate(zip(pools, buffers, strict=True))
        ]

    def fetch(page: Any, half: Any, slots: Any) -> None:
        @pl.when(page >= 0)
        def _() -> None:
            for copy in copies(page, half, slots):
                copy.start()

        @pl.when(page < 0)  # a weight of 0 times what was there must be 0
        def _() -> None:
            v_ref[half, :, slots] = jnp.zeros_like(v_ref[half, :, slots])

    def arrive(page: Any, half: Any, slots: Any) -> None:
        @pl.when(page >= 0)
        def _() -> None:
            for copy in copies(page, half, slots):
                copy.wait()

    sums_ref[0] = jnp.full_like(sums_ref[0], MASKED)
    sums_ref[1] = jnp.zeros_like(sums_ref[1])
    out_ref[:] = jnp.zeros_like(out_ref)
    pl.when(num > 0)(lambda: for_pages(0, fetch))

    def chunk(c: Any, _: None) -> None:
        for_pages(c, arrive)
        pl.when(c + 1 < num)(lambda: for_pages(c + 1, fetch))
        position, first = positions_ref[0, c], first_ref[0]  # (1, slots), and equal lanes
        slots = position.shape[1]
        seen = position >= jnp.tile(first, (1, -(-slots // LANES)))[:, :slots]
        half = jax.lax.rem(c, 2)

        def head(k: Any, _: None) -> None:
            scores = jnp.where(seen, _product(q_ref[0, k], k_ref[half, k], 1) * scale, MASKED)
            top = jnp.maximum(sums_ref[0, k], jnp.max(scores, axis=1, keepdims=True))
            p = jnp.where(seen, jnp.exp2(scores - top[:, :1]), 0)
            shrink = jnp.exp2(sums_ref[0, k] - top)
            sums_ref[0, k] = top
            sums_ref[1, k] = sums_ref[1, k] * shrink + jnp.sum(p, axis=1, keepdims=True)
            out_ref[0, k] = out_ref[0, k] * shrink[:, :1] + _product(p.astype(v_ref.dtype), v_ref[half, k, :, :U], 0)

        jax.lax.fori_loop(0, K, head, None)

    jax.lax.fori_loop(0, num, chunk, None)
    total = sums_ref[1]
    log_ref[0] = jnp.where(total > 0, (sums_ref[0] + jnp.log2(total)) / LOG2_E, -jnp.inf)
    out_ref[0] = out_ref[0] / jnp.where(total > 0, total, 1)[..., :1]


def _product(a: Array, b: Array, over: int) -> Array:
    """A matrix product over the last dimension of ``a``, summed in float32; float32 numbers keep their precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (over,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
