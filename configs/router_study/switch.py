"""The Switch loss, dropless.

    dsjax train configs/router_study/switch.py

Result: see docs/numerics.md.
"""

from none import variant

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return variant(balance_coef=0.0025)
