"""What backends for Hopper GPUs share: whether the device is one, and how their kernels are simulated without one.

Mosaic GPU is loaded when a kernel is traced, not before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

SIMULATOR_THREADS = 8  # 3 warpgroups, the copies, and the programs around them
MISCOMPILED = range(12080, 12091)  # by ptxas of these versions of CUDA: masks between products (JAX refuses them too)


@functools.cache
def wrong_device() -> str | None:
    """Why the GPU that is here is no Hopper. Where there is none, a program may be compiled for another."""
    if jax.default_backend() != "gpu":
        return None
    from jax._src.lib import cuda_versions

    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) != "9.0":
        return f"the device is {device.device_kind}; the kernel is written for Hopper (H100, H200)"
    if cuda_versions is not None and cuda_versions.cuda_runtime_get_version() in MISCOMPILED:
        return "CUDA 12.8.0 to 12.9.0 miscompiles masks; install 12.9.1 or newer"
    return None


def simulated(f: Callable[..., Any], interpret: Any, *arrays: Any, **static: Any) -> Any:
    """``f`` with these parameters of the simulator, on the host: shared memory, copies, barriers and warpgroups.

    The simulator keeps its order by effects, which branches by platform do not allow: hence a program of its own. It
    lets threads of XLA wait for each other, and hangs where there are too few.
    """
    simulate = jax.jit(functools.partial(f, **static, interpret=interpret))

    def run(*arrays: Any) -> Any:
        if max(os.cpu_count() or 1, jax.local_device_count("cpu")) < SIMULATOR_THREADS:
            flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={SIMULATOR_THREADS}"
            raise RuntimeError(f"simulating a GPU takes more threads than there are processors here: set {flag}")
        return simulate(*arrays)

    return jax.pure_callback(run, jax.eval_shape(functools.partial(f, **static), *arrays), *arrays)
