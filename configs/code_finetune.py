"""Fine-tuning for code, on from any run: repairs, expected risk beside cross-entropy, a course, the best epoch.

    dsjax train configs/coder/stage1.py --run runs/coder_stage1
    dsjax data tasks tasks/first training=6000 levels=1,2
    dsjax data tasks tasks/second training=6000 levels=3,4,5
    dsjax data build stdlib corpora/stdlib
    dsjax train configs/code_finetune.py --run runs/code_finetune
    dsjax eval runs/code_finetune/best --task tasks --limit 500

Model and tokenizer are those of ``train.start_from``, a run or a converted folder of Hugging Face's layout. What can be
switched off: data.repair=none, risk.weight=0, course.order=0 (docs/code_finetune.md). A micro-batch is 8 rows, a step 4
of them: 32 rows. The learning rate is for a pre-trained model of some billion parameters; small ones learn at 1e-3.

Not yet run at this size.
"""

import dataclasses
import pathlib

from dsjax.checkpoint import CheckpointConfig
from dsjax.config import load_config
from dsjax.data.corpus import Source
from dsjax.data.structure.errors import RepairConfig
from dsjax.train.code_finetune import CodeFinetune
from dsjax.train.curriculum import CourseConfig, Stage
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import TrainConfig

BEFORE = "runs/coder_stage1"
MICRO_BATCH, ACCUMULATE = 8, 4


def get_config() -> CodeFinetune:
    base = load_config(pathlib.Path(__file__).parent / "coder" / "stage1.py")
    sources = ("tasks/first/training", "tasks/second/training", "corpora/stdlib/pairs", "corpora/stdlib/text")
    data = dataclasses.replace(
        base.data,
        sources=tuple(Source(path, marked=True) for path in sources),
        batch_size=MICRO_BATCH * ACCUMULATE,
        held_out_share=0.01,
        near_duplicate_threshold=1.0,  # tasks are alike, and differ in a word
        repair=RepairConfig(share=0.1),
    )
    one_function, several, real_functions, modules = (
        (Stage(0), Stage(1)),
        (Stage(1, functions=4),),
        (Stage(2),),
        (Stage(3),),
    )
    return CodeFinetune(
        model=base.model,
        data=data,
        optim=OptimConfig(lr=2e-5, weight_decay=0.01, schedule="cosine", warmup_steps=20),
        train=TrainConfig(steps=10**6, accumulate=ACCUMULATE, log_every=4, start_from=BEFORE),
        compute=base.compute,
        checkpoint=CheckpointConfig(every=1000),
        course=CourseConfig(stages=(*one_function, *several, *real_functions, *modules), epochs=3),
    )
