"""Runs of R1 of seconds: a model that hardly learns, on words of three letters."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from small_runs import ATTENTION

from dsjax.checkpoint import CheckpointConfig
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.rl.algorithms import AlgorithmConfig
from dsjax.rl.exercises.config import ExercisesConfig, FamilyConfig
from dsjax.rl.rewards import RewardConfig
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import TrainConfig
from dsjax.train.r1 import R1
from dsjax.train.r1_config import ReportConfig, RolloutConfig, UpdateConfig, WarmStartConfig

VARIANTS = ("grpo", "ppo", "ahead", "experts", "pairs")


def r1(variant: str = "grpo", **parts: dict[str, Any]) -> R1:
    """Two steps of a warm start and three iterations; a control and a report only if they are asked for.

    ``grpo`` with rounds for dead groups; ``ppo`` with a head of values, a KL and minibatches; ``ahead``: one step off;
    ``experts``: a mixture of experts whose routing is replayed, with a reference; ``pairs``: low-rank pairs beside
    frozen weights, which are the reference.
    """
    experts = MoEConfig(num_experts=4, top_k=2, d_ff=8, num_shared_experts=1, bias_update_rate=1e-3)
    ffn = experts if variant == "experts" else MLPConfig(d_ff=16)
    config = R1(
        model=DecoderConfig(vocab_size=264, d_model=8, num_layers=1, groups=(LayerGroup(ffn, ATTENTION),)),
        data=DataConfig(vocab_size=257, seq_len=32),
        exercises=ExercisesConfig((FamilyConfig("reverse", (1, 2)),), answer_mark=""),
        warm_start=WarmStartConfig(8, batch_size=8, exercises=64, optim=OptimConfig(lr=3e-2, warmup_steps=1)),
        rollout=RolloutConfig(prompts=8, samples=4, max_tokens=6, more_rounds=1),
        # Of its texts none is right: what pays is their length.
        rewards=RewardConfig(length=1.0, length_to=6, workers=1),
        optim=OptimConfig(lr=1e-3, weight_decay=0.0, schedule="constant", warmup_steps=1),
        train=TrainConfig(steps=3, log_every=1),
        checkpoint=CheckpointConfig(every=1, keep=8),
        report=ReportConfig(prompts=8, samples=2, validation=4, control=False),
    )
    if variant == "ppo":
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, values="head"),
            algorithm=AlgorithmConfig("ppo"),
            update=UpdateConfig(epochs=2, minibatches=2, kl_target=0.01),
        )
    if variant == "ahead":
        parts = {"rollout": {"more_rounds": 0, "one_step_off": True, "rescore": True, "correction_limit": 2.0}} | parts
    if variant in ("experts", "pairs"):
        parts = {"algorithm": {"kl_coef": 0.01}} | parts
    if variant == "pairs":
        parts = {"lora": {"targets": ("attention", "mlp"), "rank": 2, "alpha": 4.0}} | parts
    return dataclasses.replace(config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in parts.items()})


def config_file(folder: pathlib.Path, variant: str) -> pathlib.Path:
    """A config that the command line takes."""
    path = folder / f"{variant}.py"
    path.write_text(
        f'"""Of the tests."""\n\nimport r1_runs\n\n\ndef get_config():\n    return r1_runs.r1({variant!r})\n'
    )
    return path
