"""Embeddings, look-ups of names and openers, and heads that see only what is still open.

    dsjax train configs/coder/structured.py --run runs/coder_structured

Result: docs/numerics.md (Coder).
"""

import dataclasses

from embeddings import matched
from plain import get_config as plain

from dsjax.nn.structure import StructureConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = plain()
    structure = StructureConfig(pointers=("block", "bracket", "name"))
    return dataclasses.replace(base, model=matched(base.model, structure, scope_heads=1))
