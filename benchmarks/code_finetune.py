"""What each ingredient of fine-tuning for code is worth: ``python -m benchmarks.code_finetune BASE``.

On from one base, with all of them and without each, and with none, several seeds each; the same documents, steps and
rows a step. The best epoch, chosen on some held-out compositions, is judged on others. A finished run is a line of
``results.jsonl`` and is not made again; a run that was killed goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from benchmarks.paired import t_interval
from benchmarks.plans import table
from benchmarks.timing import ROOT
from dsjax.config import apply_overrides, load_config, validate
from dsjax.data.corpus import Source
from dsjax.data.tasks import Task, stream
from dsjax.data.tasks.records import record
from dsjax.evals.written_programs import WrittenPrograms, figures, problems_of, whole
from dsjax.loaded import load
from dsjax.metrics import write_atomic
from dsjax.rl.rollout import Sampler
from dsjax.rl.sandbox import Sandbox
from dsjax.runtime import configure
from dsjax.train.candidates import ROWS, greedy_programs
from dsjax.train.code_finetune import CodeFinetune, run
from dsjax.train.curriculum import Stage

EVERYTHING, BASE = "all", "base"
# Each leaves out what it is named after.
ARMS: dict[str, tuple[str, ...]] = {
    EVERYTHING: (),
    "repairs": ("data.repair=none",),
    "risk": ("risk.weight=0",),
    "course": ("course.order=0",),
    "all three": ("data.repair=none", "risk.weight=0", "course.order=0"),
}
SIMPLE, HARD = (1, 2), (3, 4, 5)  # levels
MEASURES = ("combined_score", "syntax", "functional", "pass_at_1", "bleu")


@dataclasses.dataclass(frozen=True)
class Material:
    """How many tasks there are: to train on, of each half of the levels; to choose the epoch by; to judge it by."""

    training: int
    select: int
    test: int


def write_material(folder: pathlib.Path, cfg: Material) -> None:
    """Files of tasks, the same for all runs; what is judged by means nothing that anything else does."""
    held_out = list(itertools.islice(stream("composition", distinct=True), cfg.select + cfg.test))
    files: dict[str, Iterable[Task]] = {
        "simple/tasks.jsonl": itertools.islice(stream("training", levels=SIMPLE), cfg.training),
        "hard/tasks.jsonl": itertools.islice(stream("training", levels=HARD), cfg.training),
        "select.jsonl": held_out[:: -(-len(held_out) // cfg.select)],
    }
    chosen = {task.name for task in files["select.jsonl"]}
    files["test.jsonl"] = [task for task in held_out if task.name not in chosen]
    for name, tasks in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            write_atomic(folder / name, "".join(f"{json.dumps(record(task))}\n" for task in tasks))


def config_of(arm: str, seed: int, base: pathlib.Path, material: pathlib.Path, overrides: Sequence[str]) -> Any:
    """The recipe's config without one ingredient, on small material."""
    config: CodeFinetune = load_config(ROOT / "configs" / "code_finetune.py")
    sources = tuple(Source(str(material / name), marked=True) for name in ("simple", "hard"))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=sources, seed=seed),
        train=dataclasses.replace(config.train, start_from=str(base), seed=seed),
        course=dataclasses.replace(config.course, stages=(Stage(0), Stage(1), Stage(1, functions=3))),
        select=dataclasses.replace(config.select, problems=str(material / "select.jsonl"), limit=10**6),
    )
    config = apply_overrides(config, [*overrides, *ARMS[arm]])
    validate(config)
    return config


def judge(folder: pathlib.Path, material: pathlib.Path, max_tokens: int, output: pathlib.Path) -> dict[str, float]:
    """The scores of a run on the problems that nothing was chosen by; the whole report goes to ``output``."""
    cfg = WrittenPrograms("tasks", problems=str(material / "test.jsonl"), max_tokens=max_tokens)
    model, asked = load(folder), problems_of(cfg)
    assert model.tokenizer is not None
    sampler = Sampler(model.graph, model.tokenizer, model.mesh, num_rows=ROWS, max_length=model.max_length)
    problems = [a.problem for a in asked]
    options = {"max_tokens": max_tokens, "room": model.max_length}
    codes = list(itertools.chain(*greedy_programs(sampler, model.params, model.tokenizer, problems, **options)))
    with Sandbox(workers=2) as sandbox:
        verdicts = sandbox.check([whole(problem, code) for problem, code in zip(problems, codes, strict=True)])
    report = figures(cfg, asked, [[code] for code in codes], [[verdict] for verdict in verdicts])
    write_atomic(output, json.dumps(report, indent=1) + "\n")
    scores = {name: report[name] for name in MEASURES if name in report}
    return scores | {"pass_at_1": report["pass_at_k"]["1"]["value"]}


def one(arm: str, seed: int, folder: pathlib.Path, config: Any, material: pathlib.Path) -> dict[str, Any]:
    """One run, and what came of it; CPU seconds of this process, of a resumed run those of its last part."""
    begin = time.process_time()
    if code := run(config, folder, quiet=True):
        sys.exit(f"without {arm}, seed {seed}: training ended with {code}; see {folder}")
    trained = time.process_time() - begin
    best = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = max(r["tokens_seen"] for r in records)
    facts = {"arm": arm, "seed": seed, "best_step": best["step"], "steps": records[-1]["step"], "tokens": tokens}
    return (
        facts
        | {"cpu_seconds": trained}
        | judge(folder / "best", material, config.select.max_tokens, folder.with_suffix(".json"))
    )


# ---------------------------------------------------------------- table


def rows_of(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each arm: means over seeds, and what the ingredient is worth: with everything, less without it."""
    by = {(r["arm"], r["seed"]): r for r in results}
    rows = []
    for arm in dict.fromkeys(r["arm"] for r in results):
        own = [r for r in results if r["arm"] == arm]
        row = [arm if arm in (EVERYTHING, BASE) else f"without {arm}", str(len(own))]
        row += [f"{np.mean([r[name] for r in own]):.3f}" for name in MEASURES]
        pairs = [(by[EVERYTHING, r["seed"]], r) for r in own if (EVERYTHING, r["seed"]) in by]
        for name in ("combined_score", "pass_at_1"):
            worth = np.array([ours[name] - theirs[name] for ours, theirs in pairs])
            said = f"{worth.mean():+.3f}" if pairs and arm not in (EVERYTHING, BASE) else ""
            if said and len(pairs) > 1:
                low, high = t_interval(worth)
                said += f" ({low:+.3f} to {high:+.3f})"
            row.append(said)
        row.append(f"{np.mean([r['cpu_seconds'] for r in own]):.0f}")
        rows.append(row)
    return rows


def printed(results: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["", "seeds", *(name.replace("_", " ").replace("pass at 1", "pass@1") for name in MEASURES)]
    head += ["worth in combined score (95 %)", "worth in pass@1 (95 %)", "CPU s"]
    return table(head, rows_of(results))


def main(
    base: Annotated[Positional[str], arg(metavar="BASE", help="a run to begin with")],
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]", help="of the recipe")] = (),
    /,
    *,
    out: Annotated[str, arg(metavar="FOLDER", help="of the runs; it goes on from there")] = "",
    seeds: Annotated[int, arg(help="of each arm")] = 6,
    training: Annotated[int, arg(help="tasks to train on, of each half of the levels")] = 2000,
    select: Annotated[int, arg(help="held-out tasks to choose the epoch by")] = 100,
    test: Annotated[int, arg(help="held-out tasks to judge it by")] = 300,
    arms: Annotated[tuple[str, ...], arg(metavar="NAME", help="what is left out")] = tuple(ARMS),
) -> None:
    configure()
    folder = pathlib.Path(out) if out else ROOT / "build" / "code_finetune"
    material, done = folder / "material", folder / "results.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    write_material(material, Material(training, select, test))
    results = [json.loads(line) for line in done.read_text(encoding="utf-8").splitlines()] if done.exists() else []
    start, jobs = pathlib.Path(base), [(BASE, 0), *((arm, seed) for seed in range(seeds) for arm in arms)]
    for arm, seed in jobs:
        if any((r["arm"], r["seed"]) == (arm, seed) for r in results):
            continue
        if arm == BASE:
            longest = config_of(EVERYTHING, 0, start, material, overrides).select.max_tokens
            found: dict[str, Any] = {"arm": arm, "seed": seed, "cpu_seconds": 0.0} | judge(
                start, material, longest, folder / "base.json"
            )
        else:
            config = config_of(arm, seed, start, material, overrides)
            found = one(arm, seed, folder / f"{arm.replace(' ', '_')}-{seed}", config, material)
        results.append(found)
        with done.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), file=sys.stderr, flush=True)
    print(printed(results))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.code_finetune", description=__doc__, config=(FlagCreatePairsOff,))
