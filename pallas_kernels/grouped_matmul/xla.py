"""Two forms in plain XLA: `jax.lax.ragged_dot`, and blocks of rows for the CPU.

XLA:CPU computes a ragged dot as a masked product over all groups, E times the work. The form by blocks loops over
groups and, within each, over as many blocks of rows as it has; the feed-forward of a block happens while the block is
in the cache.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.outer import outer


def grouped_swiglu_ragged(
    x_RD: Float[Array, "R D"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    sizes_E: Int[Array, E],
) -> Float[Array, "R D"]:
    """See :func:`pallas_kernels.grouped_matmul.grouped_swiglu`."""
    sizes_E = sizes_E.astype(jnp.int32)
    gate_RF = jax.lax.ragged_dot(x_RD, w_gate_EDF, sizes_E)
    up_RF = jax.lax.ragged_dot(x_RD, w_up_EDF, sizes_E)
    return jax.lax.ragged_dot(jax.nn.silu(gate_RF) * up_RF, w_down_EFD, sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def grouped_swiglu_blocks(
    x_RD: Float[Array, "R D"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    sizes_E: Int[Array, E],
    block: int = 0,
) -> Float[Array, "R D"]:
    """See :func:`pallas_kernels.grouped_matmul.grouped_swiglu`; ``block``: rows at a time, 0: about half a group."""
    return _forward(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, block)[0]


def _block_rows(num_rows: int, num_groups: int, block: int) -> int:
    return block or min(128, max(16, 1 << (num_rows // (2 * num_groups)).bit_length()))


def _over_groups(body, carry, sizes_E, weights, sums_like, block: int):
    """A scan over groups; in each, ``body(carry, sums, weights, row, end)`` for each block of its rows.

    A group's last block runs over into rows of the next group, which that group then writes again: so ``body`` may
    write whole blocks, but must leave rows from ``end`` on out of its sums. The inner loop runs as often as there are
    blocks.
    """
    ends_E = jnp.cumsum(sizes_E)

    def group(carry, each):
        start, end, w = each
        sums = jax.tree.map(jnp.zeros_like, sums_like(w))

        def step(i, state):
            return body(*state, w, start + i * block, end)

        return jax.lax.fori_loop(0, (end - start + block - 1) // block, step, (carry, sums))

    return jax.lax.scan(group, carry, (ends_E - sizes_E, ends_E, weights))


def _read(x, row, block: int):
    return jax.lax.dynamic_slice_in_dim(x, row, block, axis=0)


def _write(out, x, row):
    return jax.lax.dynamic_update_slice_in_dim(out, x, row, axis=0)


def _until(x, row, end):
    """``x``, whose first row is ``row``, with zeros from row ``end`` on."""
    return jnp.where(row + jnp.arange(len(x))[:, None] < end, x, 0)


def _forward(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, block):
    (R, D), (E, _, F) = x_RD.shape, w_gate_EDF.shape
    rows, dtype = _block_rows(R, E, block), x_RD.dtype
    x = jnp.pad(x_RD, ((0, rows), (0, 0)))

    def body(carry, _, weights, row, end):
        y, gates, ups = carry
        w_gate, w_up, w_down = weights
        x_block = _read(x, row, rows)
        gate, up = x_block @ w_gate, x_block @ w_up
        out = (jax.nn.silu(gate) * up) @ w_down
        return (_write(y, out, row), _write(gates, gate, row), _write(ups, up, row)), None

    carry = (jnp.zeros((R + rows, D), dtype), jnp.zeros((R + rows, F), dtype), jnp.zeros((R + rows, F), dtype))
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    (y, gates, ups), _ = _over_groups(body, carry, sizes_E, weights, lambda w: None, rows)
    return _until(y[:R], 0, jnp.sum(sizes_E)), (x_RD, *weights, sizes_E, gates, ups)


def _backward(block, saved, dy_RD):
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, gates, ups = saved
    R = len(x_RD)
    rows = _block_rows(R, len(w_gate_EDF), block)
    x, dy = (jnp.pad(a, ((0, rows), (0, 0))) for a in (x_RD, dy_RD))

    def body(dx, sums, weights, row, end):
        w_gate, w_up, w_down = weights
        dw_gate, dw_up, dw_down = sums
        x_block, gate, up = (_read(a, row, rows) for a in (x, gates, ups))
        dy_block = _until(_read(dy, row, rows), row, end)
        dh = dy_block @ w_down.T
        s = jax.nn.sigmoid(gate)
        act = gate * s
        dgate, dup = dh * up * (s + act * (1 - s)), dh * act
        dx = _write(dx, dgate @ w_gate.T + dup @ w_up.T, row)
        sums = dw_gate + outer(x_block, dgate), dw_up + outer(x_block, dup), dw_down + outer(act * up, dy_block)
        return dx, sums

    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    dx, dw = _over_groups(body, jnp.zeros_like(x), sizes_E, weights, lambda w: w, rows)
    return _until(dx[:R], 0, jnp.sum(sizes_E)), *dw, None


grouped_swiglu_blocks.defvjp(_forward, _backward)
