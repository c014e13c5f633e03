"""Pre-training: the config of the recipe and its one readable main."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.checkpoint import CheckpointConfig, Checkpoints
from dsjax.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, UserError, to_dict
from dsjax.data.batch import Batch
from dsjax.data.pipeline import make_batches
from dsjax.data.prepare import Corpus, DataConfig, prepare
from dsjax.evals.bits import bits_per_byte, document_bits
from dsjax.metrics import MetricsLog, Progress
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig
from dsjax.nn.masks import Documents
from dsjax.runs import RunFolder, cache_dir
from dsjax.sharding import MeshConfig, Rules, host_array_to_global, make_mesh
from dsjax.train.loop import Job, train
from dsjax.train.optimizer import OptimConfig
from dsjax.train.step import Trainer, make_trainer


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what it does on the way.

    Attributes:
        steps: batches to train on.
        max_minutes: if the steps would take longer on this machine, there will be fewer, planned while the learning
            rate has not begun to decay; 0: no limit.
        accumulate: micro-batches that a batch is cut into.
        log_every: steps between lines of ``metrics.jsonl``.
        eval_every: steps between held-out evaluations; 0: none.
        eval_documents: held-out documents that those look at.
        seed: of the initial weights and of everything random in a step.
    """

    steps: PositiveInt = 1000
    max_minutes: NonNegativeFloat = 0.0
    accumulate: PositiveInt = 1
    log_every: PositiveInt = 10
    eval_every: NonNegativeInt = 0
    eval_documents: PositiveInt = 8
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """``tensorboard``: also write TensorBoard event files into the run folder."""

    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """A pre-training run."""

    model: DecoderConfig = DecoderConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def validate(self) -> None:
        if self.data.vocab_size > self.model.vocab_size:
            raise UserError(
                f"model.vocab_size is {self.model.vocab_size}; it must be at least data.vocab_size, {self.data.vocab_size}"
            )
        if self.data.batch_size % self.train.accumulate:
            raise UserError(
                f"train.accumulate is {self.train.accumulate}; it must divide data.batch_size, {self.data.batch_size}"
            )


def make_model(config: Pretrain, rngs: nnx.Rngs) -> Decoder:
    return Decoder(config.model, config.compute, rngs=rngs)


def build(config: Pretrain, devices: list[Any] | None = None) -> tuple[Any, Trainer]:
    """The mesh over ``devices`` (None: all) and the step functions of a config; nothing is computed.

    Raises:
        UserError: the mesh does not fit the devices, the batch or the model.
    """
    mesh = make_mesh(config.mesh, devices)
    rules = Rules()
    micro, rows = config.data.batch_size // config.train.accumulate, 1
    for axis in rules.batch:
        rows *= mesh.shape[axis]
    if micro % rows:
        over = "*".join(f"{a}={mesh.shape[a]}" for a in rules.batch if mesh.shape[a] > 1)
        raise UserError(
            f"data.batch_size / train.accumulate is {micro}; it must divide over the {rows} devices of mesh {over}"
        )
    for axis in rules.length:
        if config.data.seq_len % mesh.shape[axis]:
            raise UserError(f"mesh.{axis} is {mesh.shape[axis]}; it must divide data.seq_len, {config.data.seq_len}")
    trainer = make_trainer(
        lambda rngs: make_model(config, rngs), config.optim, mesh, accumulate=config.train.accumulate, rules=rules
    )
    return mesh, trainer


def batch_shapes(config: Pretrain, mesh: Any) -> Batch:
    """The abstract batch that the step takes."""
    place = jax.sharding.NamedSharding(mesh, Rules().spec("batch", "length"))
    shape = (config.data.batch_size, config.data.seq_len)

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    ints = jnp.int32
    return Batch(array(ints), array(ints), array(jnp.float32), Documents(array(ints), array(ints)))


def check(config: Pretrain) -> None:
    """Everything that can be known to be wrong before anything is read or compiled.

    Raises:
        UserError: the first such thing.
    """
    build(config)


def run(config: Pretrain, folder: pathlib.Path, *, quiet: bool = False) -> int:
    """Trains, or goes on with, the run in ``folder``; returns the exit code."""
    begin = time.perf_counter()
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    first = jax.process_index() == 0

    # ---------------------------------------------------------------- mesh, model, optimizer
    mesh, trainer = build(config)
    model = config.model
    say(f"model: {model.num_params():,} parameters ({model.num_active_params():,} active) on {mesh.size} device(s)")

    # ---------------------------------------------------------------- run folder
    run_folder = RunFolder(folder)
    run_folder.create()
    if run_folder.config.exists():
        refuse_other_run(run_folder.read_config(), config, folder)
    if first:
        run_folder.write_config(config)

    # ---------------------------------------------------------------- data, while the step compiles
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(compile_step, trainer, batch_shapes(config, mesh))
        corpus = prepare(config.data, cache_dir() / "data", progress=say)
        report = corpus.report
        say(
            f"data: {report.num_training} documents, {report.training_tokens:,} tokens to train on; "
            f"{report.num_held_out} documents held out; {len(report.duplicates)} near-duplicates dropped"
        )
        if corpus.tokenizer.vocab_size > model.vocab_size:
            raise UserError(
                f"model.vocab_size is {model.vocab_size}; the tokenizer has {corpus.tokenizer.vocab_size} entries"
            )
        batches = make_batches(
            corpus, config.data, host_index=jax.process_index(), num_hosts=jax.process_count()
        )
        if first and not run_folder.tokenizer.exists():
            run_folder.tokenizer.write_text(corpus.tokenizer.to_json(), encoding="utf-8")
        step = compiling.result()

    # ---------------------------------------------------------------- restore, train
    checkpoints = Checkpoints(run_folder.checkpoints, keep=config.checkpoint.keep)
    job = Job(
        trainer=trainer,
        step=step,
        place=lambda batch: place_batch(batch, mesh),
        batches=batches,
        checkpoints=checkpoints,
        evaluate=held_out_evaluation(config, trainer, corpus, mesh),
        flops_per_token=model.flops_per_token(config.data.seq_len),
        begin=begin,
    )
    return train(config, run_folder, job, quiet=quiet)


def refuse_other_run(found: Any, config: Pretrain, folder: pathlib.Path) -> None:
    """A resumed run may change its length, mesh and what is logged, but not what it trains.

    Raises:
        UserError: names the first key that differs.
    """
    old, new = _flat(to_dict(found)), _flat(to_dict(config))
    for key in sorted(set(old) | set(new)):
        fixed = key.split(".")[0] in ("type", "model", "optim") or key == "train.seed"
        if fixed and old.get(key) != new.get(key):
            raise UserError(
                f"run folder {folder} was trained with {key}={old.get(key)}, now it is {new.get(key)}; "
                "give another --run, or the old value"
            )


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    out: dict[str, Any] = {}
    for key, value in items:
        here = f"{prefix}.{key}" if prefix else str(key)
        out |= _flat(value, here) if isinstance(value, (dict, list)) else {here: value}
    return out


def compile_step(trainer: Trainer, batch: Batch) -> Any:
    """The step as an executable."""
    total = jax.ShapeDtypeStruct((), jnp.int32)
    return trainer.step.lower(trainer.shapes, batch, total).compile()


def place_batch(batch: Batch, mesh: Any) -> Batch:
    """This host's rows as part of the global batch on the devices."""
    spec = Rules().spec("batch", "length")
    return jax.tree.map(lambda x: host_array_to_global(np.asarray(x), mesh, spec), batch)


def held_out_evaluation(config: Pretrain, trainer: Trainer, corpus: Corpus, mesh: Any) -> Any:
    """A function params -> metrics over the first few held-out documents, by order of name hash."""
    documents = corpus.held_out[: config.train.eval_documents]

    def evaluate(params: Any) -> dict[str, float]:
        bits = document_bits(
            trainer.graph,
            params,
            documents,
            seq_len=config.data.seq_len,
            end_id=corpus.tokenizer.end_id,
            batch_size=config.data.batch_size,
            mesh=mesh,
            place=lambda batch: place_batch(batch, mesh),
        )
        return {"held_out_bits_per_byte": bits_per_byte(bits, documents)[0]}

    return evaluate


__all__ = ["LogConfig", "MetricsLog", "Pretrain", "Progress", "TrainConfig", "check", "run"]
