"""The training step compiles for chips that are not here: TPU by libtpu ahead of time, GPU by lowering."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import pytest
from models import EVERYTHING

from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig
from dsjax.sharding import MeshConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import Pretrain, batch_shapes, build
from pallas_kernels.platforms import ANY, compiled_for

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def config(**mesh: int) -> Pretrain:
    return Pretrain(
        model=dataclasses.replace(EVERYTHING, d_model=32, vocab_size=320),
        data=DataConfig(vocab_size=320, seq_len=128, batch_size=8),
        optim=OptimConfig(name="muon"),
        compute=ComputeConfig(dtype="bfloat16", remat="dots", loss_chunk=64),
        mesh=MeshConfig(**mesh),
    )


def lowered(cfg: Pretrain, devices: list):
    mesh, trainer = build(cfg, devices)
    return trainer.step.trace(trainer.shapes, batch_shapes(cfg, mesh), jax.ShapeDtypeStruct((), jnp.int32))


@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("v5e:2x4", {"fsdp": 2, "expert": 2, "tensor": 2}), ("v6e:2x2", {"data": 2, "tensor": 2})],
)
def test_the_step_compiles_for_tpu(topology: str, mesh: dict[str, int]) -> None:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    compiled = lowered(config(**mesh), list(devices)).lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    text = compiled.as_text()
    assert "all-reduce" in text
    if "fsdp" in mesh:
        assert "all-gather" in text


def test_the_step_lowers_for_cuda() -> None:
    with compiled_for(ANY):  # the mesh is one CPU
        step = lowered(config(), jax.devices()[:1])
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_dot" in text  # not the CPU's blocks of rows
