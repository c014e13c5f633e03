"""Learning from pairs of texts of which one is preferred, on from any run: DPO, or a model of rewards.

    dsjax train configs/preference.py method=dpo --run runs/dpo
    dsjax train configs/preference.py method=reward optim.lr=1e-5 --run runs/reward

Model and tokenizer are those of ``train.start_from``, a run or a converted one; ``pairs.path`` is a file of JSON lines
with the texts prompt, chosen and rejected. A row holds both texts of a pair. The learning rate is for a model of some
billion parameters; small ones learn at 1e-4 and above (docs/preference.md).

Not yet run at this size.
"""

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.prepare import DataConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.preference import LabelConfig, PairsConfig, Preference
from dsjax.train.pretrain import TrainConfig


def get_config() -> Preference:
    return Preference(
        data=DataConfig(seq_len=2048, batch_size=32, held_out_share=0.05),
        optim=OptimConfig(lr=5e-7, weight_decay=0.0, schedule="cosine", warmup_steps=20),
        train=TrainConfig(steps=10**6, accumulate=4, log_every=1, eval_every=50, start_from="runs/quickstart"),
        checkpoint=CheckpointConfig(every=200),
        pairs=PairsConfig("pairs.jsonl"),
        labels=LabelConfig(beta=0.1),
    )
