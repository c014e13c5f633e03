"""Paged attention compiles for every TPU ahead of time, alone and in inference; for CUDA the call is XLA's."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.infer.engine import make_generator, placed
from dsjax.infer.programs import make_programs
from dsjax.infer.sampling import RowSampling, SamplingConfig
from dsjax.infer.speculation import Behind
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.masks import Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.plan.chips import parse_topology, topology_options
from dsjax.sharding import MeshConfig, joined, make_mesh, split_variables
from pallas_kernels.paged_attention import paged_attention

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
# B, T, K, G, H, U, P, J, dtype
SHAPES = {
    "a step": (8, 1, 8, 4, 128, 128, 64, 64, "bfloat16"),
    "64 wide, one page of many": (4, 1, 1, 1, 64, 64, 16, 4, "float32"),
    "192 and 128 wide": (2, 64, 2, 8, 192, 128, 32, 9, "bfloat16"),
    "a chunk, 256 wide": (1, 512, 4, 2, 256, 256, 64, 64, "float32"),
    "131,072 slots": (1, 1, 1, 8, 128, 128, 64, 2048, "bfloat16"),
    "latent, 128 heads": (4, 1, 1, 128, 640, 512, 64, 64, "bfloat16"),
    "latent, a chunk": (1, 256, 1, 16, 640, 512, 64, 64, "bfloat16"),
}


def shapes(name: str, sharding: NamedSharding | None = None) -> list[jax.ShapeDtypeStruct | None]:
    B, T, K, G, H, U, P, J, dtype = SHAPES[name]
    arrays = (
        ((B, T, K * G, H), dtype),
        ((3000, K, P, H), dtype),
        ((3000, K, P, U), dtype),
        ((B, J), jnp.int32),
        ((B, J, P), jnp.int32),
        ((B, T), jnp.int32),
    )
    made = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in arrays]
    return [None if number == 2 and "latent" in name else x for number, x in enumerate(made)]


def options(name: str) -> dict[str, int]:
    return {"value_width": SHAPES[name][5]} if "latent" in name else {}


def targets() -> list:
    """Each chip with a step, one chip with all shapes; all of both with --slow."""
    default = {*((chip, "a step") for chip in TOPOLOGIES), *(("v4", name) for name in SHAPES)}
    every = [(chip, name) for chip in TOPOLOGIES for name in SHAPES]
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in default)) for pair in every]


@pytest.mark.parametrize(("chip", "name"), targets())
def test_the_kernel_compiles_and_copies_no_page(chip: str, name: str) -> None:
    from jax.experimental import topologies

    described = topology_options(parse_topology(TOPOLOGIES[chip]))
    mesh = Mesh(np.array([topologies.get_topology_desc(**described).devices[0]]), ("device",))
    with jax.set_mesh(mesh):
        given = shapes(name, NamedSharding(mesh, PartitionSpec()))
        compiled = jax.jit(functools.partial(paged_attention, **options(name))).lower(*given).compile()
    assert "paged_attention" in compiled.as_text()
    # The pools are read where they lie; what is laid out anew are queries, tables and results. (Pools of another width
    # are given with pages along the lanes: a cache fills its heads up, below.)
    if all(x.shape[-1] % 128 == 0 for x in given[1:3] if x is not None):
        assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * math.prod(given[1].shape) * given[1].dtype.itemsize


@pytest.mark.parametrize(("head_dim", "mesh"), [(64, {"data": 1, "fsdp": 2, "tensor": 2}), (128, {"data": 4})])
def test_a_decode_step_copies_no_cache(head_dim: int, mesh: dict[str, int]) -> None:
    """Neither to read it nor to write it, whatever the width of a head, also where slots and heads are cut."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    attention = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=head_dim)
    cfg = DecoderConfig(512, 256, 3, (LayerGroup(MLPConfig(d_ff=256), attention),))
    make = functools.partial(Decoder, cfg, ComputeConfig(dtype="bfloat16"))
    made = make_generator(
        lambda rngs: make(rngs=rngs), make_mesh(MeshConfig(**mesh), list(devices)), batch_size=8, slots=8192
    )
    memory = made.decode_step.trace(*made.decode_shapes()).lower().compile().memory_analysis()
    pools = made.cache_shapes.groups[0].pages
    held = 2 * math.prod(pools.k_LMKPH.sharding.shard_shape(pools.k_LMKPH.shape)) * 2
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < 0.05 * held


def test_the_call_is_exported_for_cuda_as_xlas() -> None:
    text = jax.export.export(jax.jit(paged_attention), platforms=["cuda"])(*shapes("a step")).mlir_module()
    assert "stablehlo.while" in text  # as many blocks as the longest row needs
    assert "stablehlo.gather" in text
    assert "custom_call" not in text


def test_an_engines_programs_copy_no_pool() -> None:
    """A chunk of a prompt, decode steps, pages that are copied: the cache is changed in place."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    full = AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=64)
    chosen = dataclasses.replace(full, segmented=Segmented(1024, top_segments=1))
    groups = (LayerGroup(MLPConfig(d_ff=256), full, num_layers=1), LayerGroup(MLPConfig(d_ff=256), chosen))
    cfg, compute = DecoderConfig(512, 256, 3, groups), ComputeConfig(dtype="bfloat16")
    graph, params, buffers = split_variables(nnx.eval_shape(lambda: Decoder(cfg, compute, rngs=nnx.Rngs(0))))
    there = placed(graph, joined(params, buffers), make_mesh(MeshConfig(), list(devices)[:1]), 8)
    programs = make_programs(graph, there.mesh, there.rules, 2)
    whole = NamedSharding(there.mesh, PartitionSpec())

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    pools = {"page_size": 64, "lanes": 128, "pools": (1024, 600)}
    cache = jax.tree.map(abstract, jax.eval_shape(lambda: there.model.empty_cache(8, 8192, there.dtype, **pools)))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    logits, row = (abstract(np.zeros(shape, dtype)) for shape, dtype in (((8, 512), np.float32), (1, np.int32)))
    chunk, moved = abstract(np.zeros((1, 64), np.int32)), (abstract(np.zeros((1, 9), np.int32)),) * 2
    behind, zeros = Behind(logits, abstract(jnp.zeros((8, 0, 256), jnp.bfloat16))), np.zeros(8, np.int32)
    rows = jax.tree.map(abstract, (zeros, zeros, np.zeros(8, np.uint32), zeros))
    settings = jax.tree.map(abstract, RowSampling.of([SamplingConfig()] * 8))
    for lowered in (
        programs.copy.lower(cache, moved, moved),
        programs.extend.lower(there.shapes, chunk, row, row, row, behind, cache),
        programs.decode.lower(there.shapes, behind, cache, *rows, settings, 4, width=4, num_top=2),
    ):
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= held
        assert memory.temp_size_in_bytes < 0.05 * held
