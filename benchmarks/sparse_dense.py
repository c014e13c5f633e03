"""Sparse against dense: a mixture of experts with five times the parameters that it uses for a token, against the dense
model of as many in all and the dense model of as many in use.

The command line of ``scripts/study_sparse``. A variant is a file of configs/sparse_dense. Data, tokenizer, tokens,
seeds and all of the model but its feed-forward layers are the same. Costs are FLOPs counted in the traced programs,
seconds on this CPU in alternation, and joules by the energy model of ``dsjax plan`` for one TPU chip. Each finished run
is a line of a file, as are the costs, and is not made again.
"""

from __future__ import annotations

import dataclasses
import functools
import json as json_format
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tyro.conf import FlagCreatePairsOff, arg

from benchmarks.kept import KeptLines
from benchmarks.line_completion import figures
from benchmarks.paired import t_interval, verdict
from benchmarks.plans import table
from benchmarks.timing import ROOT
from benchmarks.turns import by_turns
from dsjax.config import load_config, validate
from dsjax.data.pipeline import make_batches
from dsjax.data.prepare import prepare
from dsjax.infer.engine import Generator, make_generator
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import DecoderConfig
from dsjax.nn.moe import MoEConfig
from dsjax.plan.chips import energy_joules, parse_topology
from dsjax.plan.flops import count_flops
from dsjax.plan.measure import Job
from dsjax.plan.process import ask
from dsjax.plan.programs import Mode, make_program
from dsjax.runs import cache_dir
from dsjax.runtime import configure
from dsjax.train.pretrain import Pretrain, batch_shapes, build, compile_step, make_model, place_batch

CONFIGS = ROOT / "configs" / "sparse_dense"
SPARSE, TOTAL, ACTIVE = VARIANTS = ("mixture", "dense_total", "dense_active")
CHIP = "v5e:1x1"
DECODED = 32  # tokens of a row in one timed call
WORKS: dict[str, tuple[Mode, int]] = {
    "training, 8 rows": ("train", 8),
    "training, 32 rows": ("train", 32),
    "prefill, 16 rows": ("prefill", 16),
    "decoding, 1 row": ("decode", 1),
    "decoding, 16 rows": ("decode", 16),
}
ENERGIES = {"compiled_joules": "as compiled", "least_joules": "of the least traffic"}
SCORES = {"next_token": "next token", "exact_line": "rest of a line"}
# What the seed says of the mixture against the dense model of as many parameters in all.
FASTER, LESS_ENERGY, LESS_ACCURATE = 4.2, 0.68, 0.021
Say = Callable[[str], None]


def config_of(variant: str) -> Any:
    """The config of a variant."""
    config = load_config(CONFIGS / f"{variant}.py")
    validate(config)
    return config


def own_params(model: DecoderConfig) -> tuple[int, int]:
    """Parameters in all, and those that a token uses, without embedding and output matrix."""
    outside = (1 if model.tied else 2) * model.vocab_size * model.d_model
    return model.num_params() - outside, model.num_active_params() - outside


# ---------------------------------------------------------------- quality


def study_one(variant: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains one model and lets it complete the held-out files."""
    begin = time.perf_counter()
    config = config_of(variant)
    mesh, trainer = build(config, jax.devices()[:1])
    corpus = prepare(config.data, cache_dir() / "data")
    batches = make_batches(corpus, dataclasses.replace(config.data, seed=seed))
    number: Any = np.uint32(seed)
    state, records = trainer.init(number), []
    for _ in range(steps):
        state, metrics = trainer.step(state, place_batch(next(batches), mesh), jnp.int32(steps))
        records.append({name: float(metrics[name]) for name in ("loss", "finite")})
    batches.close()
    if not all(record["finite"] for record in records):
        sys.exit(f"{variant}, seed {seed}: loss or gradients were not finite")
    scores = figures(trainer.graph, state.variables, corpus.held_out, corpus.tokenizer, seq_len=config.data.seq_len)
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "tokens": steps * config.data.batch_size * config.data.seq_len,
        "last_loss": statistics.mean(record["loss"] for record in records[-steps // 10 :]),
        "max_over_mean_load": float(metrics.get("router/group_0/max_over_mean_load", 1.0)),
        "seconds": time.perf_counter() - begin,
    } | scores


# ---------------------------------------------------------------- costs


def costs(rounds: int, say: Say) -> dict[str, Any]:
    """For each work and variant, of one token: FLOPs, the seconds of each round, joules."""
    found: dict[str, Any] = {}
    for work, (mode, rows) in WORKS.items():
        say(f"costs of {work}")
        turns = {variant: _TURNS[mode](config_of(variant), rows) for variant in VARIANTS}
        seconds = by_turns({name: functools.partial(next, turn) for name, turn in turns.items()}, rounds)
        del turns
        found[work] = {}
        for variant in VARIANTS:
            program = make_program(config_of(variant), mode, jax.devices()[:1], batch_size=rows)
            counted = count_flops(program.traced.jaxpr, platform="cpu", ragged_share=program.ragged_share)
            found[work][variant] = {
                "flops": counted.executed / program.tokens,
                "seconds": seconds[variant],
                "compiled_joules": compiled_joules(variant, mode, rows),
            }
            if mode == "decode":
                least = least_bytes(config_of(variant), rows) / rows
                modelled = energy_joules(parse_topology(CHIP).chip, counted.executed / program.tokens, least, 0)
                assert modelled is not None
                found[work][variant]["least_joules"] = modelled["total"]
    return found


def compiled_joules(variant: str, mode: Mode, rows: int) -> float:
    """Of one token on ``CHIP``, in bfloat16: dynamic energy of FLOPs and HBM bytes of the program compiled for it."""
    config: Pretrain = config_of(variant)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="bfloat16"))
    return ask(Job(config, CHIP, mode, rows))["energy_joules_per_token"]["total"]


def least_bytes(config: Pretrain, rows: int) -> float:
    """HBM bytes that decoding a token of each of ``rows`` full rows can not do without, in bfloat16.

    Those of the cache, of all weights once but of the experts that no row visits (at balanced routing), and of the
    output matrix. A compiler that finds room on the chip for a model as small as these moves more: all experts.
    """
    model = config.model
    weights: float = own_params(model)[0] + model.vocab_size * model.d_model
    for group, num_layers in model.sized_groups():
        if isinstance(moe := group.ffn, MoEConfig):
            idle = moe.num_experts * (1 - moe.top_k / moe.num_experts) ** rows
            weights -= num_layers * idle * 3 * model.d_model * moe.d_ff
    return 2 * weights + rows * model.kv_bytes(config.data.seq_len)


def _training(config: Pretrain, rows: int) -> Iterator[float]:
    """Seconds of a token in each of any number of training steps."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows))
    mesh, trainer = build(config, jax.devices()[:1])
    step, state = compile_step(trainer, batch_shapes(config, mesh)), trainer.init(0)
    batches = make_batches(prepare(config.data, cache_dir() / "data"), config.data)
    while True:
        batch = place_batch(next(batches), mesh)
        begin = time.perf_counter()
        state, metrics = step(state, batch, jnp.int32(config.train.steps))
        float(metrics["loss"])
        yield (time.perf_counter() - begin) / (config.data.batch_size * config.data.seq_len)


def _generator(config: Pretrain, rows: int, length: int) -> tuple[Generator, Any, list[Any]]:
    """What generates with new weights, those, and prompts of random tokens."""
    mesh, trainer = build(config, jax.devices()[:1])
    made = make_generator(lambda rngs: make_model(config, rngs), mesh, batch_size=rows, slots=config.data.seq_len)
    tokens_BT = np.random.default_rng(0).integers(1, config.data.vocab_size, (rows, length), dtype=np.int32)
    prompts = [made.place_rows(x) for x in (tokens_BT, np.ones_like(tokens_BT))]
    return made, made.place(trainer.init(0).variables), prompts


def _prefill(config: Pretrain, rows: int) -> Iterator[float]:
    """Seconds of a token of full rows that are read at once."""
    made, params, prompts = _generator(config, rows, config.data.seq_len)
    while True:
        begin = time.perf_counter()
        jax.block_until_ready(made.prefill(params, *prompts))
        yield (time.perf_counter() - begin) / (rows * config.data.seq_len)


def _decoding(config: Pretrain, rows: int) -> Iterator[float]:
    """Seconds of a token where rows of half the model's length are continued, all at a time."""
    made, params, prompts = _generator(config, rows, config.data.seq_len // 2)
    greedy: dict[str, Any] = {"sampling": SamplingConfig(temperature=0.0), "steps": DECODED}
    while True:
        logits_BV, cache = jax.block_until_ready(made.prefill(params, *prompts))
        begin = time.perf_counter()
        jax.block_until_ready(made.decode(params, logits_BV, cache, jax.random.key(0), **greedy))
        yield (time.perf_counter() - begin) / (rows * DECODED)


_TURNS: dict[Mode, Callable[..., Iterator[float]]] = {"train": _training, "prefill": _prefill, "decode": _decoding}


# ---------------------------------------------------------------- comparison


def ratio(found: dict[str, Any], variant: str, name: str) -> tuple[float, tuple[float, float]]:
    """What a variant takes, as a multiple of what the mixture takes; for seconds the median of rounds, with the 95 %
    interval of that median (of order statistics by the binomial distribution); else an exact number."""
    theirs, ours = found[variant][name], found[SPARSE][name]
    if name != "seconds":
        return theirs / ours, (theirs / ours, theirs / ours)
    from scipy.stats import binom

    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    cut = max(int(binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
    return statistics.median(ratios), (ratios[cut], ratios[len(ratios) - 1 - cut])


def less_accurate(runs: Sequence[dict[str, Any]], variant: str, score: str) -> tuple[float, tuple[float, float]] | None:
    """By what share of the variant's score the mixture has less, mean over seeds, with its 95 % interval.

    None: of one seed, or of scores of 0.
    """
    by = {(run["variant"], run["seed"]): run[score] for run in runs}
    seeds = sorted(seed for v, seed in by if v == variant and (SPARSE, seed) in by)
    if len(seeds) < 2 or not all(by[variant, seed] for seed in seeds):
        return None
    less = np.array([1 - by[SPARSE, seed] / by[variant, seed] for seed in seeds])
    return float(less.mean()), t_interval(less)


def verdicts(runs: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[str]:
    """A line for each claim and what it was measured on."""
    lines = []
    for work in WORKS:
        middle, (low, high) = ratio(found[work], TOTAL, "seconds")
        said = verdict(low, high, FASTER, at_least=True)
        lines.append(f"{FASTER} times faster, {work}: {said}: {middle:.2f} times ({low:.2f} to {high:.2f})")
    for work in WORKS:
        for name in (name for name in ENERGIES if name in found[work][SPARSE]):
            less = 1 - 1 / ratio(found[work], TOTAL, name)[0]
            said = verdict(less, less, LESS_ENERGY, at_least=True)
            lines.append(f"{LESS_ENERGY:.0%} less energy, {work}, {ENERGIES[name]}: {said}: {less:.1%} less")
    for score, text in SCORES.items():
        if (difference := less_accurate(runs, TOTAL, score)) is None:
            lines.append(f"at most {LESS_ACCURATE:.1%} less accurate, {text}: not decided: too few runs, or none right")
            continue
        middle, (low, high) = difference
        said = verdict(low, high, LESS_ACCURATE, at_least=False)
        lines.append(
            f"at most {LESS_ACCURATE:.1%} less accurate, {text}: {said}: {middle:+.1%} less ({low:+.1%} to {high:+.1%})"
        )
    return lines


def tables(runs: Sequence[dict[str, Any]], found: dict[str, Any]) -> str:
    """Markdown: what they learned, what that costs, and the verdicts."""
    quality = []
    for variant in VARIANTS:
        own = [run for run in runs if run["variant"] == variant]
        params = (f"{n / 1e6:.2f} M" for n in own_params(config_of(variant).model))
        means = {name: statistics.mean(run[name] for run in own) for name in ("bits_per_byte", *SCORES)}
        against = (_less(less_accurate(runs, variant, score)) for score in SCORES)
        shares = (f"{means[score]:.2%}" for score in SCORES)
        quality.append((variant, *params, str(len(own)), f"{means['bits_per_byte']:.4f}", *shares, *against))
    head = ("", "parameters", "of a token", "seeds", "bits per byte", *SCORES.values())
    parts = [table((*head, *(f"mixture less right, {text}" for text in SCORES.values())), quality)]
    parts.append(
        f"{runs[0]['tokens']:,} tokens to train on; {runs[0]['num_tokens']:,} held-out tokens, {runs[0]['num_lines']:,}"
        " lines. Parameters without embedding and output matrix."
    )
    head = (
        "of one token",
        "",
        "FLOPs (of the mixture's)",
        "seconds",
        *(f"energy, {text}" for text in ENERGIES.values()),
    )
    parts.append(table(head, [_cost(work, variant, found[work]) for work in WORKS for variant in VARIANTS]))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in verdicts(runs, found))])


def _cost(work: str, variant: str, found: dict[str, Any]) -> Sequence[str]:
    """A line of the table: what a token takes, and what that is as a multiple of the mixture's."""
    cost, (times, (low, high)) = found[variant], ratio(found, variant, "seconds")
    seconds = f"{1e6 * statistics.median(cost['seconds']):,.0f} µs ({times:.2f}; {low:.2f} to {high:.2f})"
    joules = (
        f"{1e6 * cost[name]:,.1f} µJ ({ratio(found, variant, name)[0]:.2f})" if name in cost else ""
        for name in ENERGIES
    )
    return (work, variant, f"{cost['flops'] / 1e6:.1f} M ({ratio(found, variant, 'flops')[0]:.2f})", seconds, *joules)


def _less(difference: tuple[float, tuple[float, float]] | None) -> str:
    if difference is None:
        return ""
    middle, (low, high) = difference
    return f"{middle:+.1%} ({low:+.1%} to {high:+.1%})"


def plot(runs: Sequence[dict[str, Any]], found: dict[str, Any], path: pathlib.Path) -> None:
    """Accuracy of each run against the FLOPs of a trained token, and what the dense model of equal total takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, variant in enumerate(VARIANTS):
        flops = found["training, 8 rows"][variant]["flops"] / 1e6
        for marker, score in zip("o^", SCORES, strict=True):
            own = [run[score] for run in runs if run["variant"] == variant]
            label = f"{variant}, {SCORES[score]}"
            left.plot([flops] * len(own), own, marker, color=f"C{color}", alpha=0.6, label=label)
    left.set(xlabel="million FLOPs of a trained token", ylabel="share right, held-out files", xlim=(0, None))
    left.legend(fontsize=7)
    names = {"flops": "FLOPs", "seconds": "seconds"} | {name: f"energy {text}" for name, text in ENERGIES.items()}
    for place, (name, label) in enumerate(names.items()):
        works = [i for i, work in enumerate(WORKS) if name in found[work][SPARSE]]
        heights = [ratio(found[list(WORKS)[i]], TOTAL, name)[0] for i in works]
        right.bar(np.array(works) + 0.2 * (place - 1.5), heights, 0.19, label=label)
    right.axhline(FASTER, color="k", linestyle=":", linewidth=1)
    right.set_xticks(range(len(WORKS)), [work.replace(", ", ",\n") for work in WORKS], fontsize=8)
    right.set(ylabel=f"{TOTAL} / {SPARSE}; dots: {FASTER}")
    right.legend(fontsize=7, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- command line


def study(seeds: int, steps: int, rounds: int, kept: pathlib.Path, say: Say) -> tuple[list[dict[str, Any]], Any]:
    """All runs and the costs; what ``kept`` has a line of is not done again."""
    lines = KeptLines(kept)
    found = lines.get(lambda: {"costs": costs(rounds, say)}, rounds=rounds)["costs"]
    runs = []
    for seed in range(seeds):
        for variant in VARIANTS:
            key: dict[str, Any] = {"variant": variant, "seed": seed, "steps": steps}
            runs.append(lines.get(functools.partial(study_one, **key), **key))
            run = runs[-1]
            shares = ", ".join(f"{text} {run[score]:.2%}" for score, text in SCORES.items())
            say(f"{variant}, seed {seed}: {run['bits_per_byte']:.4f} bits per byte, {shares}; {run['seconds']:.0f} s")
    return runs, found


def main(
    *,
    seeds: Annotated[int, arg(help="models of each variant")] = 3,
    rounds: Annotated[int, arg(help="turns of each variant in each timing")] = 15,
    steps: Annotated[int, arg(help="of training; 0: as the configs say")] = 0,
    kept: Annotated[str, arg(metavar="FILE", help="a line for each trained model; it goes on from there")] = "",
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    picture: Annotated[str, arg(metavar="PNG", help="draw them there")] = "",
) -> None:
    configure()
    here = pathlib.Path(os.environ.get("DSJAX_CALLED_FROM", "."))
    lines = here / kept if kept else ROOT / "build" / "sparse_dense.jsonl"
    steps = steps or config_of(SPARSE).train.steps
    runs, found = study(seeds, steps, rounds, lines, lambda text: print(text, file=sys.stderr, flush=True))
    print(tables(runs, found))
    if picture:
        plot(runs, found, here / picture)
    if json:
        (here / json).write_text(json_format.dumps({"runs": runs, "costs": found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main, prog="scripts/study_sparse", description=__doc__, config=(FlagCreatePairsOff,))
