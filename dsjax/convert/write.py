"""From a run of ours to a folder of Hugging Face's layout, a tensor at a time.

A run that was converted from such a folder, and not trained since, gives its files back byte for byte. What was
trained keeps the folder's files, shards and names, with its own numbers; a run without an origin, or whose model has
become another one, gets shards by size.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from dsjax.config import UserError, read_json
from dsjax.convert.fp8 import BF16, FP8, SCALE
from dsjax.convert.journal import Journal, identity
from dsjax.convert.origin import (
    CONFIG,
    TOKENIZER,
    copy_file,
    dtype_name,
    entries_of,
    header_of,
    write_json,
    written_whole,
)
from dsjax.convert.parallel import each
from dsjax.convert.read import FORMAT, IN_FLIGHT, Say, check_space, is_file_of, silent, told
from dsjax.convert.run_tensors import RunTensors
from dsjax.convert.store import blocks
from dsjax.data.tokenizer import load_tokenizer
from dsjax.tensor_files import DTYPES, INDEX, SINGLE

EMBEDDING = "model.embed_tokens.weight"
SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What can be asked of an export.

    Attributes:
        shard_bytes: of a file at the most; None: the origin's files, or :data:`SHARD_BYTES`.
        dtype: of weights; None: the origin's if nothing was trained since, else the run's.
        fp8: weights that were 8-bit in the origin are so again, though they were trained.
    """

    shard_bytes: int | None = None
    dtype: str | None = None
    fp8: bool = False


@dataclasses.dataclass(frozen=True)
class OutFile:
    """A .safetensors file to be written: its header, and where in it each tensor begins."""

    name: str
    header: bytes

    def tensors(self) -> Iterator[tuple[str, np.dtype, int, int]]:
        """Name, type, offset in the file and bytes of each tensor."""
        offset = len(self.header)
        for name, (dtype, _, size) in entries_of(self.header)[0].items():
            yield name, np.dtype(DTYPES[dtype]), offset, size
            offset += size

    @property
    def bytes(self) -> int:
        return len(self.header) + sum(size for _, _, _, size in self.tensors())


Entries = dict[str, tuple[str, tuple[int, ...], int]]  # tensor -> type, shape and bytes, in the order of a file


class Export:
    """What an export writes: which files, and what each tensor in them is.

    Raises:
        UserError: the options ask for what the run can not give.
    """

    def __init__(self, tensors: RunTensors, options: ExportOptions):
        self.tensors, self.options, origin = tensors, options, tensors.origin
        self._as_before = not tensors.trained and options.dtype is None
        self.fp8 = tensors.kept_fp8 and (self._as_before or options.fp8)
        if options.fp8 and options.dtype is not None:
            raise UserError(
                f"--dtype is {options.dtype!r}; beside --keep-fp8, with which every weight has the type that it had in"
                " the folder, it must be left out"
            )
        if options.fp8 and not self.fp8:
            raise UserError(
                "--keep-fp8: the run keeps no scales of 8-bit weights; its conversion was not asked to, or the model"
                " has become another one since"
            )
        headers = {SINGLE: header_of(self._own_entries())} if origin is None else origin.headers
        before = {name: entries_of(header) for name, header in headers.items()}
        every = {name: entry for entries, _ in before.values() for name, entry in entries.items()}
        self.eight_bit = {name for name, entry in every.items() if np.dtype(DTYPES[entry[0]]) == FP8}
        now = {name: self._now(entries) for name, (entries, _) in before.items()}
        self.same_types = origin is not None and all(now[name] == entries for name, (entries, _) in before.items())
        self.main_dtype = self._dtype(EMBEDDING, np.dtype(DTYPES[every[EMBEDDING][0]]))
        most = options.shard_bytes or (SHARD_BYTES if origin is None else None)
        if most is not None:
            self.files = _by_size({name: entry for entries in now.values() for name, entry in entries.items()}, most)
        elif self.same_types:
            self.files = [OutFile(name, header) for name, header in headers.items()]
        else:
            self.files = [OutFile(name, header_of(now[name], metadata)) for name, (_, metadata) in before.items()]
        self.same_files = origin is not None and {file.name: file.header for file in self.files} == headers

    def _own_entries(self) -> Entries:
        """Every tensor of a model without an origin."""
        return {name: self._entry(place.shape, self.tensors.dtype(name)) for name, place in self.tensors.places.items()}

    def _entry(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[str, tuple[int, ...], int]:
        return dtype_name(dtype), shape, math.prod(shape) * dtype.itemsize

    def _now(self, entries: Entries) -> Entries:
        """The tensors of a file with the types that they get."""
        now = {}
        for name, entry in entries.items():
            if self._is_scale(name) and not self.fp8:
                continue
            if not self._is_scale(name) and (name in self.tensors.places or name in self.eight_bit):
                entry = self._entry(entry[1], self._dtype(name, np.dtype(DTYPES[entry[0]])))
            now[name] = entry
        return now

    def _is_scale(self, name: str) -> bool:
        return name.removesuffix(SCALE) in self.eight_bit and name.endswith(SCALE)

    def _dtype(self, name: str, before: np.dtype) -> np.dtype:
        if before == FP8:
            if self.fp8:
                return before
            before = BF16
        place = self.tensors.places.get(name)
        if self._as_before or self.fp8 or place is None:
            return before
        is_weight = place.variables[0].startswith("params/")  # what biases the choice of experts keeps its type
        return np.dtype(self.options.dtype) if self.options.dtype and is_weight else self.tensors.dtype(name)

    def tensor(self, name: str, dtype: np.dtype) -> np.ndarray:
        """The content of a tensor of an output file, of the type that its header states."""
        tensors = self.tensors
        if self._is_scale(name):
            weight = name.removesuffix(SCALE)
            return tensors.fp8(weight)[1] if tensors.trained and weight in tensors.places else tensors[name]
        if name in tensors.places:
            return tensors.fp8(name)[0] if dtype == FP8 else tensors[name].astype(dtype, copy=False)
        return tensors[name] if dtype == FP8 else tensors.plain(name)


def _by_size(entries: Entries, most: int) -> list[OutFile]:
    """The tensors in files of at most so many bytes, or of one tensor that is larger."""
    groups: list[Entries] = [{}]
    for name, entry in entries.items():
        if groups[-1] and entry[2] + sum(size for _, _, size in groups[-1].values()) > most:
            groups.append({})
        groups[-1][name] = entry
    names = [SINGLE] if len(groups) == 1 else [_numbered(i, len(groups)) for i in range(len(groups))]
    metadata = {"format": "pt"}
    return [OutFile(name, header_of(group, metadata)) for name, group in zip(names, groups, strict=True)]


def _numbered(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def run_to_hf(
    tensors: RunTensors, target: pathlib.Path, options: ExportOptions = ExportOptions(), say: Say = silent
) -> None:
    """Writes a folder of Hugging Face's layout; if that was begun, goes on.

    Args:
        tensors: of the run.
        target: a new folder, or one that a killed export of the same run left.
        options: see :class:`ExportOptions`.
        say: told of the progress.

    Raises:
        UserError: the target can not be written, or the options do not fit the run.
    """
    export = Export(tensors, options)
    work = identity([FORMAT, tensors.about["files"], dataclasses.asdict(options)])
    total = sum(file.bytes for file in export.files)
    with told(target), Journal(target, work) as journal:
        there = {name for name, size in journal.done.items() if is_file_of(target / name, size)}
        missing = [file for file in export.files if file.name not in there]
        done = total - sum(file.bytes for file in missing)
        check_space(target, sum(file.bytes for file in missing))
        for file in missing:
            for size in write_file(target, file, export):
                done += size
                say(done, total, file.name)
            journal.add(file.name, file.bytes, [target / file.name])
        journal.finish()
        write_rest(target, export)
        journal.complete()


def write_file(target: pathlib.Path, file: OutFile, export: Export) -> Iterator[int]:
    """Writes a .safetensors file, which has its name once it is whole; tells the bytes of each tensor."""
    with written_whole(target / file.name) as opened:
        opened.write(file.header)
        opened.truncate(file.bytes)
        opened.flush()

        def write(tensor: tuple[str, np.dtype, int, int]) -> None:
            name, dtype, offset, _ = tensor
            for block in blocks(export.tensor(name, dtype)):
                offset += _write_at(opened.fileno(), block, offset)

        yield len(file.header)
        memory = ((t, t[3] * (6 if t[1] == FP8 else 1)) for t in file.tensors())  # bfloat16, and that once more
        for tensor, _ in each(write, memory, IN_FLIGHT):
            yield tensor[3]


def _write_at(handle: int, block: memoryview, offset: int) -> int:
    written = 0
    while written < len(block):
        written += os.pwrite(handle, block[written:], offset + written)
    return written


def write_rest(target: pathlib.Path, export: Export) -> None:
    """Writes everything but weights; config.json last, since without it the folder is no model."""
    tensors = export.tensors
    config, files = dict(tensors.hf_config), tensors.files
    for name, path in files.items():
        if name not in (CONFIG, INDEX):
            copy_file(path, target / name)
    if export.same_files and INDEX in files:
        copy_file(files[INDEX], target / INDEX)
    elif len(export.files) > 1:
        sizes = {name: size for file in export.files for name, _, _, size in file.tensors()}
        where = {name: file.name for file in export.files for name, *_ in file.tensors()}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
        write_json(target / INDEX, index)
    if not files:
        _write_tokenizer(tensors, target)
    if export.same_types:
        copy_file(files[CONFIG], target / CONFIG)
        return
    if not export.fp8:
        config.pop("quantization_config", None)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(export.main_dtype)
    write_json(target / CONFIG, config)


def _write_tokenizer(tensors: RunTensors, target: pathlib.Path) -> None:
    """Writes the files that Hugging Face's library wants of a tokenizer of ours: what ends a text begins it, too."""
    if not tensors.run.tokenizer.is_file():
        return
    end = tensors.config.data.end_token
    end_id = load_tokenizer(tensors.run.tokenizer, end_token=end).end_id
    put, text = {"SpecialToken": {"id": end, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    in_front = {
        "type": "TemplateProcessing",
        "single": [put, text],
        "pair": [put, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {end: {"id": end, "ids": [end_id], "tokens": [end]}},
    }
    write_json(target / TOKENIZER, read_json(tensors.run.tokenizer) | {"post_processor": in_front})
    names = {"eos_token": end, "bos_token": end, "add_bos_token": True}
    write_json(target / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    ends = {"eos_token_id": tensors.hf_config["eos_token_id"]}
    write_json(target / "generation_config.json", ends)
