"""Eight forced CPU devices, run-time checks of jaxtyping shapes, and what tests share."""

from __future__ import annotations

import os
import signal

# A job in the background of a shell ignores Ctrl-C, and so would the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",  # a third less to compile; tests run little
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["dsjax", "pallas_kernels"], "typecheck.check")
