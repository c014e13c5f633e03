"""A mixture of experts with five times the parameters that it uses for a token, to be compared with dense models.

    dsjax train configs/sparse_dense/mixture.py
    ./scripts/study_sparse                       # all variants

Three layers of 16 experts, two of which a token visits, and a shared one. Parameters are counted without the embedding
and the output matrix, which all variants have alike; of these the mixture has 5.00 times those that a token uses.
Dense variants have the same layers but for one feed-forward of another width (one file each beside this one). The
optimizer is AdamW: Muon's products would be half of the arithmetic of steps as short as these. Of the peak learning
rates 1e-3, 2e-3, 4e-3 and 8e-3 each was better than the one before for each of the three variants after 40 steps of 16
rows, the last by 0.04 to 0.05 nats; a longer run of fewer rows takes a little less.

Result: see docs/numerics.md.
"""

import dataclasses

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import Pretrain, TrainConfig

STEPS, D_MODEL = 400, 256
EXPERTS = MoEConfig(num_experts=16, top_k=2, d_ff=272, num_shared_experts=1)


def get_config() -> Pretrain:
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=64, qk_norm=True, conv_taps=4)
    return Pretrain(
        model=DecoderConfig(1024, D_MODEL, num_layers=3, groups=(LayerGroup(EXPERTS, attention),)),
        data=DataConfig(vocab_size=1024, seq_len=256, batch_size=8),
        optim=OptimConfig(lr=5e-3, weight_decay=0.0, warmup_steps=20, decay_share=0.7),
        train=TrainConfig(steps=STEPS, log_every=10),
        compute=ComputeConfig(unroll=True, loss_chunk=128),
        checkpoint=CheckpointConfig(every=STEPS),
    )


def dense(num_params: int) -> Pretrain:
    """The same with one feed-forward instead of experts, of as many parameters as they to a multiple of 8 in width."""
    config = get_config()
    (group,) = config.model.groups
    group = dataclasses.replace(group, ffn=MLPConfig(d_ff=8 * round(num_params / (3 * D_MODEL * 8))))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, groups=(group,)))
