"""Fine-tuning for code: repairs of injected errors, expected risk beside cross-entropy, a course from functions to
modules, and the epoch whose programs are the best.

    loss = cross-entropy + weight * risk          (docs/code_finetune.md)

It is a recipe like pre-training: the same main, step and loop, with a loss, an order of rows and an evaluation of its
own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax import hosts
from dsjax.config import PositiveInt, UserError
from dsjax.data.batch import Batch
from dsjax.data.prepare import Corpus, prepare
from dsjax.data.structure.errors import BROKEN, REPAIR
from dsjax.data.structure.repair import with_repairs
from dsjax.data.structure.stored import with_structure
from dsjax.data.tokenizer import Tokenizer
from dsjax.evals.written_programs import Asked, WrittenPrograms, figures, problems_of, whole
from dsjax.infer.engine import placed
from dsjax.models.decoder import Decoder
from dsjax.rl.risk import JudgedBatch, risk
from dsjax.rl.rollout import Sampler
from dsjax.rl.sandbox import Sandbox
from dsjax.runs import RunFolder, cache_dir
from dsjax.sharding import Rules, joined, split_variables, training_rules
from dsjax.train import pretrain
from dsjax.train.candidates import (
    ROWS,
    Agenda,
    Judge,
    RiskConfig,
    greedy_programs,
    longest_row,
    prompts_of,
    with_candidates,
)
from dsjax.train.curriculum import CourseConfig, CourseRows, repairs_in_words, staged
from dsjax.train.loop import Counters
from dsjax.train.lora import whole_weights
from dsjax.train.pretrain import Pretrain, Regime, Setting
from dsjax.train.selection import keep_best
from dsjax.train.start import inherited
from dsjax.train.step import LossFunction, LossReport, TrainState, next_token_loss

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """What the epochs are compared by: the combined score of programs for held-out problems, written greedily.

    Attributes:
        problems: a file of them (:func:`dsjax.rl.programs.read_problems`); empty: generated held-out compositions.
        limit: of them.
        max_tokens: of a program.
        workers: programs that the sandbox runs at a time, in training, too.
    """

    problems: str = ""
    limit: PositiveInt = 100
    max_tokens: PositiveInt = 192
    workers: PositiveInt = 2


@dataclasses.dataclass(frozen=True)
class CodeFinetune(Pretrain):
    """A run that goes on from a model and makes it better at writing programs.

    Steps, evaluations and checkpoints are those of ``course.epochs``; ``train.steps`` is the most, and
    ``train.eval_every`` 0 is an epoch.

    Attributes:
        course: in which order things are learned.
        risk: of the model's own programs.
        select: what decides which epoch is the best.
        inherit: the model and its tokenizer are those of the run that ``train.start_from`` names.
    """

    course: CourseConfig = CourseConfig()
    risk: RiskConfig = RiskConfig()
    select: SelectConfig = SelectConfig()
    inherit: bool = True

    def validate(self) -> None:
        super().validate()
        if self.risk.weight and self.risk.prompts % self.train.accumulate:
            raise UserError(
                f"risk.prompts is {self.risk.prompts}; it must be a multiple of train.accumulate,"
                f" {self.train.accumulate}, whose micro-batches share it out"
            )

    @property
    def loss_fn(self) -> LossFunction:
        return joint_loss(self.risk)

    def begins(self, run_folder: RunFolder) -> tuple[CodeFinetune, Tokenizer | None]:
        return inherited(self, run_folder) if self.inherit and self.train.start_from else (self, None)


# ---------------------------------------------------------------- loss


def joint_loss(cfg: RiskConfig) -> LossFunction:
    """Cross-entropy, and the weighted risk of candidates where a batch has some."""

    def loss_fn(
        model: Decoder, batch: Batch, key: jax.Array, total_weight: Float[Array, ""]
    ) -> tuple[Float[Array, ""], LossReport]:
        loss, report = next_token_loss(model, batch, key, total_weight)
        if not isinstance(batch, JudgedBatch) or batch.candidates is None:
            return loss, report
        expected, metrics = risk(model, batch.candidates, alpha=cfg.alpha, per_token=cfg.per_token)
        metrics["loss/risk"] = cfg.weight * expected
        return loss + metrics["loss/risk"], LossReport(report.metrics | metrics, report.router)

    return loss_fn


# ---------------------------------------------------------------- run


def check(config: CodeFinetune) -> tuple[Any, Any]:
    """See :func:`dsjax.train.pretrain.check`; also whether programs can be written on this mesh, and judged."""
    mesh, trainer = pretrain.check(config)
    graph, params, buffers = split_variables(nnx.eval_shape(lambda: pretrain.make_model(config, nnx.Rngs(0))))
    placed(graph, joined(params, buffers), mesh, mesh.shape["data"] * mesh.shape["expert"])
    if config.risk.weight and config.risk.bleu and importlib.util.find_spec("sacrebleu") is None:
        raise UserError(
            f"risk.bleu is {config.risk.bleu:g}, but sacrebleu is not installed: pip install 'dsjax[code]', or set"
            " risk.bleu=0"
        )
    rows = math.prod(mesh.shape[axis] for axis in training_rules(config.mesh).batch)
    if config.risk.weight and config.risk.prompts // config.train.accumulate % rows:
        raise UserError(
            f"risk.prompts / train.accumulate is {config.risk.prompts // config.train.accumulate}; it must divide over"
            f" the {rows} devices of the mesh"
        )
    return mesh, trainer


def run(config: CodeFinetune, folder: pathlib.Path, *, quiet: bool = False) -> int:
    """Trains, or goes on with, the run in ``folder``; returns the exit code."""
    config = config.begins(RunFolder(folder))[0]
    check(config)
    asked = problems_of(asked_for(config.select))  # a file that is not there is known now
    with Sandbox(workers=config.select.workers) as sandbox:  # before anything is read: whether there can be one
        regime = Regime(material, functools.partial(parts, sandbox, asked))
        return pretrain.run(config, folder, quiet=quiet, regime=regime)


def material(config: CodeFinetune, say: Say) -> tuple[CodeFinetune, Corpus, CourseRows]:
    """The corpus, stage by stage and with repairs; the rows in their order; the config with how many steps that is."""
    data, course = config.data, config.course
    corpus = prepare(data, cache_dir() / "data", progress=say)
    if data.repair is not None:
        if {BROKEN, REPAIR} <= set(corpus.tokenizer.special_ids):
            corpus = with_repairs(corpus, data.repair, data.seed, cache_dir() / "data", progress=say)
        else:
            say(f"the tokenizer has no {BROKEN} and {REPAIR}: repairs are said in comments")
            corpus = repairs_in_words(corpus, data.repair, data.seed)
    corpus = staged(corpus, course, data.seed)
    if config.model.structure is not None:
        corpus = with_structure(corpus, config.model.structure.language, cache_dir() / "data", progress=say)
    rows = CourseRows(corpus, course, seq_len=data.seq_len, batch_size=data.batch_size, seed=data.seed)
    # Where an epoch ends depends on all of these, and with it what rows are taken next.
    settings = repr((corpus.fingerprint, corpus.content, data.batch_size, data.repair, course))
    corpus = dataclasses.replace(corpus, fingerprint=hashlib.sha256(settings.encode()).hexdigest())
    epoch = rows.num_rows // data.batch_size
    steps = min(config.train.steps, epoch * course.epochs)
    say(f"course: {len(corpus.stores) - len(corpus.further_shares)} stage(s), {epoch} steps an epoch, {steps} in all")
    every = config.train.eval_every or epoch
    train = dataclasses.replace(config.train, steps=steps, eval_every=every)
    return dataclasses.replace(config, train=train), corpus, rows


def parts(sandbox: Sandbox, asked: Sequence[Asked], setting: Setting) -> dict[str, Any]:
    """What the loop gets: candidates on steps with risk, the evaluation, and the selection."""
    config, say = cast(CodeFinetune, setting.config), setting.say
    own: dict[str, Any] = {"evaluate": evaluation(sandbox, asked, setting)}
    if not hosts.index():
        own["select"] = functools.partial(keep_best, setting.run, say=say)
    else:
        own["select"] = lambda records: None
    if not config.risk.weight:
        return own
    prompts = prompts_of(config.risk, setting.corpus.tokenizer, config.data.seq_len, config.data.seed)
    parts_of_length = math.prod(setting.mesh.shape[axis] for axis in Rules().length)
    length = longest_row(prompts, config.risk.max_tokens, config.data.seq_len, parts_of_length)
    say(f"risk: {len(prompts)} problems, rows of {length} positions")
    sampler = Sampler(
        setting.trainer.graph,
        setting.corpus.tokenizer,
        setting.mesh,
        num_rows=config.risk.prompts * config.risk.samples,
        max_length=length,
    )
    judge = Judge(
        config.risk, sampler, sandbox, setting.corpus.tokenizer, config.model, length=length, seed=config.train.seed
    )
    epoch = setting.rows.num_rows // config.data.batch_size
    agenda = Agenda(prompts, config.risk, config.course, epoch, config.data.seed)

    def complete(state: TrainState, batch: Batch, counters: Counters) -> Batch:
        if not agenda.is_due(counters.iteration):
            return batch
        variables = whole_weights(state.variables, jnp.dtype(config.compute.dtype))
        found = judge.candidates(variables, agenda.prompts(counters.iteration), counters.iteration)
        return with_candidates(batch, found, setting.mesh)

    return own | {"complete": complete}


def asked_for(select: SelectConfig) -> WrittenPrograms:
    """The evaluation of an epoch, as ``dsjax eval`` would be asked for it."""
    return WrittenPrograms(
        "tasks", problems=select.problems, limit=select.limit, max_tokens=select.max_tokens, workers=select.workers
    )


def evaluation(sandbox: Sandbox, asked: Sequence[Asked], setting: Setting) -> Any:
    """A function (variables, stopped) -> bits per byte of held-out documents, and scores of held-out programs."""
    config, cfg = setting.config, asked_for(setting.config.select)
    bits = pretrain.held_out_evaluation(config, setting.trainer, setting.corpus, setting.mesh)
    tokenizer, room = setting.corpus.tokenizer, config.data.seq_len
    sampler = Sampler(setting.trainer.graph, tokenizer, setting.mesh, num_rows=ROWS, max_length=room)

    def evaluate(variables: Any, stopped: Callable[[], bool]) -> dict[str, float]:
        values, codes = bits(variables, stopped), list[str]()
        params, problems = whole_weights(variables, jnp.dtype(config.compute.dtype)), [a.problem for a in asked]
        for some in greedy_programs(sampler, params, tokenizer, problems, max_tokens=cfg.max_tokens, room=room):
            codes += some
            if stopped():
                return values
        found = {} if hosts.index() else scores(sandbox, asked, codes, cfg, setting.say)
        return values | hosts.exchange("scores of programs", found)[0]

    return evaluate


def scores(
    sandbox: Sandbox, asked: Sequence[Asked], codes: Sequence[str], cfg: WrittenPrograms, say: Say
) -> dict[str, float]:
    """Of held-out programs, one for each problem; empty if none could be judged."""
    verdicts = sandbox.check([whole(a.problem, code) for a, code in zip(asked, codes, strict=True)])
    if all(verdict.passed is None for verdict in verdicts):
        say(f"no program could be judged: {verdicts[0].reason}")
        return {}
    report = figures(cfg, asked, [[code] for code in codes], [[verdict] for verdict in verdicts])
    names = ("combined_score", "syntax", "functional", "bleu", "code_bleu")
    found = {f"held_out_{name}": report[name] for name in names if report[name] is not None}
    return {"held_out_pass_at_1": report["pass_at_k"]["1"]["value"]} | found
