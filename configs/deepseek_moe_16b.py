"""DeepSeekMoE-16B's shape and routing (Dai et al. 2024, arXiv 2401.06066): 16.4B parameters in all, 2.8B active.

    dsjax plan configs/deepseek_moe_16b.py --topology v5p:4x4x4
    dsjax train configs/deepseek_moe_16b.py --run runs/deepseek_moe_16b

One dense layer, then 27 of 64 experts, top-6 by softmax and not normalised, and two shared ones; balanced within each
sequence.

Result: not yet run.
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
    attention = AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=128)
    experts = MoEConfig(
        num_experts=64,
        top_k=6,
        d_ff=1408,
        num_shared_experts=2,
        normalize_weights=False,
        balance_coef=0.0,
        sequence_coef=1e-3,
    )
    return Pretrain(
        model=DecoderConfig(
            vocab_size=102_400,
            d_model=2048,
            num_layers=28,
            groups=(LayerGroup(MLPConfig(d_ff=10_944), attention, num_layers=1), LayerGroup(experts, attention)),
        ),
        data=DataConfig(vocab_size=102_400, seq_len=4096, batch_size=4608),
        optim=OptimConfig(lr=4.2e-4, warmup_steps=2000, weight_decay=0.1),
        train=TrainConfig(steps=106_449, accumulate=18),
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=512),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8),
        checkpoint=CheckpointConfig(every=500),
    )
