"""The sequence-wise loss, dropless.

    dsjax train configs/router_study/sequence.py

Result: see docs/numerics.md.
"""

from none import variant

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return variant(sequence_coef=0.0025)
