"""Llama-2-7B's shape (Touvron et al. 2023, arXiv 2307.09288), as MaxText trains it on 256 v5e chips.

    dsjax plan configs/llama2_7b.py --topology v5e:16x16
    dsjax train configs/llama2_7b.py --run runs/llama2_7b

Four sequences of 2,048 tokens for each chip, everything cut over fsdp.

Result: not yet run; planned beside published figures in docs/plan.md.
"""

from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.sharding import MeshConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import CheckpointConfig, Pretrain, TrainConfig


def get_config() -> Pretrain:
    attention = AttentionConfig(num_heads=32, num_kv_heads=32, head_dim=128)
    return Pretrain(
        model=DecoderConfig(
            vocab_size=32_000,
            d_model=4096,
            num_layers=32,
            groups=(LayerGroup(MLPConfig(d_ff=11_008), attention),),
            norm_eps=1e-5,
        ),
        data=DataConfig(vocab_size=32_000, seq_len=2048, batch_size=1024),
        optim=OptimConfig(lr=3e-4, warmup_steps=2000, schedule="cosine", final_lr_share=0.1),
        train=TrainConfig(steps=500_000),
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=512),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=1000),
    )
