"""The control of the look-up of names: where the same token stood last, whatever it is.

    dsjax train configs/coder/same.py --run runs/coder_same

Result: docs/numerics.md (Coder).
"""

import dataclasses

from embeddings import matched
from plain import get_config as plain

from dsjax.nn.structure import StructureConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = plain()
    return dataclasses.replace(base, model=matched(base.model, StructureConfig(embed=False, pointers=("same",))))
