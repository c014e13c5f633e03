"""Pre-training: the config of the recipe and its one readable main."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsjax
from dsjax import hosts
from dsjax.background import InBackground
from dsjax.checkpoint import CheckpointConfig, Checkpoints
from dsjax.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, UserError, to_dict
from dsjax.data.batch import Batch
from dsjax.data.pipeline import make_batches
from dsjax.data.prepare import Corpus, CorpusReport, DataConfig
from dsjax.data.structure.stored import prepared
from dsjax.data.tokenizer import Tokenizer
from dsjax.evals.bits import bits_per_byte, document_bits
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig
from dsjax.models.multi_token import MULTI_TOKEN
from dsjax.nn.fields import NUM_FIELDS
from dsjax.nn.lora import LoraConfig
from dsjax.nn.masks import Documents
from dsjax.nn.moe import MoEConfig
from dsjax.nn.placement import placed_anew
from dsjax.nn.quantize import BITS
from dsjax.runs import RunFolder, cache_dir
from dsjax.runtime import memory_bytes
from dsjax.sharding import MeshConfig, Rules, host_array_to_global, make_mesh, rows_of_process, training_rules
from dsjax.train.capacity import CompiledSteps
from dsjax.train.loop import Job, restore_or_init, train
from dsjax.train.optimizer import OptimConfig
from dsjax.train.start import CRITIC, Start
from dsjax.train.step import LossFunction, Trainer, TrainState, make_trainer, next_token_loss


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
        place_every: steps between placements of the busiest experts' replicas, where ``num_replicas`` gives them some.
        seed: of the initial weights and of everything random in a step.
        start_from: a run (also a converted one) whose weights training begins with, instead of random ones.
    """

    steps: PositiveInt = 1000
    max_minutes: NonNegativeFloat = 0.0
    accumulate: PositiveInt = 1
    log_every: PositiveInt = 10
    eval_every: NonNegativeInt = 0
    eval_documents: PositiveInt = 8
    place_every: PositiveInt = 50
    seed: Seed = 0
    start_from: str = ""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """``tensorboard``: also write TensorBoard event files into the run folder."""

    tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """A run that predicts the next token: pre-training, or fine-tuning of all weights or of low-rank pairs."""

    model: DecoderConfig = DecoderConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    lora: LoraConfig = LoraConfig()

    def validate(self) -> None:
        if self.data.vocab_size > self.model.vocab_size:
            raise UserError(
                f"model.vocab_size is {self.model.vocab_size};"
                f" it must be at least data.vocab_size, {self.data.vocab_size}"
            )
        if self.data.batch_size % self.train.accumulate:
            raise UserError(
                f"train.accumulate is {self.train.accumulate}; it must divide data.batch_size, {self.data.batch_size}"
            )
        if self.lora.targets and self.model.values != "none":
            raise UserError(
                f"lora.targets is {','.join(self.lora.targets)}, and model.values {self.model.values}; with pairs alone"
                " no values are learned, so set model.values=none"
            )
        if self.lora.targets and not self.train.start_from:
            raise UserError(
                f"lora.targets is {','.join(self.lora.targets)}, but train.start_from is empty; name there the run"
                " beside whose weights pairs are trained"
            )

    @property
    def loss_fn(self) -> LossFunction:
        """What its step descends."""
        return next_token_loss

    def step_batch(self, mesh: Any) -> Batch:
        """The abstract batch that its step takes."""
        return batch_shapes(self, mesh)

    def begins(self, run_folder: RunFolder) -> tuple[Any, Tokenizer | None]:
        """The config with the model that the run in ``run_folder`` begins with, and the tokenizer, if another run says.

        Raises:
            UserError: there is no such run.
        """
        return self, None


def make_model(config: Pretrain, rngs: nnx.Rngs) -> Decoder:
    """The model of a config, with new weights."""
    return Decoder(config.model, config.compute, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is there before training begins."""

    config: Any
    run: RunFolder
    trainer: Trainer
    corpus: Corpus
    rows: Any
    mesh: Any
    say: Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Regime:
    """What a way of training has of its own, beside what its config says; :func:`run` is the same for all.

    Attributes:
        material: (config, say) -> (config, corpus, rows): what is trained on; the config with what only that can tell;
            and the rows in their order, or none: the mixture of the sources.
        parts: what the loop gets of its own, by the names of :class:`~dsjax.train.loop.Job`; ``evaluate`` at least.
            With ``batches`` of its own it has ``place`` and ``complete``, too.
        first_batch: (config, mesh) -> the abstract batch that the step is compiled for while the data is prepared.
        stepping: (step of one update) -> what the loop calls for each batch.
    """

    material: Callable[[Any, Callable[[str], None]], tuple[Any, Corpus, Any]]
    parts: Callable[[Setting], dict[str, Any]]
    first_batch: Callable[[Any, Any], Batch] = lambda config, mesh: config.step_batch(mesh)
    stepping: Callable[[Any], Any] = lambda step: step


def build(config: Pretrain, devices: list[Any] | None = None) -> tuple[Any, Trainer]:
    """The mesh over ``devices`` (None: all) and the step functions of a config; nothing is computed.

    Raises:
        UserError: the mesh does not fit the devices, the batch or the model.
    """
    mesh = make_mesh(config.mesh, devices)
    rules = training_rules(config.mesh)
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
        lambda rngs: make_model(config, rngs),
        config.optim,
        mesh,
        accumulate=config.train.accumulate,
        loss_fn=config.loss_fn,
        rules=rules,
        lora=config.lora,
    )
    return mesh, trainer


def batch_shapes(config: Pretrain, mesh: Any) -> Batch:
    """An abstract batch of documents."""
    place = jax.sharding.NamedSharding(mesh, Rules().spec("batch", "length"))
    shape = (config.data.batch_size, config.data.seq_len)

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    ints = jnp.int32
    features = None
    if config.model.structure is not None:
        features = jax.ShapeDtypeStruct((*shape, NUM_FIELDS), jnp.int16, sharding=place)
    return Batch(array(ints), array(ints), array(jnp.float32), Documents(array(ints), array(ints)), features)


def check(config: Pretrain) -> tuple[Any, Trainer]:
    """Finds what can be known to be wrong before anything is read or compiled; the result of :func:`build`.

    Raises:
        UserError: the first such thing.
    """
    if jax.default_backend() == "cpu" and least_bytes(config) > memory_bytes():
        model, data = config.model, config.data
        raise UserError(
            f"this machine has {memory_bytes() / 2**30:,.1f} GiB, training needs at least"
            f" {least_bytes(config) / 2**30:,.1f} GiB: the model has {model.num_params():,} parameters"
            f" (model.d_model={model.d_model}, model.num_layers={model.num_layers}, model.vocab_size={model.vocab_size}"
            f" ...), a step {data.batch_size * data.seq_len:,} tokens (data.batch_size={data.batch_size},"
            f" data.seq_len={data.seq_len})"
        )
    if config.log.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("log.tensorboard is true, but tensorboardX is not installed: pip install 'dsjax[tensorboard]'")
    return build(config)


def least_bytes(config: Pretrain) -> int:
    """Memory that no way of training can do without, over all devices.

    In float32 the weights, their gradients and one moment, or frozen weights as they are stored; a batch (five arrays);
    and, of one micro-batch, what each layer adds to the residual stream.
    """
    tokens, width = config.data.batch_size * config.data.seq_len, jnp.dtype(config.compute.dtype).itemsize
    stream = tokens // config.train.accumulate * config.model.d_model * config.model.num_layers * width
    weights = 12 * config.model.num_params()
    if config.lora.targets:
        weights = config.model.num_params() * (BITS[config.lora.base] if config.lora.base else 8 * width) // 8
    return weights + 20 * tokens + stream


def run(config: Pretrain, folder: pathlib.Path, *, quiet: bool = False, regime: Regime | None = None) -> int:
    """Trains, or goes on with, the run in ``folder``, as ``regime`` says (None: next tokens); returns the exit code."""
    regime = regime or Regime(next_token_material, next_token_parts)
    begin = time.perf_counter()
    quiet = quiet or hosts.index() > 0  # one process speaks for all
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))

    # ---------------------------------------------------------------- mesh, model, optimizer
    hosts.same("config", without_paths(config))
    hosts.same("version", {"jax": jax.__version__, "dsjax": dsjax.__version__})
    mesh, trainer = check(config)
    model = config.model
    say(f"model: {model.num_params():,} parameters ({model.num_active_params():,} active) on {mesh.size} device(s)")
    if config.lora.targets:
        say(f"trained: {sum(x.size for x in jax.tree.leaves(trainer.shapes.params)):,} parameters in low-rank pairs")

    # ---------------------------------------------------------------- run folder: only looked at so far
    run_folder = RunFolder(folder)
    run_folder.check()
    if run_folder.has_checkpoint():
        refuse_other_run(run_folder.read_config(), config, folder)

    # ---------------------------------------------------------------- data, while the step compiles
    first_batch = regime.first_batch(config, mesh)
    step = InBackground(lambda: compile_step(trainer, first_batch))
    config, corpus, rows = regime.material(config, say)
    say(described(corpus.report))
    if corpus.tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"model.vocab_size is {model.vocab_size}; the tokenizer has {corpus.tokenizer.vocab_size} entries"
        )
    hosts.same("data.fingerprint", corpus.fingerprint)
    hosts.beat(0)  # from here on, nobody may be slow for long
    capacity = model.dynamic_capacity()
    largest = None if capacity is None else capacity.factors[-1]
    steps = CompiledSteps(functools.partial(compile_step, trainer), first_batch, {largest: step.result()}, say)
    own = regime.parts(Setting(config, run_folder, trainer, corpus, rows, mesh, say))
    if "batches" not in own:
        part, parts = rows_of_process(mesh, config.data.batch_size)
        own["batches"] = make_batches(corpus, config.data, host_index=part, num_hosts=parts, rows=rows)
        own["place"] = lambda batch: place_batch(batch, mesh, part, parts)

    # ---------------------------------------------------------------- restore, train
    first = hosts.index() == 0
    source = None
    if config.train.start_from and (trainer.base is not None or not run_folder.has_checkpoint()):
        source = Start(pathlib.Path(config.train.start_from), corpus.tokenizer, run_folder.base())
        for difference in differences(source.run.read_config().model, model):
            say(f"not the model of {source.run.path}: {difference}")
    if first and not run_folder.has_checkpoint():
        run_folder.write(config, corpus)
        if source is not None:
            source.hand_on(run_folder)
    facts = about(config, mesh, corpus)
    if source is not None and trainer.base is not None:
        facts["base"] = dataclasses.asdict(source.base)
    checkpoints = Checkpoints(run_folder.checkpoints, keep=config.checkpoint.keep, about=facts)
    with contextlib.closing(own["batches"]), contextlib.closing(checkpoints):
        job = Job(
            trainer=trainer,
            step=regime.stepping(steps),
            checkpoints=checkpoints,
            flops_per_token=model.flops_per_token(config.data.seq_len),
            begin=begin,
            data_changes=lambda: run_folder.changed_data(corpus),
            capacity=capacity,
            start=None if source is None else functools.partial(source.with_weights, trainer),
            frozen=dict if source is None else functools.partial(source.frozen, trainer),
            place_experts=expert_placement(config, mesh),
            experts={name: (moe.num_experts, moe.top_k) for name, moe in routed(model).items()},
            **own,
        )
        state, counters = restore_or_init(config, job)
        if first:  # nothing speaks against going on: the folder now describes the run as it is continued
            run_folder.write(config, corpus)
        return train(config, run_folder, job, state, counters, quiet=quiet)


def next_token_material(config: Pretrain, say: Callable[[str], None]) -> tuple[Pretrain, Corpus, Any]:
    """The sources, mixed."""
    return config, prepared(config.data, config.model.structure, cache_dir() / "data", progress=say), None


def next_token_parts(setting: Setting) -> dict[str, Any]:
    """Bits per byte of held-out documents."""
    return {"evaluate": held_out_evaluation(setting.config, setting.trainer, setting.corpus, setting.mesh)}


def described(report: CorpusReport) -> str:
    """A corpus in one line."""
    return (
        f"data: {report.num_training} documents, {report.training_tokens:,} tokens to train on; "
        f"{report.num_held_out} documents held out; {len(report.duplicates)} near-duplicates dropped"
    )


def about(config: Pretrain, mesh: Any, corpus: Corpus) -> dict[str, Any]:
    """What the manifest of each checkpoint says of the run."""
    fixed = fixed_part(config)
    return {
        "config": fixed,
        "config_sha256": hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest(),
        "data_fingerprint": corpus.fingerprint,
        "tokenizer_sha256": hashlib.sha256(corpus.tokenizer.to_json().encode()).hexdigest(),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "num_devices": mesh.size,
    }


def without_paths(config: Pretrain) -> dict[str, Any]:
    """What all processes must agree on: data may lie elsewhere on each host, its fingerprint is compared later."""
    flat = _flat(to_dict(config))
    return {k: v for k, v in flat.items() if k.split(".")[-1] not in ("path", "tokenizer_path")}


# Parts of a config, of this recipe or of others.
OF_RL = ("exercises", "rollout", "rewards", "algorithm", "update", "curriculum", "archive")
FIXED = ("type", "model", "optim", "lora", "course", "risk", "method", "labels", *OF_RL)


def fixed_part(config: Any) -> dict[str, Any]:
    """What a run may not change when it goes on, by dotted key."""
    flat = _flat(to_dict(config))
    return {k: v for k, v in flat.items() if k.split(".")[0] in FIXED or k == "train.seed"}


def refuse_other_run(found: Any, config: Pretrain, folder: pathlib.Path) -> None:
    """A resumed run may change its length, mesh and what is logged, but not what it trains.

    Raises:
        UserError: names the first key that differs.
    """
    old, new = fixed_part(found), fixed_part(config)
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key):
            raise UserError(
                f"run folder {folder} was trained with {key}={old.get(key)}, now it is {new.get(key)}; "
                "give another --run, or the old value"
            )


def differences(there: DecoderConfig, here: DecoderConfig) -> list[str]:
    """What two configs of models with the same weights may still say differently, a sentence for each key."""
    old, new = (_flat(to_dict(model), "model") for model in (there, here))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key} is {new.get(key)} here and {old.get(key)} there" for key in keys]


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    out: dict[str, Any] = {}
    for key, value in items:
        here = f"{prefix}.{key}" if prefix else str(key)
        out |= _flat(value, here) if isinstance(value, (dict, list)) else {here: value}
    return out


def compile_step(trainer: Trainer, batch: Batch, factor: float | None = None) -> Any:
    """The step for a batch, or its shapes, as an executable; ``factor`` is that of a dynamic capacity, None: the
    largest."""
    total, step = jax.ShapeDtypeStruct((), jnp.int32), cast(Any, trainer.step)
    return step.lower(trainer.shapes, batch, total, factor).compile()


def routed(model: DecoderConfig) -> dict[str, MoEConfig]:
    """Layers of experts by the names that are logged: of the groups, of multi-token modules, and of a critic."""
    experts, last = model.experts(), model.groups[-1].ffn
    of_critic = {} if model.critic is None else {f"{CRITIC}{name}": moe for name, moe in experts.items()}
    of_modules = {MULTI_TOKEN: last} if model.multi_token is not None and isinstance(last, MoEConfig) else {}
    return experts | of_modules | of_critic


def expert_placement(config: Pretrain, mesh: Any) -> Callable[[TrainState], TrainState] | None:
    """What places replicas of experts between two steps; None: no layer has any."""
    if not any(moe.num_replicas for moe in config.model.experts().values()):
        return None
    over = math.prod(mesh.shape[axis] for axis in training_rules(config.mesh).expert)
    return lambda state: dataclasses.replace(state, buffers=placed_anew(state.buffers, over))


def place_batch(batch: Batch, mesh: Any, part: int = 0, parts: int = 1) -> Batch:
    """A batch on the devices, from the part of its rows that this process has."""
    spec = Rules().spec("batch", "length")
    return jax.tree.map(lambda x: host_array_to_global(np.asarray(x), mesh, spec, part=part, parts=parts), batch)


def held_out_evaluation(config: Pretrain, trainer: Trainer, corpus: Corpus, mesh: Any) -> Any:
    """A function (variables, stopped) -> metrics over the first few held-out documents."""
    documents = corpus.held_out[: config.train.eval_documents]

    def evaluate(variables: Any, stopped: Callable[[], bool]) -> dict[str, float]:
        bits = document_bits(
            trainer.graph,
            variables,
            documents,
            seq_len=config.data.seq_len,
            end_id=corpus.tokenizer.end_id,
            batch_size=config.data.batch_size,
            mesh=mesh,
            place=lambda batch: place_batch(batch, mesh),
            stopped=stopped,
        )
        return {"held_out_bits_per_byte": bits_per_byte(bits, documents)[0]}

    return evaluate
