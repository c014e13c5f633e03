"""Eight forced CPU devices, run-time checks of jaxtyping shapes, and what tests share."""

from __future__ import annotations

import gc
import os
import pathlib
import signal
from collections.abc import Iterator

# A job in the background of a shell ignores Ctrl-C, and so would the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",  # a third less to compile; tests run little
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["dsjax", "pallas_kernels"], "typecheck.check")

MOST_MAPPINGS = 25_000  # Linux ends a process that wants more than 65,530


@pytest.fixture(autouse=True, scope="module")
def forgets_programs() -> Iterator[None]:
    """Every program compiled for the CPU maps some memory, and a worker runs thousands: it must let go of them."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
