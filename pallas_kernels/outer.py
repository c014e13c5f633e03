"""The product over the rows of both operands, in the orientation that XLA:CPU runs fast."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


def outer(x_RA: Float[Array, "R A"], y_RB: Float[Array, "R B"]) -> Float[Array, "A B"]:
    """``x.T @ y``, transposing the narrower of the two: the wide one costs XLA:CPU 1.6 times as much."""
    if x_RA.shape[1] <= y_RB.shape[1]:
        return jax.lax.dot_general(x_RA, y_RB, (((0,), (0,)), ((), ())))
    # The barrier keeps XLA from turning the product and the transposition back into the slow form.
    return jax.lax.optimization_barrier(jax.lax.dot_general(y_RB, x_RA, (((0,), (0,)), ((), ())))).T
