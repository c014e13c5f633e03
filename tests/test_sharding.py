"""One override moves a model between parallelisms, and the losses stay those of one device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import apply_overrides, validate
from dsjax.data.batch import Batch
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.masks import Documents
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.sharding import MeshConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import Pretrain, TrainConfig, build, place_batch

ATTENTION = AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=8)
STEPS = 20


def small(capacity: float | None = None) -> Pretrain:
    experts = MoEConfig(num_experts=8, top_k=2, d_ff=32, num_shared_experts=1, capacity=capacity)
    groups = (
        LayerGroup(MLPConfig(d_ff=64), ATTENTION, num_layers=1),
        LayerGroup(experts, ATTENTION),
    )
    return Pretrain(
        model=DecoderConfig(vocab_size=320, d_model=32, num_layers=3, groups=groups),
        data=DataConfig(vocab_size=320, seq_len=32, batch_size=8),
        optim=OptimConfig(lr=3e-3, warmup_steps=3),
        train=TrainConfig(steps=STEPS),
    )


def random_batch(config: Pretrain, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    B, T = config.data.batch_size, config.data.seq_len
    tokens = rng.integers(0, 50, (B, T + 1)).astype(np.int32)  # few of the ids: there is something to learn
    starts = rng.random((B, T)) < 0.1
    starts[:, 0] = True
    ids = np.cumsum(starts, axis=1).astype(np.int32)
    positions = (np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)).astype(np.int32)
    weight = (rng.random((B, T)) < 0.9).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weight, Documents(ids, positions))


def losses(config: Pretrain, steps: int = STEPS, devices=None) -> np.ndarray:
    validate(config)
    if devices is not None:
        config = dataclasses.replace(config, mesh=MeshConfig(data=1))
    mesh, trainer = build(config, devices)
    state, out = trainer.init(0), []
    for i in range(steps):
        state, metrics = trainer.step(state, place_batch(random_batch(config, i), mesh), jnp.int32(STEPS))
        out.append(float(metrics["loss"]))
    return np.array(out)


@pytest.fixture(scope="module")
def one_device() -> np.ndarray:
    found = losses(small(), devices=jax.devices()[:1])
    assert found[-1] < found[0] - 0.5  # it learns: equal losses of an idle model would say nothing
    return found


@pytest.mark.parametrize(
    "mesh",
    [
        "data=8",
        "fsdp=8",
        "tensor=8",
        "expert=8",
        "context=8",
        "fsdp=4",
        "fsdp=2,tensor=2",
        "expert=4,tensor=2",
        "fsdp=2,expert=2,tensor=2",
        "fsdp=2,expert=2,context=2",
        "data=2,expert=4,expert_over_data=true",
    ],
)
def test_every_mesh_gives_the_losses_of_one_device(mesh: str, one_device: np.ndarray) -> None:
    config = apply_overrides(small(), [f"mesh={mesh}"])
    found = losses(config)
    print(f"mesh={mesh}: largest relative difference {np.max(np.abs(found / one_device - 1)):.1e}")
    # rtol: float32 sums in another order over 20 steps.
    np.testing.assert_allclose(found, one_device, rtol=1e-5)


@pytest.mark.parametrize("mesh", ["fsdp=2,expert=2,context=2", "data=2,expert=4,expert_over_data=true"])
def test_every_mesh_drops_the_pairs_that_one_device_drops(mesh: str) -> None:
    """The first ones of the whole batch find room, whichever device they are on."""
    want, dropless = (losses(small(c), 3, jax.devices()[:1]) for c in (0.75, None))
    assert abs(want[0] - dropless[0]) > 1e-3
    found = losses(apply_overrides(small(0.75), [f"mesh={mesh}"]), 3)
    np.testing.assert_allclose(found, want, rtol=1e-5)  # as above
