"""A small decoder on rows of 16,384 tokens: segmented attention, segments of 1,024.

    dsjax train configs/long_context.py --run runs/long_context
    dsjax plan configs/long_context.py --topology v5e:2x4 --mode decode --length 131072 --mesh data=1,tensor=8

A position sees its own segment, and of each earlier one the last 512 positions; of two key/value heads one cuts the row
512 positions earlier, so that each layer sees every position. The decode cache is half of what full attention keeps.

Result: not yet run.
"""

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.masks import Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import Pretrain, TrainConfig


def get_config() -> Pretrain:
    attention = AttentionConfig(
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        rope_theta=500_000.0,
        qk_norm=True,
        segmented=Segmented(1024, shift="heads"),
    )
    return Pretrain(
        model=DecoderConfig(
            vocab_size=4096, d_model=512, num_layers=8, groups=(LayerGroup(MLPConfig(d_ff=1536), attention),)
        ),
        data=DataConfig(vocab_size=4096, seq_len=16_384, batch_size=8),
        optim=OptimConfig(lr=1e-3, warmup_steps=100),
        train=TrainConfig(steps=1000, eval_every=250),
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=512),
        checkpoint=CheckpointConfig(every=250),
    )
