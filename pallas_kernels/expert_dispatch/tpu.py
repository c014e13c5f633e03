"""Expert dispatch on TPU (Pallas Mosaic): the four functions of a backend, and what they can not do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.expert_dispatch.tpu_rows import block_size, gather, gather_dot, gather_sum
from pallas_kernels.expert_dispatch.tpu_select import select
from pallas_kernels.platforms import NARROW

__all__ = ["gather", "gather_dot", "gather_sum", "select", "why_not"]

MOST_EXPERTS, MOST_CHOICES = 512, 16


def why_not(function: str, *arrays: Any, **static: Any) -> str | None:
    """Why ``function`` can not take these arrays, in a sentence; None: it can."""
    if jax.enable_x64.value:
        return NARROW
    if function == "select":
        experts, choices = arrays[0].shape[1], static["spec"].top_k
        if experts > MOST_EXPERTS or choices > MOST_CHOICES:
            return f"{choices} of {experts} experts; the kernel takes up to {MOST_CHOICES} of {MOST_EXPERTS}"
        return None
    rows = arrays[0]
    choices = 1 if function == "gather" else arrays[1].shape[1]
    if rows.dtype not in (jnp.bfloat16, jnp.float32):
        return f"rows are {rows.dtype}; the kernel takes bfloat16 or float32"
    if not block_size(choices, rows.shape[1]):
        return f"{choices} rows of {rows.shape[1]} numbers for a token are more than the kernel has room for"
    return None
