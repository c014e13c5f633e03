"""The coder study, first part: models of the same files that differ in what they are told of the syntax.

An arm is a file of configs/coder, and what is done to its batches. All have the parameters, rows, tokens and seeds of
the plain model; rates are swept for each kind of model with a seed of its own, and no other.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kept import KeptLines
from benchmarks.paired import Difference, difference, ratio, verdict
from benchmarks.plans import table
from benchmarks.timing import ROOT
from dsjax.config import load_config, validate
from dsjax.data.batch import Batch
from dsjax.data.pipeline import make_batches
from dsjax.data.prepare import Corpus
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.stored import prepared, scanner
from dsjax.evals.bits import document_bits
from dsjax.evals.functions import FunctionPrompt, function_prompts, parses
from dsjax.evals.report import BODY_TOKENS, sample_bodies
from dsjax.runs import LoadedModel, cache_dir
from dsjax.train.pretrain import Pretrain, batch_shapes, build, compile_step, place_batch
from dsjax.train.step import Trainer, TrainState

CONFIGS = ROOT / "configs" / "coder"
STEPS, SAMPLES = 200, 200
SWEPT_SEED = 100
RATES = (1.0, 2.0, 4.0, 8.0)  # of the config's


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared.

    config: its file.
    rate_of: the arm whose swept rate it takes; empty: its own.
    alone: features say what the row alone tells, as if a text began with it.
    as_long_as: the arm whose CPU seconds of training it has, instead of its steps.
    seeds: how many; those that no verdict needs have fewer.
    """

    config: str
    rate_of: str = ""
    alone: bool = False
    as_long_as: str = ""
    seeds: int = 6


BASELINE = "plain"
ARMS: dict[str, Arm] = {
    "plain": Arm("plain"),
    "embeddings": Arm("embeddings"),
    "structured": Arm("structured", seeds=3),
    "layout": Arm("layout"),
    "layout_embeddings": Arm("layout_embeddings"),
    "embeddings_alone": Arm("embeddings", rate_of="embeddings", alone=True),
    "name": Arm("name", rate_of="plain", seeds=3),
    "same": Arm("same", rate_of="plain"),
    "embeddings_same": Arm("embeddings_same", rate_of="embeddings"),
    "plain_longer": Arm("plain", rate_of="plain", as_long_as="embeddings"),
}
SWEPT = tuple(name for name, arm in ARMS.items() if not arm.rate_of)


def config_of(name: str) -> Pretrain:
    """The config of a file of configs/coder."""
    config = load_config(CONFIGS / f"{name}.py")
    validate(config)
    return config


def at_rate(config: Pretrain, rate: float) -> Pretrain:
    """The config with both learning rates so many times as high."""
    optim = dataclasses.replace(config.optim, lr=config.optim.lr * rate, muon_lr=config.optim.muon_lr * rate)
    return dataclasses.replace(config, optim=optim)


# ---------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, and what its training took: CPU seconds of this process, those of compiling left out."""

    trainer: Trainer
    state: TrainState
    losses: list[float]
    cpu_seconds: float


def _unchanged(batch: Batch) -> Batch:
    return batch


def trained(
    config: Pretrain,
    corpus: Corpus,
    seed: int,
    steps: int,
    *,
    total: int = 0,
    variables: Any = None,
    change: Callable[[Batch], Batch] = _unchanged,
) -> Trained:
    """A model after so many steps.

    Args:
        config: of model, data and optimizer.
        corpus: what is trained on.
        seed: of weights and rows.
        steps: that are taken.
        total: those that the schedule of the learning rate is for; 0: ``steps``.
        variables: weights to begin with; None: new ones.
        change: of each batch.

    Raises:
        FloatingPointError: a loss or gradient was not finite.
    """
    mesh, trainer = build(config, jax.devices()[:1])
    step = compile_step(trainer, batch_shapes(config, mesh))
    number: Any = np.uint32(seed)
    state = trainer.init(number)
    if variables is not None:
        state = dataclasses.replace(state, params=variables.params, buffers=variables.buffers)
    batches = make_batches(corpus, dataclasses.replace(config.data, seed=seed))
    begin, losses = time.process_time(), []
    for _ in range(steps):
        state, metrics = step(state, place_batch(change(next(batches)), mesh), jnp.int32(total or steps))
        if not float(metrics["finite"]):
            raise FloatingPointError(f"loss or gradients were not finite, seed {seed}")
        losses.append(float(metrics["loss"]))
    batches.close()
    return Trained(trainer, state, losses, time.process_time() - begin)


def seen_alone(batch: Batch, first: Scanner) -> Batch:
    """The batch with the features that its rows tell by themselves: each document's part as if it began there."""
    features_BTC = np.array(batch.features_BTC)
    for row, (tokens_T, ids_T) in enumerate(zip(batch.tokens_BT, batch.documents.ids_BT, strict=True)):
        for document in np.unique(ids_T[ids_T > 0]):
            (places,) = np.nonzero(ids_T == document)
            features_BTC[row, places] = first.copy().scan(np.asarray(tokens_T)[places])
    return dataclasses.replace(batch, features_BTC=features_BTC)


def language_run(name: str, seed: int, rate: float, steps: int, samples: int = SAMPLES) -> dict[str, Any]:
    """One run of an arm: bits per byte of all held-out files, and the share of sampled bodies that parse."""
    begin, arm = time.process_time(), ARMS[name]
    config = at_rate(config_of(arm.config), rate)
    corpus = prepared(config.data, config.model.structure, cache_dir() / "data")
    change = _unchanged
    if arm.alone:
        assert config.model.structure is not None
        change = functools.partial(seen_alone, first=scanner(config.model.structure.language, corpus.tokenizer))
    run = trained(config, corpus, seed, steps, change=change)
    bits = document_bits(
        run.trainer.graph,
        run.state.variables,
        corpus.held_out,
        seq_len=config.data.seq_len,
        end_id=corpus.tokenizer.end_id,
        batch_size=config.data.batch_size,
        place=lambda batch: jax.tree.map(jnp.asarray, change(batch)),
    )
    model = LoadedModel(run.trainer.graph, run.state.variables, corpus.tokenizer, config, steps)
    prompts = function_prompts(corpus.held_out, samples)
    if arm.alone:
        prompts = [_cut(prompt, model) for prompt in prompts]
    bodies = sample_bodies(model, prompts) if samples else []
    good = [parses(prompt, body) for prompt, (body, _) in zip(prompts, bodies, strict=False)]
    return {
        "tokens": steps * config.data.batch_size * config.data.seq_len,
        "num_params": config.model.num_params(),
        "last_loss": statistics.mean(run.losses[-steps // 10 :]),
        "bits_per_byte": float(bits.sum() / sum(document.num_bytes for document in corpus.held_out)),
        "parses": sum(good) / max(len(good), 1),
        "samples": len(good),
        "training_seconds": run.cpu_seconds,
        "cpu_seconds": time.process_time() - begin,
    }


def _cut(prompt: FunctionPrompt, model: LoadedModel) -> FunctionPrompt:
    """The prompt with no more before it than the model reads."""
    length = model.config.data.seq_len
    room = length - min(BODY_TOKENS, length // 2) - 1
    kept = model.tokenizer.encode(prompt.context)[-(room - 1) :]
    return dataclasses.replace(prompt, context=model.tokenizer.decode(kept))


def study(kept: KeptLines, arms: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The sweeps of the arms, then all seeds at the best rate; those that are kept are not run again."""
    for name in arms:
        for rate in RATES if name in SWEPT else ():
            line = _kept(kept, name, SWEPT_SEED, rate, STEPS, samples=0)
            say(f"language, {name}, rate x {rate:g}: {line['bits_per_byte']:.4f} bits per byte")
    lines = []
    for seed in range(max(ARMS[name].seeds for name in arms)):
        for name in (name for name in arms if seed < ARMS[name].seeds):
            rate, steps = best_rate(kept, ARMS[name].rate_of or name), STEPS
            if other := ARMS[name].as_long_as:
                steps = as_long_as(kept, other, ARMS[name].rate_of)
            lines.append(_kept(kept, name, seed, rate, steps, samples=SAMPLES))
            line = lines[-1]
            say(
                f"language, {name}, seed {seed}: {line['bits_per_byte']:.4f} bits per byte, {line['parses']:.1%} parse;"
                f" {line['cpu_seconds']:.0f} CPU s"
            )
    return lines


def _kept(kept: KeptLines, name: str, seed: int, rate: float, steps: int, samples: int) -> dict[str, Any]:
    key = {"part": "language", "arm": name, "seed": seed, "rate": rate, "steps": steps, "asked": samples}
    return kept.get(lambda: language_run(name, seed, rate, steps, samples), **key)


def best_rate(kept: KeptLines, name: str) -> float:
    """The rate of the sweep with the fewest bits."""
    swept = [x for x in kept.lines if (x["part"], x["arm"], x["seed"]) == ("language", name, SWEPT_SEED)]
    return min(swept, key=lambda line: line["bits_per_byte"])["rate"]


def as_long_as(kept: KeptLines, other: str, own: str) -> int:
    """Steps that take the training seconds that ``STEPS`` of the other arm take, by the sweeps of both."""

    def seconds(name: str) -> float:
        return statistics.median(
            x["training_seconds"]
            for x in kept.lines
            if (x["part"], x["arm"], x["seed"]) == ("language", name, SWEPT_SEED)
        )

    return round(STEPS * seconds(other) / seconds(own))


# ---------------------------------------------------------------- comparison


MORE_PARSE, WORSE_BITS = 1.5, 0.005  # what must hold: times plain's share of bodies that parse, more bits than plain
JUDGED = "embeddings"
# Whose doing a difference is: equal time, the same look-up without syntax, embeddings without what comes on top.
PEERS = (
    ("embeddings", "plain_longer"),
    ("embeddings_same", "same"),
    ("layout_embeddings", "embeddings"),
    ("structured", "embeddings"),
)


def compared(lines: Sequence[dict[str, Any]], name: str, base: str = BASELINE) -> dict[str, Difference]:
    """Of an arm against another, by seed: bits per byte as a share, bodies that parse as a difference."""
    ours, theirs = _by_seed(lines, name, base)
    return {
        "bits": difference([a["bits_per_byte"] / b["bits_per_byte"] - 1 for a, b in zip(ours, theirs, strict=True)]),
        "parses": difference([a["parses"] - b["parses"] for a, b in zip(ours, theirs, strict=True)]),
    }


def times_as_many(lines: Sequence[dict[str, Any]], name: str, base: str = BASELINE) -> tuple[float, float, float]:
    """How many times the other's share of bodies that parse, with its interval (see :func:`ratio`)."""
    ours, theirs = ([line["parses"] for line in own] for own in _by_seed(lines, name, base))
    return ratio(ours, theirs)


def _by_seed(lines: Sequence[dict[str, Any]], *names: str) -> list[list[dict[str, Any]]]:
    """Of some arms the lines of the seeds that all of them have."""
    by = {(line["arm"], line["seed"]): line for line in lines}
    seeds = sorted(seed for arm, seed in by if arm == names[0] and all((name, seed) in by for name in names))
    return [[by[name, seed] for seed in seeds] for name in names]


def verdicts(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each question whose arms have run with two seeds at least."""
    said = []
    if len(_by_seed(lines, JUDGED, BASELINE)[0]) > 1:
        times, low, high = times_as_many(lines, JUDGED)
        holds = verdict(low, high, MORE_PARSE, at_least=True)
        said.append(f"{MORE_PARSE} times as many parse, {JUDGED}: {holds}: {times:.2f} ({low:.2f} to {high:.2f})")
        bits = compared(lines, JUDGED)["bits"]
        holds = verdict(bits.low, bits.high, WORSE_BITS, at_least=False)
        said.append(f"bits per byte at most {WORSE_BITS:.1%} more, {JUDGED}: {holds}: {bits.said('+.2%')}")
    for name, base in PEERS:
        if len(_by_seed(lines, name, base)[0]) > 1:
            found, (times, low, high) = compared(lines, name, base), times_as_many(lines, name, base)
            said.append(
                f"{name} against {base}: bits per byte {found['bits'].said('+.2%')}; bodies that parse"
                f" {found['parses'].said()}, {times:.2f} times ({low:.2f} to {high:.2f})"
            )
    return said


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each arm."""
    rows = []
    for name in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == name]
        mean = {key: statistics.mean(x[key] for x in own) for key in ("bits_per_byte", "parses", "training_seconds")}
        row = [
            name,
            f"{own[0]['num_params'] / 1e6:.3f}",
            str(len(own)),
            f"{own[0]['rate']:g}",
            str(own[0]["steps"]),
            f"{mean['training_seconds']:.0f}",
            f"{mean['bits_per_byte']:.4f}",
        ]
        if name == BASELINE or len(own) < 2:
            rows.append((*row, "", f"{mean['parses']:.1%}", "", ""))
            continue
        found, (times, low, high) = compared(lines, name), times_as_many(lines, name)
        rows.append(
            (
                *row,
                found["bits"].said("+.2%"),
                f"{mean['parses']:.1%}",
                found["parses"].said("+.1%"),
                f"{times:.2f} ({low:.2f} to {high:.2f})",
            )
        )
    head = ("", "M parameters", "seeds", "rate", "steps", "CPU s", "bits per byte", "against plain")
    parts = [table((*head, "bodies that parse", "against plain", "times plain's"), rows), ""]
    return "\n".join([*parts, *(f"- {line}" for line in verdicts(lines))])


def plot(lines: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Each run by its bits per byte and the share of its bodies that parse; the mean of each arm with its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(line["arm"] for line in lines)):
        points = [(line["bits_per_byte"], 100 * line["parses"]) for line in lines if line["arm"] == name]
        x, y = (statistics.mean(values) for values in zip(*points, strict=True))
        axes.plot(*zip(*points, strict=True), ".", color=f"C{number}", alpha=0.4)
        axes.plot(x, y, "o", color=f"C{number}", label=f"{name}: {x:.3f}, {y:.0f} %")
    axes.set(xlabel="held-out bits per byte (less is better)", ylabel="sampled bodies that parse, %", ylim=(0, None))
    axes.invert_xaxis()
    axes.legend(fontsize=8, title="mean over seeds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
