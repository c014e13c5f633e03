"""Stage 2, solving: from the specification of a task to the body of its function, on from stage 1.

    dsjax train configs/coder/stage1.py --run runs/coder_stage1
    dsjax data tasks tasks training=20000
    dsjax train configs/coder/stage2.py --run runs/coder_stage2
    dsjax eval runs/coder_stage2 --task tasks --problems tasks/composition.jsonl

Specifications are read and not learned: what counts is the body (``Source.marked``). Tasks are generated without end
and none of the held-out ones means the same as one of these (docs/tasks.md).

Result: docs/numerics.md (Coder, solving).
"""

import dataclasses

from stage1 import get_config as stage1

from dsjax.data.corpus import Source
from dsjax.train.pretrain import Pretrain

BEFORE = "runs/coder_stage1"


def get_config() -> Pretrain:
    base = stage1()
    data = dataclasses.replace(
        base.data,
        sources=(Source("tasks/training", marked=True),),
        tokenizer_path=f"{BEFORE}/tokenizer.json",
        special_tokens=(),
        repair=None,
        near_duplicate_threshold=1.0,  # tasks are alike, and differ in a word
    )
    train = dataclasses.replace(base.train, start_from=BEFORE)
    return dataclasses.replace(base, data=data, train=train)
