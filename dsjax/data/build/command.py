"""``dsjax data build SRC DST [KEY=VALUE ...]``: what is asked for, and what is said of it."""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Sequence

from dsjax.config import UserError, apply_overrides
from dsjax.data.build import report
from dsjax.data.build.build import build
from dsjax.data.build.config import BuildConfig
from dsjax.metrics import Progress

SECONDS = 0.2  # between two updates of the progress


def run(source: str, target: str, overrides: Sequence[str] = (), *, workers: int = 1, quiet: bool = False) -> int:
    """Builds the corpus, prints its report as a table; returns the exit code.

    Raises:
        UserError: in one sentence, what is wrong.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    cfg = apply_overrides(BuildConfig(), overrides)
    begin = time.perf_counter()
    last = 0.0
    with Progress(1, label="building", every=20, quiet=quiet) as bar:

        def say(done: int, total: int, what: str) -> None:
            nonlocal last
            if done == total or time.monotonic() > last + SECONDS:
                last = time.monotonic()
                bar.update(done, total, what)

        found = build(source, pathlib.Path(target), cfg, workers=workers, say=say)
    seconds = time.perf_counter() - begin
    print(report.table(found), end="")
    if not quiet:
        size = found["files"]["found"]["bytes"] / 1e6
        print(f"{target} is a corpus ({size:.1f} MB read in {seconds:.1f} s)", file=sys.stderr)
    return 0
