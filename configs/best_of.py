"""Rejection sampling: learning the best of several texts of one's own, on from any run that solves some exercises.

    dsjax train configs/best_of.py --run runs/best_of
    dsjax train configs/best_of.py train.start_from=runs/r1 picks.pairs=true --run runs/best_of_r1

Model and tokenizer are those of ``train.start_from``, here the warm start of configs/r1_cpu.py, whose families these
are. Each exercise is tried eight times, and of what is right the shortest is learned (docs/preference.md).

Result: not yet run.
"""

from r1_cpu import get_config as r1_cpu

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.prepare import DataConfig
from dsjax.train.best_of import BestOf, PicksConfig, TextsConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import TrainConfig


def get_config() -> BestOf:
    r1 = r1_cpu()
    return BestOf(
        data=DataConfig(seq_len=r1.data.seq_len, batch_size=r1.warm_start.batch_size),
        exercises=r1.exercises,
        rollout=TextsConfig(exercises=2000, prompts=64, samples=8, max_tokens=r1.rollout.max_tokens, rows=64),
        picks=PicksConfig(least=1.0, epochs=2),
        optim=OptimConfig(lr=5e-4, weight_decay=0.0, schedule="cosine", warmup_steps=10),
        train=TrainConfig(steps=10**6, log_every=5, start_from="runs/r1/warm_start"),
        compute=r1.compute,
        checkpoint=CheckpointConfig(every=100),
    )
