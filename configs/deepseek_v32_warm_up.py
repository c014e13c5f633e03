"""The first stage of DeepSeek-V3.2 (arXiv 2512.02556, section 2.1.1): indexers learn where full attention looks.

    dsjax train configs/deepseek_v32_warm_up.py --run runs/deepseek_v32_warm_up train.start_from=RUN

1000 steps of 16 rows of 128K positions at a learning rate of 1e-3. The loss is the indexers' alone, and nothing decays
or moves by itself, so that every other weight stays as it is, to the bit. What comes of it is what
configs/deepseek_v32.py goes on with.

Result: not yet run.
"""

import dataclasses

from deepseek_v32 import get_config as second_stage

from dsjax.models.decoder import LayerGroup
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.moe import MoEConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    config = second_stage()
    groups = tuple(warming_up(group) for group in config.model.groups)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, groups=groups),
        data=dataclasses.replace(config.data, batch_size=16),
        optim=dataclasses.replace(config.optim, lr=1e-3, weight_decay=0.0),
        train=dataclasses.replace(config.train, steps=1000),
        mesh=dataclasses.replace(config.mesh, expert=16),
    )


def warming_up(group: LayerGroup) -> LayerGroup:
    """A group whose indexers learn, and whose routers' biases do not move."""
    assert isinstance(group.attention, LatentAttentionConfig)
    assert group.attention.indexer is not None
    indexer = dataclasses.replace(group.attention.indexer, warm_up=True)
    group = dataclasses.replace(group, attention=dataclasses.replace(group.attention, indexer=indexer))
    if isinstance(group.ffn, MoEConfig):
        group = dataclasses.replace(
            group, ffn=dataclasses.replace(group.ffn, bias_update_rate=0.0, selection_bias=True)
        )
    return group
