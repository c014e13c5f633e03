"""The TPU kernels of grouped matmul compile ahead of time for every chip, forward and backward, all of them."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.plan.chips import parse_topology, topology_options
from pallas_kernels.expert_dispatch import Plan
from pallas_kernels.grouped_matmul import expert_swiglu, grouped_matmul

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer of experts: its rows are gathered from half as many tokens."""

    R: int = 256
    D: int = 256
    F: int = 384
    E: int = 4
    dtype: str = "bfloat16"
    layers: int = 0
    int8: bool = False


SHAPES = {
    "usual": Shape(),
    "float32": Shape(dtype="float32"),
    "of a layer": Shape(layers=3),
    "int8": Shape(int8=True, layers=2),
    "odd": Shape(R=250, D=200, F=330, dtype="float32"),
    "odd, bfloat16": Shape(R=250, D=200, F=330),
    "wide": Shape(R=2048, D=7168, F=2048, E=8),
    "wide, float32": Shape(R=2048, D=7168, F=2048, E=8, dtype="float32"),
}


def _array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def program(shape: Shape) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """The layer and its gradients, or a product with int8 matrices; sizes of groups are not known before."""
    R, D, F, E, dtype = shape.R, shape.D, shape.F, shape.E, shape.dtype
    stack, sizes = (shape.layers,) * (shape.layers > 0) + (E,), _array(E, dtype=jnp.int32)
    more: dict[str, Any] = {"layer": jnp.int32(1)} if shape.layers else {}

    def product(x, w, scales, sizes_E):
        return jax.vjp(lambda x: grouped_matmul(x, w, sizes_E, scales_EF=scales, **more), x)[0]

    if shape.int8:
        scales = _array(*stack, F, dtype=jnp.float32)
        return product, [_array(R, D, dtype=dtype), _array(*stack, D, F, dtype=jnp.int8), scales, sizes]

    def layer(x, dy, token_R, sizes_E, *weights):
        plan = Plan(token_R.reshape(-1, 2), token_R * 2, sizes_E)
        y, pull = jax.vjp(lambda x, *w: expert_swiglu(x, *w, plan, **more), x, *weights)
        return y, pull(dy)

    weights = [_array(*stack, *dims, dtype=dtype) for dims in ((D, F), (D, F), (F, D))]
    rows = [_array(R // 2, D, dtype=dtype), _array(R, D, dtype=dtype), _array(R, dtype=jnp.int32)]
    return layer, [*rows, sizes, *weights]


def compiled_for(chip: str, shape: Shape) -> str:
    from jax.experimental import topologies

    options = topology_options(parse_topology(TOPOLOGIES[chip]))
    mesh = Mesh(np.array(topologies.get_topology_desc(**options).devices[:1]), ("device",))
    f, shapes = program(shape)
    with jax.set_mesh(mesh):
        here = NamedSharding(mesh, PartitionSpec())
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in shapes]
        return jax.jit(f).lower(*arguments).compile().as_text()


def targets() -> list[Any]:
    """Each chip with the usual layer, and one with int8 matrices; all of both with --slow."""
    default = {*((chip, "usual") for chip in TOPOLOGIES), ("v5e", "int8")}
    # 16 MiB of v4 do not hold 7,168 float32 rows of two matrices, twice: XLA computes that.
    every = [(chip, name) for chip in TOPOLOGIES for name in SHAPES if (chip, name) != ("v4", "wide, float32")]
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in default)) for pair in every]


@pytest.mark.parametrize(("chip", "name"), targets())
def test_the_kernels_compile(chip: str, name: str) -> None:
    shape = SHAPES[name]
    text = compiled_for(chip, shape)
    kernels = ["matmul"] if shape.int8 else ["swiglu", "matmul", "swiglu_backward", "swiglu_dx", "outer"]
    for kernel in kernels:
        assert f"grouped_{kernel}" in text
    assert not re.search(r"\b(dot|convolution|ragged-dot)\(", text)  # no product is left to XLA
