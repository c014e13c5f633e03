"""DeepSeek-V2-Lite's shape and routing (arXiv 2405.04434, appendix B) with grouped-query attention.

    dsjax plan configs/deepseek_v2_lite.py --topology v5p:4x4x4
    dsjax train configs/deepseek_v2_lite.py --run runs/deepseek_v2_lite

15.7B parameters in all, 2.6B active. One dense layer, then 26 of 64 experts, top-6 by softmax and not normalised, and
two shared ones; balanced within each sequence. Latent attention is not here yet: a layer's 16 query and 8 key/value
heads have 12.6M parameters, where the original's have 13.8M.

Result: not yet run; planned in docs/plan.md.
"""

import dataclasses

from deepseek_moe_16b import get_config as deepseek_moe_16b

from dsjax.models.decoder import LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base, attention = deepseek_moe_16b(), AttentionConfig(num_heads=16, num_kv_heads=8, head_dim=128)
    dense, experts = (group.ffn for group in base.model.groups)
    groups = (LayerGroup(dense, attention, num_layers=1), LayerGroup(experts, attention))
    return dataclasses.replace(base, model=dataclasses.replace(base.model, num_layers=27, groups=groups))
