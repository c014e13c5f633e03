"""The form of a function that a program gets: that of the platform it is compiled for.

JAX traces every form that :func:`jax.lax.platform_dependent` is given, and keeps one when it lowers the program. Where
kernels are among them that is most of the time of tracing a model, so who knows the platform says so:
``with compiled_for("cpu"):``. It is part of the key of each of JAX's caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ANY = "any"  # also on a mesh: for who compares the forms of a program, or lowers it for another platform
compiled_for = jax.make_user_context(default_value=None)  # "cpu", "tpu", "cuda", "rocm", or ANY; None: nobody said
NARROW = "jax_enable_x64 is set; the kernel counts in 32 bits"  # why a kernel for TPUs can not be traced then


def by_platform(*arrays: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """What the platform's form makes of some arrays; ``default``'s, where the platform has none of its own."""
    platform = compiled_for.value
    if not forms:
        return default(*arrays)
    if platform in (None, ANY):
        return jax.lax.platform_dependent(*arrays, default=default, **forms)
    return forms.get(platform, default)(*jax.tree.map(jnp.asarray, arrays))  # numpy's too, as JAX's own does
