"""A selection bias alone, capacity 1.25.

    dsjax train configs/router_study/bias_fixed.py

Result: see docs/numerics.md.
"""

from none import variant

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return variant(bias_update_rate=0.003, capacity=1.25)
