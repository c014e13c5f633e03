"""Judges, from a recorded trace, whether a committed folder would survive a power loss.

What a write or a new name leaves is on the disk once the file, or the folder that holds the name, was fsynced after it.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from chaos.syscalls import WRITES, Call

RENAMES = ("rename", "renameat", "renameat2")
_MADE = ("open", "openat", "openat2", "creat")
_CHANGES_CONTENT = (*WRITES, "truncate", "ftruncate", "fallocate", "mmap")
_CHANGES_NAMES = ("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "link", "linkat", "symlink", "symlinkat", "mknod")


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is to be durable.

    Attributes:
        folder: whose names matter.
        commit: a rename to this path commits.
    """

    folder: pathlib.Path
    commit: pathlib.Path


def not_durable(calls: Sequence[Call], rules: Rules) -> tuple[int, list[str]]:
    """How many files and folders were looked at, and a sentence for each whose fsync is missing or too late."""
    commits = [call for call in calls if call.name in RENAMES and call.to == str(rules.commit) and call.result == 0]
    if len(commits) != 1:
        return 0, [f"{len(commits)} renames to {rules.commit.name} instead of one"]
    commit = commits[0]
    source, wrong = commit.path, []
    changed = _last_changes([call for call in calls if call.begun < commit.begun])
    mine = {path: call for path, call in changed.items() if path == source or path.startswith(source + "/")}
    for path, change in sorted(mine.items()):
        synced = any(_syncs(call, path) and change.ended < call.begun and call.ended < commit.begun for call in calls)
        if not synced:
            wrong.append(f"{_short(path, rules)} was not fsynced between its last {change.name} and the commit")
    later = [call for call in calls if commit.ended < call.begun]
    done = [call for call in later if _syncs(call, str(rules.folder))]
    if not done:
        wrong.append("the folder of the checkpoints was not fsynced after the commit")
    for call in later:
        removes = call.name in RENAMES or call.name.startswith(("unlink", "rmdir"))
        removes = removes and call.path.startswith(f"{rules.folder}/")
        if removes and call.result == 0 and (not done or call.begun < done[0].ended):
            wrong.append(f"{_short(call.path, rules)} went ({call.name}) before the commit was on the disk")
    for call in calls:
        if call.name.startswith("mkdir") and call.result == 0 and str(rules.commit).startswith(call.path + "/"):
            above = _above(call.path)
            if not any(_syncs(sync, above) and call.ended < sync.begun for sync in calls):
                wrong.append(f"{pathlib.PurePath(call.path).name} was made, but the folder above it was not fsynced")
    # What is on the disk counts only if nobody changes it afterwards.
    for call in later:
        inside = call.path.startswith(f"{rules.commit}/") and call.name not in ("fsync", "fdatasync")
        if inside and not call.name.startswith(("unlink", "rmdir")):
            wrong.append(f"{_short(call.path, rules)} was changed ({call.name}) after the commit")
    return len(mine) + 1, wrong


def names_not_durable(calls: Sequence[Call], paths: Sequence[pathlib.Path], commit: pathlib.Path) -> list[str]:
    """A sentence for each file that may not be there after a power loss though the rename to ``commit`` is."""
    committed = next(call for call in calls if call.name in RENAMES and call.to == str(commit) and call.result == 0)
    wrong = []
    for path in paths:
        named = [c for c in calls if c.begun < committed.begun and str(path) in (c.to, c.path) and _names(c)]
        if not named:
            wrong.append(f"{path.name} was not there when {commit.name} was committed")
            continue
        above = str(path.parent)
        if not any(_syncs(c, above) and named[-1].ended < c.begun and c.ended < committed.begun for c in calls):
            wrong.append(f"the folder of {path.name} was not fsynced between its {named[-1].name} and the commit")
    return wrong


def _names(call: Call) -> bool:
    """Whether the call gives a file its name."""
    made = call.name in RENAMES or (call.name in _MADE and bool(call.flags & os.O_CREAT))
    return made and (call.result or 0) >= 0


def _last_changes(calls: Sequence[Call]) -> dict[str, Call]:
    """Path -> the call that changed its content, or for a folder its names, last. Renames carry what they move."""
    changed: dict[str, Call] = {}

    def change(path: str, call: Call) -> None:
        if path not in changed or changed[path].ended < call.ended:
            changed[path] = call

    for call in sorted(calls, key=lambda call: call.ended):
        if call.result is None or call.result < 0:
            continue
        if call.name in RENAMES:
            for path in [p for p in changed if p == call.path or p.startswith(call.path + "/")]:
                changed[call.to + path[len(call.path) :]] = changed.pop(path)
            change(_above(call.path), call)
            change(_above(call.to), call)
        elif call.name in _MADE and call.flags & os.O_CREAT:
            change(_above(call.path), call)
            change(call.path, call)
        elif call.name in _CHANGES_CONTENT or (call.name in _MADE and call.flags & os.O_TRUNC):
            change(call.path, call)
        elif call.name in _CHANGES_NAMES:
            change(_above(call.path), call)
            if call.name.startswith("mkdir"):
                change(call.path, call)
            elif call.name.startswith(("unlink", "rmdir")):
                for path in [p for p in changed if p == call.path or p.startswith(call.path + "/")]:
                    del changed[path]
    return changed


def _syncs(call: Call, path: str) -> bool:
    return call.result == 0 and (call.name == "syncfs" or (call.name in ("fsync", "fdatasync") and call.path == path))


def _above(path: str) -> str:
    return str(pathlib.PurePath(path).parent)


def _short(path: str, rules: Rules) -> str:
    return os.path.relpath(path, rules.folder)
