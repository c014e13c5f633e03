"""The R1 study: what reinforcement learning from verified rewards adds to solutions, and what a curriculum adds to it.

The command line of ``scripts/study_r1``. docs/r1_study.md says what is compared and how it is judged. Each finished run
is a line of a file, and is not made again.
"""

from __future__ import annotations

import dataclasses
import functools
import json as json_format
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import tyro
from tyro.conf import FlagCreatePairsOff, arg

from benchmarks.kept import KeptLines
from benchmarks.paired import difference
from benchmarks.timing import ROOT
from dsjax.config import load_config
from dsjax.rl.algorithms import AlgorithmConfig
from dsjax.rl.exercises.config import families_of
from dsjax.rl.exercises.exercise import Exercise, distinct
from dsjax.rl.rewards import Rewards
from dsjax.runs import RunFolder
from dsjax.runtime import configure
from dsjax.train import pretrain, r1
from dsjax.train.r1_report import solved_by, spent_on

SEEDS = range(1, 7)  # 0 was the pilots'
ITERATIONS = 200
PROMPTS, SAMPLES = 512, 8  # held-out exercises of a level; texts for each on the levels that are named
NAMED = {"reverse": 4, "sort": 4, "countdown": 2}
LEVELS = {"reverse": range(1, 7), "sort": range(1, 7), "countdown": range(1, 4)}
PHASES = ("foundations", "multi-step", "open exploration")
ARMS = ("control", "grpo", "uniform", "ppo", "hardest", *(f"without {phase}" for phase in PHASES))


def config_of(arm: str, seed: int) -> r1.R1:
    """configs/r1_cpu.py with what makes the arm."""
    config = load_config(ROOT / "configs" / "r1_cpu.py")
    curriculum = config.curriculum
    if arm in ("uniform", "hardest"):
        curriculum = dataclasses.replace(curriculum, mode=arm)
    if arm.startswith("without "):
        phases = tuple(phase for phase in curriculum.phases if phase.name != arm.removeprefix("without "))
        curriculum = dataclasses.replace(curriculum, phases=phases)
    if arm == "ppo":
        model = dataclasses.replace(config.model, values="head")
        config = dataclasses.replace(config, algorithm=AlgorithmConfig("ppo"), model=model)
    train = dataclasses.replace(config.train, steps=ITERATIONS, seed=seed, eval_every=0)
    return dataclasses.replace(
        config,
        curriculum=curriculum,
        train=train,
        data=dataclasses.replace(config.data, seed=seed),
        report=dataclasses.replace(config.report, prompts=PROMPTS, samples=1, control=False),
    )


def warm_start(seed: int, folder: pathlib.Path) -> pathlib.Path:
    """The run that all arms of a seed begin with."""
    config = config_of("grpo", seed)
    config, tokenizer = config.begins(RunFolder(folder))
    regime = r1.solutions(config, families_of(config.exercises), tokenizer)
    ended(pretrain.run(r1.warm_start_run(config), folder / "warm_start", quiet=True, regime=regime))
    return folder / "warm_start"


def trained(arm: str, seed: int, start: pathlib.Path, folder: pathlib.Path) -> RunFolder:
    """The run of an arm; the control learns as many tokens as GRPO's run did."""
    config = config_of(arm, seed)
    train = dataclasses.replace(config.train, start_from=str(start))
    warm = dataclasses.replace(config.warm_start, steps=0)
    if arm == "control":
        config = dataclasses.replace(config, train=train)
        of_rl, tokenizer = RunFolder(folder.parent / "grpo"), config.begins(RunFolder(folder))[1]
        learned = spent_on(of_rl)["tokens_learned"]
        regime = r1.solutions(config, families_of(config.exercises), tokenizer, learned=learned)
        ended(pretrain.run(r1.control_run(config), folder, quiet=True, regime=regime))
    else:
        ended(r1.run(dataclasses.replace(config, train=train, warm_start=warm), folder, quiet=True, reports=False))
    return RunFolder(folder)


def ended(code: int) -> None:
    """Leaves if a run was interrupted: a half-trained model is no figure."""
    if code:
        sys.exit(code)


def evaluated(config: r1.R1, run: RunFolder) -> dict[str, Any]:
    """pass@1 and greedy of every level, and pass@8 of those that are named."""
    families = families_of(config.exercises)
    asked = [e for f, levels in LEVELS.items() for level in levels for e in held_out(families[f], level)]
    named = [e for f, level in NAMED.items() for e in held_out(families[f], level)]
    mesh, trainer = pretrain.build(r1.of_updates(config))
    with Rewards(config.rewards, families) as rewards:
        once = solved_by(config, trainer, mesh, {"run": run}, asked, rewards)["run"]
        more = dataclasses.replace(config, report=dataclasses.replace(config.report, samples=SAMPLES))
        often = solved_by(more, trainer, mesh, {"run": run}, named, rewards, greedy=False)["run"]
    return {
        "pass@1": {f: {str(n): row["pass@1"]["value"] for n, row in rows.items()} for f, rows in once.items()},
        "greedy": {f: {str(n): row["greedy"] for n, row in rows.items()} for f, rows in once.items()},
        "named pass@1": {f: rows[NAMED[f]]["pass@1"]["value"] for f, rows in often.items()},
        "named pass@8": {f: rows[NAMED[f]][f"pass@{SAMPLES}"]["value"] for f, rows in often.items()},
    }


def held_out(family: Any, level: int) -> list[Exercise]:
    return distinct(family, level, "held_out", PROMPTS)


def study(lines: KeptLines, arms: Sequence[str], seeds: Sequence[int], say: Callable[[str], None]) -> None:
    """Makes what is missing: of a seed the start, GRPO, then the other arms."""
    for seed in seeds:
        folder = lines.folder / f"r1_study_{seed}"
        for arm in ("before", *(arm for arm in ("grpo", *ARMS) if arm in arms)):
            if lines.find(arm=arm, seed=seed) is None:
                line = lines.get(functools.partial(one, arm, seed, folder), arm=arm, seed=seed)
                means = {f: round(float(np.mean(list(rows.values()))), 3) for f, rows in line["pass@1"].items()}
                say(f"{arm}, seed {seed}: {means} in {line['cpu_seconds']:.0f} CPU seconds")
        shutil.rmtree(folder, ignore_errors=True)


def one(arm: str, seed: int, folder: pathlib.Path) -> dict[str, Any]:
    """Trains and evaluates; CPU seconds of training and of evaluation apart."""
    config, start = config_of("grpo" if arm == "before" else arm, seed), folder / "warm_start"
    begin = time.process_time()
    if arm == "before" or not start.exists():
        warm_start(seed, folder)
    if arm == "control" and not (folder / "grpo").exists():
        trained("grpo", seed, start, folder / "grpo")
    run = RunFolder(start) if arm == "before" else trained(arm, seed, start, folder / arm.replace(" ", "_"))
    spent = time.process_time() - begin
    figures = evaluated(config, run)
    further = spent_on(run) | {"cpu_seconds": time.process_time() - begin, "cpu_seconds_training": spent}
    return figures | further


# ---------------------------------------------------------------- tables


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: each arm's means, and its paired differences."""
    found = {(line["arm"], line["seed"]): line for line in lines}
    arms = [arm for arm in ("before", "grpo", *ARMS[2:], "control") if any(a == arm for a, _ in found)]
    text = "| arm | seeds | mean of levels | " + " | ".join(f"{f} {n}" for f, n in NAMED.items())
    text += " | pass@8 | greedy, mean | CPU min |\n|" + "---|" * (7 + len(NAMED) - 1) + "\n"
    for arm in arms:
        own = [line for (a, _), line in found.items() if a == arm]
        named = " | ".join(f"{np.mean([line['named pass@1'][f] for line in own]):.1%}" for f in NAMED)
        often = " / ".join(f"{np.mean([line['named pass@8'][f] for line in own]):.0%}" for f in NAMED)
        greedy = np.mean([over_levels(line, "greedy") for line in own])
        minutes = np.mean([line["cpu_seconds_training"] for line in own]) / 60
        text += f"| {arm} | {len(own)} | {np.mean([over_levels(line) for line in own]):.1%} | {named}"
        text += f" | {often} | {greedy:.1%} | {minutes:.1f} |\n"
    text += "\n| difference | mean of levels | " + " | ".join(f"{f} {n}" for f, n in NAMED.items()) + " |\n"
    text += "|" + "---|" * (2 + len(NAMED)) + "\n"
    pairs = [("grpo", "before"), ("ppo", "before"), ("control", "before"), ("grpo", "control")]
    pairs += [("grpo", "uniform"), ("grpo", "hardest"), ("uniform", "hardest"), ("ppo", "grpo")]
    pairs += [("grpo", f"without {phase}") for phase in PHASES]
    for ours, theirs in pairs:
        seeds = sorted(seed for arm, seed in found if arm == ours and (theirs, seed) in found)
        if len(seeds) > 1:
            text += f"| {ours} - {theirs} | {said(found, ours, theirs, seeds, over_levels)} | "
            text += " | ".join(said(found, ours, theirs, seeds, at_named_level(family)) for family in NAMED)
            text += " |\n"
    return text


def over_levels(line: dict[str, Any], figure: str = "pass@1") -> float:
    """The mean over families of the mean over levels."""
    return float(np.mean([np.mean(list(rows.values())) for rows in line[figure].values()]))


def at_named_level(family: str) -> Callable[[Any], float]:
    """(line) -> pass@1 of the level that is named of a family."""
    return lambda line: line["named pass@1"][family]


def said(found: Any, ours: str, theirs: str, seeds: Sequence[int], figure: Callable[[Any], float]) -> str:
    return difference([figure(found[ours, s]) - figure(found[theirs, s]) for s in seeds]).said()


def main(
    *,
    arms: Annotated[tuple[str, ...], arg(metavar="ARM", help="none: all")] = (),
    seeds: Annotated[int, arg(metavar="N", help="seeds 1 to N")] = len(SEEDS),
    kept: Annotated[str, arg(metavar="FILE", help="a line for each run; it goes on from there")] = "",
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
) -> None:
    configure()
    here = pathlib.Path(os.environ.get("DSJAX_CALLED_FROM", "."))
    if unknown := sorted(set(arms) - set(ARMS)):
        print(f"--arms has {', '.join(unknown)}; they are {', '.join(ARMS)}", file=sys.stderr)
        sys.exit(2)
    lines = KeptLines(here / kept if kept else ROOT / "build" / "r1_study.jsonl")
    study(lines, arms or ARMS, range(1, 1 + seeds), lambda text: print(text, file=sys.stderr, flush=True))
    print(tables(lines.lines))
    print(f"{sum(line['cpu_seconds'] for line in lines.lines) / 60:.0f} CPU minutes in all.")
    if json:
        (here / json).write_text(json_format.dumps({"runs": lines.lines}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main, prog="scripts/study_r1", description=__doc__, config=(FlagCreatePairsOff,))
