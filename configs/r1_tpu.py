"""R1 on sixteen TPU v5e: GRPO on verified rewards, on from DeepSeek-R1-Distill-Qwen-7B.

    dsjax convert DeepSeek-R1-Distill-Qwen-7B runs/r1_distill_7b
    dsjax train configs/r1_tpu.py exercises.files=train.jsonl --run runs/r1
    dsjax plan configs/r1_tpu.py --topology v5e:4x4
    dsjax plan configs/r1_tpu.py --topology v5e:4x4 --mode decode --mesh data=4,tensor=4 --batch 128

The model is the base's own. Mathematics and programs: reasoning-gym's generators, tasks of the Coder's that the sandbox
runs, and any JSON lines of questions and answers. Texts of 3,072 tokens behind prompts of up to 1,024; every token
alike, a higher upper clip, no KL and a penalty for what is too long (DAPO, arXiv 2503.14476). Levels are chosen by the
curriculum.

Result: not yet run; planned in docs/plan.md.
"""

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.rl.algorithms import AlgorithmConfig
from dsjax.rl.exercises.config import ExercisesConfig, FamilyConfig
from dsjax.rl.rewards import RewardConfig
from dsjax.sharding import MeshConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import TrainConfig
from dsjax.train.r1 import R1
from dsjax.train.r1_config import ReportConfig, RolloutConfig, UpdateConfig, WarmStartConfig

FAMILIES = ("gym/chain_sum", "gym/countdown", "gym/simple_equations", "gym/gcd", "program/list", "program/string")


def get_config() -> R1:
    attention = AttentionConfig(num_heads=28, num_kv_heads=4, head_dim=128, qkv_bias=True, rope_theta=10_000.0)
    return R1(
        model=DecoderConfig(
            vocab_size=152_064, d_model=3584, num_layers=28, groups=(LayerGroup(MLPConfig(d_ff=18_944), attention),)
        ),
        data=DataConfig(vocab_size=152_064, seq_len=4096),
        exercises=ExercisesConfig(tuple(map(FamilyConfig, FAMILIES)), template="think"),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(
            prompts=64,
            samples=8,
            max_tokens=3072,
            rows=128,
            mesh=MeshConfig(data=4, tensor=4),
            rescore=True,
            correction_limit=2.0,
            more_rounds=1,
            overlong=512,
        ),
        rewards=RewardConfig(format=0.1),
        algorithm=AlgorithmConfig("dapo"),
        update=UpdateConfig(minibatches=4),
        optim=OptimConfig(lr=1e-6, weight_decay=0.01, schedule="constant", warmup_steps=10),
        train=TrainConfig(steps=1000, accumulate=32, log_every=1, eval_every=50, start_from="runs/r1_distill_7b"),
        compute=ComputeConfig(dtype="bfloat16", remat="full", loss_chunk=512),
        mesh=MeshConfig(data=1, fsdp=4, tensor=4),
        checkpoint=CheckpointConfig(every=20),
        report=ReportConfig(control=False),
    )
