"""Process-wide settings of JAX and of the C library, made once before the first array."""

from __future__ import annotations

import ctypes
import gc
import os
import pathlib
import sys
from collections.abc import Callable

from dsjax.config import UserError


def configure(join: Callable[[], None] = lambda: None) -> None:
    """Keeps compiled programs on disk, and the memory of a step in the process.

    Args:
        join: connects to the other processes, which must come before the first use of a device.

    Raises:
        UserError: JAX can not start on the platform that ``JAX_PLATFORMS`` names.
    """
    keep_freed_memory()
    import jax

    from dsjax.runs import cache_dir

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    join()
    try:
        jax.devices()
    except RuntimeError as error:
        raise UserError(
            f"JAX finds no device (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}): {error}"
        ) from None
    if not gc.isenabled():
        gc.freeze()  # what the imports made stays
        gc.enable()


def keep_freed_memory() -> None:
    """Tells glibc to keep what XLA:CPU frees after a step instead of returning it to the kernel.

    XLA:CPU allocates a step's temporaries anew each time. Blocks of this size come from mmap, so each step would
    fault every page in again: a fifth of the time of the benchmark's step (docs/numerics.md).
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block by mmap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap
    except (OSError, AttributeError):
        pass  # another C library


def memory_bytes() -> float:
    """The memory that this process may use: the machine's, or what its control group allows."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not Unix
        return float("inf")
    try:
        allowed = pathlib.Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return machine
    return min(machine, int(allowed)) if allowed.isdigit() else machine
