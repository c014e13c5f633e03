"""The seed's mixture of experts: 175B parameters in all, 35B active, context 4,096.

    dsjax plan configs/seed_moe_175b.py --topology v5p:4x8x8
    dsjax train configs/seed_moe_175b.py --run runs/seed_moe_175b

One dense layer, then 67 of 64 experts, top-8, and two shared ones (DeepSeekMoE's shape, Dai et al. 2024), balanced by
DeepSeek-V3's selection bias.

Result: not yet run; planned for 64 to 4,096 chips in docs/plan.md.
"""

from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.sharding import MeshConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import CheckpointConfig, Pretrain, TrainConfig


def get_config() -> Pretrain:
    attention = AttentionConfig(num_heads=64, num_kv_heads=8, head_dim=128)
    experts = MoEConfig(
        num_experts=64, top_k=8, d_ff=2048, num_shared_experts=2, balance_coef=1e-4, bias_update_rate=1e-3
    )
    return Pretrain(
        model=DecoderConfig(
            vocab_size=131_072,
            d_model=6144,
            num_layers=68,
            groups=(LayerGroup(MLPConfig(d_ff=16_384), attention, num_layers=1), LayerGroup(experts, attention)),
        ),
        data=DataConfig(vocab_size=131_072, seq_len=4096, batch_size=256),
        optim=OptimConfig(lr=2.2e-4, warmup_steps=2000, weight_decay=0.1),
        train=TrainConfig(steps=500_000),
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=512),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8),
        checkpoint=CheckpointConfig(every=500),
    )
