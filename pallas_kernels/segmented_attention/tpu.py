"""Segmented attention on TPU (Pallas Mosaic): the four functions of a backend, and what they can not do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.platforms import NARROW
from pallas_kernels.segmented_attention.tpu_backward import backward
from pallas_kernels.segmented_attention.tpu_forward import forward
from pallas_kernels.segmented_attention.tpu_rows import backward_rows, forward_rows

__all__ = ["backward", "backward_rows", "forward", "forward_rows", "why_not"]

WIDEST_HEAD = 256
LONGEST_TAIL = 4096  # which a block of gathered rows holds on the chip


def why_not(function: str, *arrays: Any, **static: Any) -> str | None:
    """Why ``function`` can not take these arrays, in a sentence; None: it can."""
    if jax.enable_x64.value:
        return NARROW
    q, k, v = arrays[:3] if function in ("forward", "backward") else (arrays[0], *arrays[3:5])
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; the kernel takes all bfloat16 or all float32"
    if max(q.shape[-1], v.shape[-1]) > WIDEST_HEAD:
        return f"heads are {q.shape[-1]} and {v.shape[-1]} wide; the kernel takes up to {WIDEST_HEAD}"
    if function.endswith("_rows") and k.shape[3] > LONGEST_TAIL:
        return f"window is {k.shape[3]}; with top_segments the kernel takes up to {LONGEST_TAIL}"
    return None
