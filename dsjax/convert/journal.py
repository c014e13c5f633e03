"""What of a long conversion is done: a file of lines, so that a killed one goes on where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pathlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsjax.config import UserError

FILE = ".converting.jsonl"


def identity(facts: Any) -> str:
    """A text that is the same for the same work."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _entries(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """What the lines of a journal say, up to the first that is damaged: what it stands for is done once more."""
    for line in lines:
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError):
            return
        if not isinstance(entry, dict):
            return
        yield entry


class Journal:
    """The finished parts of a conversion, by name, in ``folder``.

    A part is noted once its files are on the disk, which a thread sees to.

    Args:
        folder: where the result goes; made if missing.
        work: :func:`identity` of the conversion.

    Raises:
        UserError: the folder holds something else, or another conversion is at work there.
    """

    def __init__(self, folder: pathlib.Path, work: str):
        path = folder / FILE
        if folder.exists() and not path.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already; convert into a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.done: dict[str, Any] = {}
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"another process converts into {folder}; wait for it, or take another folder") from None
        self._take_up(work)
        self._queue: queue.Queue[tuple[str, Any, Sequence[pathlib.Path]] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._note, daemon=True)
        self._thread.start()

    def _take_up(self, work: str) -> None:
        lines = self.path.read_bytes().split(b"\n")[:-1]  # behind the last line break is what a killed process left
        entries = list(_entries(lines))
        if lines and entries[:1] != [{"work": work}]:
            self._file.close()
            raise UserError(
                f"{self.path.parent} holds half of another conversion (another source, other options or another"
                f" version), or its {FILE} is damaged; remove the folder, or convert into another one"
            )
        self.done = {name: entry for found in entries[1:] for name, entry in found.items()}
        self._file.truncate(sum(len(line) + 1 for line in lines[: len(entries)]))
        if not lines:
            self._file.write(json.dumps({"work": work}) + "\n")
            self._file.flush()

    def add(self, name: str, entry: Any, files: Sequence[pathlib.Path]) -> None:
        """A part is finished: ``entry`` is what is to be known of it, ``files`` are its files.

        Raises:
            OSError: the files of an earlier part could not be brought to the disk.
        """
        self._raise()
        self._queue.put((name, entry, files))

    def _note(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                name, entry, files = item
                for path in files:
                    handle = os.open(path, os.O_RDONLY)
                    try:
                        os.fsync(handle)
                    finally:
                        os.close(handle)
                self._file.write(json.dumps({name: entry}) + "\n")
                self._file.flush()
                self.done[name] = entry
            os.fsync(self._file.fileno())
        except BaseException as error:  # told by the next call
            self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def finish(self) -> Mapping[str, Any]:
        """Waits until all parts are on the disk; returns their entries.

        Raises:
            OSError: they can not be brought there.
        """
        self._queue.put(None)
        self._thread.join()
        self._raise()
        return self.done

    def complete(self) -> None:
        """Nothing is left to be taken up."""
        self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._queue.put(None)
        self._thread.join()
        self._file.close()
