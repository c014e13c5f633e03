"""Embeddings of the syntax, and a look-up of where the token at hand stood last, which knows no syntax.

    dsjax train configs/coder/embeddings_same.py --run runs/coder_embeddings_same

Result: docs/numerics.md (Coder).
"""

import dataclasses

from embeddings import matched
from plain import get_config as plain

from dsjax.nn.structure import StructureConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = plain()
    return dataclasses.replace(base, model=matched(base.model, StructureConfig(pointers=("same",))))
