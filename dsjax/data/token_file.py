"""Token arrays on disk that are checked, block by block, each time they are read.

A token file may be larger than memory and a run may last for weeks. Mapped into memory, a bit that flips is trained
on, and a file that is cut short kills the process by SIGBUS. So blocks are read with `pread`, and each is compared
with a part of its SHA-256 that was noted when the file was written. The file stays open: deleting it, or renaming
another into its place, changes nothing for who reads it.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Integer

from dsjax import manifest
from dsjax.config import UserError

BLOCK = 2**12  # bytes that are checked together
_CHECK = 8  # bytes kept of each block's SHA-256: damage that is no attack passes once in 2**64
_CHUNK = 2**12  # blocks in memory at once while a whole file is read


def write_parts(path: pathlib.Path, parts: Iterable[np.ndarray]) -> bytes:
    """Writes one array after the other, all of one dtype, as they are in memory; returns the check of each block."""
    checks, left = [], b""
    with path.open("wb") as file:
        for part in parts:
            content = left + part.tobytes()
            file.write(memoryview(content)[len(left) :])
            whole = len(content) // BLOCK * BLOCK
            checks += [_check(content[at : at + BLOCK]) for at in range(0, whole, BLOCK)]
            left = content[whole:]
    return b"".join((*checks, _check(left))) if left else b"".join(checks)


def write_tokens(path: pathlib.Path, tokens: Integer[np.ndarray, " N"]) -> bytes:
    """Writes tokens as they are in memory; returns the check of each block."""
    content = memoryview(tokens.tobytes())
    path.write_bytes(content)
    return b"".join(_check(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK))


def _check(block: Any) -> bytes:
    return hashlib.sha256(block).digest()[:_CHECK]


class TokenFile:
    """A file of tokens, for slices and `np.asarray`.

    Args:
        path: written by :func:`write_tokens`.
        dtype: of the tokens.
        num_bytes: how long the file was.
        checks: what `write_tokens` returned.

    Attributes:
        size: number of tokens.

    Raises:
        UserError: here and at every read, that the file is damaged, where, and what to do. The manifest beside it is
            removed then, so that the next start makes the whole folder anew.
    """

    def __init__(self, path: pathlib.Path, *, dtype: Any, num_bytes: int, checks: bytes):
        self.path, self.dtype, self._checks, self._num_bytes = path, np.dtype(dtype), checks, num_bytes
        self.size = num_bytes // self.dtype.itemsize
        try:
            self._handle = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)
            found = os.fstat(self._handle).st_size
        except OSError as error:
            raise self._damaged(0, error.strerror or str(error)) from None
        if found != num_bytes:
            raise self._damaged(min(found, num_bytes), f"it has {found} bytes instead of {num_bytes}")
        if len(checks) != -(-num_bytes // BLOCK) * _CHECK:
            raise self._damaged(0, f"there are checks for {len(checks) // _CHECK * BLOCK} bytes of it")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, span: slice) -> Integer[np.ndarray, " n"]:
        begin, end, step = span.indices(self.size)
        if end <= begin:
            return np.empty(0, self.dtype)
        width = self.dtype.itemsize
        first, last = begin * width // BLOCK, -(-end * width // BLOCK)
        content, skip = self._read(first, last), first * BLOCK
        return np.frombuffer(content, self.dtype, end - begin, begin * width - skip)[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # always one
        out = np.empty(self.size, self.dtype)
        flat = out.view(np.uint8)
        for first in range(0, len(self._checks) // _CHECK, _CHUNK):
            content = self._read(first, first + _CHUNK)
            flat[first * BLOCK : first * BLOCK + len(content)] = np.frombuffer(content, np.uint8)
        return out if dtype is None else out.astype(dtype, copy=False)

    def verify(self) -> None:
        """Reads and checks every block."""
        for first in range(0, len(self._checks) // _CHECK, _CHUNK):
            self._read(first, first + _CHUNK)

    def _read(self, first: int, last: int) -> bytes:
        """The content of blocks first .. last (or the end), checked."""
        begin, end = first * BLOCK, min(last * BLOCK, self._num_bytes)
        try:
            content = os.pread(self._handle, end - begin, begin)
            while len(content) < end - begin:
                more = os.pread(self._handle, end - begin - len(content), begin + len(content))
                if not more:
                    raise self._damaged(begin + len(content), "it was cut short")
                content += more
        except OSError as error:
            raise self._damaged(begin, error.strerror or str(error)) from None
        view = memoryview(content)
        for at in range(0, end - begin, BLOCK):
            noted = (begin + at) // BLOCK * _CHECK
            if _check(view[at : at + BLOCK]) != self._checks[noted : noted + _CHECK]:
                size = min(BLOCK, end - begin - at)
                raise self._damaged(begin + at, f"the {size} bytes from there are not those that were written")
        return content

    def _damaged(self, offset: int, what: str) -> UserError:
        try:
            (self.path.parent / manifest.FILE).unlink(missing_ok=True)
            remedy = "start the command again: the prepared data is then made anew"
        except OSError:
            remedy = f"delete the folder {self.path.parent} and start the command again"
        return UserError(f"{self.path} is damaged at byte {offset}: {what}; {remedy}")
