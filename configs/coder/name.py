"""The plain Transformer with a look-up of where the name at hand was bound last, and nothing else of syntax.

    dsjax train configs/coder/name.py --run runs/coder_name

Result: docs/numerics.md (Coder).
"""

import dataclasses

from embeddings import matched
from plain import get_config as plain

from dsjax.nn.structure import StructureConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = plain()
    return dataclasses.replace(base, model=matched(base.model, StructureConfig(embed=False, pointers=("name",))))
