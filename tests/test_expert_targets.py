"""The whole layer of experts compiles for chips that are not here, with what its kernels do there."""

from __future__ import annotations

import os
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from dsjax.config import apply_overrides
from dsjax.nn.moe import MoE, MoEConfig, set_capacity
from dsjax.sharding import MeshConfig, Rules, logical_axes, make_mesh, shardings, split_variables, use_mesh
from pallas_kernels.platforms import ANY, compiled_for

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

EXPERTS = MoEConfig(
    num_experts=16, top_k=4, d_ff=256, num_shared_experts=2, scoring="sigmoid", num_groups=4, top_groups=2,
    group_score="top2", sequence_coef=1e-3, bias_update_rate=1e-3, capacity=2.0,
)  # fmt: skip
# libtpu exchanges synchronously unless it is asked not to.
ASYNCHRONOUS = {"xla_tpu_enable_async_ragged_all_to_all": "true"}


def traced(
    devices: list, mesh: str, *, backward: bool = True, capacity: bool = False, shape: tuple[int, ...] = (64, 128, 256)
):
    """The layer in bfloat16, weights and tokens cut as in training; with the gradients of all weights and of x."""
    placed, rules = make_mesh(apply_overrides(MeshConfig(data=1), mesh.split(",")), devices), Rules()

    def make() -> MoE:
        layer = MoE(EXPERTS, shape[-1], rngs=nnx.Rngs(0))
        if capacity:
            set_capacity(layer)
        return layer

    layer = nnx.eval_shape(make)
    graph, weights, buffers = split_variables(layer)
    axes = logical_axes(layer)

    def run(weights, buffers, x_BTD):
        def total(weights, x_BTD):
            y_BTD, stats = nnx.merge(graph, weights, buffers)(x_BTD, jnp.ones(x_BTD.shape[:2]))
            return jnp.sum(y_BTD.astype(jnp.float32)) + stats.losses["sequence_balance"], y_BTD

        with use_mesh(placed, rules):
            if not backward:
                return total(weights, x_BTD)[1]
            return jax.grad(lambda *a: total(*a)[0], argnums=(0, 1))(weights, x_BTD)

    def shapes(tree):
        places = shardings(tree, {name: axes[name] for name in tree}, placed, rules)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, places)

    tokens = NamedSharding(placed, rules.spec("batch", "length", None))
    x_BTD = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=tokens)
    return jax.jit(run).trace(shapes(weights), shapes(buffers), x_BTD)


def tpu(topology: str) -> list:
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


@pytest.mark.parametrize(
    ("topology", "mesh", "capacity"),
    [
        ("v5e:4x4", "fsdp=2,expert=4,tensor=2", False),
        pytest.param("v5e:4x4", "fsdp=2,expert=4,context=2", True, marks=pytest.mark.slow),
        pytest.param("v5p:4x4x4", "fsdp=4,expert=16", False, marks=pytest.mark.slow),
        pytest.param("v6e:4x4", "fsdp=4,expert=4", True, marks=pytest.mark.slow),
        pytest.param("tpu7x:2x2x1", "fsdp=2,expert=4", False, marks=pytest.mark.slow),
    ],
)
def test_forward_and_backward_compile_for_tpu(topology: str, mesh: str, capacity: bool) -> None:
    text = traced(tpu(topology), mesh, capacity=capacity).lower().compile().as_text()
    # There and back, forward and backward: rows that are there, and no padded slots.
    assert len(re.findall(r"= \S+ ragged-all-to-all\(", text)) == 4
    assert not re.search(r"[^-]all-to-all\(", text)
    assert "tpu_custom_call" in text


def test_the_exchange_overlaps_with_the_shared_experts() -> None:
    """They do not wait for each other: where the exchange is asynchronous, products are computed meanwhile."""
    layer = traced(tpu("v5e:4x4"), "fsdp=4,expert=4", backward=False, shape=(64, 1024, 1024))
    text = layer.lower().compile(compiler_options=ASYNCHRONOUS).as_text()
    entry = text[text.index("ENTRY") :].splitlines()
    starts = [i for i, line in enumerate(entry) if "ragged-all-to-all-start(" in line]
    ends = [i for i, line in enumerate(entry) if "ragged-all-to-all-done(" in line]
    assert len(starts) == len(ends) == 2
    between = "\n".join(line for start, end in zip(starts, ends, strict=True) for line in entry[start:end])
    # The experts' and the exchange's own work are inside the shard_map, the router's is done by then.
    assert re.search(r'fusion\(.*op_name="jit\(run\)/(?!shard_map)[^"]*dot_general', between)


@pytest.mark.parametrize("capacity", [False, True])
def test_forward_and_backward_lower_for_cuda(capacity: bool) -> None:
    with compiled_for(ANY):  # the mesh is one of CPUs
        layer = traced(jax.devices(), "fsdp=2,expert=2,tensor=2", capacity=capacity)
    text = layer.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@ragged_all_to_all") == 4
