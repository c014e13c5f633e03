"""Projections as plain 2-D matrix products."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.nn.lora import FrozenWeight, written_out
from dsjax.sharding import current_mesh
from pallas_kernels.outer import outer


def project(x: Float[Array, ...], w: Float[Array, ...] | FrozenWeight, num_inputs: int = 1) -> Float[Array, ...]:
    """Contracts the last ``num_inputs`` dimensions of ``x`` with the first ones of ``w``, cast to the dtype of ``x``.

    On one device it is one product of two matrices, the form that XLA:CPU runs at the machine's peak; on a mesh the
    dimensions stay apart, so that each keeps its own sharding. A frozen weight's pair is applied beside it, x a b: that
    costs rank / width of the product, and no gradient of a whole matrix is ever made.

    Args:
        x: (..., *inputs).
        w: (*inputs, *outputs).
        num_inputs: how many dimensions are contracted.

    Returns:
        (..., *outputs).
    """
    if isinstance(w, FrozenWeight):
        y = _frozen_product(x, w.stored, num_inputs)
        if w.pair is None:
            return y
        a, b = w.pair
        return y + w.scale * project(project(x, a, num_inputs), b)
    return _product(x, w.astype(x.dtype), num_inputs, matmul)


def _product(x: Any, w: Any, num_inputs: int, multiply: Any) -> jax.Array:
    if current_mesh() is not None:
        return jnp.tensordot(x, w, num_inputs)
    leading, outputs = x.shape[: x.ndim - num_inputs], w.shape[num_inputs:]
    inputs = math.prod(w.shape[:num_inputs])
    return multiply(x.reshape(-1, inputs), w.reshape(inputs, -1)).reshape(*leading, *outputs)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _frozen_product(x, stored, num_inputs):
    """The product with a weight that has no gradient. The backward pass keeps it as it is stored, and of x nothing."""
    return _product(x, written_out(stored).astype(x.dtype), num_inputs, jnp.matmul)


def _frozen_backward(num_inputs, stored, dy):
    w = written_out(stored).astype(dy.dtype)
    x = jax.ShapeDtypeStruct((*dy.shape[: dy.ndim - w.ndim + num_inputs], *w.shape[:num_inputs]), dy.dtype)
    (dx,) = jax.linear_transpose(lambda x: _product(x, w, num_inputs, jnp.matmul), x)(dy)
    return dx, None


_frozen_product.defvjp(lambda x, stored, num_inputs: (_frozen_product(x, stored, num_inputs), stored), _frozen_backward)
