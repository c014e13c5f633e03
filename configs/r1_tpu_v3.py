"""R1 at full size: GRPO on verified rewards, on from DeepSeek-V3, on 1,024 TPU v5p.

    dsjax convert DeepSeek-V3 runs/v3
    dsjax train configs/r1_tpu_v3.py --run runs/r1_v3
    dsjax plan configs/r1_tpu_v3.py --topology v5p:8x8x16
    dsjax plan configs/r1_tpu_v3.py --topology v5p:8x8x16 --mode decode --mesh data=32,expert=32 --batch 512

configs/r1_tpu.py with the model of configs/deepseek_v3.py: texts go to the experts in learning that they went to in
writing, routers keep their bias, and one iteration's texts are written while the one before is learned from.

Result: not yet run; planned in docs/plan.md.
"""

import dataclasses

from deepseek_v3 import get_config as deepseek_v3
from r1_tpu import get_config as r1_tpu

from dsjax.train.r1 import R1


def get_config() -> R1:
    base, v3 = r1_tpu(), deepseek_v3()
    return dataclasses.replace(
        base,
        model=v3.model,
        data=dataclasses.replace(base.data, vocab_size=v3.data.vocab_size),
        rollout=dataclasses.replace(
            base.rollout, prompts=512, samples=16, rows=512, mesh=None, more_rounds=0, one_step_off=True
        ),
        update=dataclasses.replace(base.update, minibatches=2),
        train=dataclasses.replace(base.train, accumulate=4, start_from="runs/v3"),
        compute=v3.compute,
        mesh=v3.mesh,
    )
