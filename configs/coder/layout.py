"""The plain Transformer on text whose indentation is said relative to the line before (docs/layout.md).

    dsjax train configs/coder/layout.py --run runs/coder_layout

Result: docs/numerics.md (Coder).
"""

import dataclasses

from plain import get_config as plain

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = plain()
    return dataclasses.replace(base, data=dataclasses.replace(base.data, layout=True))
