"""DeepSeek-V2-Lite's shape and routing (arXiv 2405.04434, appendix B).

    dsjax plan configs/deepseek_v2_lite.py --topology v5p:4x4x4
    dsjax train configs/deepseek_v2_lite.py --run runs/deepseek_v2_lite

15.7B parameters in all, 2.7B active, embeddings included. Latent attention of 16 heads, queries straight from the
input. One dense layer, then 26 of 64 experts, top-6 by softmax and not normalised, and two shared ones; balanced within
each sequence.

Result: not yet run.
"""

import dataclasses

from deepseek_moe_16b import get_config as deepseek_moe_16b

from dsjax.models.decoder import LayerGroup
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = deepseek_moe_16b()
    attention = LatentAttentionConfig(num_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    dense, experts = (group.ffn for group in base.model.groups)
    groups = (LayerGroup(dense, attention, num_layers=1), LayerGroup(experts, attention))
    return dataclasses.replace(base, model=dataclasses.replace(base.model, num_layers=27, groups=groups))
