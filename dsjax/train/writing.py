"""Texts that a recipe has written by the model that it trains: how many at a time, how long, and on which devices."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

from jax.sharding import Mesh

from dsjax import hosts
from dsjax.config import Bounds, NonNegativeInt, PositiveFloat, PositiveInt, UserError, to_dict
from dsjax.data.tokenizer import Tokenizer
from dsjax.evals.solved import prompt_tokens
from dsjax.infer.engine import placed
from dsjax.manifest import make_folder
from dsjax.metrics import write_atomic
from dsjax.rl.exercises.exercise import Exercise, Family, draw, numbers_of
from dsjax.rl.rollout import Sampler
from dsjax.runs import RunFolder
from dsjax.sharding import MeshConfig, joined, make_mesh
from dsjax.train.step import Trainer

TRIED = 2  # exercises of a level, of a family without end; some take seconds to make


@dataclasses.dataclass(frozen=True)
class WritingConfig:
    """What is written.

    Attributes:
        prompts: exercises P that are written for at a time.
        samples: texts K for each.
        max_tokens: of a text.
        temperature: of sampling.
        stop: texts that end one.
        rows: texts that the engine works on at a time; 0: all of P exercises.
        mesh: that texts are written on; none: the trainer's.
    """

    prompts: PositiveInt = 32
    samples: Annotated[int, Bounds(ge=1, lt=2**15)] = 8
    max_tokens: PositiveInt = 32
    temperature: PositiveFloat = 1.0
    stop: tuple[str, ...] = ()
    rows: NonNegativeInt = 0
    mesh: MeshConfig | None = None

    @property
    def rows_at_a_time(self) -> int:
        """Texts that the engine works on at a time."""
        return self.rows or self.prompts * self.samples

    def devices(self, mesh: Mesh) -> Mesh:
        """The devices that write, of a trainer on ``mesh``."""
        return mesh if self.mesh is None else make_mesh(self.mesh, list(mesh.devices.flat))

    def check_room(self, seq_len: int) -> None:
        """Whether rows of a text with its prompt hold more than a text.

        Raises:
            UserError: they do not.
        """
        if self.max_tokens >= seq_len:
            raise UserError(
                f"rollout.max_tokens is {self.max_tokens}; data.seq_len, {seq_len}, must leave room for a prompt"
            )


def check_writing(cfg: WritingConfig, mesh: Mesh, trainer: Trainer) -> None:
    """Whether the model can write on these devices. Frozen weights are not looked at.

    Raises:
        UserError: it can not be cut over them.
    """
    if trainer.base is None:
        there = cfg.devices(mesh)
        of_rows = there.shape["data"] * there.shape["expert"]
        shapes = joined(trainer.shapes.params, trainer.shapes.buffers)
        placed(trainer.graph, shapes, there, -(-cfg.rows_at_a_time // of_rows) * of_rows)


def make_sampler(
    cfg: WritingConfig, trainer: Trainer, mesh: Mesh, tokenizer: Tokenizer, seq_len: int, *, tell_experts: bool = False
) -> Sampler:
    """What writes texts of a trainer's model; see :class:`dsjax.rl.rollout.Sampler`."""
    return Sampler(
        trainer.graph,
        tokenizer,
        cfg.devices(mesh),
        num_rows=cfg.rows_at_a_time,
        max_length=seq_len,
        tell_experts=tell_experts,
    )


# ---------------------------------------------------------------- prompts


def leaves_room(exercise: Exercise, tokenizer: Tokenizer, cfg: WritingConfig, seq_len: int) -> bool:
    """Whether there is room for a text behind the prompt."""
    return len(prompt_tokens(tokenizer, exercise)) + cfg.max_tokens <= seq_len


def check_prompts(exercises: Sequence[Exercise], tokenizer: Tokenizer, cfg: WritingConfig, seq_len: int) -> None:
    """Whether every prompt leaves room for a text.

    Raises:
        UserError: one does not.
    """
    for exercise in exercises:
        if not leaves_room(exercise, tokenizer, cfg, seq_len):
            raise UserError(
                f"data.seq_len is {seq_len}; there is a prompt of {exercise.family} {exercise.level} with"
                f" {len(prompt_tokens(tokenizer, exercise))} tokens, and rollout.max_tokens is {cfg.max_tokens}: raise"
                " it"
            )


def check_course(
    families: Iterable[Family], tokenizer: Tokenizer, cfg: WritingConfig, seq_len: int, say: Callable[[str], None]
) -> None:
    """Says how many prompts of the training side leave no room for a text; of families without end some are tried.

    Raises:
        UserError: all those of a level do not.
    """
    for family in families:
        for level in family.levels:
            size = family.size(level)
            num = TRIED if size is None else len(numbers_of(family, level, "training"))
            some = draw(family, level, "training", seed=0, num=num)
            fitting = sum(leaves_room(exercise, tokenizer, cfg, seq_len) for exercise in some)
            if not fitting:
                raise UserError(
                    f"data.seq_len is {seq_len}; with a rollout.max_tokens of {cfg.max_tokens} it has no room for any"
                    f" prompt of {family.name} {level}: raise it"
                )
            if size is not None and fitting < num:
                say(f"{num - fitting} of {num} prompts of {family.name} {level} leave no room for a text: left out")


def begun(config: Any, run_folder: RunFolder) -> None:
    """The folder says what it is going to be, before there is a checkpoint in it."""
    if not run_folder.config.exists() and not hosts.index():
        make_folder(run_folder.path)
        write_atomic(run_folder.config, json.dumps(to_dict(config), indent=1) + "\n")
