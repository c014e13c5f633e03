"""The plain Transformer that the coder models are compared with: the standard library, minutes on one core.

    dsjax train configs/coder/plain.py --run runs/coder_plain

Result: docs/numerics.md (Coder).
"""

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import Pretrain, TrainConfig


def get_config() -> Pretrain:
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=True)
    return Pretrain(
        model=DecoderConfig(
            vocab_size=4096, d_model=128, num_layers=4, groups=(LayerGroup(MLPConfig(d_ff=384), attention),)
        ),
        data=DataConfig(vocab_size=4096, seq_len=512, batch_size=4),
        optim=OptimConfig(
            name="muon",
            lr=0.02,
            muon_lr=0.003,
            weight_decay=0.0,
            clip_norm=0.0,
            schedule="wsd",
            warmup_steps=20,
            decay_share=0.7,
        ),
        train=TrainConfig(steps=200, eval_every=100),
        compute=ComputeConfig(unroll=True, loss_chunk=128),
        checkpoint=CheckpointConfig(every=200),
    )
