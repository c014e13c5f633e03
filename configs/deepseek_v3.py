"""DeepSeek-V3's shape and routing (arXiv 2412.19437), without multi-token prediction.

    dsjax plan configs/deepseek_v3.py --topology v5p:8x8x8
    dsjax train configs/deepseek_v3.py --run runs/deepseek_v3

671B parameters in all, 38B active, embeddings included. Latent attention of 128 heads; a position's cache is 576
numbers a layer. Three dense layers, then 58 of 256 experts in 8 groups: sigmoid scores, the 8 best of the 4 groups
whose two best add up to most, normalised and times 2.5, and a shared one; balanced by a bias, and a little within each
sequence.

Result: not yet run.
"""

from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.sharding import MeshConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import CheckpointConfig, Pretrain, TrainConfig


def get_config() -> Pretrain:
    attention = LatentAttentionConfig(num_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    experts = MoEConfig(
        num_experts=256,
        top_k=8,
        d_ff=2048,
        num_shared_experts=1,
        scoring="sigmoid",
        num_groups=8,
        top_groups=4,
        group_score="top2",
        routed_scale=2.5,
        balance_coef=0.0,
        sequence_coef=1e-4,
        bias_update_rate=1e-3,
    )
    return Pretrain(
        model=DecoderConfig(
            vocab_size=129_280,
            d_model=7168,
            num_layers=61,
            groups=(LayerGroup(MLPConfig(d_ff=18_432), attention, num_layers=3), LayerGroup(experts, attention)),
        ),
        data=DataConfig(vocab_size=129_280, seq_len=4096, batch_size=15_360),
        optim=OptimConfig(lr=2.2e-4, warmup_steps=2000, weight_decay=0.1),
        train=TrainConfig(steps=235_000, accumulate=30),
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=512),
        mesh=MeshConfig(data=1, fsdp=-1, expert=32),
        checkpoint=CheckpointConfig(every=200),
    )
