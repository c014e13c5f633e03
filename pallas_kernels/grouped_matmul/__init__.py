"""Grouped matmul: rows sorted by group, each group times its own matrix; and a whole SwiGLU of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
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
    w_gate_EDF: Float[Array, "E D F"],
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
    sizes_E: Int[Array, E],
    *,
    implementation: Literal["reference", "blocks", "ragged"] | None = None,
) -> Float[Array, "R D"]:
    """``(silu(x w_gate) * (x w_up)) w_down`` of each row with its group's weights; rows of no group give 0.

    Args:
        x_RD: rows, those of group 0 first.
        w_gate_EDF, w_up_EDF, w_down_EFD: one feed-forward layer for each group.
        sizes_E: rows in each group; their sum is at most R.
        implementation: None takes the best one for the platform that the program is compiled for.
    """
    arguments = (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_E)
    if implementation is not None:
        return _IMPLEMENTATIONS[implementation](*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=grouped_swiglu_blocks, default=grouped_swiglu_ragged)
