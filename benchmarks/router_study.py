"""The router study: variants of one small mixture of experts, several seeds each, compared on held-out code.

The command line of ``scripts/study_router``. A variant is a file of configs/router_study; a run is a folder, and a
finished run is not made again. First a screen of all variants with few seeds, then those that matter with more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json as json_format
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import tyro
from tyro.conf import FlagCreatePairsOff, arg

from benchmarks.paired import t_interval
from benchmarks.plans import table
from benchmarks.timing import ROOT
from dsjax.config import load_config, validate
from dsjax.runtime import configure
from dsjax.train.pretrain import run as train

CONFIGS = ROOT / "configs" / "router_study"
BASELINE = "switch"
FINALISTS = ("none", "switch", "bias", "entropy", "entropy_dynamic")
LAST = 0.5  # the part of a run that loads are averaged over
COLUMNS = (
    "variant",
    "seeds",
    "bits per byte",
    "against switch",
    "max / mean load",
    "dropped",
    "load entropy / log E",
    "token entropy / log E",
    "steps compiled",
)


def study_one(variant: str, seed: int, folder: pathlib.Path) -> dict[str, Any]:
    """One run, or what is written of it."""
    done = folder / "study.json"
    if done.exists():
        return json_format.loads(done.read_text(encoding="utf-8"))
    config = load_config(CONFIGS / f"{variant}.py")
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, seed=seed),
        data=dataclasses.replace(config.data, seed=seed),
    )
    validate(config)
    begin = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        code = train(config, folder, quiet=True)
    if code:
        sys.exit(f"{variant}, seed {seed}: dsjax train ended with {code}; see {folder}")
    records = [json_format.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = {"variant": variant, "seed": seed, "seconds": time.perf_counter() - begin} | figures(
        records, config.train.steps, config.model.groups[0].ffn.num_experts
    )
    done.write_text(json_format.dumps(result), encoding="utf-8")
    return result


def figures(records: Sequence[dict[str, Any]], steps: int, num_experts: int) -> dict[str, float]:
    """What is compared, from the lines of ``metrics.jsonl``."""
    late = [r for r in records if "loss" in r and r["step"] > steps * (1 - LAST)]

    def mean(name: str) -> float:
        return float(np.mean([r[f"router/group_0/{name}"] for r in late]))

    return {
        "bits_per_byte": next(r for r in reversed(records) if "held_out_bits_per_byte" in r)["held_out_bits_per_byte"],
        "max_over_mean_load": mean("max_over_mean_load"),
        "drop_rate": mean("drop_rate"),
        "load_entropy": mean("load_entropy") / float(np.log(num_experts)),
        "token_entropy": mean("entropy") / float(np.log(num_experts)),
        "unaccounted": float(max(r["router/group_0/unaccounted"] for r in records if "loss" in r)),
        "compiled": len({r.get("capacity/factor") for r in records if "loss" in r}),
    }


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant, best first: means, and the paired difference to the baseline with its 95 % interval."""
    by = {(r["variant"], r["seed"]): r for r in results}
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in results):
        own = [r for r in results if r["variant"] == variant]
        pairs = [
            (r["bits_per_byte"], by[BASELINE, r["seed"]]["bits_per_byte"]) for r in own if (BASELINE, r["seed"]) in by
        ]
        difference = np.array([ours / theirs - 1 for ours, theirs in pairs])
        row: dict[str, Any] = {
            name: float(np.mean([r[name] for r in own])) for name in own[0] if name not in ("variant", "seed")
        }
        row |= {"variant": variant, "seeds": len(own), "difference": float(difference.mean()) if pairs else None}
        row["interval"] = t_interval(difference) if len(pairs) > 1 else None
        row["most_compiled"] = max(r["compiled"] for r in own)
        rows.append(row)
    # Seeds differ more than variants do: what has fewer of them is told by its pairs alone.
    return sorted(rows, key=lambda row: row["difference"] if row["difference"] is not None else row["bits_per_byte"])


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = []
    for row in rows:
        against = "" if row["difference"] is None else f"{row['difference']:+.2%}"
        if row["interval"] is not None:
            against += f" ({row['interval'][0]:+.2%} to {row['interval'][1]:+.2%})"
        lines.append(
            (
                row["variant"],
                str(row["seeds"]),
                f"{row['bits_per_byte']:.4f}",
                against,
                f"{row['max_over_mean_load']:.2f}",
                f"{row['drop_rate']:.3%}",
                f"{row['load_entropy']:.3f}",
                f"{row['token_entropy']:.3f}",
                str(row["most_compiled"]),
            )
        )
    return table(COLUMNS, lines)


def plot(rows: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Held-out bits per byte of every run beside the baseline of its seed, by variant, and the loads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.32 * len(rows) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by = {(r["variant"], r["seed"]): r["bits_per_byte"] for r in results}
    for place, row in enumerate(rows):
        pairs = [(bits, by.get((BASELINE, seed))) for (v, seed), bits in by.items() if v == row["variant"]]
        own = [100 * (bits / base - 1) for bits, base in pairs if base is not None]
        left.plot(own, [place] * len(own), "o", color="C0", alpha=0.5, markersize=4)
        left.plot(np.mean(own or np.nan), place, "|", color="k", markersize=14)
        right.barh(place, row["max_over_mean_load"], color="C1")
        right.text(row["max_over_mean_load"], place, f" {row['drop_rate']:.2%} dropped", va="center", fontsize=7)
    left.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    left.invert_yaxis()
    left.set(xlabel=f"held-out bits per byte against {BASELINE}, % (each seed; bar: mean)")
    right.set(xlabel="max / mean load, second half of the run")
    right.set_xlim(1, right.get_xlim()[1] * 1.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(
    *,
    screen_seeds: Annotated[int, arg(help="of every variant")] = 2,
    seeds: Annotated[int, arg(help="of those that matter")] = 6,
    only: Annotated[tuple[str, ...], arg(metavar="NAME", help="these variants alone; none: all")] = (),
    finalists: Annotated[tuple[str, ...], arg(metavar="NAME", help="those that matter")] = FINALISTS,
    runs: Annotated[str, arg(metavar="FOLDER", help="of the runs; it goes on from there")] = "",
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    picture: Annotated[str, arg(metavar="PNG", help="draw them there")] = "",
) -> None:
    configure()
    here = pathlib.Path(os.environ.get("DSJAX_CALLED_FROM", "."))
    folder = here / runs if runs else ROOT / "build" / "router_study"
    names = sorted(path.stem for path in CONFIGS.glob("*.py"))
    if unknown := sorted({*only, *finalists} - set(names)):
        sys.exit(f"there is no variant {', '.join(unknown)}; they are {', '.join(names)}")
    chosen = list(only) or names
    jobs = [(name, seed) for seed in range(screen_seeds) for name in chosen]
    jobs += [(name, seed) for seed in range(screen_seeds, seeds) for name in chosen if name in finalists]
    results = []
    for number, (name, seed) in enumerate(jobs, start=1):
        results.append(study_one(name, seed, folder / f"{name}-{seed}"))
        found = results[-1]
        print(
            f"{number} of {len(jobs)}: {name}, seed {seed}: {found['bits_per_byte']:.4f} bits per byte,"
            f" {found['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    rows = summary(results)
    print(tables(rows))
    if picture:
        plot(rows, results, here / picture)
    if json:
        (here / json).write_text(json_format.dumps({"runs": results, "summary": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main, prog="scripts/study_router", description=__doc__, config=(FlagCreatePairsOff,))
