"""A selection bias alone, dropless.

    dsjax train configs/router_study/bias.py

Result: see docs/numerics.md.
"""

from none import variant

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return variant(bias_update_rate=0.003)
