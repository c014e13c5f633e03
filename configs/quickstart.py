"""The first job: a small decoder on Python's standard library, in minutes on two cores.

    ./scripts/quickstart                      # or: dsjax train configs/quickstart.py && dsjax eval runs/quickstart

Result: 1.228 held-out bits per byte after 1,434 steps (2.9M tokens, 6 minutes on two cores); the 5-gram has 1.661, xz
2.167. See docs/numerics.md.
"""

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.history import CopyConfig, NgramConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import Pretrain, TrainConfig


def get_config() -> Pretrain:
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=64, qk_norm=True, conv_taps=4)
    return Pretrain(
        model=DecoderConfig(
            vocab_size=4096,
            d_model=128,
            num_layers=4,
            groups=(LayerGroup(MLPConfig(d_ff=384), attention),),
            ngram=NgramConfig(sizes=(2, 3, 4), num_buckets=131_072, d_table=32),
            copy=CopyConfig(max_match=8),
        ),
        data=DataConfig(vocab_size=4096, seq_len=512, batch_size=4),
        optim=OptimConfig(
            name="muon",
            lr=0.02,
            muon_lr=0.003,
            table_lr=0.1,
            weight_decay=0.0,
            clip_norm=0.0,
            schedule="wsd",
            warmup_steps=30,
            decay_share=0.7,
        ),
        train=TrainConfig(steps=1800, max_minutes=6.0, eval_every=300),
        compute=ComputeConfig(unroll=True, loss_chunk=128),
        checkpoint=CheckpointConfig(every=600),
    )
