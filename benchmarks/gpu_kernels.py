"""Segmented attention's kernels for Hopper, compiled as for an H100: registers, spills, shared memory. Nothing is run.

The command line of ``scripts/gpu_kernels``. Mosaic GPU writes down what it makes of each kernel (PTX, the words of the
assembler ptxas, SASS), and that is read here.
"""

from __future__ import annotations

import json as json_format
import os
import pathlib
import re
import sys
import sysconfig
import tempfile
from typing import Annotated, Any

import tyro
from tyro.conf import arg

# What XLA wants to know of an H100 (SXM): the numbers of NVIDIA's data sheet and of the compute capability 9.0.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
SHARED_LIMIT = 232448
WIDTHS = ((64, 64), (128, 128), (192, 128))  # of keys and of values
T, N, K, W = 4096, 8, 4, 1024
COLUMNS = ("kernel", "heads", "documents", "registers", "spilled", "local accesses", "shared", "wgmma", "SASS lines")


def main(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    keep: Annotated[str, arg(metavar="FOLDER", help="leave the PTX and the SASS there")] = "",
) -> None:
    called_from = pathlib.Path(os.environ.get("DSJAX_CALLED_FROM", "."))
    with tempfile.TemporaryDirectory() as scratch:
        folder = called_from / keep if keep else pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        figures = compile_all(folder)
    print(table(figures))
    if json:
        (called_from / json).write_text(json_format.dumps(figures, indent=1) + "\n")
    if any(figure["shared_bytes"] > SHARED_LIMIT for figure in figures):
        sys.exit(f"a kernel wants more shared memory than the {SHARED_LIMIT} bytes of a thread block")


def compile_all(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Compiles forward and backward for each pair of widths, with documents and without; what the compiler said."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
        MOSAIC_GPU_DUMP_TO=str(folder),
        MOSAIC_GPU_DUMP_PTX="1",
        MOSAIC_GPU_DUMP_PTXAS="1",
        MOSAIC_GPU_DUMP_SASS="1",
        CUDA_ROOT=str(pathlib.Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13")),  # where nvdisasm is
    )
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from pallas_kernels.segmented_attention import segmented_attention

    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=H100)
    on_it = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=on_it)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None) -> jax.Array:
        out = segmented_attention(q, k, v, segment_size=W, documents=documents, implementation="gpu")
        return out.astype(jnp.float32).sum()

    figures = []
    for H, U in WIDTHS:
        for documents in (None, shape(1, T, dtype=jnp.int32)):
            arrays = (shape(1, T, N, H), shape(1, T, K, H), shape(1, T, K, U), documents)
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
            made = {path.stem for path in folder.glob("*.ptxas")} - {figure["file"] for figure in figures}
            figures += [read(folder, name, f"{H}/{U}", documents is not None) for name in sorted(made)]
    return figures


def read(folder: pathlib.Path, name: str, heads: str, documents: bool) -> dict[str, Any]:
    """The figures of one kernel, from what the compiler wrote down."""
    said, sass = ((folder / f"{name}{suffix}").read_text() for suffix in (".ptxas", ".sass_ctrl"))
    passes = folder / f"{name}.mlir-passes.log"  # tens of megabytes
    shared = re.search(r"dynamic_shared_memory_size %c(\d+)", passes.read_text())
    passes.unlink()
    stored = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    if shared is None or stored is None:
        raise RuntimeError(f"{name}: the compiler's words have changed")
    return {
        "file": name,
        "kernel": re.sub(r"_\d+$", "", name),
        "heads": heads,
        "documents": documents,
        # Of the computing warpgroups, which take the registers that the copying one gives back.
        "registers": 1 + max(int(register) for register in re.findall(r"\bR(\d+)", sass)),
        "spilled_bytes": int(stored[1]),
        "local_accesses": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared_bytes": int(shared[1]),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "sass_lines": len(re.findall(r"/\*[0-9a-f]{4,}\*/", sass)),
    }


def table(figures: list[dict[str, Any]]) -> str:
    rows = [COLUMNS, *([str(value) for key, value in figure.items() if key != "file"] for figure in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


if __name__ == "__main__":
    tyro.cli(main, prog="scripts/gpu_kernels", description=__doc__)
