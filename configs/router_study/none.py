"""No balance at all, dropless: what all variants of the router study begin with.

    dsjax train configs/router_study/none.py
    ./scripts/study_router                       # all variants

Four layers of 16 small experts, two of which a token visits, on code. Variants differ in how the router is kept
balanced, in what an expert may drop, and in whether gradients are compensated; each is one file beside this one.
Coefficients are those of a layer: 0.0025 of each of four is 0.01 of their mean.

Result: see docs/numerics.md.
"""

import dataclasses
from typing import Any

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.moe import MoEConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import Pretrain, TrainConfig

STEPS = 150


def get_config() -> Pretrain:
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=64, qk_norm=True, conv_taps=4)
    experts = MoEConfig(num_experts=16, top_k=2, d_ff=96, num_shared_experts=1, balance_coef=0.0)
    return Pretrain(
        model=DecoderConfig(4096, 128, num_layers=4, groups=(LayerGroup(experts, attention),)),
        data=DataConfig(vocab_size=4096, seq_len=512, batch_size=8),
        optim=OptimConfig(
            name="muon", lr=0.02, muon_lr=0.003, weight_decay=0.0, clip_norm=0.0, warmup_steps=20, decay_share=0.7
        ),
        train=TrainConfig(steps=STEPS, log_every=5, eval_every=STEPS, eval_documents=40),
        compute=ComputeConfig(unroll=True, loss_chunk=128),
        checkpoint=CheckpointConfig(every=STEPS),
    )


def variant(compensation: float = 0.0, **moe: Any) -> Pretrain:
    """The same with other settings of its experts, and with ``optim.expert_compensation``."""
    config = get_config()
    (group,) = config.model.groups
    assert isinstance(group.ffn, MoEConfig)
    group = dataclasses.replace(group, ffn=dataclasses.replace(group.ffn, **moe))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, groups=(group,)),
        optim=dataclasses.replace(config.optim, expert_compensation=compensation),
    )
