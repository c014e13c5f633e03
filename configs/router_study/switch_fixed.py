"""The Switch loss, capacity 1.25.

    dsjax train configs/router_study/switch_fixed.py

Result: see docs/numerics.md.
"""

from none import variant

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return variant(balance_coef=0.0025, capacity=1.25)
