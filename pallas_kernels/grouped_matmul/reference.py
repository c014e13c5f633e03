"""The specification: every group's feed-forward on all rows, of which each row takes its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul_reference(
    rows_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, E]
) -> Float[Array, "R F"]:
    """See :func:`pallas_kernels.grouped_matmul.grouped_matmul`."""
    ends_E, row_R = jnp.cumsum(sizes_E), jnp.arange(rows_RD.shape[0])
    y_RF = jnp.zeros((len(rows_RD), w_EDF.shape[-1]), rows_RD.dtype)
    for e in range(len(w_EDF)):
        inside_R = (row_R >= ends_E[e] - sizes_E[e]) & (row_R < ends_E[e])
        y_RF = y_RF + jnp.where(inside_R[:, None], rows_RD @ w_EDF[e], 0)
    return y_RF


def grouped_swiglu_reference(
    x_RD: Float[Array, "R D"],
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    sizes_E: Int[Array, E],
) -> Float[Array, "R D"]:
    """See :func:`pallas_kernels.grouped_matmul.grouped_swiglu`."""
    ends_E, row_R = jnp.cumsum(sizes_E), jnp.arange(x_RD.shape[0])
    y_RD = jnp.zeros_like(x_RD)
    for e in range(len(w_gate_EDF)):
        inside_R = (row_R >= ends_E[e] - sizes_E[e]) & (row_R < ends_E[e])
        y_e = (jax.nn.silu(x_RD @ w_gate_EDF[e]) * (x_RD @ w_up_EDF[e])) @ w_down_EFD[e]
        y_RD = y_RD + jnp.where(inside_R[:, None], y_e, 0)
    return y_RD
