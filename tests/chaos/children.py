"""Trials in a child process, under a limit of memory and a watchdog: what ends the child is the fault of its trial."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from xla_flags import QUICK

ROOT = pathlib.Path(__file__).parent.parent.parent
_HANG_SECONDS = 20
_MEMORY = 2**30  # that all trials together may take, above what the good files take


def child(module: str, place: str, seed: int, first: int, last: int, defended: bool) -> None:
    """Tries first .. last; a line for each trial that is begun, and one for each failure."""
    faulthandler.enable()
    trial = importlib.import_module(module).trials(pathlib.Path(place), seed, defended)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, resource.RLIM_INFINITY))
    for index in range(first, last):
        print(f"at {index}", flush=True)
        faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
        said = trial(index)
        faulthandler.cancel_dump_traceback_later()
        if said:
            print(f"bad {index} {json.dumps(said)}", flush=True)


def failures(module: str, n: int, seed: int, *, defended: bool = True) -> Iterator[str]:
    """Makes n trials; a sentence for each one that failed.

    Args:
        module: has `trials(place, seed, defended)`, which makes what is needed in a folder and returns a function from
            the number of a trial to what went wrong in it, empty if nothing did.
        n: how many.
        seed: of all of them.
        defended: False switches off what is under test.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": path, "RUST_BACKTRACE": "0", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
    first = 0
    while first < n:
        with tempfile.TemporaryDirectory() as place:
            code = f"from chaos.children import child; child({module!r}, {place!r}, {seed}, {first}, {n}, {defended})"
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, errors="replace", env=env, check=False)
        at = first - 1
        for line in done.stdout.splitlines():
            kind, index, *said = line.split(" ", 2)
            at = int(index)
            if kind == "bad":
                yield f"trial {index} (seed {seed}), {json.loads(said[0])}"
        if at < first:
            raise RuntimeError(f"the child did not start: {done.stderr[-2000:]}")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1][:200]
            yield f"trial {at} (seed {seed}) ended the process with {done.returncode}: {last}"
        first = at + 1
