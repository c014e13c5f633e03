"""Entropy constraints, dynamic capacity.

    dsjax train configs/router_study/entropy_dynamic.py

Result: see docs/numerics.md.
"""

from none import variant

from dsjax.nn.moe import DynamicCapacity
from dsjax.nn.routing_losses import EntropyConstraint
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return variant(entropy=EntropyConstraint(), capacity=DynamicCapacity(window=20))
