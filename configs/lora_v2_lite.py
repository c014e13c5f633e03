"""DeepSeek-V2-Lite, converted, with low-rank pairs beside attention, dense layers and shared experts; the base in nf4.

    dsjax convert DeepSeek-V2-Lite runs/v2_lite
    dsjax train configs/lora_v2_lite.py data.sources.0.path=texts/ --run runs/tuned
    dsjax plan configs/lora_v2_lite.py --topology v5e:2x2

Add `experts` to the targets to train pairs beside the routed experts too: 64 for each layer.

Result: not yet run.
"""

import dataclasses

from deepseek_v2_lite import get_config as deepseek_v2_lite

from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, LayerGroup
from dsjax.nn.lora import LoraConfig
from dsjax.nn.rope import YarnScaling
from dsjax.sharding import MeshConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import CheckpointConfig, Pretrain, TrainConfig


def get_config() -> Pretrain:
    base = deepseek_v2_lite()
    # As published: stretched to 163,840 positions (YaRN).
    rope = YarnScaling(factor=40.0, original_length=4096, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707)
    attention = dataclasses.replace(base.model.groups[0].attention, rope_scaling=rope)
    dense, experts = (group.ffn for group in base.model.groups)
    experts = dataclasses.replace(experts, sequence_coef=0.0)  # a frozen router has nothing to learn from balance
    groups = (LayerGroup(dense, attention, num_layers=1), LayerGroup(experts, attention))
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, groups=groups),
        data=DataConfig(
            tokenizer_path="runs/v2_lite/tokenizer.json",
            end_token="<｜end▁of▁sentence｜>",
            vocab_size=base.model.vocab_size,
            seq_len=2048,
            batch_size=16,
        ),
        optim=OptimConfig(lr=1e-4, weight_decay=0.0, schedule="cosine", warmup_steps=30),
        train=TrainConfig(steps=1000, accumulate=4, start_from="runs/v2_lite"),
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=512),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=100),
        lora=LoraConfig(targets=("attention", "mlp"), rank=16, alpha=32.0, base="nf4"),
    )
