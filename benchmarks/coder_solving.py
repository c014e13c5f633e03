"""The coder study, second part: models that learn the syntax first and then to solve tasks, or both at once.

Stage 1 is Python's standard library with repairs of injected errors, stage 2 generated tasks; mixed is both together,
with the same rows in all. What is asked of a model are held-out compositions, by level, and held-out repairs.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.coder_language import config_of, trained
from benchmarks.kept import KeptLines
from benchmarks.paired import difference, ratio, verdict
from benchmarks.plans import table
from dsjax.config import validate
from dsjax.data.corpus import Source
from dsjax.data.prepare import Corpus, prepare
from dsjax.data.structure.stored import prepared
from dsjax.data.tasks.records import TasksConfig, write
from dsjax.data.tasks.records import read as read_tasks
from dsjax.evals.pass_at_k import estimate
from dsjax.evals.repair import repair_figures
from dsjax.evals.written_programs import Asked, WrittenPrograms, figures, problems_of, whole, written_programs
from dsjax.loaded import LoadedModel
from dsjax.rl.sandbox import Sandbox
from dsjax.runs import LoadedModel as RunModel
from dsjax.runs import cache_dir
from dsjax.sharding import MeshConfig, Rules, make_mesh
from dsjax.train.pretrain import Pretrain


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model of configs/coder, how it learns, and with how many seeds."""

    model: str
    mixed: bool = False
    seeds: int = 6


PLAIN, CODER, MIXED, SAME = "plain", "coder", "coder, mixed", "same"
ARMS = {
    PLAIN: Arm("plain"),
    CODER: Arm("stage1"),
    MIXED: Arm("stage1", mixed=True),
    SAME: Arm("same", seeds=3),  # no syntax, but the look-up that the coder has: whose doing a gain is
}
FIRST, SECOND = 80, 340  # steps of each stage
LEVELS, MEDIUM = (1, 2, 3), 3
TASKS = TasksConfig(
    training=20_000, composition=240, family=0, families=("list", "number"), levels=LEVELS, examples_share=0.25
)
VOCABULARY = 1024
PROBLEMS, REPAIRS, LONG_PROBLEMS = 120, 60, 240
LONG_MINUTES = 20.0  # CPU minutes of training for the claim of the medium level
SHARE, MORE = 0.82, 1.37  # what the seed says: of the medium level; times the plain model's solve rate


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all runs have in common: the tasks' folder and a tokenizer of files and tasks."""

    tasks: pathlib.Path
    tokenizer: pathlib.Path


def ground(folder: pathlib.Path, say: Callable[[str], None]) -> Ground:
    """Writes the tasks, if they are not there, and trains the tokenizer."""
    tasks, tokenizer = folder / "coder_tasks", folder / "coder_tokenizer.json"
    if not tasks.exists():
        say(f"writing {TASKS.training:,} tasks")
        write(tasks, TASKS)
    if not tokenizer.exists():
        base = config_of("stage1").data
        sources = (Source(), Source(str(tasks / "training"), marked=True))
        data = dataclasses.replace(base, sources=sources, vocab_size=VOCABULARY, repair=None)
        corpus = prepare(dataclasses.replace(data, near_duplicate_threshold=1.0), cache_dir() / "data", progress=say)
        tokenizer.write_text(corpus.tokenizer.to_json(), encoding="utf-8")
    found = Ground(tasks, tokenizer)
    for arm in ARMS.values():  # what is made once, tokens, features and repairs, belongs to no run
        for stage in ("first", "second", "mixed"):
            _corpus(config_for(arm.model, stage, found))
    return found


def config_for(model: str, stage: str, at: Ground) -> Pretrain:
    """The config of a stage, ``first``, ``second`` or ``mixed``, for a model of configs/coder."""
    base, chosen = config_of("stage1"), config_of(model).model
    tasks = Source(str(at.tasks / "training"), marked=True, weight=SECOND if stage == "mixed" else 1.0)
    files = Source(weight=FIRST if stage == "mixed" else 1.0)
    repair = base.data.repair
    assert repair is not None
    if stage == "mixed":
        repair = dataclasses.replace(repair, share=repair.share * FIRST / (FIRST + SECOND))
    data = dataclasses.replace(
        base.data,
        sources={"first": (files,), "second": (tasks,), "mixed": (files, tasks)}[stage],
        tokenizer_path=str(at.tokenizer),
        special_tokens=(),
        vocab_size=VOCABULARY,
        repair=None if stage == "second" else repair,
        near_duplicate_threshold=1.0,  # tasks are alike, and differ in a word
    )
    config = dataclasses.replace(base, model=dataclasses.replace(chosen, vocab_size=VOCABULARY), data=data)
    validate(config)
    return config


# ---------------------------------------------------------------- runs


def cpu_seconds() -> float:
    """Of this process and those that it has waited for (the sandbox's)."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def solving_run(arm: str, seed: int, at: Ground) -> dict[str, Any]:
    """Trains one model, and asks it."""
    begin, model = cpu_seconds(), ARMS[arm].model
    first = config_for(model, "first", at)
    files = _corpus(first)
    if ARMS[arm].mixed:
        config = config_for(model, "mixed", at)
        run = trained(config, _corpus(config), seed, FIRST + SECOND)
        spent = run.cpu_seconds
    else:
        before = trained(first, files, seed, FIRST)
        config = config_for(model, "second", at)
        run = trained(config, _corpus(config), seed, SECOND, variables=before.state)
        spent = before.cpu_seconds + run.cpu_seconds
    found = {"training_seconds": spent, "last_loss": statistics.mean(run.losses[-SECOND // 10 :])}
    found |= asked(config, run.trainer.graph, run.state.variables, files, at, PROBLEMS)
    known = RunModel(run.trainer.graph, run.state.variables, files.tokenizer, first, FIRST + SECOND)
    mended = repair_figures(known, files.held_out, limit=REPAIRS)
    return found | {
        "repairs": {name: mended[name] for name in ("samples", "exact", "parses")},
        "num_params": config.model.num_params(),
        "tokens": (FIRST + SECOND) * config.data.batch_size * config.data.seq_len,
        "cpu_seconds": cpu_seconds() - begin,
    }


def long_run(model: str, seed: int, at: Ground, minutes: float) -> dict[str, Any]:
    """A model that learns tasks alone for so many CPU minutes."""
    begin, config = cpu_seconds(), config_for(model, "second", at)
    corpus = _corpus(config)
    pace = trained(config, corpus, seed, 30).cpu_seconds / 30
    steps = round(60 * minutes / pace)
    run = trained(config, corpus, seed, steps)
    found = {"training_seconds": run.cpu_seconds, "taken": steps, "num_params": config.model.num_params()}
    found |= asked(config, run.trainer.graph, run.state.variables, corpus, at, LONG_PROBLEMS)
    return found | {"cpu_seconds": cpu_seconds() - begin}


def asked(config: Pretrain, graph: Any, variables: Any, corpus: Corpus, at: Ground, problems: int) -> dict[str, Any]:
    """Held-out compositions: of each level how many are solved, and how many there are; how many programs parse."""
    cfg = WrittenPrograms("tasks", problems=str(at.tasks / "composition.jsonl"), limit=problems, max_tokens=160)
    levels = [task.level for task in read_tasks(at.tasks / "composition.jsonl")[:problems]]
    model = LoadedModel(
        graph,
        variables,
        config.model,
        config.compute,
        corpus.tokenizer,
        (corpus.tokenizer.end_id,),
        config.data.seq_len,
        {},
        make_mesh(MeshConfig(), jax.devices()[:1]),
        Rules(),
        cuts_prompts=True,
    )
    wanted = [a.problem for a in problems_of(cfg)]
    codes = [written[0] for written in written_programs(model, wanted, cfg)]
    with Sandbox(workers=1) as sandbox:
        verdicts = list(sandbox.stream([whole(p, code) for p, code in zip(wanted, codes, strict=True)]))
    if any(v.passed is None for v in verdicts):
        raise RuntimeError(f"no verdict: {next(v.reason for v in verdicts if v.passed is None)}")
    by_level = {
        str(n): [sum(bool(v.passed) for v, level in zip(verdicts, levels, strict=True) if level == n), levels.count(n)]
        for n in LEVELS
    }
    report = figures(cfg, [Asked(p) for p in wanted], [[code] for code in codes], [[v] for v in verdicts])
    return {"solved": by_level, "parses": report["syntax"]}


def _corpus(config: Pretrain) -> Corpus:
    return prepared(config.data, config.model.structure, cache_dir() / "data")


def study(kept: KeptLines, folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """All arms and seeds, then the coder that learns tasks for ``LONG_MINUTES``; what is kept is not run again.

    Args:
        kept: lines of finished runs.
        folder: for tasks and tokenizer.
        say: is told of each run.
    """
    at = ground(folder, say)
    for seed in range(max(arm.seeds for arm in ARMS.values())):
        for name in (name for name, arm in ARMS.items() if seed < arm.seeds):
            key = {"part": "solving", "arm": name, "seed": seed, "steps": [FIRST, SECOND]}
            line = kept.get(functools.partial(solving_run, name, seed, at), **key)
            say(
                f"solving, {name}, seed {seed}: {solved(line):.1%} solved, {line['repairs']['exact']:.1%} mended to the"
                f" letter; {line['cpu_seconds']:.0f} CPU s"
            )
    key = {"part": "long", "arm": CODER, "seed": 0, "minutes": LONG_MINUTES}
    line = kept.get(functools.partial(long_run, ARMS[CODER].model, 0, at, LONG_MINUTES), **key)
    say(f"long, {CODER}: {solved(line):.1%} solved; {line['cpu_seconds']:.0f} CPU s")


# ---------------------------------------------------------------- comparison


def solved(line: dict[str, Any], level: int = 0) -> float:
    """The share of a run's problems that were solved, of one level or of all."""
    counts = [line["solved"][str(n)] for n in ((level,) if level else LEVELS)]
    return sum(right for right, _ in counts) / sum(total for _, total in counts)


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each arm, and the verdicts."""
    by = {(line["arm"], line["seed"]): line for line in lines if line["part"] == "solving"}
    rows = []
    for arm in dict.fromkeys(name for name, _ in by):
        own = [line for (name, _), line in by.items() if name == arm]
        means = [statistics.mean(values) for values in (
            *([solved(line, n) for line in own] for n in (0, *LEVELS)),
            [line["parses"] for line in own],
            [line["repairs"]["exact"] for line in own],
            [line["repairs"]["parses"] for line in own],
        )]  # fmt: skip
        seconds = statistics.mean(line["training_seconds"] for line in own)
        rows.append((arm, str(len(own)), f"{seconds:.0f}", *(f"{x:.1%}" for x in means)))
    head = ("", "seeds", "CPU s of training", "solved", *(f"level {n}" for n in LEVELS), "parse")
    parts = [table((*head, "mended to the letter", "mended: parse"), rows)]
    parts += [f"- {line}" for line in (*verdicts(by), *long_verdicts(lines))]
    return "\n".join([parts[0], "", *parts[1:]])


def verdicts(by: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """A line for each question about pairs."""
    said = []
    for other in (PLAIN, SAME):
        seeds = sorted(seed for arm, seed in by if arm == other and (CODER, seed) in by)
        if len(seeds) < 2:
            continue
        middle, low, high = ratio(*([solved(by[arm, seed]) for seed in seeds] for arm in (CODER, other)))
        claim = f"{MORE - 1:+.0%} solved: {verdict(low, high, MORE, at_least=True)}" if other == PLAIN else "solved"
        said.append(f"{claim}: {middle:.2f} times {other}'s ({low:.2f} to {high:.2f}; {len(seeds)} seeds)")
    pairs = {"coder against plain": (CODER, PLAIN), "two stages against mixed": (CODER, MIXED)}
    for name, (ours, theirs) in pairs.items():
        seeds = sorted(seed for arm, seed in by if arm == ours and (theirs, seed) in by)
        if len(seeds) < 2:
            continue
        for what, of in _MEASURES.items():
            found = difference([of(by[ours, seed]) - of(by[theirs, seed]) for seed in seeds])
            said.append(f"{name}, {what}: {found.said()}")
    return said


_MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "solved": solved,
    "programs that parse": lambda line: line["parses"],
    "mended to the letter": lambda line: line["repairs"]["exact"],
    "mended so that it parses": lambda line: line["repairs"]["parses"],
}


def long_verdicts(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The claim of the medium level, for each model that learned so long."""
    said = []
    for line in lines:
        if line["part"] != "long":
            continue
        right, total = line["solved"][str(MEDIUM)]
        found = estimate([(1, int(i < right)) for i in range(total)], 1)
        holds = verdict(found.low, found.high, SHARE, at_least=True)
        levels = ", ".join(f"level {n} {solved(line, n):.1%}" for n in LEVELS)
        said.append(
            f"{SHARE:.0%} of level {MEDIUM} in {line['minutes']:g} CPU minutes, {line['arm']}: {holds}:"
            f" {found.value:.1%} ({found.low:.1%} to {found.high:.1%}); {levels}"
        )
    return said
