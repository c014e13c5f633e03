"""Embeddings of the syntax around each token, on text whose indentation is said relative to the line before.

    dsjax train configs/coder/layout_embeddings.py --run runs/coder_layout_embeddings

Result: docs/numerics.md (Coder).
"""

import dataclasses

from embeddings import get_config as embeddings

from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = embeddings()
    return dataclasses.replace(base, data=dataclasses.replace(base.data, layout=True))
