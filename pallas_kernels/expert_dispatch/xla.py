"""Dispatch and combine in plain XLA: a running count instead of a sort, gathers in both directions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each pair (token, choice) goes when the pairs are sorted by expert.

    Attributes:
        row_TX: the row of each pair; R (one behind the last) for a pair whose expert is not among the E.
        pair_R: token * X + choice of each row; rows behind the last group hold 0.
        sizes_E: rows of each expert.
    """

    row_TX: Any
    pair_R: Any
    sizes_E: Any


def plan_dispatch(experts_TX: Int[Array, "T X"], num_experts: int) -> Plan:
    """The plan for experts 0 ... E - 1; other numbers are somebody else's.

    A token's experts differ, so R = T * min(X, E) rows hold every pair.
    """
    T, X = experts_TX.shape
    R = T * min(X, num_experts)
    chosen_PE = (experts_TX.reshape(-1, 1) == jnp.arange(num_experts, dtype=experts_TX.dtype)).astype(jnp.int32)
    count_PE = jnp.cumsum(chosen_PE, axis=0)
    sizes_E = count_PE[-1]
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    row_P = jnp.sum(chosen_PE * (starts_E + count_PE - 1), axis=1)
    row_P = jnp.where(jnp.sum(chosen_PE, axis=1) > 0, row_P, R)
    pair_R = jnp.zeros(R, jnp.int32).at[row_P].set(jnp.arange(T * X, dtype=jnp.int32), mode="drop", unique_indices=True)
    return Plan(row_P.reshape(T, X), pair_R, sizes_E)


def _rows(y_RD: jax.Array, row_T: jax.Array) -> jax.Array:
    """Row R reads as zero."""
    return y_RD.at[row_T].get(mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x_TD: Float[Array, "T D"], plan: Plan) -> Float[Array, "R D"]:
    """Each token's row, once for each of its pairs, sorted by expert."""
    X = plan.row_TX.shape[1]
    return x_TD[plan.pair_R // X]


def _dispatch_backward(plan, dx_RD):
    # Rows behind the last group hold no pair: no token reads them back.
    return sum(_rows(dx_RD, plan.row_TX[:, x]) for x in range(plan.row_TX.shape[1])), None


dispatch.defvjp(lambda x_TD, plan: (dispatch(x_TD, plan), plan), _dispatch_backward)


@jax.custom_vjp
def combine(y_RD: Float[Array, "R D"], weights_TX: Float[Array, "T X"], plan: Plan) -> Float[Array, "T D"]:
    """The weighted sum of each token's rows."""
    parts = [weights_TX[:, x, None] * _rows(y_RD, plan.row_TX[:, x]) for x in range(weights_TX.shape[1])]
    return functools.reduce(jnp.add, parts)


def _combine_forward(y_RD, weights_TX, plan):
    return combine(y_RD, weights_TX, plan), (y_RD, weights_TX, plan)


def _combine_backward(saved, dout_TD):
    y_RD, weights_TX, plan = saved
    X = weights_TX.shape[1]
    filled_R = jnp.arange(len(plan.pair_R)) < jnp.sum(plan.sizes_E)
    weight_R = jnp.where(filled_R, weights_TX.reshape(-1)[plan.pair_R], 0)
    dy_RD = weight_R[:, None] * dout_TD[plan.pair_R // X]
    dweights = [jnp.sum(dout_TD * _rows(y_RD, plan.row_TX[:, x]), axis=-1) for x in range(X)]
    return dy_RD, jnp.stack(dweights, axis=1), None


combine.defvjp(_combine_forward, _combine_backward)
