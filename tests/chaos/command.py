"""``scripts/chaos``: every kind of fault, a table of what came of it, and exit code 1 if anything did not hold."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from chaos import Goal

ROOT = pathlib.Path(__file__).parent.parent.parent
REPORT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: scripts/chaos --full --write -->", "<!-- end of table -->"

# Kind of fault -> how many by default, how many with --full (0 crash points: all there are), what is counted.
KINDS = {
    "controls": (2, 8, "runs that nothing happens to"),
    "kills": (8, 104, "kill -9 of a run, over all its phases"),
    "rl-kills": (4, 24, "kill -9 of a run of reinforcement learning"),
    "mutants": (1, 1, "1: also leave each class of state out of a save"),
    "crash-points": (12, 0, "system calls of a save at which it is stopped; 0: all of them"),
    "disk": (6, 40, "errors of the file system under a run"),
    "corruptions": (24, 300, "damaged checkpoints"),
    "data-faults": (60, 1000, "damaged files of training data"),
    "formats": (300, 10_000, "mutated files of every format that is read"),
    "meshes": (1, 5, "meshes on which two processes are compared with one"),
    "hosts": (2, 20, "times that one of two processes is lost"),
    "sigterms": (2, 20, "times that one of two processes is preempted"),
}


def goals(kind: str, n: int, folder: pathlib.Path, seed: int) -> Iterator[Goal]:
    """The checks of one kind, ``n`` faults each."""
    from chaos import corruption, crash_points, data_faults, disk, formats, kills, pairs, rl_kills

    say = Progress(kind)
    if kind in ("controls", "kills", "mutants"):
        repeated, control = kills.repeat(n if kind == "controls" else 1, folder / kind)
        if kind == "controls":
            yield repeated
        elif kind == "kills":
            yield kills.kills(n, folder, control, seed=seed)
        else:
            yield kills.leaf_mutants(folder, control)
    elif kind == "rl-kills":
        yield rl_kills.kills(n, folder / kind, seed=seed)
    elif kind == "crash-points":
        yield from crash_points.goals(n or None, seed=seed, say=say)
    elif kind == "disk":
        yield from disk.goals(n, seed=seed, say=say)
    elif kind == "corruptions":
        yield from corruption.corruptions(n, folder / kind, seed=seed)
    elif kind == "data-faults":
        yield data_faults.run(n, seed)
    elif kind == "formats":
        yield formats.run(n, seed)
    elif kind == "meshes":
        yield pairs.same_losses(folder / kind, pairs.MESHES[:n])
        yield pairs.reshaped(folder / "reshaped")
    elif kind == "hosts":
        lost = pairs.losses_of_processes(n, folder / kind, seed=seed)
        yield dataclasses.replace(lost, mutant=pairs.without_watch(folder / "unwatched"))
    elif kind == "sigterms":
        stopped, _ = pairs.sigterms(n, folder / kind, seed=seed)
        yield dataclasses.replace(stopped, mutant=pairs.without_agreement(folder / "alone"))


class Progress:
    """A line of standard error, at most one a second."""

    def __init__(self, kind: str):
        self._kind, self._last = kind, 0.0

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._last > 1:
            self._last = time.monotonic()
            print(f"{self._kind}: {text}", file=sys.stderr, flush=True)


def options(words: Sequence[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    for kind, (few, many, what) in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, metavar="N", help=f"{what} (default {few}, with --full {many})")
    parser.add_argument("--full", action="store_true", help="as many as the table of docs/reliability.md wants")
    parser.add_argument("--only", metavar="KIND[,KIND ...]", default="", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    asked = parser.parse_args(words)
    asked.kinds = asked.only.split(",") if asked.only else list(KINDS)
    if unknown := set(asked.kinds) - set(KINDS):
        parser.error(f"--only names {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return asked


def rows(kind: str, results: Sequence[Goal]) -> list[str]:
    """What came of one kind of fault, in Markdown."""
    return [
        f"| {kind} | {goal.name} | {goal.n:,} | {len(goal.failures)} | {goal.seconds:,.0f} | {goal.mutant} |"
        for goal in results
    ]


HEAD = [
    "| `--only` | what has to hold | N | failures | seconds | with the defence off |",
    "|---|---|---|---|---|---|",
]


def table(found: dict[str, list[str]]) -> str:
    """The rows of all kinds, in their order."""
    return "\n".join([*HEAD, *(row for kind in KINDS for row in found.get(kind, []))])


def written() -> dict[str, list[str]]:
    """The rows that the report has, by kind."""
    found: dict[str, list[str]] = {}
    for line in REPORT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines():
        kind = line.strip("| ").split(" |")[0]
        if kind in KINDS:
            found.setdefault(kind, []).append(line)
    return found


def write(found: dict[str, list[str]], seed: int) -> None:
    """Puts rows between the marks of the report; those of kinds that were not tried stay."""
    machine = f"{len(os.sched_getaffinity(0))} cores, {platform.system()}, Python {platform.python_version()}"
    text = REPORT.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    note = f"Seed {seed}, on {machine}."
    content = f"{table(written() | found)}\n\n{note}"
    REPORT.write_text(f"{before}{BEGIN}\n\n{content}\n\n{END}{after}", encoding="utf-8")


def main(words: Sequence[str]) -> int:
    """Runs what is asked for; the exit code."""
    asked = options(words)
    found: dict[str, list[str]] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="dsjax-chaos-") as folder:
        for kind in asked.kinds:
            given = getattr(asked, kind.replace("-", "_"))
            n = KINDS[kind][asked.full] if given is None else given
            if n == 0 and kind != "crash-points":
                continue
            for goal in goals(kind, n, pathlib.Path(folder), asked.seed):
                found.setdefault(kind, []).extend(rows(kind, [goal]))
                failed = failed or bool(goal.failures)
                print("\n".join([found[kind][-1], *(f"  {failure}" for failure in goal.failures)]), flush=True)
            if asked.write:
                write(found, asked.seed)
    print(f"\n{table(found)}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
