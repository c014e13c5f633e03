"""Rows fetched one by one from HBM on TPU: weighted sums of them, and their dots with other rows.

A grid step asks for the rows of a block of tokens, each by a copy of its own, and works on those of the block before,
which have arrived meanwhile. A copy moves whole words of 32 bits. Numbers of 16 bits share a word with those of the
next row: both rows come, and the wanted half of each word is taken. Rows that are nowhere are not asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES, ROWS = 128, 8  # of a tile of 32-bit words
AT_ONCE = 16  # tokens that are worked on at once: a tile of bfloat16
ROOM = 8 * 2**20  # bytes for the rows of two blocks
BLOCKS = (128, 64, 32, 16)  # tokens of a block: as many as find room


def gather(
    x_TD: Float[Array, "T D"], token_R: Int[Array, " R"], weight_R: Float[Array, " R"] | None, *, interpret: Any = False
) -> Float[Array, "R D"]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    weight = None if weight_R is None else weight_R[:, None]
    return gather_sum(x_TD, token_R[:, None], weight, interpret=interpret)


def gather_sum(
    y_RD: Float[Array, "R D"],
    row_TX: Int[Array, "T X"],
    weights_TX: Float[Array, "T X"] | None,
    *,
    interpret: Any = False,
) -> Float[Array, "T D"]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    D, columns = y_RD.shape[1], []
    if weights_TX is not None:
        columns = [jax.lax.bitcast_convert_type(weights_TX.astype(jnp.float32), jnp.int32)]
    out = jax.ShapeDtypeStruct((len(row_TX), round_up(D, LANES)), y_RD.dtype)
    return _call(_sum, y_RD, row_TX, columns, [], out, interpret)[:, :D]


def gather_dot(
    y_RD: Float[Array, "R D"], row_TX: Int[Array, "T X"], dout_TD: Float[Array, "T D"], *, interpret: Any = False
) -> Float[Array, "T X"]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    out = jax.ShapeDtypeStruct(row_TX.shape, jnp.float32)
    return _call(_dot, y_RD, row_TX, [], [dout_TD], out, interpret)


def block_size(num_choices: int, width: int) -> int:
    """Tokens of a block; 0: not even the smallest finds room."""
    bytes_of_token = 2 * num_choices * round_up(width, LANES) * 4
    return next((block for block in BLOCKS if block * bytes_of_token <= ROOM), 0)


def round_up(n: int, to: int) -> int:
    """The next multiple."""
    return -(-n // to) * to


def _padded(x: Array, rows: int, columns: int) -> Array:
    """With zeros up to so many rows and columns."""
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))


def _call(
    work: Callable[..., None],
    y_RD: Array,
    row_TX: Array,
    columns: list[Array],
    beside: list[Array],
    out: jax.ShapeDtypeStruct,
    interpret: Any,
) -> Array:
    """``work`` of the tokens' rows of y, for every token.

    Args:
        work: see :func:`_sum`, :func:`_dot`.
        columns: (T, X) words that belong to the rows.
        beside: (T, D) rows of the tokens themselves.
        out: what comes of it.
    """
    (R, D), (T, X), itemsize = y_RD.shape, row_TX.shape, y_RD.dtype.itemsize
    per_word = 4 // itemsize
    block, lanes = block_size(X, D), round_up(D, LANES)
    num, padded = -(-T // block), round_up(T, block)
    goes_TX = row_TX < R
    fetch_TX = jnp.where(goes_TX, row_TX // per_word, -1)
    fetch_TX = jnp.pad(fetch_TX, ((0, padded + block - T), (0, 0)), constant_values=-1).reshape(num + 1, 1, block * X)
    counts = jnp.pad(jnp.sum(fetch_TX >= 0, axis=(1, 2), dtype=jnp.int32), (1, 0))
    # A word with two numbers in it, shifted left and masked, is the wanted one as float32.
    mask_TX = jnp.where(goes_TX, -1 << (32 - 32 // per_word), 0)
    shifts = [16 * (1 - row_TX % 2)] if per_word == 2 else []
    words = jnp.concatenate([mask_TX, *shifts, *columns], axis=1).astype(jnp.int32)
    y_RD = _padded(y_RD, round_up(R, per_word), lanes)
    if per_word == 2 and interpret:  # which knows no bitcast of a reference
        y_RD = jax.lax.bitcast_convert_type(y_RD.reshape(-1, 2, lanes).swapaxes(1, 2), jnp.int32)

    def before(width: int) -> pl.BlockSpec:
        """The block in front of that whose rows are asked for."""
        return pl.BlockSpec((block, width), lambda i: (jnp.maximum(i - 1, 0), 0))

    return pl.pallas_call(
        functools.partial(_kernel, work=work, num_choices=X, halves=per_word == 2, unrolled=not interpret),
        grid=(num + 1,),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((1, 1, block * X), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pltpu.HBM),
            before(words.shape[1]),
            [before(lanes)] * len(beside),
        ],
        out_specs=before(out.shape[1]),
        out_shape=jax.ShapeDtypeStruct((padded, out.shape[1]), out.dtype),
        scratch_shapes=[
            pltpu.VMEM((2, X * block // ROWS, ROWS, lanes), jnp.int32 if per_word == 2 else jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(
            flops=0,  # of matrix products
            transcendentals=0,
            bytes_accessed=4 * T * X * D + T * D * itemsize,
        ),
        interpret=interpret,
        name=f"expert_dispatch{work.__name__}",
    )(
        counts,
        fetch_TX,
        y_RD,
        _padded(words, padded, words.shape[1]),
        [_padded(x_TD, padded, lanes) for x_TD in beside],
    )[:T]


def _kernel(counts_ref, fetch_ref, y_ref, words_ref, beside_refs, out_ref, rows, arrived, *, work, num_choices: int,
            halves: bool, unrolled: bool) -> None:  # fmt: skip
    """Asks for the rows of block i, and works on those of block i - 1; there is none in front of the first.

    Copies are started between vector instructions if the loop over them is unrolled, which takes long to interpret.
    """
    i, X = pl.program_id(0), num_choices
    y_words = y_ref.bitcast(jnp.int32) if y_ref.dtype.itemsize == 2 else y_ref
    asks, works, tiles = jax.lax.rem(i, 2), jax.lax.rem(i + 1, 2), rows.shape[1] // X
    per_part = AT_ONCE // ROWS

    for bit in range((X * tiles * ROWS).bit_length()):  # waits for the count in powers of two

        @pl.when((counts_ref[i] >> bit) & 1 == 1)
        def _(bit=bit) -> None:
            some = rows.at[works, pl.ds(0, max(1, (1 << bit) // ROWS)), pl.ds(0, min(1 << bit, ROWS))]
            pltpu.make_async_copy(some, some, arrived.at[works]).wait()

    def part(j: Any, _: None) -> None:
        def ask(n: Any, _: None = None) -> None:
            fetch, t, x = fetch_ref[0, 0, j * AT_ONCE * X + n], n // X, n % X

            @pl.when(fetch >= 0)
            def start() -> None:
                to = rows.at[asks, x * tiles + j * per_part + t // ROWS, pl.ds(t % ROWS, 1)]
                pltpu.make_async_copy(y_words.at[pl.ds(fetch, 1)], to, arrived.at[asks]).start()

        def lanes_of(width: int) -> Iterator[slice]:
            """Pieces of rows, between which copies are started: the scalar unit is as busy as the vector units."""
            asks_of_piece = -(-AT_ONCE * X * LANES // width)
            for n, start in enumerate(range(0, width, LANES)):
                for m in range(n * asks_of_piece, min((n + 1) * asks_of_piece, AT_ONCE * X * unrolled)):
                    ask(m)
                yield slice(start, start + LANES)

        if not unrolled:
            jax.lax.fori_loop(0, AT_ONCE * X, ask, None)
        tokens = pl.ds(pl.multiple_of(j * AT_ONCE, AT_ONCE), AT_ONCE)

        def column(c: int) -> Array:
            return jnp.broadcast_to(words_ref[tokens, c : c + 1], (AT_ONCE, LANES))

        masks = [column(x) for x in range(X)]
        shifts = [column(X + x) for x in range(X)] if halves else []
        others = [column(c) for c in range(len(masks) + len(shifts), words_ref.shape[1])]

        def row(x: int, lanes: slice) -> Array:
            words = rows[works, pl.ds(x * tiles + j * per_part, per_part), :, lanes].reshape(AT_ONCE, LANES)
            if not halves:
                return jnp.where(masks[x] != 0, words, 0)
            return pltpu.bitcast((words << shifts[x]) & masks[x], jnp.float32)

        work(tokens, lanes_of, row, others, beside_refs, out_ref, X)

    jax.lax.fori_loop(0, tiles // per_part, part, None)


Pieces = Callable[[int], Iterator[slice]]


def _sum(
    tokens: Any, lanes_of: Pieces, row: Callable[..., Array], others: list[Array], _: Any, out_ref: Any, X: int
) -> None:
    """The sum of their rows, with weights if there are some."""
    weights = [pltpu.bitcast(words, jnp.float32) for words in others]
    for lanes in lanes_of(out_ref.shape[1]):
        parts = [row(x, lanes) for x in range(X)]
        parts = [w * part for w, part in zip(weights, parts, strict=True)] if weights else parts
        out_ref[tokens, lanes] = functools.reduce(jnp.add, parts).astype(out_ref.dtype)


def _dot(
    tokens: Any, lanes_of: Pieces, row: Callable[..., Array], _: Any, beside_refs: list[Any], out_ref: Any, X: int
) -> None:
    """The products of their rows with their own row beside."""
    (dout_ref,) = beside_refs
    totals = [jnp.zeros((AT_ONCE, LANES), jnp.float32)] * X
    for lanes in lanes_of(dout_ref.shape[1]):
        dout = dout_ref[tokens, lanes].astype(jnp.float32)
        totals = [total + dout * row(x, lanes) for x, total in enumerate(totals)]
    at = jax.lax.broadcasted_iota(jnp.int32, (AT_ONCE, X), 1)
    dots = jnp.zeros((AT_ONCE, X), jnp.float32)
    for x, total in enumerate(totals):
        dots = jnp.where(at == x, jnp.sum(total, axis=1, keepdims=True), dots)
    out_ref[tokens] = dots
