"""Projections as plain 2-D matrix products."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.sharding import current_mesh
from pallas_kernels.outer import outer


def project(x: Float[Array, ...], w: Float[Array, ...], num_inputs: int = 1) -> Float[Array, ...]:
    """Contracts the last ``num_inputs`` dimensions of ``x`` with the first ones of ``w``, cast to the dtype of ``x``.

    On one device it is one product of two matrices, the form that XLA:CPU runs at the machine's peak; on a mesh the
    dimensions stay apart, so that each keeps its own sharding.

    Args:
        x: (..., *inputs).
        w: (*inputs, *outputs).
        num_inputs: how many dimensions are contracted.

    Returns:
        (..., *outputs).
    """
    w = w.astype(x.dtype)
    if current_mesh() is not None:
        return jnp.tensordot(x, w, num_inputs)
    leading, outputs = x.shape[: x.ndim - num_inputs], w.shape[num_inputs:]
    inputs = math.prod(w.shape[:num_inputs])
    return matmul(x.reshape(-1, inputs), w.reshape(inputs, -1)).reshape(*leading, *outputs)


@jax.custom_vjp
def matmul(x_RD: Float[Array, "R D"], w_DF: Float[Array, "D F"]) -> Float[Array, "R F"]:
    """``x @ w``, with the gradient of ``w`` by :func:`outer`."""
    return x_RD @ w_DF


def _matmul_forward(x_RD, w_DF):
    return x_RD @ w_DF, (x_RD, w_DF)


def _matmul_backward(saved, dy_RF):
    x_RD, w_DF = saved
    return dy_RF @ w_DF.T, outer(x_RD, dy_RF)


matmul.defvjp(_matmul_forward, _matmul_backward)
