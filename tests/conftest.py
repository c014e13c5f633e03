"""Eight forced CPU devices, run-time checks of jaxtyping shapes, and what tests share."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

from jaxtyping import install_import_hook

install_import_hook(["dsjax", "pallas_kernels"], "typecheck.check")
