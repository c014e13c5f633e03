"""Stage 1, syntax: the next token, the leaf that it ends in, and repairs of injected errors in a tenth of the rows.

    dsjax train configs/coder/stage1.py --run runs/coder_stage1

Result: docs/numerics.md (Coder, solving).
"""

import dataclasses

from embeddings import matched
from plain import get_config as plain

from dsjax.data.structure.errors import BROKEN, REPAIR, RepairConfig
from dsjax.nn.structure import StructureConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = plain()
    structure = StructureConfig(pointers=("same",), next_leaf=0.1)
    data = dataclasses.replace(base.data, special_tokens=(BROKEN, REPAIR), repair=RepairConfig(share=0.1))
    return dataclasses.replace(base, model=matched(base.model, structure), data=data)
