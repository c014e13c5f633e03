"""Algorithms by name: which objective, and what a text is compared with. Any single switch can be set otherwise.

docs/policy_optimization.md explains each switch, with its equation and its source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from dsjax.config import NonNegativeFloat, Share, validate
from dsjax.rl.advantages import AdvantageConfig
from dsjax.rl.experience import Aggregate
from dsjax.rl.policy import Kl, PolicyConfig

Name = Literal["ppo", "grpo", "dapo", "dr_grpo", "gspo", "rloo"]
Kind = Literal["group", "group_mean", "leave_one_out", "gae"]


def ppo() -> tuple[PolicyConfig, AdvantageConfig]:
    """Proximal policy optimisation (arXiv 1707.06347) with a critic, and the KL in the reward (arXiv 1909.08593)."""
    policy = PolicyConfig(value_clip=0.2, kl_coef=0.05, kl="k1", kl_in="reward")
    return policy, AdvantageConfig("gae")


def grpo() -> tuple[PolicyConfig, AdvantageConfig]:
    """Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300)."""
    return PolicyConfig(kl_coef=0.04, kl="k3", aggregate="sequence"), AdvantageConfig("group")


def dapo() -> tuple[PolicyConfig, AdvantageConfig]:
    """GRPO with a higher upper clip, every token alike, and no KL (arXiv 2503.14476)."""
    return PolicyConfig(clip_high=0.28, aggregate="token"), AdvantageConfig("group")


def dr_grpo() -> tuple[PolicyConfig, AdvantageConfig]:
    """GRPO without division by standard deviation and by length, and no KL (arXiv 2503.20783)."""
    return PolicyConfig(aggregate="constant"), AdvantageConfig("group_mean")


def gspo() -> tuple[PolicyConfig, AdvantageConfig]:
    """GRPO with the ratio of whole texts, clipped where those of section 5.1 are (arXiv 2507.18071)."""
    policy = PolicyConfig(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregate="sequence")
    return policy, AdvantageConfig("group")


def rloo() -> tuple[PolicyConfig, AdvantageConfig]:
    """REINFORCE, each text against the mean of the others, and the KL in the reward (arXiv 2402.14740)."""
    policy = PolicyConfig(kl_coef=0.05, kl="k1", kl_in="reward", aggregate="constant")
    return policy, AdvantageConfig("leave_one_out")


PRESETS: dict[str, Callable[[], tuple[PolicyConfig, AdvantageConfig]]] = {
    "ppo": ppo,
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "rloo": rloo,
}


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """An algorithm, and what is to be otherwise than it has it; none: as it has it.

    Attributes:
        name: of it.
        advantage: :attr:`AdvantageConfig.kind <dsjax.rl.advantages.AdvantageConfig>`; ``discount``, ``gae_lambda`` and
            ``whiten`` are of the same.
        ratio, ...: all others, see :class:`~dsjax.rl.policy.PolicyConfig`.
    """

    name: Name = "grpo"
    advantage: Kind | None = None
    discount: Share | None = None
    gae_lambda: Share | None = None
    whiten: bool | None = None
    ratio: Literal["token", "sequence"] | None = None
    clip_low: Share | None = None
    clip_high: NonNegativeFloat | None = None
    dual_clip: NonNegativeFloat | None = None
    kl_coef: NonNegativeFloat | None = None
    kl: Kl | None = None
    kl_in: Literal["loss", "reward"] | None = None
    entropy_coef: NonNegativeFloat | None = None
    value_coef: NonNegativeFloat | None = None
    value_clip: NonNegativeFloat | None = None
    aggregate: Aggregate | None = None

    def validate(self) -> None:
        for part in self.switches():
            validate(part)

    def switches(self) -> tuple[PolicyConfig, AdvantageConfig]:
        """All of them."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given["kind"] = given.pop("advantage")
        policy, advantage = PRESETS[self.name]()
        return _with(policy, given), _with(advantage, given)


def _with(config, given):
    """A config with those of its fields that are given."""
    own = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in given.items() if k in own and v is not None})
