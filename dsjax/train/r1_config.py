"""Parts of the config of R1: what is learned before, what is written, how it is learned from, what is evaluated."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from dsjax.config import Bounds, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UserError
from dsjax.rl.arms import Arm
from dsjax.train.optimizer import OptimConfig
from dsjax.train.writing import WritingConfig


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Supervised fine-tuning on solutions, before RL; in RUN/warm_start.

    Attributes:
        steps: of it, on from ``train.start_from`` if that names a run; 0: there is none, and RL goes on from there.
        batch_size: rows of a step, of ``data.seq_len`` positions.
        exercises: of each family, of the training side.
        level_decay: there are that many times as many of a level as of the one below.
        optim: its optimizer.
    """

    steps: NonNegativeInt = 240
    batch_size: PositiveInt = 16
    exercises: PositiveInt = 8000
    level_decay: Annotated[float, Bounds(gt=0, le=1)] = 0.4
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup_steps=20)


@dataclasses.dataclass(frozen=True)
class RolloutConfig(WritingConfig):
    """What is written in an iteration. ``temperature`` is the policy's, in writing and in learning.

    Attributes:
        replay: tokens go to the experts in learning that they went to in writing.
        rescore: probabilities under the policy that wrote are the trainer's, and not the engine's.
        correction_limit: with ``rescore`` a token counts by how much likelier the trainer finds it than the engine
            did, up to this (truncated importance sampling); 0: it counts once.
        one_step_off: the texts of the next iteration are written, by the model before the update, while this one is
            learned from.
        more_rounds: of exercises, at the most, to take the place of groups whose rewards are all equal (DAPO's dynamic
            sampling); 0: those stay.
        drop_dead: groups whose rewards are all equal have no part in the loss.
        overlong: tokens before ``max_tokens`` over which a penalty grows from 0 to 1 (DAPO); 0: there is none.
    """

    replay: bool = True
    rescore: bool = False
    correction_limit: NonNegativeFloat = 0.0
    one_step_off: bool = False
    more_rounds: NonNegativeInt = 0
    drop_dead: bool = True
    overlong: NonNegativeInt = 0

    def validate(self) -> None:
        if self.overlong > self.max_tokens:
            raise UserError(f"overlong is {self.overlong}; it must be at most max_tokens, {self.max_tokens}")
        if self.one_step_off and self.more_rounds:
            raise UserError(
                f"more_rounds is {self.more_rounds}; with one_step_off it must be 0: what is written ahead can not wait"
                " for what it is worth"
            )
        if self.temperature != 1 and not self.rescore:
            raise UserError(
                f"temperature is {self.temperature:g}; with another than 1 rescore must be true: the engine tells"
                " probabilities at 1"
            )
        if self.temperature != 1 and self.correction_limit:
            raise UserError(
                f"temperature is {self.temperature:g}; with another than 1 correction_limit must be 0: the engine tells"
                " probabilities at 1, so there is nothing to correct by"
            )


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How often texts are learned from, and how far the policy may go.

    Attributes:
        epochs: times that each text is learned from.
        minibatches: updates of an epoch.
        kl_target: KL from the reference, in nats a token, that its coefficient is moved towards; 0: it stays.
        kl_horizon: iterations over which it is.
    """

    epochs: PositiveInt = 1
    minibatches: PositiveInt = 1
    kl_target: NonNegativeFloat = 0.0
    kl_horizon: PositiveFloat = 50.0


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What is evaluated, behind RL and on the way.

    Attributes:
        prompts: held-out exercises of each family and level.
        samples: texts for each, sampled as in RL; beside a greedy one.
        validation: exercises of each family and level behind every ``train.eval_every`` steps, one sample each.
        named: families with the level that their verdict is about; of others it is the middle one.
        control: beside RL, the warm start goes on for as many learned tokens, in RUN/control.
    """

    prompts: PositiveInt = 128
    samples: PositiveInt = 4
    validation: PositiveInt = 32
    named: tuple[Arm, ...] = ()
    control: bool = True
