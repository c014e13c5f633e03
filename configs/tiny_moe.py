"""The tiny run with experts: one dense layer, then two of 8 experts, top-2, and one shared; balanced by a bias too.

    dsjax train configs/tiny_moe.py --run runs/tiny_moe

Result: see docs/numerics.md (its loss means nothing; it must be fast).
"""

import dataclasses

from tiny import get_config as tiny

from dsjax.models.decoder import LayerGroup
from dsjax.nn.moe import MoEConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = tiny()
    dense = dataclasses.replace(base.model.groups[0], num_layers=1)
    moe = MoEConfig(num_experts=8, top_k=2, d_ff=64, num_shared_experts=1, bias_update_rate=1e-3)
    experts = LayerGroup(moe, dense.attention)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, num_layers=3, groups=(dense, experts)))
