"""The plain Transformer with embeddings of the syntax around each token, its feed-forward layers as much narrower.

    dsjax train configs/coder/embeddings.py --run runs/coder_embeddings

Result: docs/numerics.md (Coder).
"""

import dataclasses

from plain import get_config as plain

from dsjax.models.decoder import DecoderConfig
from dsjax.nn.structure import StructureConfig
from dsjax.train.pretrain import Pretrain


def matched(base: DecoderConfig, structure: StructureConfig, *, scope_heads: int = 0) -> DecoderConfig:
    """The model with structure, and with the parameters of the one without: what they take, its layers give."""
    group, D = base.groups[0], base.d_model
    per_unit = base.num_layers * 3 * D  # parameters of one more unit of d_ff
    ffn = dataclasses.replace(group.ffn, d_ff=group.ffn.d_ff - round(structure.num_params(D) / per_unit))
    attention = dataclasses.replace(group.attention, scope_heads=scope_heads)
    group = dataclasses.replace(group, ffn=ffn, attention=attention)
    return dataclasses.replace(base, groups=(group,), structure=structure)


def get_config() -> Pretrain:
    base = plain()
    return dataclasses.replace(base, model=matched(base.model, StructureConfig()))
