"""Runs in processes of their own that say where they are, and can be stopped there."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import queue
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from small_runs import Child, home

T = TypeVar("T")

# Says "mark: PHASE" on standard error as each phase of a run begins, and the content of each batch as it is taken.
MARKS = """
import hashlib, os
import dsjax.checkpoint as checkpoint, dsjax.train.pretrain as pretrain

def mark(text):
    os.write(2, f"mark: {text}\\n".encode())

def marked(place, name, phase):
    inner = getattr(place, name)
    def outer(*arguments, **options):
        mark(phase)
        result = inner(*arguments, **options)
        mark(f"{phase} done")
        return result
    setattr(place, name, outer)

marked(pretrain, "prepared", "data")
marked(pretrain, "compile_step", "compile")
marked(checkpoint.Checkpoints, "save", "save")
marked(checkpoint.Checkpoints, "_commit", "finalise")
marked(checkpoint.Checkpoints, "_prune", "prune")
marked(checkpoint.Checkpoints, "_arrays", "restore")

restore_or_init, place_batch = pretrain.restore_or_init, pretrain.place_batch

def restored(config, job):
    state, counters = restore_or_init(config, job)
    mark(f"begins behind {counters.iteration}")
    return state, counters

def placed(batch, *where):
    mark("step " + hashlib.sha256(batch.tokens_BT.tobytes() + batch.targets_BT.tobytes()).hexdigest()[:16])
    return place_batch(batch, *where)

pretrain.restore_or_init, pretrain.place_batch = restored, placed
"""


def batches_of(said: str) -> dict[int, str]:
    """Iteration -> content of its batch, from what a marked process said."""
    begin = re.search(r"mark: begins behind (\d+)", said)
    if begin is None:
        return {}
    found = re.findall(r"mark: step (\w+)", said[begin.end() :])
    return dict(enumerate(found, int(begin[1]) + 1))


def wait_for_mark(child: Child, phase: str, times: int = 1) -> bool:
    """Until a phase begins for the ``times``-th time; False if the process ends before."""
    assert child.process.stderr is not None
    mark, seen = re.compile(rf"mark: {phase}\b(?! done)"), 0
    seen = len(mark.findall(child.said))
    while seen < times:
        line = child.process.stderr.readline()
        if not line:
            return False
        child.said += line
        seen += bool(mark.search(line))
    return True


def on_all_cores(function: Callable[[T, int], Any], items: Sequence[T]) -> list[Any]:
    """``function(item, core)`` of each item, one at a time on each core."""
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def one(item: T) -> Any:
        core = cores.get()
        try:
            return function(item, core)
        finally:
            cores.put(core)

    with concurrent.futures.ThreadPoolExecutor(cores.qsize()) as pool:
        return list(pool.map(one, items))


def config_file(folder: pathlib.Path, call: str = "small_moe({!r}, bias_update_rate=1e-3)") -> pathlib.Path:
    """A config of these runs; by default a small mixture with every kind of state that a run can have."""
    path = folder / "config.py"
    path.write_text(
        '"""A run of the fault tests."""\n\nimport small_runs\n\n\ndef get_config():\n'
        f"    return small_runs.{call.format(str(home() / 'corpus'))}\n"
    )
    return path
