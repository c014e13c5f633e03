"""The public calls that move rows: to the experts, and back with weights; one gradient for all backends."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.expert_dispatch.backends import Implementation, run
from pallas_kernels.expert_dispatch.plan import Plan, by_row


def dispatch(
    x_TD: Float[Array, "T D"], plan: Plan, *, implementation: Implementation | None = None
) -> Float[Array, "R D"]:
    """Each token's row, once for each of its pairs that go somewhere, sorted by expert.

    Rows behind the last group hold some token's row: no pair has them.
    """
    return _dispatch(x_TD, plan, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dispatch(x_TD, plan: Plan, implementation):
    return run(implementation, "gather", x_TD, plan.token_R, None)


def _dispatch_backward(implementation, plan, dx_RD):
    return sum_rows(dx_RD, plan, implementation=implementation), None


_dispatch.defvjp(lambda x_TD, plan, implementation: (_dispatch(x_TD, plan, implementation), plan), _dispatch_backward)


def sum_rows(
    y_RD: Float[Array, "R D"], plan: Plan, *, implementation: Implementation | None = None
) -> Float[Array, "T D"]:
    """The sum of each token's rows: the transpose of :func:`dispatch`. Not differentiable."""
    return run(implementation, "gather_sum", y_RD, plan.row_TX, None)


def combine(
    y_RD: Float[Array, "R D"],
    weights_TX: Float[Array, "T X"],
    plan: Plan,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's rows, summed in float32; pairs that go nowhere add nothing."""
    return _combine(y_RD, weights_TX, plan, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(y_RD, weights_TX, plan: Plan, implementation):
    return run(implementation, "gather_sum", y_RD, plan.row_TX, _weights(weights_TX, plan))


def _weights(weights_TX, plan: Plan):
    """0 for pairs that go nowhere: of a token that does not count a weight may be NaN."""
    return jnp.where(plan.row_TX < len(plan.pair_R), weights_TX, 0)


def _combine_forward(y_RD, weights_TX, plan, implementation):
    return _combine(y_RD, weights_TX, plan, implementation), (y_RD, weights_TX, plan)


def _combine_backward(implementation, saved, dout_TD):
    y_RD, weights_TX, plan = saved
    weight_R = by_row(weights_TX, plan.row_TX, len(plan.pair_R))
    dy_RD = run(implementation, "gather", dout_TD, plan.token_R, weight_R)
    dweights_TX = run(implementation, "gather_dot", y_RD, plan.row_TX, dout_TD)
    return dy_RD, dweights_TX.astype(weights_TX.dtype), None


_combine.defvjp(_combine_forward, _combine_backward)
