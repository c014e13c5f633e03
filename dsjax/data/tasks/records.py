"""Tasks as files: JSON lines that a `Source` reads as text to train on, and that `dsjax.rl.programs` reads as problems.

    text, masked          prompt and solution; the prompt is read and not learned (`dsjax.data.marked`)
    name, prompt, solution, entry_point, tests      the problem: tests are pairs [arguments, expected]
    family, level, specification, operations, meaning, examples      where it comes from

``dsjax data tasks DST`` writes a folder of them: training/ (shards), composition.jsonl and family.jsonl (held out), a
report, and a manifest last.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dsjax import manifest
from dsjax.config import NonNegativeInt, PositiveInt, Seed, Share, UserError, to_dict, validate
from dsjax.data.marked import Marked
from dsjax.data.tasks.families import FAMILIES, LEVELS
from dsjax.data.tasks.generate import Task
from dsjax.data.tasks.split import Side, Split, check_disjoint, stream
from dsjax.data.tasks.wording import docstring
from dsjax.metrics import told_of, write_atomic

Say = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """A folder of tasks.

    training, composition, family: how many of each side.
    families: those to train on and to hold out compositions of; empty: all that are not held out whole.
    levels: which.
    examples_share: of the tasks to train on, those whose specification shows examples: these are half of a task's
        tokens, and the words that say what to do are more often met without them. Held-out ones all show theirs.
    split: how sides are divided.
    per_shard: tasks in a file of training.
    seed: another one gives other tasks; held-out ones stay held out.
    """

    training: PositiveInt = 10_000
    composition: NonNegativeInt = 500
    family: NonNegativeInt = 500
    families: tuple[str, ...] = ()
    levels: tuple[int, ...] = LEVELS
    examples_share: Share = 1.0
    split: Split = Split()
    per_shard: PositiveInt = 10_000
    seed: Seed = 0

    def validate(self) -> None:
        """What annotations cannot say.

        Raises:
            UserError: names the key.
        """
        wrong = [name for name in self.families if name not in FAMILIES or name in self.split.held_out_families]
        if wrong:
            allowed = [name for name in FAMILIES if name not in self.split.held_out_families]
            raise UserError(f"families has {wrong[0]!r}; it must be some of {', '.join(allowed)}")
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise UserError(f"levels is {self.levels}; it must be some of {', '.join(map(str, LEVELS))}")


def without_examples(task: Task) -> Task:
    """The task whose specification shows none."""
    signature = task.prompt.partition("\n")[0]
    return dataclasses.replace(task, prompt=f"{signature}\n{docstring(task.specification, [])}")


def shows_examples(task: Task, share: float) -> bool:
    """Whether a task is among the share of those that do: a matter of its name alone."""
    return int.from_bytes(hashlib.sha256(task.name.encode()).digest()[:8], "big") < share * 2**64


def record(task: Task) -> dict[str, Any]:
    """A task as one line."""
    marked = Marked(task.code, masked=((0, len(task.prompt)),))
    fields = dataclasses.asdict(task) | {"operations": list(task.operations)}
    return marked.record(**fields)


def parse(fields: dict[str, Any], origin: str) -> Task:
    """The task of a line; ``origin`` names it in errors.

    Raises:
        UserError: a field is missing or has another type.
    """
    kinds: dict[str, type] = {"level": int, "tests": list, "examples": list, "operations": list}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Task):
        value = fields.get(field.name)
        kind = kinds.get(field.name, str)
        if not isinstance(value, kind):
            raise UserError(f"{origin}: {field.name!r} must be a {kind.__name__}, found {type(value).__name__}")
        values[field.name] = value
    for name in ("tests", "examples"):
        if not all(isinstance(case, list) and len(case) == 2 and isinstance(case[0], list) for case in values[name]):
            raise UserError(f"{origin}: {name!r} must be pairs [arguments, expected]")
        values[name] = [(tuple(arguments), expected) for arguments, expected in values[name]]
    return Task(**values | {"operations": tuple(values["operations"])})


def read(path: str | pathlib.Path) -> list[Task]:
    """The tasks of a file.

    Raises:
        UserError: it can not be read, or a line is no task; says which.
    """
    path = pathlib.Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can not be read: {error}") from None
    tasks = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not a line of JSON ({error})") from None
            if not isinstance(fields, dict):
                raise UserError(f"{path}:{number}: a JSON object was expected, found {type(fields).__name__}")
            tasks.append(parse(fields, f"{path}:{number}"))
    return tasks


def write(target: pathlib.Path, cfg: TasksConfig, say: Say = lambda done, total, what: None) -> dict[str, Any]:
    """Writes a folder of tasks, whole or not at all; returns its report, how many of each family and level there are.

    Args:
        target: a folder that does not exist yet.
        cfg: what.
        say: progress.

    Raises:
        UserError: a bad setting, a target that is there, or fewer tasks than are asked for.
    """
    validate(cfg)
    target = target.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already; write into a new folder")
    building = target.with_name(f".{target.name}.building")
    with told_of(target):
        manifest.make_folder(target.parent)
        shutil.rmtree(building, ignore_errors=True)
        (building / "training").mkdir(parents=True)
        try:
            found = _write_sides(building, cfg, say)
            write_atomic(building / "report.json", json.dumps(found, indent=1) + "\n")
            about = {"kind": "tasks", "config": to_dict(cfg)}
            manifest.write(building, about, manifest.inventory(building, manifest.files_of(building)))
            building.rename(target)
            manifest.sync_folder(target.parent)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return found


def _write_sides(folder: pathlib.Path, cfg: TasksConfig, say: Say) -> dict[str, Any]:
    counts: dict[str, collections.Counter[str]] = {}
    total, done = cfg.training + cfg.composition + cfg.family, 0

    def counted(tasks: Iterable[Task], side: str) -> Iterator[Task]:
        nonlocal done
        counts[side] = collections.Counter()
        for task in tasks:
            counts[side][f"{task.family} {task.level}"] += 1
            done += 1
            say(done, total, "tasks written")
            yield task

    held_out: list[Task] = []
    sides: tuple[Side, ...] = ("composition", "family")
    for side in sides:
        number = cfg.composition if side == "composition" else cfg.family
        families = cfg.families if side == "composition" else ()
        if not number:
            continue
        tasks = stream(side, split=cfg.split, families=families, levels=cfg.levels, seed=cfg.seed, distinct=True)
        chosen = list(counted(itertools.islice(tasks, number), side))
        if len(chosen) < number:
            raise UserError(f"{side} is {number}; there are {len(chosen)} tasks of different meanings")
        write_atomic(folder / f"{side}.jsonl", _lines(chosen))
        held_out += chosen
    training = stream("training", split=cfg.split, families=cfg.families, levels=cfg.levels, seed=cfg.seed)
    tasks = counted(itertools.islice(training, cfg.training), "training")
    shards = -(-cfg.training // cfg.per_shard)
    for shard in range(shards):
        chosen = list(itertools.islice(tasks, cfg.per_shard))
        chosen = [task if shows_examples(task, cfg.examples_share) else without_examples(task) for task in chosen]
        check_disjoint(chosen, held_out)
        write_atomic(folder / "training" / f"tasks-{shard:05d}-of-{shards:05d}.jsonl", _lines(chosen))
    return {side: dict(sorted(places.items())) for side, places in counts.items()}


def _lines(tasks: Iterable[Task]) -> str:
    return "".join(f"{json.dumps(record(task))}\n" for task in tasks)
