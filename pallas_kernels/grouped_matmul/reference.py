"""The specification: each group's matrices times all rows, of which those of other groups are set to 0."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul_reference(
    rows_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, E]
) -> Float[Array, "R F"]:
    """See :func:`pallas_kernels.grouped_matmul.grouped_matmul`."""
    y_RF = jnp.zeros((len(rows_RD), w_EDF.shape[-1]), rows_RD.dtype)
    for e, inside_R in enumerate(_groups(len(rows_RD), sizes_E)):
        y_RF = jnp.where(inside_R, jnp.where(inside_R, rows_RD, 0) @ w_EDF[e], y_RF)
    return y_RF


def grouped_swiglu_reference(
    x_RD: Float[Array, "R D"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    sizes_E: Int[Array, E],
) -> Float[Array, "R D"]:
    """See :func:`pallas_kernels.grouped_matmul.grouped_swiglu`."""
    y_RD = jnp.zeros_like(x_RD)
    for e, inside_R in enumerate(_groups(len(x_RD), sizes_E)):
        x_e = jnp.where(inside_R, x_RD, 0)  # what stands in other rows may be NaN, which times 0 is NaN
        y_e = (jax.nn.silu(x_e @ w_gate_EDF[e]) * (x_e @ w_up_EDF[e])) @ w_down_EFD[e]
        y_RD = jnp.where(inside_R, y_e, y_RD)
    return y_RD


def _groups(num_rows: int, sizes_E: jax.Array) -> Iterator[jax.Array]:
    """For each group, which rows belong to it, (R, 1)."""
    ends_E, row_R = jnp.cumsum(sizes_E), jnp.arange(num_rows)[:, None]
    for e in range(len(sizes_E)):
        yield (row_R >= ends_E[e] - sizes_E[e]) & (row_R < ends_E[e])
