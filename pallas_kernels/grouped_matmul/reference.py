"""The specification of the grouped matmul."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul_reference(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """Row r, which lies in group e, times ``w_EDF[e]``; rows behind the last group give 0."""
    ends_E = jnp.cumsum(sizes_E)
    row_R = jnp.arange(x_RD.shape[0])
    y_RF = jnp.zeros((x_RD.shape[0], w_EDF.shape[-1]), x_RD.dtype)
    for e in range(w_EDF.shape[0]):
        inside_R = (row_R >= ends_E[e] - sizes_E[e]) & (row_R < ends_E[e])
        y_RF = y_RF + jnp.where(inside_R[:, None], x_RD @ w_EDF[e], 0)
    return y_RF
