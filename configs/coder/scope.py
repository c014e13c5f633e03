"""The plain Transformer with one of two key/value heads that sees only what is still open, and nothing else of syntax.

    dsjax train configs/coder/scope.py --run runs/coder_scope

Not in the study (docs/coder_study.md); docs/coder.md has a first look.
"""

import dataclasses

from embeddings import matched
from plain import get_config as plain

from dsjax.nn.structure import StructureConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = plain()
    return dataclasses.replace(base, model=matched(base.model, StructureConfig(embed=False), scope_heads=1))
