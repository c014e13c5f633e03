"""DeepSeek-V3.2 (arXiv 2512.02556): V3 whose attention looks at the 2048 positions that an indexer chooses.

    dsjax plan configs/deepseek_v32.py --topology v5p:8x8x8
    dsjax train configs/deepseek_v32.py --run runs/deepseek_v32

672B parameters in all, 39B active: V3's, and 13.97M of an indexer in each layer. A position's cache is 704 numbers a
layer: a latent, a rotary key and an index key. Trained on from a V3 whose context was stretched to 128K (YaRN), in two
stages: the indexers alone (configs/deepseek_v32_warm_up.py); then everything, which this is: 15,000 steps of 480 rows
of 128K positions at 7.3e-6.

Result: not yet run.
"""

import dataclasses

from deepseek_v3 import get_config as deepseek_v3

from dsjax.models.decoder import DecoderConfig
from dsjax.nn.indexer import IndexerConfig
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.rope import YarnScaling
from dsjax.sharding import MeshConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    config = deepseek_v3()
    return dataclasses.replace(
        config,
        model=indexed(config.model, IndexerConfig(num_heads=64, head_dim=128, top_k=2048)),
        data=dataclasses.replace(config.data, seq_len=131_072, batch_size=480),
        optim=dataclasses.replace(config.optim, lr=7.3e-6, schedule="constant"),
        train=dataclasses.replace(config.train, steps=15_000, accumulate=1),
        mesh=MeshConfig(data=1, fsdp=-1, expert=32),
    )


def indexed(model: DecoderConfig, indexer: IndexerConfig) -> DecoderConfig:
    """The model with an indexer in every layer, and 40 times its context."""
    yarn = YarnScaling(40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    groups = []
    for group in model.groups:
        assert isinstance(group.attention, LatentAttentionConfig)
        attention = dataclasses.replace(group.attention, rope_scaling=yarn, indexer=indexer)
        groups.append(dataclasses.replace(group, attention=attention))
    return dataclasses.replace(model, groups=tuple(groups))
