"""Test data that must not be in a corpus: a file that shares ten tokens in a row with it is dropped.

DeepSeek-Coder (section 2.4) does so with HumanEval, MBPP and others. Tokens are words and signs, white space does not
count; what is shorter than ten tokens is not looked for.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt64

from dsjax.config import UserError
from dsjax.data.corpus import missing_path
from dsjax.data.dedup import Shingles

WIDTH = 10  # tokens


def shingles_of_tests(paths: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """The sorted shingles of all texts in some files: of JSON lines every string, of other files the whole.

    Raises:
        UserError: a file can not be read, or holds no text of ten tokens.
    """
    shingle = Shingles(WIDTH)
    found = [np.empty(0, np.uint64)]
    for name in paths:
        texts = list(_texts(name))
        sets = [shingle(text) for text in texts if shingle.has_full(text)]
        if not sets:
            raise UserError(f"decontaminate has {name}, which holds no text of {WIDTH} tokens or more")
        found += sets
    return np.unique(np.concatenate(found))


def _texts(name: str) -> Iterator[str]:
    path = pathlib.Path(name).expanduser()
    if not path.exists():
        raise UserError(f"decontaminate: {missing_path(name, path)}")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"decontaminate: {name} can not be read ({error})") from None
    if ".json" not in path.name:
        yield text
        return
    try:
        records = [json.loads(text)] if text.startswith("[") else [json.loads(x) for x in text.split("\n") if x.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"decontaminate: {name} is not JSON ({error})") from None
    yield from _strings(records)


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, list | dict):
            waiting += inner.values() if isinstance(inner, dict) else inner
