"""Two forms in plain XLA: `jax.lax.ragged_dot`, and blocks of rows for the CPU.

XLA:CPU computes a ragged dot as a masked product over all groups, E times the work. The form by blocks loops over
groups and, within each, over as many blocks of rows as it has; the feed-forward of a block happens while the block is
in the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.outer import outer as product

SPARE_ROWS = 128  # behind what is saved: the largest block


def matmul(x_RD, w_GDF, scales_GF, sizes_E, first, *, transposed: bool):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    w_EDF = jax.lax.dynamic_slice_in_dim(w_GDF, first, len(sizes_E), axis=0)
    if transposed:
        w_EDF = jnp.swapaxes(w_EDF, 1, 2)
    if scales_GF is not None:
        scales_EF = jax.lax.dynamic_slice_in_dim(scales_GF, first, len(sizes_E), axis=0)
        w_EDF = (w_EDF * scales_EF[:, None]).astype(x_RD.dtype)
    return _until(jax.lax.ragged_dot(x_RD, w_EDF, sizes_E), 0, jnp.sum(sizes_E))


def outer(x_RD, dy_RF, sizes_E):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    ends_E, row_R = jnp.cumsum(sizes_E), jnp.arange(len(x_RD))
    inside_ER = (row_R >= (ends_E - sizes_E)[:, None]) & (row_R < ends_E[:, None])
    x_RD, dy_RF = (_until(a, 0, jnp.sum(sizes_E)) for a in (x_RD, dy_RF))
    return jnp.einsum("ER,RD,RF->EDF", inside_ER.astype(x_RD.dtype), x_RD, dy_RF)


def swiglu(x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, *, keep: bool):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    x_RD = x_TD if token_R is None else x_TD[token_R]
    w_gate, w_up, w_down = (_own(w, sizes_E, first) for w in (w_gate_GDF, w_up_GDF, w_down_GFD))
    y_RD, saved = _forward(x_RD, w_gate, w_up, w_down, sizes_E)
    return y_RD, saved if keep else None


def swiglu_backward(x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, saved, dy_RD):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    x_RD = x_TD if token_R is None else x_TD[token_R]
    w_gate, w_up, w_down = (_own(w, sizes_E, first) for w in (w_gate_GDF, w_up_GDF, w_down_GFD))
    gates, ups = saved
    return _backward(x_RD, w_gate, w_up, w_down, sizes_E, gates, ups, dy_RD)


def _own(w_GDF, sizes_E, first):
    return jax.lax.dynamic_slice_in_dim(w_GDF, first, len(sizes_E), axis=0)


def _block_rows(num_rows: int, num_groups: int) -> int:
    return min(SPARE_ROWS, max(16, 1 << (num_rows // (2 * num_groups)).bit_length()))


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


def _forward(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E):
    (R, D), (E, _, F) = x_RD.shape, w_gate_EDF.shape
    rows, dtype = _block_rows(R, E), x_RD.dtype
    x = jnp.pad(x_RD, ((0, rows), (0, 0)))

    def body(carry, _, weights, row, end):
        y, gates, ups = carry
        w_gate, w_up, w_down = weights
        x_block = _read(x, row, rows)
        gate, up = x_block @ w_gate, x_block @ w_up
        out = (jax.nn.silu(gate) * up) @ w_down
        return (_write(y, out, row), _write(gates, gate, row), _write(ups, up, row)), None

    saved = jnp.zeros((R + SPARE_ROWS, F), dtype)
    carry = (jnp.zeros((R + rows, D), dtype), saved, saved)
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    (y, gates, ups), _ = _over_groups(body, carry, sizes_E, weights, lambda w: None, rows)
    return _until(y[:R], 0, jnp.sum(sizes_E)), (gates, ups)


def _backward(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E, gates, ups, dy_RD):
    R = len(x_RD)
    rows = _block_rows(R, len(w_gate_EDF))
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
        sums = dw_gate + product(x_block, dgate), dw_up + product(x_block, dup), dw_down + product(act * up, dy_block)
        return dx, sums

    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    dx, dw = _over_groups(body, jnp.zeros_like(x), sizes_E, weights, lambda w: w, rows)
    return _until(dx[:R], 0, jnp.sum(sizes_E)), *dw
