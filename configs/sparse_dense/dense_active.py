"""A dense model with as many parameters as the mixture uses for a token.

    dsjax train configs/sparse_dense/dense_active.py

Result: see docs/numerics.md.
"""

from mixture import D_MODEL, EXPERTS, dense

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return dense(EXPERTS.num_active_params(D_MODEL))
