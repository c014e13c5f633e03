"""What a plan says of experts over devices, against arithmetic."""

from __future__ import annotations

import os

import pytest

from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.moe import MoEConfig
from dsjax.plan.measure import Job, measure
from dsjax.sharding import MeshConfig
from dsjax.train.pretrain import Pretrain

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

LAYERS, B, T, D, X = 2, 16, 128, 256, 3


def config(remat: str, capacity: float | None = None, **mesh: int) -> Pretrain:
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=128)
    experts = MoEConfig(num_experts=8, top_k=X, d_ff=256, num_shared_experts=1, capacity=capacity)
    return Pretrain(
        model=DecoderConfig(512, d_model=D, num_layers=LAYERS, groups=(LayerGroup(experts, attention),)),
        data=DataConfig(vocab_size=512, seq_len=T, batch_size=B),
        compute=ComputeConfig(dtype="bfloat16", remat=remat, loss_chunk=T),  # type: ignore[arg-type]
        mesh=MeshConfig(**mesh),
    )


@pytest.mark.parametrize(
    ("remat", "capacity", "exchanges"),
    [
        ("full", None, 6),  # there and back: forward, again, and in the backward pass
        pytest.param("none", 1.25, 4, marks=pytest.mark.slow),
    ],
)
def test_bytes_and_flops_of_experts_over_devices(remat: str, capacity: float | None, exchanges: int) -> None:
    """8 experts on 4 devices: with 2 of its own, a device may get 2 pairs of each token, and on average 3/4 of one."""
    plan = measure(Job(config(remat, capacity, data=2, expert=4), "v5e:2x4", "train"))
    pairs = B * T // 8 * X  # of a device
    found = plan["collective_bytes"]["expert"]
    assert found["ragged-all-to-all"] == pytest.approx(LAYERS * exchanges * pairs * D * 2 * 3 / 4, rel=1e-6)
    assert "all-to-all" not in found
    # How many rows each device has for each expert is all that all devices are told; weights are not cut.
    counts = 3 * 8 * 4
    assert found.get("all-gather", 0) <= 3 * LAYERS * counts
    assert plan["flops_per_step"] == pytest.approx(plan["flops_of_config"], rel=0.03)
