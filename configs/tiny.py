"""A run of seconds, for tests: a two-layer decoder on the standard library.

    dsjax train configs/tiny.py --run runs/tiny

Result: see docs/numerics.md (its loss means nothing; it must be fast).
"""

from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import CheckpointConfig, Pretrain, TrainConfig


def get_config() -> Pretrain:
    attention = AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=8)
    return Pretrain(
        model=DecoderConfig(
            vocab_size=512,
            d_model=64,
            num_layers=2,
            groups=(LayerGroup(MLPConfig(d_ff=128), attention),),
        ),
        data=DataConfig(vocab_size=512, seq_len=64, batch_size=8),
        optim=OptimConfig(lr=3e-3, warmup_steps=5),
        train=TrainConfig(steps=20, log_every=5),
        checkpoint=CheckpointConfig(every=10),
    )
