"""Expert dispatch compiles for chips that are not here: every TPU ahead of time, CUDA by export."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import jax
import numpy as np
import pytest
from dispatch_cases import Case, Shape, expected, program
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels.expert_dispatch
from dsjax.plan.chips import parse_topology, topology_options

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
USUAL = Shape(T=300, E=16, X=2, D=256, bias=True, counted=True, limited=True, dtype="bfloat16")
SHAPES = {
    "usual": USUAL,
    "float32": dataclasses.replace(USUAL, dtype="float32"),
    "no multiples": dataclasses.replace(USUAL, T=37, X=3, E=15, D=100, num_groups=3, top_groups=2, num_rows=4),
    "float32, no multiples": dataclasses.replace(USUAL, T=37, X=3, E=5, D=100, num_rows=4, dtype="float32"),
    "DeepSeek-V3": Shape(
        T=600, E=256, X=8, num_groups=8, top_groups=4, group_score="top2", bias=True, D=7168, dtype="bfloat16"
    ),
    "DeepSeek-V2": Shape(T=600, E=160, X=6, num_groups=8, top_groups=3, D=5120, dtype="bfloat16"),
}
KERNELS = ("expert_dispatch_select", "expert_dispatch_sum", "expert_dispatch_dot")


def shapes_of(shape: Shape, **placed: Any) -> dict[str, Any]:
    """The arguments of a program."""
    given, _ = expected(Case(dataclasses.replace(shape, T=1)))
    here = {"T": shape.T, "R": shape.R, "E": shape.E, "X": shape.X, "D": shape.D}

    def of(name: str, x: np.ndarray | None) -> Any:
        if x is None:
            return None
        size = (shape.here,) if name == "limit_E" else tuple(here[letter] for letter in name.split("_")[1])
        return jax.ShapeDtypeStruct(size, x.dtype, **placed)

    return {name: of(name, x) for name, x in given.items()}


def targets() -> list:
    """The usual shape on every chip, the others on one or two; all with --slow."""
    default = {*((chip, "usual") for chip in TOPOLOGIES), ("v5e", "float32"), ("v6e", "no multiples")}
    every = [(chip, name) for chip in TOPOLOGIES for name in SHAPES]
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in default)) for pair in every]


@pytest.mark.parametrize(("chip", "name"), targets())
def test_the_kernels_compile(chip: str, name: str) -> None:
    from jax.experimental import topologies

    device = topologies.get_topology_desc(**topology_options(parse_topology(TOPOLOGIES[chip]))).devices[0]
    mesh = Mesh(np.array([device]), ("device",))
    f = program(SHAPES[name], None, pallas_kernels.expert_dispatch)
    arguments = shapes_of(SHAPES[name], sharding=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        text = f.lower(**arguments).compile().as_text()
    for kernel in KERNELS:
        assert kernel in text
    # What a chip does one number at a time is left to nothing: rows move in kernels, numbers by sorting.
    assert not re.search(r"\b(scatter|gather)\(", text)


@pytest.mark.parametrize("name", ["usual", "float32"])
def test_the_call_is_exported_for_cuda(name: str) -> None:
    f = program(SHAPES[name], None, pallas_kernels.expert_dispatch)
    exported = jax.export.export(f, platforms=["cuda"])(**shapes_of(SHAPES[name]))
    assert "tpu_custom_call" not in exported.mlir_module()
