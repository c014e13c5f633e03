"""R1: reinforcement learning from verified rewards (DeepSeek-R1, DeepSeekMath's GRPO), on the one trainer.

    warm start (solutions of easy exercises)  ->  RL  ->  report, beside a control that went on with solutions

Each is a run like any other: RUN/warm_start, RUN and RUN/control. The loop of RL is that of pre-training; its batches
are exercises, and a step of it writes, judges and learns (:mod:`dsjax.train.practice`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from dsjax import hosts
from dsjax.config import UserError, to_dict
from dsjax.data.prepare import Corpus
from dsjax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from dsjax.evals.solved import as_judged, solved
from dsjax.infer.sampling import SamplingConfig
from dsjax.metrics import read_metrics, write_atomic
from dsjax.rl.advantages import AdvantageConfig, overlong_penalty
from dsjax.rl.algorithms import AlgorithmConfig
from dsjax.rl.archive import ArchiveConfig
from dsjax.rl.arms import Arm, CurriculumConfig
from dsjax.rl.course_report import plot_course
from dsjax.rl.exercises.config import ExercisesConfig, families_of
from dsjax.rl.exercises.exercise import Exercise, Family, distinct, draw
from dsjax.rl.experience import Experience
from dsjax.rl.health import HealthConfig
from dsjax.rl.packing import num_rows
from dsjax.rl.policy import PolicyConfig
from dsjax.rl.rewards import RewardConfig, Rewards
from dsjax.rl.rollout import Sampler
from dsjax.runs import RunFolder
from dsjax.sharding import Rules, joined, training_rules
from dsjax.train import pretrain
from dsjax.train.course import Course, Worth, Written
from dsjax.train.lora import whole_weights
from dsjax.train.policy_loss import policy_loss
from dsjax.train.practice import Practice, Scorer, each_update, row_devices
from dsjax.train.pretrain import Pretrain, Regime, Setting
from dsjax.train.r1_config import ReportConfig, RolloutConfig, UpdateConfig, WarmStartConfig
from dsjax.train.r1_report import (
    held_out,
    in_words,
    named_levels,
    plot_solved,
    report_of,
    solved_by,
    spent_on,
)
from dsjax.train.start import Start, inherited
from dsjax.train.step import LossFunction, TrainState
from dsjax.train.supervised import exercise_corpus, level_mix, supervised
from dsjax.train.writing import begun, check_course, check_prompts, check_writing, make_sampler

Say = Callable[[str], None]
WARM_START, CONTROL = "warm_start", "control"  # in the run folder


@dataclasses.dataclass(frozen=True)
class R1(Pretrain):
    """A run of reinforcement learning from verified rewards.

    ``data`` has the tokenizer, ``seq_len`` (positions of a prompt and its text) and the seed; its sources and batch
    size are not looked at. ``train.steps`` are iterations, ``train.eval_every`` counts them.

    Attributes:
        exercises: which there are.
        warm_start: what is learned before.
        rollout: what is written in an iteration.
        rewards: what it is worth.
        algorithm: what a text is compared with, and what is descended.
        update: how often.
        curriculum: which exercises come when.
        archive: how much is remembered of right solutions.
        health: what is warned of.
        report: what is evaluated.
    """

    exercises: ExercisesConfig = ExercisesConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig("dapo")
    update: UpdateConfig = UpdateConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    archive: ArchiveConfig = ArchiveConfig()
    health: HealthConfig = HealthConfig()
    report: ReportConfig = ReportConfig()

    def validate(self) -> None:
        own = of_updates(self)
        if self.warm_start.steps:  # RL begins with that, whatever the warm start begins with
            own = dataclasses.replace(own, train=dataclasses.replace(own.train, start_from=WARM_START))
        super(R1, own).validate()
        cfg, update = self.rollout, self.update
        rows = cfg.prompts * cfg.samples
        if rows % (update.minibatches * self.train.accumulate):
            raise UserError(
                f"rollout.prompts * rollout.samples is {rows}; update.minibatches * train.accumulate,"
                f" {update.minibatches * self.train.accumulate}, must divide it"
            )
        cfg.check_room(self.data.seq_len)
        if cfg.samples == 1 and self.advantage.kind != "gae":
            raise UserError(
                f"rollout.samples is 1; {self.algorithm.name} compares the texts of an exercise, of which there must be"
                " at least 2"
            )
        if self.advantage.kind == "gae" and self.model.values == "none":
            raise UserError(
                f"algorithm.name is {self.algorithm.name}, whose advantages take a critic, but model.values is none; it"
                " must be head or decoder"
            )
        if update.kl_target and not self.policy.kl_coef:
            raise UserError(
                f"update.kl_target is {update.kl_target:g}, but algorithm.kl_coef is 0; it must be above, to be moved"
            )
        if not self.warm_start.steps and not self.train.start_from:
            raise UserError(
                "warm_start.steps is 0 and train.start_from is empty; name there the run whose model is to learn"
            )

    @property
    def policy(self) -> PolicyConfig:
        """The objective."""
        return self.algorithm.switches()[0]

    @property
    def advantage(self) -> AdvantageConfig:
        """What a text is compared with."""
        return self.algorithm.switches()[1]

    @property
    def loss_fn(self) -> LossFunction:
        return policy_loss(self.policy, temperature=self.rollout.temperature)

    def step_batch(self, mesh: Any) -> Experience:
        return update_shapes(self, mesh, self.data.batch_size)

    def begins(self, run_folder: RunFolder) -> tuple[R1, Tokenizer]:
        if self.train.start_from:
            return inherited(self, run_folder, values=self.model.values)
        path = self.data.tokenizer_path
        return self, load_tokenizer(path, end_token=self.data.end_token) if path else byte_tokenizer()


# ---------------------------------------------------------------- runs


def check(config: R1) -> tuple[Any, Any]:
    """See :func:`dsjax.train.pretrain.check`; also whether texts can be written on this mesh, and split over it."""
    mesh, trainer = pretrain.check(of_updates(config))
    check_writing(config.rollout, mesh, trainer)
    return mesh, trainer


def run(config: R1, folder: pathlib.Path, *, quiet: bool = False, reports: bool = True) -> int:
    """Trains, or goes on with, the runs in ``folder``, and ``reports``; returns the exit code."""
    quiet = quiet or hosts.index() > 0
    say: Say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    run_folder = RunFolder(folder)
    run_folder.check()
    families = families_of(config.exercises)
    named_levels(config, families)
    config, tokenizer = config.begins(run_folder)
    asked = held_out(config, families) if reports else []  # now, not behind hours of training
    check_prompts(asked + validated_on(config, families), tokenizer, config.rollout, config.data.seq_len)
    check_course(families.values(), tokenizer, config.rollout, config.data.seq_len, say)
    check(config)
    with Rewards(config.rewards, families) as rewards:
        if config.warm_start.steps:
            say(f"warm start: {config.warm_start.steps} steps on solutions")
            begun(of_updates(config), run_folder)
            start = folder / WARM_START
            regime = solutions(config, families, tokenizer)
            if code := pretrain.run(warm_start_run(config), start, quiet=quiet, regime=regime):
                return code
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, start_from=str(start)))
            say("reinforcement learning")
        regime = Regime(
            functools.partial(material, tokenizer),
            functools.partial(parts, families, rewards),
            first_batch=first_batch,
            stepping=each_update,
        )
        if code := pretrain.run(of_updates(config), folder, quiet=quiet, regime=regime):
            return code
        if config.report.control:
            tokens = hosts.exchange("tokens learned", spent_on(run_folder)["tokens_learned"])[0]
            say(f"control: solutions again, {tokens:,} tokens as learned in RL")
            regime = solutions(config, families, tokenizer, learned=tokens)
            if code := pretrain.run(control_run(config), folder / CONTROL, quiet=quiet, regime=regime):
                return code
        if reports:
            report(config, run_folder, families, asked, rewards, say)
    return 0


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and the boundary."""
    return train_tokenizer([], 257)


def of_updates(config: R1) -> R1:
    """The config with the rows of an update as its batch: what the trainer counts by."""
    rows = config.rollout.prompts * config.rollout.samples // config.update.minibatches
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))


# ---------------------------------------------------------------- solutions


def warm_start_run(config: R1) -> Pretrain:
    """The run that learns solutions before RL, on from ``train.start_from`` if that names a run."""
    warm = config.warm_start
    return Pretrain(
        model=dataclasses.replace(config.model, values="none"),
        data=dataclasses.replace(config.data, batch_size=warm.batch_size),
        optim=warm.optim,
        train=dataclasses.replace(config.train, steps=warm.steps, accumulate=1, eval_every=0),
        compute=config.compute,
        mesh=config.mesh,
        checkpoint=config.checkpoint,
        log=config.log,
    )


def control_run(config: R1) -> Pretrain:
    """The run that goes on with solutions from where RL began; how long, :func:`solutions` says. If pairs are what RL
    trains, the control trains such pairs."""
    base = warm_start_run(config)
    train = dataclasses.replace(base.train, steps=10**9, start_from=config.train.start_from)
    return dataclasses.replace(base, train=train, lora=config.lora)


def solutions(
    config: R1, families: Mapping[str, Family], tokenizer: Tokenizer, *, learned: int | None = None
) -> Regime:
    """The regime of both: exercises of the training side, fewer of each higher level; others for the control.

    ``learned``: tokens to learn, of the control.
    """
    warm, seed = config.warm_start, 2 * config.data.seed + (learned is not None)
    training = [
        exercise
        for family in families.values()
        for level, num in level_mix(family.levels, warm.exercises, warm.level_decay).items()
        for exercise in draw(family, level, "training", seed=seed, num=num)
    ]
    if not any(exercise.solution for exercise in training):
        raise UserError(
            f"warm_start.steps is {warm.steps}, but none of the exercises of {', '.join(families)} has a solution to"
            " learn; set it to 0 and name a run as train.start_from"
        )
    return supervised(tokenizer, training, (), learned_tokens=learned)  # neither is evaluated on the way


# ---------------------------------------------------------------- reinforcement learning


def first_batch(config: R1, mesh: Any) -> Experience:
    """An abstract minibatch of a likely size: sixteen texts in a row."""
    return update_shapes(config, mesh, num_rows(of_updates(config).data.batch_size // 16, row_devices(config, mesh)))


def update_shapes(config: R1, mesh: Any, rows: int) -> Experience:
    """An abstract minibatch of so many rows."""
    data, rollout = dataclasses.replace(config.data, batch_size=rows), config.rollout
    batch = pretrain.batch_shapes(dataclasses.replace(config, data=data), mesh)
    float_BT = batch.loss_weight_BT
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    given = {"weight_BT": float_BT, "advantage_BT": float_BT, "old_log_prob_BT": float_BT}
    if needs_reference(config):
        place = jax.sharding.NamedSharding(mesh, Rules().spec("batch"))
        given |= {"reference_log_prob_BT": float_BT}
        given["kl_coef_B"] = jax.ShapeDtypeStruct(float_BT.shape[:1], jnp.float32, sharding=place)
    if config.advantage.kind == "gae":
        given |= {"old_value_BT": float_BT, "return_BT": float_BT}
    if rollout.rescore and rollout.correction_limit:
        given["correction_BT"] = float_BT
    if rollout.replay and config.model.experts():
        place = jax.sharding.NamedSharding(mesh, Rules().spec("batch", "length"))
        shape = (*float_BT.shape, *config.model.decisions)
        given["experts_BTLK"] = jax.ShapeDtypeStruct(shape, jnp.int16, sharding=place)
    return Experience(**fields, **given)


def needs_reference(config: R1) -> bool:
    """Whether there is a policy to stay near."""
    return config.policy.kl_coef > 0


def material(tokenizer: Tokenizer, config: R1, say: Say) -> tuple[R1, Corpus, None]:
    """No documents: what is learned from is written on the way. The tokenizer, and what tells exercises apart."""
    del say
    corpus = exercise_corpus(tokenizer, [])
    families = dataclasses.replace(config.exercises, files=())  # files may lie elsewhere, but say the same
    digest = hashlib.sha256(json.dumps(to_dict(families), sort_keys=True).encode() + corpus.fingerprint.encode())
    for path in config.exercises.files:
        digest.update(pathlib.Path(path).read_bytes())
    return config, dataclasses.replace(corpus, fingerprint=digest.hexdigest()), None


def sampler_of(config: R1, trainer: Any, mesh: Any, tokenizer: Tokenizer) -> Sampler:
    """What writes texts to learn from."""
    tells = bool(config.model.experts())
    return make_sampler(config.rollout, trainer, mesh, tokenizer, config.data.seq_len, tell_experts=tells)


def parts(families: Mapping[str, Family], rewards: Rewards, setting: Setting) -> dict[str, Any]:
    """What the loop gets."""
    config, tokenizer = cast(R1, setting.config), setting.corpus.tokenizer
    course = Course(config, families, setting.corpus.fingerprint)
    sampler = sampler_of(config, setting.trainer, setting.mesh, tokenizer)
    scorer = Scorer(setting.trainer.graph, setting.mesh, training_rules(config.mesh), config, tokenizer.end_id)
    practice = Practice(
        config,
        course,
        sampler,
        functools.partial(judged, config, rewards, course),
        scorer,
        tokenizer,
        setting.mesh,
        reference_of(config, setting) if needs_reference(config) else None,
        lambda state: whole_weights(state.variables, jnp.dtype(config.compute.dtype)),
    )
    return {
        "batches": course,
        "place": lambda choices: choices,
        "complete": practice,
        "evaluate": validation(config, families, rewards, course, sampler, tokenizer),
        "observe": course.observe,
        "summary": summary,
    }


def judged(config: R1, rewards: Rewards, course: Course, written: Written) -> Worth:
    """What texts are worth: rewards by their weights, less what is too long, and the bonus for what is new."""
    shape = (len(written.exercises), config.rollout.samples)
    exercises, texts = written.flat
    found = rewards(exercises, [as_judged(text) for text in texts])
    parts = {name: x.reshape(shape) for name, x in found.parts.items()}
    total_PK = found.total_N.reshape(shape)
    if buffer := config.rollout.overlong:
        lengths = np.array([len(text.tokens) + text.ended for text in texts])
        parts["overlong"] = np.asarray(overlong_penalty(lengths, config.rollout.max_tokens, buffer)).reshape(shape)
        total_PK = total_PK + parts["overlong"]
    worth = Worth(total_PK, parts["correct"], parts)
    return course.with_novelty(written, worth, found.answers)


def reference_of(config: R1, setting: Setting) -> Callable[[TrainState], Any]:
    """(state) -> all variables of the policy that RL began with: where pairs are trained, the frozen weights."""
    if setting.trainer.base is not None:
        return lambda state: joined(state.frozen, state.buffers)
    source = Start(pathlib.Path(config.train.start_from), setting.corpus.tokenizer, setting.run.base())
    kept = source.variables(setting.trainer, config.train.seed)
    return lambda state: kept


def validated_on(config: R1, families: Mapping[str, Family]) -> list[Exercise]:
    """Exercises that are asked every ``train.eval_every`` steps.

    Raises:
        UserError: a family has too few.
    """
    num = config.report.validation if config.train.eval_every else 0
    return [
        exercise
        for family in families.values()
        for level in family.levels
        for exercise in distinct(family, level, "validation", num, key="report.validation")
    ]


def validation(
    config: R1,
    families: Mapping[str, Family],
    rewards: Rewards,
    course: Course,
    sampler: Sampler,
    tokenizer: Tokenizer,
) -> Any:
    """A function (variables, stopped) -> pass@1 by family and level, and over all."""
    exercises = validated_on(config, families)

    def evaluate(variables: Any, stopped: Callable[[], bool]) -> dict[str, float]:
        course.wait()  # one engine writes for both
        found = solved(
            sampler,
            whole_weights(variables, jnp.dtype(config.compute.dtype)),
            tokenizer,
            exercises,
            lambda some, texts: rewards(some, texts).parts["correct"],
            num_samples=1,
            max_tokens=config.rollout.max_tokens,
            sampling=SamplingConfig(config.rollout.temperature, top_p=1.0),
            greedy=False,
            seed=0,
            stop=config.rollout.stop,
            stopped=stopped,
        )
        if found is None:
            return {}
        table = found.by_level()
        rates = {
            f"validation/{family}/{level}": figures["pass@1"]["value"]
            for family, levels in table.items()
            for level, figures in levels.items()
            if "pass@1" in figures
        }
        return {"validation": float(np.mean(list(rates.values())))} | rates if rates else {}

    return evaluate


def summary(values: Mapping[str, float]) -> str:
    """An iteration in some words."""

    def said(name: str, form: str) -> str:
        return format(values[name], form) if math.isfinite(values.get(name, math.nan)) else "unknown"

    kl = f"KL {said('rl/kl', '.3f')}" if "rl/kl" in values else f"KL to the writer {said('rl/kl_old', '.3f')}"
    return (
        f"reward {said('rl/reward', '.3f')}  correct {said('rl/correct', '.0%')}  {kl}"
        f"  length {said('rl/length', '.1f')}  phase {said('curriculum/phase', '.0f')}"
    )


# ---------------------------------------------------------------- report


def report(
    config: R1,
    run_folder: RunFolder,
    families: Mapping[str, Family],
    exercises: list[Exercise],
    rewards: Rewards,
    say: Say,
) -> None:
    """Evaluates what there was before and is now, writes it down and draws it; of several processes the first one does,
    and all of them write texts."""
    runs = {"before": RunFolder(pathlib.Path(config.train.start_from)), "after": run_folder}
    if config.report.control:
        runs["sft_control"] = RunFolder(run_folder.path / CONTROL)
    levels = named_levels(config, families)
    say(f"report: {len(exercises):,} held-out exercises, {len(runs)} models")
    mesh, trainer = pretrain.build(of_updates(config))
    tables = solved_by(config, trainer, config.rollout.devices(mesh), runs, exercises, rewards)
    if hosts.index():
        return
    spent = {name: spent_on(run) for name, run in runs.items()}
    found = report_of(config, levels, tables, spent=spent)
    write_atomic(run_folder.path / "report.json", json.dumps(found, indent=1) + "\n")
    plot_solved(found, run_folder.path / "solved.png")
    arms = [Arm(name, level) for name, family in families.items() for level in family.levels]
    phases = [phase.name for phase, _ in config.curriculum.phases_of(arms)]
    plot_course(read_metrics(run_folder.metrics), run_folder.path / "course.png", phases=phases)
    for family, level in levels.items():
        say(f"{family} {level}: {in_words(found['families'][family])}")
    say(f"all levels: {in_words(found['mean'])}")
    say(f"{run_folder.path}: report.json, solved.png, course.png")
