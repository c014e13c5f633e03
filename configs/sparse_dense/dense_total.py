"""A dense model with as many parameters as the mixture has in all.

    dsjax train configs/sparse_dense/dense_total.py

Result: see docs/numerics.md.
"""

from mixture import D_MODEL, EXPERTS, dense

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    return dense(EXPERTS.num_params(D_MODEL))
