"""The Switch loss, dropless, compensated gradients.

    dsjax train configs/router_study/switch_compensated.py

Result: see docs/numerics.md.
"""

from none import variant

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return variant(compensation=0.5, balance_coef=0.0025)
