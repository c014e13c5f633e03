"""The plain Transformer with one of two key/value heads that sees only what is still open, and nothing else of syntax.

    dsjax train configs/coder/scope.py --run runs/coder_scope

Result: none of its own; with all the rest in structured.py, docs/numerics.md (Coder).
"""

import dataclasses

from embeddings import matched
from plain import get_config as plain

from dsjax.nn.structure import StructureConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = plain()
    return dataclasses.replace(base, model=matched(base.model, StructureConfig(embed=False), scope_heads=1))
