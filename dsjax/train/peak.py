"""Peak matmul rates, to state how much of a machine a run uses."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s of one chip as jax counts devices, from the makers' data sheets: Cloud TPU documentation
# (system architecture pages of v4, v5e, v5p, v6e, Ironwood) and NVIDIA's A100, H100 and H200 data sheets.
PEAK_BF16_FLOPS = {
    "TPU v4": 275e12,  # both cores are one device
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
}


@functools.cache
def matmul_peak_flops(dtype: str = "float32") -> float:
    """FLOP/s of one device: from the table, or on a CPU (and unknown chips) measured with a large matmul."""
    kind, platform = jax.devices()[0].device_kind, jax.devices()[0].platform
    for name in sorted(PEAK_BF16_FLOPS, key=len, reverse=True):
        if kind.startswith(name):
            return PEAK_BF16_FLOPS[name]
    # What XLA lists as several devices of a CPU is one.
    return measured_matmul_flops(dtype) / (jax.local_device_count() if platform == "cpu" else 1)


def measured_matmul_flops(dtype: str = "float32", size: int = 2048, rounds: int = 5) -> float:
    """The best rate of a square 2-D matmul on this machine, FLOP/s."""
    x = jnp.ones((size, size), dtype)
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        matmul(x, x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
