"""Draws what a model is told of a function: ``python -m benchmarks.structure_picture docs/images/structure.png``."""

from __future__ import annotations

import inspect
import pathlib
import platform
import sys
import sysconfig

from dsjax.data.structure.picture import picture
from dsjax.data.tokenizer import train_tokenizer

VOCAB_SIZE = 4096  # as configs/coder


def draw(path: pathlib.Path) -> None:
    """A function of the standard library, with a tokenizer that was trained on its top-level modules."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokenizer = train_tokenizer((file.read_text(encoding="utf-8") for file in files), VOCAB_SIZE)
    function = inspect.getsource(vars(platform)["_comparable_version"])
    picture(function, tokenizer, at="(t, v").savefig(path, dpi=160)


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]))
