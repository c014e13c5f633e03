"""A dense model with as many parameters as the seed's mixture of experts has in all: 175B.

    dsjax plan configs/seed_dense_175b.py --topology v5p:4x8x8
    dsjax train configs/seed_dense_175b.py --run runs/seed_dense_175b

Result: not yet run; planned beside the mixture in docs/plan.md.
"""

import dataclasses

from seed_moe_175b import get_config as mixture

from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.sharding import MeshConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    attention = AttentionConfig(num_heads=96, num_kv_heads=8, head_dim=128)
    model = DecoderConfig(
        vocab_size=131_072,
        d_model=12_288,
        num_layers=96,
        groups=(LayerGroup(MLPConfig(d_ff=39_936), attention),),
    )
    return dataclasses.replace(mixture(), model=model, mesh=MeshConfig(data=1, fsdp=-1))
