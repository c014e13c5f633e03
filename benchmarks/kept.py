"""Figures of finished runs, a line of JSON each, so that a study can be stopped and goes on."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any


class KeptLines:
    """The lines of a file. A run is known by some of its fields, its key.

    Attributes:
        lines: what the file has, in its order.
        folder: that it lies in.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self.folder = path, path.parent
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.parent.mkdir(parents=True, exist_ok=True)

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The first line with these fields."""
        return next((line for line in self.lines if key.items() <= line.items()), None)

    def get(self, make: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The line with these fields; if there is none, it is made, and written at once."""
        if (found := self.find(**key)) is not None:
            return found
        line = key | make()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line
