"""The best of the checkpoints that were evaluated, kept where training does not touch it.

    RUN/best.json       {"step": ..., "held_out_combined_score": ..., "evaluated": [every evaluation so far]}
    RUN/best/           a run with that checkpoint alone: what `dsjax eval`, `generate` and `convert` take

Files of the checkpoint are linked, not copied, where the file system can.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from dsjax.metrics import told_of, write_atomic
from dsjax.runs import RunFolder
from dsjax.train.start import ORIGIN

SCORE = "held_out_combined_score"


def best_of(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The record with the highest score, of equal ones the earliest; None: none has one."""
    judged = [record for record in records if record.get(SCORE) is not None]
    return max(judged, key=lambda record: (record[SCORE], -record["step"]), default=None)


def keep_best(run: RunFolder, records: Sequence[dict[str, Any]], *, say: Callable[[str], None]) -> None:
    """Brings ``best/`` and ``best.json`` up to date; the same as often as it is called.

    Args:
        run: whose checkpoint of the best step is there, or was the best before.
        records: of ``metrics.jsonl``.
        say: told of a new best one.

    Raises:
        UserError: it can not be written.
    """
    best = best_of(records)
    if best is None:
        return
    step, target = best["step"], run.path / "best"
    there, source = target / "checkpoints" / str(step), run.checkpoints / str(step)
    if not there.is_dir() and source.is_dir():
        with told_of(target):
            _link(run, step, target)
        say(f"the best so far: step {step}, {SCORE} {best[SCORE]:.3f}")
    if there.is_dir():
        evaluated = [record for record in records if record.get(SCORE) is not None]
        about = {"step": step, SCORE: best[SCORE], "evaluated": evaluated}
        write_atomic(run.path / "best.json", json.dumps(about, indent=1) + "\n")


def _link(run: RunFolder, step: int, target: pathlib.Path) -> None:
    """Makes ``target`` anew: whole, or not there."""
    building, old = target.with_name(".best-building"), target.with_name(".best-old")
    for left in (building, old):
        shutil.rmtree(left, ignore_errors=True)
    (building / "checkpoints").mkdir(parents=True)
    for path in (run.config, run.tokenizer, run.data):
        shutil.copy2(path, building / path.name)
    shutil.copytree(run.checkpoints / str(step), building / "checkpoints" / str(step), copy_function=_link_or_copy)
    if (run.path / ORIGIN).is_dir():
        shutil.copytree(run.path / ORIGIN, building / ORIGIN, copy_function=_link_or_copy)
    if target.exists():
        target.rename(old)
    building.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
