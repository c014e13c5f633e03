"""The Switch loss, dynamic capacity.

    dsjax train configs/router_study/switch_dynamic.py

Result: see docs/numerics.md.
"""

from none import variant

from dsjax.nn.moe import DynamicCapacity
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return variant(balance_coef=0.0025, capacity=DynamicCapacity(window=20))
