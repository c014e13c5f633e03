"""``dsjax data tasks DST [KEY=VALUE ...]``."""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Sequence

from dsjax.config import apply_overrides
from dsjax.data.tasks.records import TasksConfig, write
from dsjax.metrics import Progress

SECONDS = 0.2  # between two updates of the progress


def run(target: str, overrides: Sequence[str] = (), *, quiet: bool = False) -> int:
    """Writes a folder of tasks and says how many; returns the exit code.

    Raises:
        UserError: in one sentence, what is wrong.
    """
    cfg = apply_overrides(TasksConfig(), overrides)
    begin, last = time.perf_counter(), 0.0
    with Progress(1, label="writing", every=20, quiet=quiet) as bar:

        def say(done: int, total: int, what: str) -> None:
            nonlocal last
            if done == total or time.monotonic() > last + SECONDS:
                last = time.monotonic()
                bar.update(done, total, what)

        found = write(pathlib.Path(target), cfg, say)
    seconds = time.perf_counter() - begin
    numbers = {side: sum(places.values()) for side, places in found.items()}
    print(", ".join(f"{side}: {number:,} tasks" for side, number in numbers.items()))
    if not quiet:
        rate = sum(numbers.values()) / seconds
        print(f"{target} holds them ({seconds:.0f} s, {rate:.0f} tasks a second)", file=sys.stderr)
    return 0
