"""Iterations of R1 on one CPU core, beside a plain loop of Hugging Face transformers and PyTorch that does the same.

Both begin with the same model of Llama's shape, warm-started on solutions and written by ``dsjax convert``; both write
8 texts for each of the same 32 exercises (reverse or sort letters), up to the end token or 48 tokens; both make one
update of those whose group has different rewards: clipped ratios, every token alike (DAPO), AdamW, gradients clipped.
benchmarks/torch_grpo.py says what the other loop is. First both are given the same texts and advantages: loss,
gradients and the weights after one step are compared.

As in :mod:`benchmarks.timing` each contender is a process of its own, warmed up, and takes its turn while the others
wait; all are held to one and the same core, with one thread. Seconds are those of the processor, which on a core with
nothing else to do are those of a clock. An iteration in which something was compiled is not counted and made again.
Texts are drawn by chance, so figures are rates: texts and tokens a second.

    rollout    prompts to texts; tokens are those that were written, an end included
    reward     what texts are worth, as soon as there is text
    update     advantages, arrays, gradient and optimizer; tokens are those that are learned

    python -m benchmarks.r1_speed prepare FOLDER          # the model that all begin with
    python -m benchmarks.r1_speed serve dsjax@FOLDER      # a worker: a case a line, figures back
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.parity import LIMIT
from benchmarks.timing import ROOT
from benchmarks.turns import Worker, ratio
from dsjax.checkpoint import path_name
from dsjax.config import load_config, to_dict
from dsjax.convert.command import Request
from dsjax.convert.command import run as convert
from dsjax.convert.families import hf_config
from dsjax.convert.names import places, variables_of
from dsjax.evals.solved import prompt_tokens
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.rl.arms import Arm
from dsjax.rl.curriculum import Choice
from dsjax.rl.exercises.config import ExercisesConfig, families_of
from dsjax.rl.exercises.exercise import exercise_of
from dsjax.rl.rewards import Rewards
from dsjax.rl.rollout import Rollout
from dsjax.runs import RunFolder
from dsjax.runtime import configure
from dsjax.tensor_files import TensorFiles
from dsjax.train import pretrain, r1
from dsjax.train.capacity import CompiledSteps
from dsjax.train.course import Course, Worth, Written
from dsjax.train.loop import Counters
from dsjax.train.practice import Practice, each_update
from dsjax.train.start import Start

FAMILIES = ("reverse", "sort")
SIZES = {"0.7M": (128, 4, 4, 32, 256), "10M": (384, 6, 6, 64, 1024)}  # width, layers, heads, head width, inner width
WARM_STEPS = {"0.7M": 120, "10M": 60}
HUGGING_FACE = ("hf", "hf_static")  # kinds of benchmarks/torch_grpo.py
MODULE, CONFIG = "benchmarks.r1_speed", "r1.json"
MODULES = {"dsjax": MODULE, "tunix": "benchmarks.tunix_grpo"}
PHASES = ("rollout", "reward", "update")
WARM_UP, MOST_TRIES = 2, 6  # iterations that are not counted; of one, until nothing is compiled in it
NOISE = 0.2  # nats, of old log-probabilities in the check
# What the two may differ by: float32 in another order; of the first step see `differences`.
LIMITS = {"loss": LIMIT, "rewards": 0.0, "gradient norm": 1e-4, "step": 0.01}


# ---------------------------------------------------------------- what is compared


def config_of(size: str) -> r1.R1:
    """configs/r1_cpu.py on letters alone, with a model of :data:`SIZES`; its learning rate does not warm up."""
    width, layers, heads, head_width, inner = SIZES[size]
    attention = AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=head_width)
    config = load_config(ROOT / "configs" / "r1_cpu.py")
    model = dataclasses.replace(
        config.model, d_model=width, num_layers=layers, groups=(LayerGroup(MLPConfig(d_ff=inner), attention),)
    )
    families = tuple(family for family in config.exercises.families if family.name in FAMILIES)
    return dataclasses.replace(
        config,
        model=model,
        exercises=ExercisesConfig(families, answer_mark=config.exercises.answer_mark),
        warm_start=dataclasses.replace(config.warm_start, steps=WARM_STEPS[size]),
        optim=dataclasses.replace(config.optim, warmup_steps=0),
    )


def prepare(config: r1.R1, folder: pathlib.Path) -> None:
    """The model that all begin with, by a process of its own: ``warm_start``, a run, and ``hf``; and ``r1.json``.

    What is there stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(to_dict(config), indent=1), encoding="utf-8")
    subprocess.run([sys.executable, "-m", MODULE, "prepare", str(folder)], cwd=ROOT, check=True)


def warm_started(folder: pathlib.Path) -> None:
    """Trains the model of a folder that has its config, and writes it for the others."""
    config, tokenizer = load_config(folder / CONFIG).begins(RunFolder(folder))
    regime = r1.solutions(config, families_of(config.exercises), tokenizer)
    if code := pretrain.run(r1.warm_start_run(config), folder / "warm_start", quiet=True, regime=regime):
        sys.exit(code)
    if not (folder / "hf").is_dir():
        convert(Request(folder / "warm_start", folder / "hf", quiet=True))


def exercises_of(config: r1.R1, iteration: int) -> list[tuple[str, int, int]]:
    """Family, level and number of an iteration's exercises: each family and level as often as any other."""
    arms = [(family.name, level) for family in config.exercises.families for level in family.levels]
    first = iteration * config.rollout.prompts
    return [(*arms[n % len(arms)], n) for n in range(first, first + config.rollout.prompts)]


def asked(config: r1.R1, iteration: int) -> dict[str, Any]:
    """An iteration as contenders are told of it: exercises, and the tokens and right answers that they stand for."""
    families, tokenizer = families_of(config.exercises), r1.byte_tokenizer()
    chosen = exercises_of(config, iteration)
    exercises = [exercise_of(families[family], level, "training", number) for family, level, number in chosen]
    return {
        "iteration": iteration,
        "exercises": chosen,
        "prompts": [prompt_tokens(tokenizer, exercise) for exercise in exercises],
        "answers": [exercise.answer for exercise in exercises],
    }


# ---------------------------------------------------------------- turns


def compare(folder: pathlib.Path, pythons: Mapping[str, str], *, rounds: int) -> dict[str, Any]:
    """All figures of a model that :func:`prepare` made.

    Args:
        folder: of it.
        pythons: the interpreter of each contender, dsjax among them.
        rounds: counted iterations of each; the order is reversed every other one.

    Returns:
        ``check``, by contender: :func:`differences` from dsjax. By contender its figures (:func:`summary`), and
        ``dsjax_times_it``: medians over rounds of how many times its rate dsjax has, with intervals of 95 %.
    """
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # which processes that it starts inherit
    config = load_config(folder / CONFIG)
    workers, found = {}, {name: list[dict[str, Any]]() for name in pythons}
    figures: dict[str, Any] = {"parameters": config.model.num_params(), "rounds": rounds}
    try:
        for name, python in pythons.items():
            workers[name] = Worker(f"{name}@{folder}", python, MODULES.get(name, "benchmarks.torch_grpo"))
        alike = {name: worker for name, worker in workers.items() if name != "tunix"}
        figures["check"] = check(alike, folder, *texts_of(workers["dsjax"], config))
        for number in range(WARM_UP + rounds):
            for name in list(workers) if number % 2 == 0 else reversed(list(workers)):
                row = iteration_of(workers[name], asked(config, 1 + number))
                found[name] += [row] if number >= WARM_UP else []
    finally:
        for worker in workers.values():
            worker.close()
    for name, rows in found.items():
        figures[name] = summary(rows)
        if name != "dsjax":
            figures[name]["dsjax_times_it"] = {rate: times(found["dsjax"], rows, rate) for rate in RATES}
    return figures


def iteration_of(worker: Worker, case: Mapping[str, Any]) -> dict[str, Any]:
    """An iteration in which nothing was compiled; what compiling took before is in it as ``compilation``."""
    compilation = 0.0
    for _ in range(MOST_TRIES):
        row = worker.ask(json.dumps(case))
        if not row["compiled"]:
            return row | {"compilation": compilation}
        compilation += sum(row["seconds"].values())
    raise RuntimeError(f"{worker.contender} compiled something in each of {MOST_TRIES} iterations")


# Rates of an iteration: (what is counted, in the seconds of which phases).
RATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "iterations/s": ("iterations", PHASES),
    "rollout texts/s": ("texts", ("rollout",)),
    "rollout tokens/s": ("written", ("rollout",)),
    "update tokens/s": ("learned", ("update",)),
    "texts/s": ("texts", PHASES),
    "written tokens/s": ("written", PHASES),
}


def rate_of(row: Mapping[str, Any], rate: str) -> float:
    """One of :data:`RATES` in one iteration."""
    what, phases = RATES[rate]
    return row.get(what, 1) / sum(row["seconds"][phase] for phase in phases)


def times(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], rate: str) -> dict[str, Any]:
    """How many times their rate ours is: the median over rounds, its interval, the least and the most."""
    rates = [[rate_of(row, rate) for row in rows] for rows in (ours, theirs)]
    median, interval = ratio(*rates)
    by_round = [a / b for a, b in zip(*rates, strict=True)]
    return {"median": median, "interval": interval, "least": min(by_round), "most": max(by_round)}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over iterations: seconds and share of each phase, rates, and what the texts were like."""
    total = [sum(row["seconds"].values()) for row in rows]
    found: dict[str, Any] = {
        "seconds": {phase: statistics.median(row["seconds"][phase] for row in rows) for phase in PHASES},
        "shares": {
            phase: statistics.median(row["seconds"][phase] / s for row, s in zip(rows, total, strict=True))
            for phase in PHASES
        },
        "rates": {rate: statistics.median(rate_of(row, rate) for row in rows) for rate in RATES},
    }
    means = ("texts", "written", "learned", "longest", "reward", "compilation")
    return found | {name: statistics.mean(row[name] for row in rows) for name in means}


def table(figures: Mapping[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [f"{'':14}" + "".join(f"{rate:>23}" for rate in RATES) + f"{'rollout, reward, update':>26}"]
    for name in (name for name in ("dsjax", *HUGGING_FACE, "tunix") if name in figures):
        own = figures[name]
        shares = ", ".join(f"{own['shares'][phase]:.1%}" for phase in PHASES)
        lines.append(f"{name:14}" + "".join(f"{x:23,.2f}" for x in own["rates"].values()) + f"{shares:>26}")
        if name != "dsjax":
            times = own["dsjax_times_it"].values()
            said = (f"{x['median']:.2f} ({x['least']:.2f} to {x['most']:.2f})" for x in times)
            lines.append(f"{'dsjax / it':14}" + "".join(f"{text:>23}" for text in said))
    return "\n".join(lines)


# ---------------------------------------------------------------- the same update


def texts_of(worker: Worker, config: r1.R1) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the check asks, and texts for it that dsjax writes.

    Probabilities under the policy that wrote are changed by chance, so that ratios are not 1 and some are clipped.
    """
    case, chance = asked(config, 0), np.random.default_rng(0)
    texts = worker.ask(json.dumps(case | {"write": True}))
    changed = [(np.array(row) + chance.normal(0, NOISE, len(row))).tolist() for row in texts["log_probs"]]
    return case, texts | {"log_probs": changed}


def check(
    workers: Mapping[str, Worker], folder: pathlib.Path, case: Mapping[str, Any], texts: Mapping[str, Any]
) -> dict[str, Any]:
    """Has all learn once from the same texts, and compares what they come to.

    Args:
        workers: by name, dsjax among them; what they begin with is as it was.
        folder: that :func:`prepare` made.
        case: from :func:`asked`.
        texts: ``tokens`` of each without the end, whether it ``ended``, and ``log_probs`` with that of the end.
    """
    told = {
        name: worker.ask(json.dumps({**case, "learn": texts, "to": str(folder / f"{name}.safetensors")}))
        for name, worker in workers.items()
    }
    before = dict(TensorFiles(folder / "hf"))
    return {name: differences(folder, before, told["dsjax"], told[name], name) for name in workers if name != "dsjax"}


def differences(
    folder: pathlib.Path,
    before: Mapping[str, np.ndarray],
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    name: str,
) -> dict[str, Any]:
    """Between two contenders that learned from the same texts.

    Returns:
        ``loss`` and ``rewards``: largest absolute difference. ``gradient norm``: relative. ``step``: the norm of the
        difference of what was added to all weights, over the norm of what dsjax added. Adam's first step is the
        gradient's sign where that is well above rounding, so ``step`` says how many signs differ.
    """
    a, b = (load_file(folder / f"{who}.safetensors") for who in ("dsjax", name))
    off = sum(float(np.square(a[key] - b[key], dtype=np.float64).sum()) for key in before)
    moved = sum(float(np.square(a[key] - before[key], dtype=np.float64).sum()) for key in before)
    found = {
        "loss": abs(ours["loss"] - theirs["loss"]),
        "rewards": float(np.abs(np.subtract(ours["rewards"], theirs["rewards"])).max()),
        "gradient norm": abs(theirs["grad_norm"] / ours["grad_norm"] - 1),
        "step": (off / moved) ** 0.5,
    }
    for what, limit in LIMITS.items():
        if not found[what] <= limit:
            raise RuntimeError(f"{name} makes another update than dsjax: {what} differs by {found[what]:.1e}: {found}")
    return found


# ---------------------------------------------------------------- within a worker


class Given:
    """A sampler that has its texts already."""

    def __init__(self, rollouts: list[list[Rollout]]):
        self._rollouts = rollouts

    def sample(self, *_: Any, **__: Any) -> list[list[Rollout]]:
        return self._rollouts


class Timed:
    """A sampler that keeps what it wrote last, and the seconds that it took."""

    def __init__(self, sampler: Any):
        self._sampler, self.last, self.seconds = sampler, list[list[Rollout]](), 0.0

    def sample(self, *given: Any, **options: Any) -> list[list[Rollout]]:
        begin = time.process_time()
        self.last = self._sampler.sample(*given, **options)
        self.seconds = time.process_time() - begin
        return self.last


class Learner:
    """dsjax as it is in a run of R1, but for the loop around it: the course is told which exercises come next.

    Args:
        folder: that :func:`prepare` made.
    """

    def __init__(self, folder: pathlib.Path):
        config = load_config(folder / CONFIG)
        train = dataclasses.replace(config.train, start_from=str(folder / "warm_start"))
        config, self.tokenizer = dataclasses.replace(config, train=train).begins(RunFolder(folder / "rl"))
        self.config, self.families = config, families_of(config.exercises)
        self.mesh, trainer = r1.check(config)
        corpus = r1.material(self.tokenizer, config, lambda text: None)[1]
        self.course = Course(config, self.families, corpus.fingerprint)
        self.rewards = Rewards(config.rewards, self.families)
        self.sampler = Timed(r1.sampler_of(config, trainer, self.mesh, self.tokenizer))
        self.state = Start(folder / "warm_start", self.tokenizer).with_weights(trainer, trainer.init(np.uint32(0)))
        compiled = functools.partial(pretrain.compile_step, trainer)
        first = r1.first_batch(config, self.mesh)
        steps = CompiledSteps(compiled, first, {None: compiled(first)}, lambda text: None)
        self._step, self._practice = each_update(steps), self._practice_of(self.sampler)
        self._count, self._judging = Compilations(), 0.0

    def _practice_of(self, sampler: Any) -> Practice:
        def judge(written: Written) -> Worth:
            begin = time.process_time()
            worth = r1.judged(self.config, self.rewards, self.course, written)
            self._judging = time.process_time() - begin
            return worth

        scorer: Any = None  # nothing is scored again
        written_by: Any = sampler
        parts = (written_by, judge, scorer, self.tokenizer, self.mesh)
        return Practice(self.config, self.course, *parts, None, lambda state: state.variables)

    def iteration(self, case: Mapping[str, Any], practice: Practice | None = None) -> dict[str, Any]:
        """One of the run's, and its seconds by phase."""
        chosen = [Choice(Arm(family, level), number, 0) for family, level, number in case["exercises"]]
        counters, compiled = Counters(iteration=case["iteration"], total_steps=1), self._count.number
        begin = time.process_time()
        updates = (practice or self._practice)(self.state, chosen, counters)
        self.state, metrics = self._step(self.state, updates, np.int32(1))
        jax.block_until_ready(self.state)
        seconds = {"rollout": self.sampler.seconds, "reward": self._judging}
        seconds["update"] = time.process_time() - begin - sum(seconds.values())
        lengths = [len(text.tokens) + text.ended for own in self.sampler.last for text in own]
        return {
            "seconds": seconds,
            "compiled": self._count.number - compiled,
            "texts": len(lengths),
            "written": sum(lengths),
            "longest": max(lengths, default=0),
            "learned": float(metrics["tokens"]),
            "reward": float(metrics["rl/reward"]),
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
        }

    def write(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Texts for the check: tokens without the end, whether there was one, and log-probabilities with it."""
        rollout = self.config.rollout
        found = self.sampler.sample(
            self.state.variables,
            case["prompts"],
            num_samples=rollout.samples,
            max_tokens=rollout.max_tokens,
            seed=0,
            sampling=SamplingConfig(rollout.temperature, top_p=1.0),
        )
        texts = [text for own in found for text in own]
        return {
            "tokens": [text.tokens for text in texts],
            "ended": [text.ended for text in texts],
            "log_probs": [text.log_probs for text in texts],
        }

    def learn(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Learns from given texts; writes its weights by the names of Hugging Face to ``case["to"]``."""
        given, samples = case["learn"], self.config.rollout.samples
        texts = [
            Rollout(tuple(tokens), tuple(log_probs), self.tokenizer.decode(tokens), ended)
            for tokens, ended, log_probs in zip(given["tokens"], given["ended"], given["log_probs"], strict=True)
        ]
        rollouts = [texts[first : first + samples] for first in range(0, len(texts), samples)]
        exercises = [
            exercise_of(self.families[family], level, "training", number)
            for family, level, number in case["exercises"]
            for _ in range(samples)
        ]
        found = self.iteration(case, self._practice_of(Given(rollouts)))
        self._write_weights(case["to"])
        return found | {"rewards": self.rewards(exercises, texts).total_N.tolist()}

    def _write_weights(self, path: str) -> None:
        flat = {
            f"params/{path_name(p)}": np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(self.state.params)
        }
        model = self.config.model
        hf = hf_config(model, max_length=self.config.data.seq_len, end_ids=(self.tokenizer.end_id,), dtype="float32")
        tensors = places(model, hf, variables_of(model)).items()
        joined = {name: place.join([flat[v][place.index] for v in place.variables]) for name, place in tensors}
        save_file({name: np.ascontiguousarray(x) for name, x in joined.items()}, path)


class Compilations:
    """How often XLA compiled something, or took it from a cache."""

    def __init__(self) -> None:
        self.number = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        self.number += event == "/jax/core/compile/backend_compile_duration"


def serve(folder: pathlib.Path) -> None:
    """Answers each case read from stdin with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    configure()
    learner = Learner(folder)
    for line in sys.stdin:
        case = json.loads(line)
        how = learner.write if "write" in case else learner.learn if "learn" in case else learner.iteration
        print(json.dumps(how(case)), file=answers, flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", contender]:
            serve(pathlib.Path(contender.partition("@")[2]))
        case ["prepare", folder]:
            configure()
            warm_started(pathlib.Path(folder))
        case _:
            sys.exit(__doc__)
