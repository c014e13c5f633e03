"""What a kernel says of its own work, for those who count FLOPs from a program (``dsjax plan``)."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

import jax


def useful_flops(share: float) -> AbstractContextManager[None]:
    """Within it, only ``share`` of the FLOPs are what the definition asks for.

    The rest is masked out, or computed again instead of being kept (``share`` 0). It is a name scope: it costs nothing,
    and stays in the program.
    """
    return jax.named_scope(f"useful={share:.9f}")


def stated_share(name_stack: str) -> float:
    """The share that the scopes of an operation state, 1 without any."""
    share = 1.0
    for found in re.findall(r"useful=([0-9.]+)", name_stack):
        share *= float(found)
    return share


def stated_flops(name_stack: str) -> float | None:
    """What a kernel states in a scope around it, where its call takes no cost (Mosaic GPU)."""
    found = re.findall(r"kernel_flops=([0-9]+)", name_stack)
    return float(found[-1]) if found else None
