"""No balance, capacity 1.25.

    dsjax train configs/router_study/none_fixed.py

Result: see docs/numerics.md.
"""

from none import variant

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return variant(capacity=1.25)
