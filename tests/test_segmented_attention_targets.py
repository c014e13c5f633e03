"""The kernels of segmented attention compile for chips that are not here: every TPU ahead of time, CUDA by export."""

from __future__ import annotations

import dataclasses
import os
import re

import jax
import numpy as np
import pytest
from attention_cases import Case
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.plan.chips import parse_topology, topology_options
from pallas_kernels.segmented_attention import Segments, context_parallel_attention

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
LONG = Case(T=4000, segment_size=1024, window=500, shift=512, G=2, H=128, U=128, dtype="bfloat16")
DOCUMENTS = (((1, 1500), (2, 2400), (0, 100)),)
SHAPES = {
    "usual": LONG,
    "64 wide, documents": dataclasses.replace(LONG, H=64, U=64, documents=DOCUMENTS),
    "192 and 128 wide": dataclasses.replace(LONG, H=192, U=128),
    "256 wide, float32": dataclasses.replace(LONG, H=256, U=256, dtype="float32"),
    "short segments": dataclasses.replace(LONG, segment_size=100, window=30, shift=7),
    "one segment": dataclasses.replace(LONG, segment_size=4096, window=0),
    "top 1, documents": dataclasses.replace(LONG, segment_size=512, window=None, top_segments=1, documents=DOCUMENTS),
}


def program(case: Case, implementation: str | None):
    """Output and gradients, and the shapes that they take."""

    def both(q, k, v, dout):
        out, vjp = jax.vjp(case.call(implementation), q, k, v)
        return out, *vjp(dout)

    return both, jax.eval_shape(case.inputs)


def compiled_for(chip: str, case: Case) -> str:
    from jax.experimental import topologies

    options = topology_options(parse_topology(TOPOLOGIES[chip]))
    device = topologies.get_topology_desc(**options).devices[0]
    mesh = Mesh(np.array([device]), ("device",))
    f, shapes = program(case, None)
    with jax.set_mesh(mesh):
        here = NamedSharding(mesh, PartitionSpec())
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in shapes]
        return jax.jit(f).lower(*arguments).compile().as_text()


def targets() -> list:
    """Each chip with the usual case, one with chosen rows; all of both with --slow."""
    default = {*((chip, "usual") for chip in TOPOLOGIES), ("v5e", "top 1, documents")}
    every = [(chip, name) for chip in TOPOLOGIES for name in SHAPES]
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in default)) for pair in every]


@pytest.mark.parametrize(("chip", "name"), targets())
def test_the_kernels_compile(chip: str, name: str) -> None:
    case = SHAPES[name]
    text = compiled_for(chip, case)
    kernels = ["forward", "backward_own"]
    if name not in ("one segment", "top 1, documents"):
        kernels.append("backward_tails")
    for kernel in kernels:
        assert f"segmented_attention_{kernel}" in text
    # Choosing is a product of XLA's, which a TPU calls a convolution; nothing else is left to it.
    assert bool(re.search(r"\b(dot|convolution)\(", text)) == (case.top_segments is not None)


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:4x4x4"])
def test_rows_cut_over_chips_compile(topology: str) -> None:
    """With the kernels, on all chips of a slice."""
    from jax.experimental import topologies

    devices = np.array(topologies.get_topology_desc(**topology_options(parse_topology(topology))).devices)
    mesh, cut = Mesh(devices, ("context",)), PartitionSpec(None, "context")

    def attend(q, k, v):
        return context_parallel_attention(q, k, v, axis="context", segments=Segments(512, 256, 256))

    def gradients(q, k, v):
        whole = jax.shard_map(attend, mesh=mesh, in_specs=(cut,) * 3, out_specs=cut, check_vma=False)
        return jax.grad(lambda *x: whole(*x).astype(np.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    x = jax.ShapeDtypeStruct((1, 1024 * devices.size, 2, 128), "bfloat16", sharding=NamedSharding(mesh, cut))
    with jax.set_mesh(mesh):
        text = jax.jit(gradients).lower(x, x, x).compile().as_text()
    assert "segmented_attention_backward_own" in text
    assert "all-gather" in text or "all-reduce" in text  # what few bytes are gathered by is the compiler's choice
    assert "collective-permute" in text


@pytest.mark.parametrize("name", ["64 wide, documents", "top 1, documents"])
def test_the_call_is_exported_for_cuda(name: str) -> None:
    """With the kernels where they do what is asked, and XLA's products elsewhere."""
    f, shapes = program(SHAPES[name], None)
    text = jax.export.export(jax.jit(f), platforms=["cuda"])(*shapes).mlir_module()
    assert "mosaic_gpu" in text
    assert ("dot_general" in text) == (SHAPES[name].top_segments is not None)
