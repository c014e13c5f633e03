"""Top-k selection and counting-sort positions in one kernel on TPU: experts in sublanes, tokens in lanes.

A score becomes an integer of the same order, so that two smaller ones are left for what must not be chosen. The best of
a column is its largest integer, and of equal ones the first; it is taken out, and so on. What was taken out is a 0/1
matrix whose running count over tokens is a product with a triangle of ones, exact in float32, behind the counts of all
earlier blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.expert_dispatch.tpu_rows import LANES, ROWS, round_up

TOKENS = 512  # of a block
CHOSEN, BARRED = -(2**31), -(2**31) + 1  # both below the integer of -inf


def select(
    choice_TE: Float[Array, "T E"], counted_T: Bool[Array, " T"] | None, *, spec: Any, interpret: Any = False
) -> tuple[Int[Array, "T X"], Int[Array, "T X"], Int[Array, " E"]]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    (T, E), G, X = choice_TE.shape, spec.num_groups, spec.top_k
    size, rows = E // G, round_up(E // G, ROWS)  # experts of a group, and the sublanes that hold them
    block = min(TOKENS, round_up(T, LANES))
    padded = round_up(T, block)
    bits_TE = jax.lax.bitcast_convert_type(choice_TE, jnp.int32)
    order_ET = jnp.pad(
        _mirror(bits_TE).T.reshape(G, size, T), ((0, 0), (0, rows - size), (0, padded - T)), constant_values=BARRED
    )
    counted_1T = jnp.ones((1, T), jnp.int32) if counted_T is None else counted_T[None].astype(jnp.int32)

    def columns(height: int) -> pl.BlockSpec:
        return pl.BlockSpec((height, block), lambda i: (0, i))

    experts_XT, position_XT, counts = pl.pallas_call(
        functools.partial(_kernel, spec=spec, size=size),
        grid=(padded // block,),
        in_specs=[columns(G * rows), columns(1)],
        out_specs=[columns(X), columns(X), pl.BlockSpec((G * rows, LANES), lambda i: (0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((X, padded), jnp.int32),
            jax.ShapeDtypeStruct((X, padded), jnp.int32),
            jax.ShapeDtypeStruct((G * rows, LANES), jnp.int32),
        ],
        scratch_shapes=[pltpu.VMEM((G * rows, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=4 * T * (E + 2 * X)),
        interpret=interpret,
        name="expert_dispatch_select",
    )(order_ET.reshape(G * rows, padded), jnp.pad(counted_1T, ((0, 0), (0, padded - T))))
    counts_E = counts[:, 0].reshape(G, rows)[:, :size].reshape(E)
    return experts_XT[:, :T].T, position_XT[:, :T].T, counts_E


def _mirror(bits: Array) -> Array:
    """float32 bits to integers of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _best(order: Array) -> tuple[Array, Array, Array]:
    """The largest of each column, in which row it stands first, and the columns without it."""
    at = jax.lax.broadcasted_iota(jnp.int32, order.shape, 0)
    best = jnp.max(order, axis=0, keepdims=True)
    first = jnp.min(jnp.where(order == best, at, order.shape[0]), axis=0, keepdims=True)
    return best, first, jnp.where(at == first, CHOSEN, order)


def _judged(order: Array, spec: Any, size: int) -> Array:
    """A group's score, as an integer of the same order."""
    best, _, rest = _best(order)
    if spec.group_score == "max" or size == 1:
        return best
    one, other = (pltpu.bitcast(_mirror(x), jnp.float32) for x in (best, _best(rest)[0]))
    both = one + other
    both = jnp.where(both == both, both, -jnp.inf)  # inf - inf
    return _mirror(pltpu.bitcast(jnp.where(both == 0, 0.0, both), jnp.int32))


def _kernel(order_ref, counted_ref, experts_ref, position_ref, counts_ref, count, *, spec, size: int) -> None:
    @pl.when(pl.program_id(0) == 0)
    def begin() -> None:
        count[:] = jnp.zeros_like(count)

    order, G = order_ref[:], spec.num_groups
    rows, tokens = order.shape[0] // G, order.shape[1]
    if G > 1:
        groups = [order[g * rows : (g + 1) * rows] for g in range(G)]
        judged = jnp.concatenate([_judged(group, spec, size) for group in groups], axis=0)
        for _ in range(spec.top_groups):
            judged = _best(judged)[2]
        kept = [jnp.where(judged[g : g + 1] == CHOSEN, group, BARRED) for g, group in enumerate(groups)]
        order = jnp.concatenate(kept, axis=0)
    firsts = []
    for _ in range(spec.top_k):
        _, first, order = _best(order)
        firsts.append(first)
    counted = counted_ref[:] > 0
    chosen = jnp.where((order == CHOSEN) & counted, 1.0, 0.0).astype(jnp.bfloat16)

    earlier, total = [], count[:]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    earlier_and_all = [jnp.where(row < column, 1.0, 0.0), jnp.ones((LANES, LANES), jnp.float32)]
    ones = jnp.concatenate(earlier_and_all, axis=1).astype(jnp.bfloat16)
    for start in range(0, tokens, LANES):
        counts = jnp.dot(chosen[:, start : start + LANES], ones, preferred_element_type=jnp.float32)
        earlier.append(total + counts[:, :LANES])
        total = total + counts[:, LANES:]
    count[:] = total
    counts_ref[:] = total.astype(jnp.int32)

    before = jnp.concatenate(earlier, axis=1)
    at = jax.lax.broadcasted_iota(jnp.int32, before.shape, 0)
    for x, first in enumerate(firsts):
        position = jnp.sum(jnp.where(at == first, before, 0.0), axis=0, keepdims=True)
        position_ref[x : x + 1] = jnp.where(counted, position, 0.0).astype(jnp.int32)
        group = jax.lax.div(first, rows)
        experts_ref[x : x + 1] = jnp.where(counted, first - group * (rows - size), G * size)
