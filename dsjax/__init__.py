"""The DeepSeek lineage as one JAX/TPU-first library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.loaded import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``dsjax.load``, imported when it is asked for: the command line must start at once."""
    if name == "load":
        return importlib.import_module("dsjax.loaded").load
    raise AttributeError(f"module 'dsjax' has no attribute {name!r}")
