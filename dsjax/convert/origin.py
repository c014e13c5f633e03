"""A folder of Hugging Face's layout, and what a run keeps of the one that it was converted from.

hf/
  files/NAME          every file but weights, byte for byte: config.json, tokenizer.json, ...
  headers/NAME        the header of each .safetensors file: names, types, order and what else it says
  kept/NAME           a .safetensors file of what was in it and is not the model's
  manifest.json       their sizes and SHA-256
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import numpy as np

from dsjax import manifest
from dsjax.config import UserError, read_json
from dsjax.tensor_files import DTYPES, INDEX, TensorFiles

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
FOLDER = "hf"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")  # weights a second time, in a form that nothing here reads
_COPIED = 2**24  # bytes at a time


@dataclasses.dataclass(frozen=True)
class Shard:
    """One .safetensors file: its header as it stands in the file, and its tensors in the order of their bytes."""

    name: str
    header: bytes
    tensors: tuple[str, ...]


class HFFolder:
    """A model in Hugging Face's layout.

    Raises:
        UserError: it holds none, or its index and its files differ.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        if not (path / CONFIG).is_file():
            raise UserError(f"{path} holds no {CONFIG}, so no model")
        self.config: dict[str, Any] = read_json(path / CONFIG)
        if not isinstance(self.config, dict):
            raise UserError(f"{path / CONFIG} holds no JSON object")
        self.tensors = TensorFiles(path)
        by_file: dict[str, list[str]] = {}
        for name in self.tensors:
            by_file.setdefault(self.tensors.kind(name).file.relative_to(path).as_posix(), []).append(name)
        self.shards = [self._shard(file, names) for file, names in sorted(by_file.items())]

    def _shard(self, file: str, listed: list[str]) -> Shard:
        held = TensorFiles(self.path / file)
        for name in held:
            if name not in self.tensors:
                raise UserError(f"{self.path / file}: tensor {name[:100]!r} is not in {INDEX}")
            if (other := self.tensors.kind(name).file) != self.path / file:
                raise UserError(
                    f"{self.path / file}: tensor {name[:100]!r} is also in {other.name}, where {INDEX} has it"
                )
        with (self.path / file).open("rb") as opened:
            length = opened.read(8)
            header = length + opened.read(int.from_bytes(length, "little"))
        return Shard(file, header, tuple(sorted(listed, key=lambda name: held.kind(name).offset)))

    def other_files(self) -> tuple[list[str], list[str]]:
        """The files that are to be kept as they are, and those that are left out since they are pickled weights."""
        weights = {shard.name for shard in self.shards}
        every = manifest.files_of(self.path, hidden=True)
        names = [n for n in every if n not in weights and (self.path / n).is_file()]
        if (self.path / manifest.FILE).is_file():
            names.append(manifest.FILE)
        return sorted(n for n in names if not n.endswith(PICKLED)), sorted(n for n in names if n.endswith(PICKLED))

    def facts(self) -> Any:
        """What tells this folder from another one, or from itself after a change, without reading it all."""
        names = [shard.name for shard in self.shards] + self.other_files()[0]
        states = {name: (self.path / name).stat() for name in names}
        return [[name, state.st_size, state.st_mtime_ns] for name, state in sorted(states.items())]


def kept_as(name: str) -> str:
    """Where in ``hf/`` a file is kept: under a name that a manifest may have, so not a hidden one."""
    plain = (c if c.isprintable() and c not in "%:\\" else quote(c, errors="surrogateescape") for c in name)
    return f"files/{''.join(plain)}".replace("/.", "/%2E")


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Any = None) -> bytes:
    """The header of a .safetensors file, from type, shape and bytes of each tensor in their order."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def entries_of(header: bytes) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], Any]:
    """The inverse of :func:`header_of`."""
    entries = json.loads(header[8:])
    metadata = entries.pop("__metadata__", None)
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in ordered}
    return {name: (entry["dtype"], tuple(entry["shape"]), sizes[name]) for name, entry in ordered}, metadata


def dtype_name(dtype: Any) -> str:
    """The name that .safetensors files have for a NumPy type."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file to write, which has its name once it is whole and on the disk; what was left of an earlier try goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: pathlib.Path, content: Any, indent: int = 2) -> None:
    """Writes a JSON file."""
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=indent) + "\n").encode())


def copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file's content."""
    with source.open("rb") as read, written_whole(target) as written:
        shutil.copyfileobj(read, written, _COPIED)


def write_tensors(path: pathlib.Path, names: Iterable[str], tensors: TensorFiles) -> None:
    """Writes tensors, as they are, into a file of their own, one at a time."""
    kinds = {name: tensors.kind(name) for name in names}
    sizes = {name: (dtype_name(k.dtype), k.shape, k.dtype.itemsize * math.prod(k.shape)) for name, k in kinds.items()}
    with written_whole(path) as file:
        file.write(header_of(sizes))
        for name in names:
            file.write(tensors[name].reshape(-1).view(np.uint8).data)


class Origin:
    """What a run keeps of the folder that it comes from, its content verified.

    Attributes:
        headers: of the files of weights, by their names.
        kept: what was in them and is not the model's.
        tensors: the names of all tensors.
        config: the fields of config.json.

    Raises:
        UserError: it is damaged.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        try:
            self.about = manifest.read(folder)
            manifest.verify(folder, self.about)
        except manifest.Damaged as error:
            raise UserError(f"{folder} is damaged: {error}") from None
        self.headers = {name.removeprefix("headers/"): (folder / name).read_bytes() for name in self._below("headers/")}
        self.kept = {name: TensorFiles(folder / name) for name in self._below("kept/")}
        self.tensors = frozenset(name for header in self.headers.values() for name in entries_of(header)[0])
        self.config: dict[str, Any] = read_json(self.files()[CONFIG])

    def _below(self, prefix: str) -> list[str]:
        return sorted(name for name in self.about["files"] if name.startswith(prefix))

    def files(self) -> dict[str, pathlib.Path]:
        """Every file but weights, by the name that it had."""
        names = {name: name.removeprefix("files/") for name in self._below("files/")}
        return {unquote(kept, errors="surrogateescape"): self.folder / name for name, kept in names.items()}
