"""Low-rank pairs beside the weights that configs/tiny_moe.py trains, those in nf4: seconds on a laptop.

    dsjax train configs/tiny_moe.py --run runs/tiny_moe
    dsjax train configs/lora_cpu.py --run runs/lora_cpu
    dsjax generate runs/lora_cpu --prompt "def "

Result: not yet run.
"""

import dataclasses

from tiny_moe import get_config as tiny_moe

from dsjax.nn.lora import LoraConfig
from dsjax.train.pretrain import Pretrain


def get_config() -> Pretrain:
    base = tiny_moe()
    return dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, lr=1e-3, weight_decay=0.0),
        train=dataclasses.replace(base.train, start_from="runs/tiny_moe"),
        lora=LoraConfig(targets=("attention", "mlp", "experts"), rank=8, alpha=16.0, base="nf4"),
    )
