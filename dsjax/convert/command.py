"""``dsjax convert``: which way, and what is said of it."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
import time
from typing import Any

from dsjax.config import UserError, read_json
from dsjax.convert.families import config_from_hf
from dsjax.convert.origin import CONFIG, HFFolder
from dsjax.convert.read import Options, Say, hf_to_run
from dsjax.convert.run_tensors import RunTensors
from dsjax.convert.write import ExportOptions, run_to_hf
from dsjax.metrics import Progress
from dsjax.runs import RunFolder

EXIT_DIFFERENT = 3
SECONDS = 0.2  # between two updates of the progress; without a terminal, 20 of them between two lines
MOST_NAMED = 10  # tensors that a report names
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked on the command line; see :func:`dsjax.cli.convert`."""

    source: pathlib.Path
    target: pathlib.Path | None
    check: bool = False
    mesh: str = ""
    keep_fp8: bool = False
    dtype: str | None = None
    max_shard_size: str = ""
    quiet: bool = False


def is_run(path: pathlib.Path) -> bool:
    """Whether a folder holds a run of ours; else it holds a model in Hugging Face's layout.

    Raises:
        UserError: neither.
    """
    if not path.is_dir():
        raise UserError(f"no folder {path}")
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} holds no {CONFIG}; it is neither a run nor a model in Hugging Face's layout")
    config = read_json(path / CONFIG)
    return isinstance(config, dict) and str(config.get("type", "")).startswith("dsjax.")


def run(request: Request) -> int:
    """Converts or checks; returns the exit code.

    Raises:
        UserError: in one sentence, what is wrong with the source, the target or the options.
    """
    if request.check:
        return check(request)
    if request.target is None:
        raise UserError("DST is missing: the folder to convert into")
    begin, source_is_run = time.perf_counter(), is_run(request.source)
    refuse_options(request, source_is_run)
    if request.source.resolve() in request.target.resolve().parents:
        raise UserError(f"{request.target} is inside {request.source}; convert into a folder beside it")
    with Progress(1, label="converting", every=20, quiet=request.quiet) as bar:
        if source_is_run:
            tensors = RunTensors(RunFolder(request.source))
            size = None if not request.max_shard_size else parsed_size(request.max_shard_size)
            run_to_hf(tensors, request.target, ExportOptions(size, request.dtype, request.keep_fp8), shown(bar))
            if tensors.has_values:
                bar.note(f"left out: what makes the values of {request.source}, for which the layout has no place")
        else:
            folder = HFFolder(request.source)
            options = Options(request.mesh, request.keep_fp8)
            hf_to_run(folder, config_from_hf(folder.config, folder.tensors), request.target, options, shown(bar))
            if left_out := folder.other_files()[1]:
                bar.note(f"left out, since they are pickled: {', '.join(left_out)}")
    if not request.quiet:
        kind = "a model in Hugging Face's layout" if source_is_run else "a run"
        print(f"{request.target} is {kind} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr)
    return 0


def refuse_options(request: Request, source_is_run: bool) -> None:
    """Raises:
    UserError: an option was given that says nothing about this direction.
    """
    for flag, given, of_runs in (
        ("--mesh", request.mesh, False),
        ("--dtype", request.dtype, True),
        ("--max-shard-size", request.max_shard_size, True),
    ):
        if given and of_runs != source_is_run:
            kinds = ("a run", "a model in Hugging Face's layout")
            raise UserError(f"{flag} is for converting {kinds[not of_runs]}; {request.source} is {kinds[of_runs]}")


def parsed_size(text: str) -> int:
    """The bytes that ``5GB``, ``500 MB`` or ``2GiB`` stand for.

    Raises:
        UserError: it stands for none.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size is {text!r}; it must be a size such as 5GB or 500MB")
    return size


def shown(bar: Progress) -> Say:
    """Progress in megabytes, not more often than one can see."""
    last = 0.0

    def say(done: int, total: int, what: str) -> None:
        nonlocal last
        if done == total or time.monotonic() > last + SECONDS:
            last = time.monotonic()
            bar.update(done // 10**6, total // 10**6, f"MB  {what}")

    return say


def check(request: Request) -> int:
    """Prints the report on two checkpoints, or on one beside what a conversion would make of it.

    Returns:
        0, or :data:`EXIT_DIFFERENT`.

    Raises:
        UserError: an option was given that says how to convert; or as :func:`run`.
    """
    from dsjax.convert.check import ThereAndBack, compare

    for name in ("mesh", "keep_fp8", "dtype", "max_shard_size"):
        if getattr(request, name):
            raise UserError(f"--{name.replace('_', '-')} does not go with --check, which writes nothing")
    source = opened(request.source)
    if request.target is not None:
        names, target = (str(request.source), str(request.target)), opened(request.target)
    elif is_run(request.source):
        raise UserError(f"DST is missing: the folder to compare the run {request.source} with")
    else:
        folder = HFFolder(request.source)
        names, target = (
            (str(request.source), "converted"),
            ThereAndBack(folder, config_from_hf(folder.config, folder.tensors)),
        )
    with Progress(1, label="comparing", every=500, quiet=request.quiet) as bar:
        report = compare(source, target, bar.update)
    for name, side in zip(names, (source, target), strict=True):
        print(f"{name}: {side.describe()}")
    equal = report.compared - len(report.differences)
    print(f"tensors: {report.compared:,} compared, {report.numbers:,} numbers; {equal:,} equal to the bit")
    for difference in report.differences[:MOST_NAMED]:
        print(f"  {difference.name}: {difference.text}")
    for name, only in zip(names, report.only, strict=True):
        if only:
            more = " ..." if len(only) > MOST_NAMED else ""
            print(f"only {name} has {len(only):,}: {', '.join(only[:MOST_NAMED])}{more}")
    apart = report.logits if isinstance(report.logits, str) else f"differ by up to {report.logits:.3g}"
    print(f"logits: {'equal to the bit' if report.logits == 0 else apart}")
    return 0 if report.equal else EXIT_DIFFERENT


def opened(path: pathlib.Path) -> Any:
    """One side of a comparison."""
    from dsjax.convert.check import HFSide, RunSide

    if is_run(path):
        return RunSide(RunTensors(RunFolder(path)))
    folder = HFFolder(path)
    return HFSide(folder, config_from_hf(folder.config, folder.tensors))
