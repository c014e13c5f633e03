"""Rejection sampling: a model writes several texts for each exercise, and learns the best of them.

    exercises -> K texts each -> rewards -> the best, if it is good enough -> next tokens        RUN
                    |                          |
                RUN/written.jsonl          RUN/picked.jsonl, RUN/shares.json, RUN/pairs.jsonl

Llama 2's rejection sampling (arXiv 2307.09288), RAFT (arXiv 2304.06767) and, with rewards that are verified, the third
stage of DeepSeek-R1 (arXiv 2501.12948, section 2.3.3). What is learned is learned as a warm start is
(:mod:`dsjax.train.supervised`); what was written is kept, so it is written once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from dsjax import hosts
from dsjax.config import Bounds, PositiveInt, UserError
from dsjax.data.prepare import Corpus
from dsjax.data.tokenizer import Tokenizer
from dsjax.evals.solved import Solved, prompt_tokens
from dsjax.infer.sampling import SamplingConfig
from dsjax.metrics import Progress, write_atomic
from dsjax.rl.exercises.config import ExercisesConfig, families_of
from dsjax.rl.exercises.exercise import Exercise, Family, draw, numbers_of
from dsjax.rl.preference import best_and_worst, best_of
from dsjax.rl.rewards import RewardConfig, Rewards
from dsjax.runs import RunFolder
from dsjax.train import pretrain, supervised
from dsjax.train.kept_texts import WRITTEN, Group, Journal, in_lines, judged
from dsjax.train.lora import whole_weights
from dsjax.train.pretrain import Pretrain, Regime, fixed_part, next_token_parts
from dsjax.train.start import Start, inherited
from dsjax.train.step import Trainer
from dsjax.train.writing import WritingConfig, begun, check_prompts, check_writing, make_sampler

Say = Callable[[str], None]
PICKED, SHARES, PAIRS = "picked.jsonl", "shares.json", "pairs.jsonl"  # in the run folder


@dataclasses.dataclass(frozen=True)
class TextsConfig(WritingConfig):
    """What is written, judged and kept.

    Attributes:
        exercises: of each family, of the training side; those that ask the same are there once.
        level_decay: there are that many times as many of a level as of the one below.
    """

    prompts: PositiveInt = 64
    exercises: PositiveInt = 2000
    level_decay: Annotated[float, Bounds(gt=0, le=1)] = 1.0


@dataclasses.dataclass(frozen=True)
class PicksConfig:
    """What is learned of it.

    Attributes:
        least: the reward that a text must have.
        epochs: how often each picked text is learned; ``train.steps`` is the most.
        pairs: the best and the worst text of each exercise are written down as a pair, for ``configs/preference.py``.
    """

    least: float = 1.0
    epochs: PositiveInt = 2
    pairs: bool = False


@dataclasses.dataclass(frozen=True)
class BestOf(Pretrain):
    """A run that goes on from a model and learns the best of what that writes.

    Model and tokenizer are those of the run that ``train.start_from`` names; ``data`` has the size of rows (positions
    of a prompt and its text at the least) and batches and the seed, and its sources are not looked at.

    Attributes:
        exercises: which there are.
        rollout: what is written.
        rewards: what it is worth.
        picks: what is learned of it.
    """

    exercises: ExercisesConfig = ExercisesConfig()
    rollout: TextsConfig = TextsConfig()
    rewards: RewardConfig = RewardConfig()
    picks: PicksConfig = PicksConfig()

    def validate(self) -> None:
        super().validate()
        if not self.train.start_from:
            raise UserError("train.start_from is empty; name there the run whose model is to write")
        self.rollout.check_room(self.data.seq_len)

    def begins(self, run_folder: RunFolder) -> tuple[BestOf, Tokenizer]:
        return inherited(self, run_folder, values="none", plain="picked texts")


# ---------------------------------------------------------------- run


def check(config: BestOf) -> tuple[Any, Trainer]:
    """See :func:`dsjax.train.pretrain.check`; also whether texts can be written on this mesh."""
    mesh, trainer = pretrain.check(config)
    check_writing(config.rollout, mesh, trainer)
    return mesh, trainer


def run(config: BestOf, folder: pathlib.Path, *, quiet: bool = False) -> int:
    """Writes and learns, or goes on with, the run in ``folder``; returns the exit code."""
    quiet = quiet or hosts.index() > 0
    say: Say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    run_folder = RunFolder(folder)
    run_folder.check()
    families = families_of(config.exercises)
    config, tokenizer = config.begins(run_folder)
    check(config)
    exercises, held_out = drawn(config, families, tokenizer), evaluated(config, families)
    facts = told(config, exercises)
    hosts.same("texts to write", facts)
    journal = Journal(run_folder.path / WRITTEN, facts)
    missing = len(exercises) - len(journal.groups)
    if missing or not run_folder.has_checkpoint():
        start = Start(pathlib.Path(config.train.start_from), tokenizer)
        journal.written_by(start.base.sha256)
        if missing:
            begun(config, run_folder)
            say(f"writing: {config.rollout.samples} texts for each of {missing:,} exercises")
            write(config, start, exercises, families, tokenizer, journal, quiet=quiet)
    picked = keep_best(config, run_folder, exercises, journal.groups, say)
    regime = Regime(functools.partial(material, tokenizer, picked, held_out), next_token_parts)
    return pretrain.run(config, folder, quiet=quiet, regime=regime)


# ---------------------------------------------------------------- exercises


def drawn(config: BestOf, families: Mapping[str, Family], tokenizer: Tokenizer) -> list[Exercise]:
    """The exercises that are written for, of the training side.

    Raises:
        UserError: a prompt leaves no room for a text.
    """
    cfg, seed = config.rollout, -1 - config.data.seed  # a warm start and its control draw by seeds from 0 on
    found = {
        exercise.key: exercise
        for family in families.values()
        for level, num in supervised.level_mix(family.levels, cfg.exercises, cfg.level_decay).items()
        for exercise in draw(family, level, "training", seed=seed, num=num)
    }
    exercises = list(found.values())
    check_prompts(exercises, tokenizer, cfg, config.data.seq_len)
    return exercises


def evaluated(config: BestOf, families: Mapping[str, Family]) -> list[Exercise]:
    """Exercises whose known solutions are scored every ``train.eval_every`` steps, of the validation side. A level of
    a file that has nothing there is left out.

    Raises:
        UserError: none has a known solution.
    """
    if not config.train.eval_every:
        return []
    found = [
        exercise
        for family in families.values()
        for level in family.levels
        if family.size(level) is None or numbers_of(family, level, "validation")
        for exercise in draw(family, level, "validation", seed=0, num=4)
    ]
    if not any(exercise.solution for exercise in found):
        raise UserError(
            f"train.eval_every is {config.train.eval_every}, but none of the exercises of {', '.join(families)} has a"
            " known solution to score; set it to 0 (dsjax eval asks what the run solves)"
        )
    return found


# ---------------------------------------------------------------- texts


def write(
    config: BestOf,
    start: Start,
    exercises: Sequence[Exercise],
    families: Mapping[str, Family],
    tokenizer: Tokenizer,
    journal: Journal,
    *,
    quiet: bool,
) -> None:
    """Has texts written for the exercises that have none yet, judges them, and keeps them."""
    cfg, num = config.rollout, len(exercises)
    mesh, trainer = pretrain.build(config)
    with Rewards(config.rewards, families) as rewards, Progress(num, label="writing", every=1, quiet=quiet) as bar:
        sampler = make_sampler(cfg, trainer, mesh, tokenizer, config.data.seq_len)
        variables = whole_weights(start.variables(trainer, config.train.seed), jnp.dtype(config.compute.dtype))
        for first in range(len(journal.groups), num, cfg.prompts):
            some = exercises[first : first + cfg.prompts]
            rollouts = sampler.sample(
                variables,
                [prompt_tokens(tokenizer, exercise) for exercise in some],
                num_samples=cfg.samples,
                max_tokens=cfg.max_tokens,
                seed=int(np.random.SeedSequence((config.train.seed, first)).generate_state(1)[0]),
                sampling=SamplingConfig(cfg.temperature, top_p=1.0),
                stop=cfg.stop,
            )
            journal.add(judged(rewards, some, rollouts))
            bar.update(first + len(some), num)


def told(config: BestOf, exercises: Sequence[Exercise]) -> dict[str, Any]:
    """What texts and their rewards depend on, beside the weights that wrote them."""
    kept = ("exercises", "rollout", "rewards", "train")
    facts = {key: value for key, value in fixed_part(config).items() if key.split(".")[0] in kept}
    digest = hashlib.sha256(json.dumps([dataclasses.asdict(e) for e in exercises], sort_keys=True).encode())
    facts |= {"data.seed": config.data.seed, "data.seq_len": config.data.seq_len}
    return facts | {"exercises (SHA-256)": digest.hexdigest()}


# ---------------------------------------------------------------- what is learned


def keep_best(
    config: BestOf, run_folder: RunFolder, exercises: Sequence[Exercise], groups: Sequence[Group], say: Say
) -> list[Exercise]:
    """The exercises of which a text was picked, with that as their solution; writes down which, and how many.

    Raises:
        UserError: there is none.
    """
    rewards, tokens = [group.counted for group in groups], [group.tokens for group in groups]
    best = best_of(rewards, tokens, least=config.picks.least)
    lines = [
        {"family": e.family, "level": e.level, "prompt": e.prompt, "text": own.texts[i], "reward": own.rewards[i]}
        for e, own, i in zip(exercises, groups, best, strict=True)
        if i is not None
    ]
    pairs = [
        {"prompt": e.prompt, "chosen": own.texts[both[0]], "rejected": own.texts[both[1]]}
        for e, own, both in zip(
            exercises, groups, best_and_worst(rewards, tokens, least=config.picks.least), strict=True
        )
        if both is not None
    ]
    table = shares(exercises, groups, best)
    if not hosts.index() and not run_folder.has_checkpoint():  # else they say what is learned already
        write_atomic(run_folder.path / PICKED, in_lines(lines))
        write_atomic(run_folder.path / SHARES, json.dumps(table, indent=1) + "\n")
    if not hosts.index() and config.picks.pairs:
        write_atomic(run_folder.path / PAIRS, in_lines(pairs))
    for family, levels in table["by_level"].items():
        found = "  ".join(f"{level} {of_level['solved']:.0%}" for level, of_level in levels.items())
        say(f"{family}: exercises with a right text by level: {found}")
    say(f"picked: {len(lines):,} texts for {len(exercises):,} exercises")
    if config.picks.pairs:
        say(f"{run_folder.path / PAIRS}: {len(pairs):,} pairs")
    if not lines:
        raise UserError(
            f"picks.least is {config.picks.least:g}; none of the texts that came to an end has such a reward: lower it,"
            " or begin with a model that solves more"
        )
    return [
        dataclasses.replace(e, solution=own.texts[i])
        for e, own, i in zip(exercises, groups, best, strict=True)
        if i is not None
    ]


def shares(exercises: Sequence[Exercise], groups: Sequence[Group], best: Sequence[int | None]) -> dict[str, Any]:
    """What was right, by family and level: ``solved`` is the share of exercises with at least one right text.

    The rest is what :meth:`dsjax.evals.solved.Solved.by_level` says of all texts, and how many were picked.
    """
    correct_NK = np.array([[math.nan if x is None else x for x in group.correct] for group in groups])
    found = Solved(tuple(exercises), correct_NK, np.zeros(0)).by_level()
    arms = [(exercise.family, exercise.level) for exercise in exercises]
    for family, levels in found.items():
        for level, figures in levels.items():
            mine = [place for place, arm in enumerate(arms) if arm == (family, level)]
            figures["solved"] = float(np.mean((correct_NK[mine] >= 1).any(axis=1)))
            figures["picked"] = sum(best[place] is not None for place in mine)
    return {
        "exercises": len(exercises),
        "samples": correct_NK.shape[1],
        "picked": sum(place is not None for place in best),
        "solved": float(np.mean((correct_NK >= 1).any(axis=1))),
        "by_level": {family: {str(level): x for level, x in levels.items()} for family, levels in found.items()},
    }


def material(
    tokenizer: Tokenizer, picked: Sequence[Exercise], held_out: Sequence[Exercise], config: BestOf, say: Say
) -> tuple[BestOf, Corpus, Any]:
    """The picked texts as documents, in rows; the config with how many steps that is."""
    _, corpus, rows = supervised.material(tokenizer, picked, held_out, 0, config, say)
    steps = min(config.train.steps, rows.num_rows // config.data.batch_size * config.picks.epochs)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)), corpus, rows
