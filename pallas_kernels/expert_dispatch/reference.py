"""The specification: plain jnp in float32; experts by one stable sort, and what moves pair by pair."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.expert_dispatch.plan import positions


def select(
    choice_TE: Float[Array, "T E"], counted_T: Bool[Array, " T"] | None, *, spec: Any
) -> tuple[Int[Array, "T X"], Int[Array, "T X"], Int[Array, " E"]]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    T, E = choice_TE.shape
    best_TGe = jnp.sort(choice_TE.reshape(T, spec.num_groups, -1), axis=-1, descending=True)
    judged_TG = jnp.sum(best_TGe[..., : 2 if spec.group_score == "top2" else 1], axis=-1)
    judged_TG = jnp.where(jnp.isnan(judged_TG), -jnp.inf, judged_TG)  # inf - inf
    kept_TJ = jnp.argsort(judged_TG, axis=-1, descending=True)[:, : spec.top_groups]
    kept_TE = jnp.any(kept_TJ[..., None] == jnp.arange(E) // (E // spec.num_groups), axis=1)
    order_TE = jnp.lexsort((-choice_TE, ~kept_TE), axis=-1)  # those of kept groups first, of them the best
    experts_TX = order_TE[:, : spec.top_k]
    if counted_T is not None:
        experts_TX = jnp.where(counted_T[:, None], experts_TX, E)
    return experts_TX, *positions(experts_TX, E)


def gather(
    x_TD: Float[Array, "T D"], token_R: Int[Array, " R"], weight_R: Float[Array, " R"] | None
) -> Float[Array, "R D"]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    x_RD = x_TD[token_R].astype(jnp.float32)
    return (x_RD if weight_R is None else weight_R[:, None] * x_RD).astype(x_TD.dtype)


def gather_sum(
    y_RD: Float[Array, "R D"], row_TX: Int[Array, "T X"], weights_TX: Float[Array, "T X"] | None
) -> Float[Array, "T D"]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    y_TXD = _of_pairs(y_RD, row_TX)
    y_TXD = y_TXD if weights_TX is None else weights_TX[..., None] * y_TXD
    return functools.reduce(jnp.add, jnp.unstack(y_TXD, axis=1)).astype(y_RD.dtype)


def gather_dot(
    y_RD: Float[Array, "R D"], row_TX: Int[Array, "T X"], dout_TD: Float[Array, "T D"]
) -> Float[Array, "T X"]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    return jnp.sum(_of_pairs(y_RD, row_TX) * dout_TD[:, None], axis=-1)


def _of_pairs(y_RD: jax.Array, row_TX: jax.Array) -> Float[Array, "T X D"]:
    """The row of each pair in float32; row R is 0."""
    return jnp.where((row_TX < len(y_RD))[..., None], y_RD[row_TX], 0).astype(jnp.float32)
