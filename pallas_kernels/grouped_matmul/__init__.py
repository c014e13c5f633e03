"""Grouped matmul: rows sorted by group, each group times its own matrix; and a whole SwiGLU of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.reference import grouped_swiglu_reference
from pallas_kernels.grouped_matmul.xla import grouped_swiglu_blocks, grouped_swiglu_ragged

__all__ = ["grouped_swiglu", "grouped_swiglu_blocks", "grouped_swiglu_ragged", "grouped_swiglu_reference"]

_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": grouped_swiglu_reference,
    "blocks": grouped_swiglu_blocks,
    "ragged": grouped_swiglu_ragged,
}


def grouped_swiglu(
    x_RD: Float[Array, "R D"],
    w_gate_EDF: Float[Array, "*layers E D F"],
    w_up_EDF: Float[Array, "*layers E D F"],
    w_down_EFD: Float[Array, "*layers E F D"],
    sizes_E: Int[Array, E],
    *,
    layer: Int[Array, ""] | None = None,
    implementation: Literal["reference", "blocks", "ragged"] | None = None,
) -> Float[Array, "R D"]:
    """``(silu(x w_gate) * (x w_up)) w_down`` of each row with its group's weights; rows of no group give 0.

    Args:
        x_RD: rows, those of group 0 first.
        w_gate_EDF, w_up_EDF, w_down_EFD: one feed-forward layer for each group.
        sizes_E: rows in each group; their sum is at most R.
        layer: the weights are those of a stack of layers, of which this one is meant. Off the CPU nothing is cut out
            of the stack, which would copy all groups of the layer: only the groups that have rows are read.
        implementation: None takes the best one for the platform that the program is compiled for.
    """
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)

    def run(name: str, x_RD: jax.Array, *rest: jax.Array) -> jax.Array:
        weights, sizes_E = rest[:3], rest[3]
        if layer is None:
            return _IMPLEMENTATIONS[name](x_RD, *weights, sizes_E)
        if name != "ragged":
            return _IMPLEMENTATIONS[name](x_RD, *(w[layer] for w in weights), sizes_E)
        num_layers, num_groups = weights[0].shape[:2]
        sizes_G = jnp.zeros((num_layers, num_groups), sizes_E.dtype).at[layer].set(sizes_E).reshape(-1)
        return _IMPLEMENTATIONS[name](x_RD, *(w.reshape(-1, *w.shape[2:]) for w in weights), sizes_G)

    if implementation is not None:
        return run(implementation, x_RD, *weights, sizes_E)
    on = {"cpu": functools.partial(run, "blocks"), "default": functools.partial(run, "ragged")}
    return jax.lax.platform_dependent(x_RD, *weights, sizes_E, **on)
