"""Entropy constraints, dropless.

    dsjax train configs/router_study/entropy.py

Result: see docs/numerics.md.
"""

from none import variant

from dsjax.nn.routing_losses import EntropyConstraint
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return variant(entropy=EntropyConstraint())
