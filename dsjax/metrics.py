"""What a run reports: ``metrics.jsonl`` always, TensorBoard files by option, a progress bar, ``loss.png``."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from dsjax.config import UserError
from dsjax.manifest import sync_folder

ALWAYS = ("step", "tokens_seen", "seconds")  # numbers that every record has


def write_atomic(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file whole or not at all, and brings it to the disk.

    Raises:
        UserError: it can not be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with told_of(path):
        _write_atomic(path, data)


@contextlib.contextmanager
def told_of(path: pathlib.Path) -> Iterator[None]:
    """An error of the file system as one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can not be written: {error.strerror or error}") from error


def _write_atomic(path: pathlib.Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = pathlib.Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line cut short by a crash is left out.

    Raises:
        UserError: another line is none that a run writes.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: also numbers of thousands of digits
            record = None
        if not _is_record(record):
            if number == len(lines):
                return
            raise UserError(f"{path}:{number} is no record of numbers with {', '.join(ALWAYS)}: {line[:60]!r}")
        yield record


def _is_record(found: Any) -> bool:
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return False
    numbers = {name: value for name, value in found.items() if value is not None}
    finite = all(type(x) in (int, float) and abs(x) <= sys.float_info.max for x in numbers.values())
    return finite and numbers.keys() >= set(ALWAYS)


class MetricsLog:
    """Appends records to ``metrics.jsonl`` and, if asked, to TensorBoard event files beside it.

    JSON has no NaN: a value that is not finite is null. On a resumed run the records behind the restored step are
    dropped: those steps are done again. ``write=False`` keeps the records in memory alone: of several processes, one
    writes.
    """

    def __init__(self, folder: pathlib.Path, *, resume_step: int = 0, tensorboard: bool = False, write: bool = True):
        self.path = folder / "metrics.jsonl"
        self.records = [r for r in read_metrics(self.path) if r["step"] <= resume_step] if resume_step else []
        self._file: Any = None
        if write:
            write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in self.records))
            with told_of(self.path):
                self._file = self.path.open("ab", buffering=0)
        self._board: Any = None
        if tensorboard and write:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError(
                    "log.tensorboard is true, but tensorboardX is not installed: pip install 'dsjax[tensorboard]'"
                ) from None
            self._board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        record: dict[str, Any] = {"step": step}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.records.append(record)
        if self._file is None:
            return
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with told_of(self.path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class Progress:
    """A bar with the time left on a terminal; elsewhere a line every ``every`` updates, on standard error."""

    def __init__(self, total: int, start: int = 0, *, label: str = "training", every: int = 10, quiet: bool = False):
        self._label, self._every, self._quiet, self._updates = label, every, quiet, 0
        self._first = (total, 0.0)  # steps done at the first update, and when it was
        self._bar: Any = None
        if sys.stderr.isatty() and not quiet:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn(label),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[text]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=start, text="")

    def update(self, done: int, total: int, text: str = "") -> None:
        """``done`` of ``total`` (which may have changed); ``text`` stands beside them."""
        self._updates += 1
        if self._updates == 1:
            self._first = (done, time.perf_counter())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)
        elif not self._quiet and (self._updates % self._every == 1 or self._every == 1 or done == total):
            left = ""
            if done > self._first[0]:  # the first update waited for what does not come again
                per_step = (time.perf_counter() - self._first[1]) / (done - self._first[0])
                left = f"  {per_step * (total - done):.0f} s left"
            print(f"{self._label} {done}/{total}  {text}{left}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def plot_loss(
    records: list[dict[str, Any]], path: pathlib.Path, *, title: str = "", lines: dict[str, float] | None = None
) -> None:
    """Draws the training loss (raw and smoothed) and held-out bits per byte over tokens.

    Args:
        records: lines of ``metrics.jsonl``.
        path: PNG to write.
        title: above the plot.
        lines: horizontal lines of the bits-per-byte panel, name -> value (baselines).
    """
    train, held = (
        [(r["tokens_seen"] / 1e6, r[name]) for r in records if r.get(name) is not None]
        for name in ("loss", "held_out_bits_per_byte")
    )
    if not train:
        return
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    panels = 2 if held else 1
    figure = Figure(figsize=(5.5 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)
    left = axes[0][0]
    x, y = zip(*train, strict=True)
    smooth, value, seen = [], 0.0, 0.0
    for point in y:
        value, seen = 0.95 * value + 0.05 * point, 0.95 * seen + 0.05
        smooth.append(value / seen)
    left.plot(x, y, color="0.8", linewidth=0.8, label="each logged step")
    left.plot(x, smooth, color="C0", label="running mean")
    left.set(xlabel="tokens seen (millions)", ylabel="training loss (nats per token)")
    left.set_title(title, parse_math=False)  # the name of a folder
    left.set_ylim(min(smooth) * 0.95, max(smooth) * 1.02)
    left.legend(frameon=False)
    if held:
        right = axes[0][1]
        right.plot(
            *zip(*held, strict=True), color="C1", marker="o", markersize=3, label="model, the first held-out files"
        )
        for index, (name, level) in enumerate((lines or {}).items()):
            right.axhline(level, color=f"C{index + 2}", linestyle="--", linewidth=1, label=f"{name} {level:.2f}")
        right.set(xlabel="tokens seen (millions)", ylabel="bits per byte, held-out")
        right.legend(frameon=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_atomic(path, png.getvalue())
