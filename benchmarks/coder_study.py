"""The coder study: a model that is told the syntax against the plain one, in what it predicts, writes and solves.

The command line of ``scripts/study_coder``. docs/coder_study.md says what is compared and how it is judged. Each
finished run is a line of a file, and is not made again.
"""

from __future__ import annotations

import json as json_format
import os
import pathlib
import sys
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, arg

from benchmarks import coder_language, coder_solving
from benchmarks.kept import KeptLines
from benchmarks.timing import ROOT
from dsjax.runtime import configure


def main(
    *,
    part: Annotated[Literal["all", "language", "solving"], arg(help="which")] = "all",
    arms: Annotated[tuple[str, ...], arg(metavar="ARM", help="of the language part; none: all")] = (),
    kept: Annotated[str, arg(metavar="FILE", help="a line for each run; it goes on from there")] = "",
    picture: Annotated[str, arg(metavar="PNG", help="draw the language part there")] = "",
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
) -> None:
    configure()
    here = pathlib.Path(os.environ.get("DSJAX_CALLED_FROM", "."))
    lines = KeptLines(here / kept if kept else ROOT / "build" / "coder_study.jsonl")
    if unknown := sorted(set(arms) - coder_language.ARMS.keys()):
        print(f"--arms has {', '.join(unknown)}; they are {', '.join(coder_language.ARMS)}", file=sys.stderr)
        sys.exit(2)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if part in ("all", "language"):
        found = coder_language.study(lines, arms or tuple(coder_language.ARMS), say)
        print(coder_language.tables(found))
        if picture:
            coder_language.plot(found, here / picture)
    if part in ("all", "solving"):
        coder_solving.study(lines, lines.folder, say)
        print(coder_solving.tables(lines.lines))
    minutes = sum(line["cpu_seconds"] for line in lines.lines) / 60
    print(f"\n{minutes:.0f} CPU minutes in all.")
    if json:
        (here / json).write_text(json_format.dumps({"runs": lines.lines}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main, prog="scripts/study_coder", description=__doc__, config=(FlagCreatePairsOff,))
