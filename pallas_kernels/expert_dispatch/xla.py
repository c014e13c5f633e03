"""Plain XLA: top-k by `jax.lax.top_k`, a running count instead of a sort, gathers in both directions."""

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
    if spec.num_groups > 1:
        groups_TGe = choice_TE.reshape(T, spec.num_groups, -1)
        best = jax.lax.top_k(groups_TGe, min(2, groups_TGe.shape[-1]) if spec.group_score == "top2" else 1)[0]
        judged_TG = jnp.sum(best, axis=-1)
        judged_TG = jnp.where(jnp.isnan(judged_TG), -jnp.inf, judged_TG)  # inf - inf
        kept_TJ = jax.lax.top_k(judged_TG, spec.top_groups)[1]
        kept_TG = jnp.any(kept_TJ[..., None] == jnp.arange(spec.num_groups), axis=1)
        # Experts of other groups come behind those of -inf: the chosen ones are taken out of the kept groups, in order.
        first_TE = jnp.argsort(~jnp.repeat(kept_TG, E // spec.num_groups, axis=1), axis=1, stable=True)
        first_TE = first_TE[:, : spec.top_groups * (E // spec.num_groups)]
        picked_TX = jax.lax.top_k(jnp.take_along_axis(choice_TE, first_TE, axis=1), spec.top_k)[1]
        experts_TX = jnp.take_along_axis(first_TE, picked_TX, axis=1)
    else:
        experts_TX = jax.lax.top_k(choice_TE, spec.top_k)[1]
    if counted_T is not None:
        experts_TX = jnp.where(counted_T[:, None], experts_TX, E)
    return experts_TX, *positions(experts_TX, E)


def gather(
    x_TD: Float[Array, "T D"], token_R: Int[Array, " R"], weight_R: Float[Array, " R"] | None
) -> Float[Array, "R D"]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    x_RD = x_TD[token_R]
    return x_RD if weight_R is None else weight_R[:, None].astype(x_RD.dtype) * x_RD


def _rows(y_RD: jax.Array, row_T: jax.Array) -> jax.Array:
    """Row R reads as zero."""
    return y_RD.at[row_T].get(mode="fill", fill_value=0)


def gather_sum(
    y_RD: Float[Array, "R D"], row_TX: Int[Array, "T X"], weights_TX: Float[Array, "T X"] | None
) -> Float[Array, "T D"]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    parts = []
    for x in range(row_TX.shape[1]):
        y_TD = _rows(y_RD, row_TX[:, x]).astype(jnp.float32)
        parts.append(y_TD if weights_TX is None else weights_TX[:, x, None].astype(jnp.float32) * y_TD)
    return functools.reduce(jnp.add, parts).astype(y_RD.dtype)


def gather_dot(
    y_RD: Float[Array, "R D"], row_TX: Int[Array, "T X"], dout_TD: Float[Array, "T D"]
) -> Float[Array, "T X"]:
    """See :mod:`pallas_kernels.expert_dispatch.backends`."""
    dout_TD = dout_TD.astype(jnp.float32)
    dots = [jnp.sum(dout_TD * _rows(y_RD, row_TX[:, x]).astype(jnp.float32), axis=-1) for x in range(row_TX.shape[1])]
    return jnp.stack(dots, axis=1)
