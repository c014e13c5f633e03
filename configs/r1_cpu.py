"""R1 at the size of a laptop: solutions of easy exercises, then reinforcement learning from verified rewards.

    dsjax train configs/r1_cpu.py --run runs/r1

A decoder of 0.7M parameters that reads bytes learns to reverse and to sort letters and to reach a number, first from
solutions of mostly easy exercises, then by GRPO from what it tries itself. RUN/report.json holds the share of held-out
exercises that it solves before and after, beside a control that went on with solutions (docs/r1.md).

Result: not yet run.
"""

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.rl.algorithms import AlgorithmConfig
from dsjax.rl.arms import Arm, CurriculumConfig, PhaseConfig
from dsjax.rl.exercises.config import ExercisesConfig, FamilyConfig
from dsjax.rl.health import HealthConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import TrainConfig
from dsjax.train.r1 import R1
from dsjax.train.r1_config import ReportConfig, RolloutConfig, WarmStartConfig

LEVELS = (1, 2, 3, 4, 5, 6)
# The next phase begins at a pass rate that a model of this size comes to; the last one has all levels.
FOUNDATIONS = PhaseConfig("foundations", levels_to=0.3, advance=0.65, retreat=0.55)
MULTI_STEP = PhaseConfig("multi-step", levels_from=0.3, levels_to=0.6, advance=0.35, retreat=0.25)
OPEN_EXPLORATION = PhaseConfig("open exploration", novelty=0.1, revisit=0.1)


def get_config() -> R1:
    attention = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=32)
    return R1(
        model=DecoderConfig(
            vocab_size=257, d_model=128, num_layers=4, groups=(LayerGroup(MLPConfig(d_ff=256), attention),)
        ),
        data=DataConfig(vocab_size=257, seq_len=128),
        exercises=ExercisesConfig(
            families=tuple(FamilyConfig(name, LEVELS) for name in ("reverse", "sort", "countdown")), answer_mark="= "
        ),
        warm_start=WarmStartConfig(
            steps=240, batch_size=32, exercises=8000, level_decay=0.4, optim=OptimConfig(lr=2e-3, warmup_steps=20)
        ),
        rollout=RolloutConfig(prompts=32, samples=8, max_tokens=48, rows=64),
        algorithm=AlgorithmConfig("dapo"),
        curriculum=CurriculumConfig(phases=(FOUNDATIONS, MULTI_STEP, OPEN_EXPLORATION)),
        health=HealthConfig(log_prob_gap=1e-3),  # float32
        optim=OptimConfig(lr=1e-4, weight_decay=0.0, schedule="constant", warmup_steps=5),
        train=TrainConfig(steps=450, log_every=1, eval_every=150),
        compute=ComputeConfig(unroll=True),
        checkpoint=CheckpointConfig(every=50),
        report=ReportConfig(prompts=128, samples=4, named=(Arm("reverse", 4), Arm("sort", 4), Arm("countdown", 2))),
    )
