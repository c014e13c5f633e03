"""The kernels for Hopper, compiled as for an H100: registers, spills, shared memory. Nothing is run.

The command line of ``scripts/gpu_kernels``. What is compiled stands in :data:`PROGRAMS`. Mosaic GPU writes down what it
makes of each kernel (PTX, the words of the assembler ptxas, SASS), and that is read here.
"""

from __future__ import annotations

import json as json_format
import os
import pathlib
import re
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

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
COLUMNS = ("kernel", "case", "registers", "spilled", "local accesses", "shared", "wgmma", "SASS lines")
XLA_COLUMNS = ("left to XLA", "case", "kernels", "bytes kept between them")
Shape = tuple[tuple[int, ...], str]
Program = tuple[str, Callable[..., Any], tuple[Shape | None, ...]]  # the case, a function, and what it takes


def segmented_attention() -> Iterator[Program]:
    """Forward and backward for each pair of widths, of keys and of values, with documents and without."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.segmented_attention import segmented_attention

    T, N, K, W = 4096, 8, 4, 1024

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None) -> jax.Array:
        out = segmented_attention(q, k, v, segment_size=W, documents=documents, implementation="gpu")
        return out.astype(jnp.float32).sum()

    for H, U in ((64, 64), (128, 128), (192, 128)):
        q, k, v = (((1, T, heads, width), "bfloat16") for heads, width in ((N, H), (K, H), (K, U)))
        for case, documents in (("", None), (", documents", ((1, T), "int32"))):
            yield f"heads {H}/{U}{case}", jax.value_and_grad(loss, argnums=(0, 1, 2)), (q, k, v, documents)


def grouped_matmul() -> Iterator[Program]:
    """A SwiGLU of experts, one product with bfloat16 and with int8 matrices, forward and backward."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu

    R, D, E = 8192, 2048, 16

    def swiglu(x: jax.Array, *rest: jax.Array) -> jax.Array:
        return grouped_swiglu(x, *rest, implementation="gpu").astype(jnp.float32).sum()

    def product(x: jax.Array, w: jax.Array, sizes: jax.Array, scales: jax.Array | None = None) -> jax.Array:
        y = grouped_matmul(x, w, sizes, scales_EF=scales, implementation="gpu")
        return y.astype(jnp.float32).sum()

    x, sizes = ((R, D), "bfloat16"), ((E,), "int32")
    for F in (2048, 1408):
        w, w_down = ((E, D, F), "bfloat16"), ((E, F, D), "bfloat16")
        yield f"{D} x {F}", jax.value_and_grad(swiglu, argnums=(0, 1, 2, 3)), (x, w, w, w_down, sizes)
        yield f"{D} x {F}", jax.value_and_grad(product, argnums=(0, 1)), (x, w, sizes)
        yield f"{D} x {F}", product, (x, ((E, D, F), "int8"), sizes, ((E, F), "float32"))


def expert_dispatch() -> Iterator[Program]:
    """What moves rows to experts and back: plain XLA."""
    from pallas_kernels.expert_dispatch import xla

    T, D = 4096, 2048
    for X in (2, 8):
        x, y, of_rows = ((T, D), "bfloat16"), ((T * X, D), "bfloat16"), ((T * X,), "int32")
        rows, weights = ((T, X), "int32"), ((T, X), "float32")
        yield f"gather, top {X}", xla.gather, (x, of_rows, ((T * X,), "float32"))
        yield f"gather_sum, top {X}", xla.gather_sum, (y, rows, weights)
        yield f"gather_dot, top {X}", xla.gather_dot, (y, rows, x)


PROGRAMS = {
    "segmented_attention": segmented_attention,
    "grouped_matmul": grouped_matmul,
    "expert_dispatch": expert_dispatch,
}


def main(
    kernels: Annotated[tuple[str, ...], Positional, arg(metavar=f"{{{','.join(PROGRAMS)}}}")] = tuple(PROGRAMS),
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    keep: Annotated[str, arg(metavar="FOLDER", help="leave the PTX and the SASS there")] = "",
) -> None:
    if unknown := set(kernels) - set(PROGRAMS):
        sys.exit(f"there are no kernels {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}")
    called_from = pathlib.Path(os.environ.get("DSJAX_CALLED_FROM", "."))
    with tempfile.TemporaryDirectory() as scratch:
        folder = called_from / keep if keep else pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        figures = compile_all(kernels, folder)
    print(table(figures))
    if json:
        (called_from / json).write_text(json_format.dumps(figures, indent=1) + "\n")
    if any(figure.get("shared_bytes", 0) > SHARED_LIMIT for figure in figures):
        sys.exit(f"a kernel wants more shared memory than the {SHARED_LIMIT} bytes of a thread block")


def compile_all(kernels: Iterable[str], folder: pathlib.Path) -> list[dict[str, Any]]:
    """Compiles the programs of these kernels; what the compiler said of each."""
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
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=H100)
    on_it = jax.sharding.SingleDeviceSharding(topology.devices[0])
    figures: list[dict[str, Any]] = []
    for kernel in kernels:
        for case, f, shapes in PROGRAMS[kernel]():
            arrays = [shape and jax.ShapeDtypeStruct(*shape, sharding=on_it) for shape in shapes]
            compiled = jax.jit(f).lower(*arrays).compile()
            made = {path.stem for path in folder.glob("*.ptxas")} - {figure["file"] for figure in figures}
            figures += [read(folder, name, case) for name in sorted(made)]
            if not made:
                figures.append(read_xla(compiled, kernel, case))
    return figures


def read(folder: pathlib.Path, name: str, case: str) -> dict[str, Any]:
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
        "case": case,
        # Of the computing warpgroups, which take the registers that the copying one gives back.
        "registers": 1 + max(int(register) for register in re.findall(r"\bR(\d+)", sass)),
        "spilled_bytes": int(stored[1]),
        "local_accesses": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared_bytes": int(shared[1]),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "sass_lines": len(re.findall(r"/\*[0-9a-f]{4,}\*/", sass)),
    }


def read_xla(compiled: Any, name: str, case: str) -> dict[str, Any]:
    """The figures of a program without a kernel of ours."""
    entry = compiled.as_text().partition("\nENTRY")[2]
    return {
        "file": "",
        "kernel": name,
        "case": case,
        "xla_kernels": len(re.findall(r" (?:fusion|custom-call)\(", entry)),
        "kept_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def table(figures: list[dict[str, Any]]) -> str:
    """Our kernels, and then what is left to XLA."""
    tables = []
    for columns, of_table in ((COLUMNS, "registers"), (XLA_COLUMNS, "xla_kernels")):
        chosen = [figure for figure in figures if of_table in figure]
        rows = [columns, *([str(value) for key, value in figure.items() if key != "file"] for figure in chosen)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        if chosen:
            tables.append("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    tyro.cli(main, prog="scripts/gpu_kernels", description=__doc__)
