"""From a folder of Hugging Face's layout to a run of ours, a tensor at a time.

    RUN/
      config.json  tokenizer.json
      hf/              what the model does not need and the way back does (see origin.py)
      checkpoints/0/   state/, host.json, manifest.json: as of every run, without optimizer and random numbers

The arrays are written into ``checkpoints/.saving-0``, which one rename makes step 0 at the end. What is finished is
noted in a journal, so that a killed conversion goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dsjax import manifest
from dsjax.config import UserError, from_dict, to_dict
from dsjax.convert.fp8 import Dequantized, block_size, quantize
from dsjax.convert.journal import Journal, identity
from dsjax.convert.names import Matched, check_copies, match
from dsjax.convert.origin import CONFIG, FOLDER, TOKENIZER, HFFolder, copy_file, kept_as, write_json, write_tensors
from dsjax.convert.parallel import each
from dsjax.convert.store import arranged, write_array_files, write_part
from dsjax.data.hf_tokenizer import end_token_of
from dsjax.models.decoder import DecoderConfig

FORMAT = 1  # of what is written; another one takes nothing up that this one left
IN_FLIGHT = 2**27  # bytes of tensors under way at a time
Say = Callable[[int, int, str], None]  # (bytes done, of so many, what)


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be asked of a conversion.

    Attributes:
        mesh: devices along each axis of the mesh that will read the run, ``fsdp=4,expert=8``; empty: one.
        keep_fp8: keep the scales of 8-bit weights, so that the way back gives these weights, byte for byte.
    """

    mesh: str = ""
    keep_fp8: bool = False


def silent(done: int, total: int, what: str) -> None:
    """Tells nobody of the progress."""


def hf_to_run(
    source: HFFolder, config: DecoderConfig, target: pathlib.Path, options: Options = Options(), say: Say = silent
) -> None:
    """Writes the run of a model; if that was begun, goes on.

    Args:
        source: the model.
        config: what its config.json describes.
        target: the run folder: a new one, or one that a killed conversion of the same source left.
        options: see :class:`Options`.
        say: told of the progress.

    Raises:
        UserError: names the tensor or file that is unknown, missing or damaged, or why the target can not be written.
    """
    tensors = Dequantized(source.tensors, block_size(source.config))
    matched = match(tensors, source.config, config)
    check_copies(tensors, matched.copies)
    job = _Job(source, tensors, matched, target, options, say)
    run = run_config(source, config, target, job.dtype)
    work = identity([FORMAT, source.facts(), to_dict(config), dataclasses.asdict(options)])
    with told(target), Journal(target, work) as journal:
        if not job.committed.exists():
            job.check_space(journal)
            job.keep_rest()
            job.write_arrays(journal)
            write_json(target / CONFIG, to_dict(run), indent=1)
            job.commit(journal.finish(), work)
        journal.complete()


class _Job:
    """The steps of a conversion, in their order."""

    def __init__(
        self,
        source: HFFolder,
        tensors: Dequantized,
        matched: Matched,
        target: pathlib.Path,
        options: Options,
        say: Say,
    ):
        self.source, self.tensors, self.matched, self.target, self.say = source, tensors, matched, target, say
        self.keep_fp8 = options.keep_fp8
        depth = {path: len(place.index) for place in matched.places.values() for path in place.variables}
        found = {path: (matched.variables[path], dtype, depth[path]) for path, dtype in matched.dtypes.items()}
        self.arrays = arranged(found, options.mesh)
        self.dtype = matched.dtypes["params/embedding"]
        self.staging, self.committed = target / "checkpoints" / ".saving-0", target / "checkpoints" / "0"
        self.sizes = {name: self._bytes(name) for name in tensors}

    def _bytes(self, name: str) -> int:
        kind = self.source.tensors.kind(name)
        return math.prod(kind.shape) * kind.dtype.itemsize

    def check_space(self, journal: Journal) -> None:
        """Nothing is begun that the disk has no room for."""
        arrays = sum(math.prod(array.shape) * array.dtype.itemsize for array in self.arrays.values())
        written = sum(entry["bytes"] for files in journal.done.values() for entry in files.values())
        check_space(self.target, arrays - written)

    def keep_rest(self) -> None:
        """Writes ``hf/``: everything but the model's weights."""
        folder = self.target / FOLDER
        kept = set(self.matched.kept)
        kept |= {scale for name, scale in self.tensors.scales.items() if self.keep_fp8 or name in kept}
        with contextlib.suppress(manifest.Damaged):
            manifest.read(folder)
            return  # a conversion that was killed later has written it
        files, left_out = self.source.other_files()
        for name in files:
            copy_file(self.source.path / name, folder / kept_as(name))
        for shard in self.source.shards:
            path = folder / "headers" / shard.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(shard.header)
            if names := [name for name in shard.tensors if name in kept]:
                write_tensors(folder / "kept" / shard.name, names, self.source.tensors)
        about = {"kept_fp8": self.keep_fp8, "left_out": left_out}
        manifest.write(folder, about, manifest.inventory(folder, manifest.files_of(folder)))

    def write_arrays(self, journal: Journal) -> None:
        """Writes every tensor that is not there yet to its place."""
        state = self.staging / "state"
        state.mkdir(parents=True, exist_ok=True)
        write_array_files(state, self.arrays)
        todo = [name for shard in self.source.shards for name in shard.tensors if name in self.matched.places]
        there = {name for name, files in journal.done.items() if self._are_there(files)}
        total = sum(self.sizes[name] for name in todo)
        done = sum(self.sizes[name] for name in there)
        memory = {name: self.sizes[name] * (4 if name in self.tensors.scales else 1) for name in todo}  # bfloat16, too
        left = [(name, memory[name]) for name in todo if name not in there]
        for name, files in each(self._write_tensor, left, IN_FLIGHT):
            journal.add(name, files, [state / file for file in files])
            done += self.sizes[name]
            self.say(done, total, self.source.tensors.kind(name).file.name)

    def _are_there(self, files: Mapping[str, dict[str, Any]]) -> bool:
        """Whether the files of a tensor are as long as they were: not if the machine went down since."""
        return all(is_file_of(self.staging / "state" / name, entry["bytes"]) for name, entry in files.items())

    def _write_tensor(self, name: str) -> dict[str, Any]:
        """Reads a tensor and writes its parts; size and SHA-256 of each file."""
        place, x = self.matched.places[name], self.tensors[name]
        if self.keep_fp8 and name in self.tensors.scales:
            self._check_kept(name, x)
        written = {}
        for path, part in zip(place.variables, place.split(x), strict=True):
            array = self.arrays[path]
            written[array.file(place.index)] = write_part(self.staging / "state", array, place.index, part)
        return written

    def _check_kept(self, name: str, x: np.ndarray) -> None:
        files, tensors = self.source.tensors, self.tensors
        if quantize(x, files[tensors.scales[name]], tensors.block).tobytes() != files[name].tobytes():
            raise UserError(
                f"{files.kind(name).file}: the 8-bit values of tensor {name!r} can not be found again from bfloat16"
                " (not finite, or a scale of 0); convert without --keep-fp8"
            )

    def commit(self, written: Mapping[str, dict[str, Any]], work: str) -> None:
        """The manifest, and the rename that makes step 0."""
        (self.staging / "host.json").write_text(json.dumps({"converted": work}), encoding="utf-8")
        files = {f"state/{name}": entry for part in written.values() for name, entry in part.items()}
        rest = [name for name in manifest.files_of(self.staging) if name not in files]
        about: dict[str, Any] = {
            "format": 1,
            "step": 0,
            "converted": work,
            "arrays": {a.name: {"shape": list(a.shape), "dtype": str(a.dtype)} for a in self.arrays.values()},
        }
        tokenizer = self.source.path / TOKENIZER
        if tokenizer.is_file():
            copy_file(tokenizer, self.target / TOKENIZER)
            about["tokenizer_sha256"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        manifest.write(self.staging, about, files | manifest.inventory(self.staging, rest))
        self.staging.rename(self.committed)
        manifest.sync_folder(self.committed.parent)


def run_config(source: HFFolder, config: DecoderConfig, target: pathlib.Path, dtype: np.dtype) -> Any:
    """The config of the run: that of a pre-training with the model, and everything else as it is by default."""
    data: dict[str, Any] = {"type": "dsjax.data.prepare:DataConfig", "vocab_size": config.vocab_size}
    data["tokenizer_path"] = str(target.resolve() / TOKENIZER)
    if (end := end_token_of(source.path)) is not None:
        data["end_token"] = end
    compute = {
        "type": "dsjax.models.decoder:ComputeConfig",
        "dtype": "bfloat16" if str(dtype) == "bfloat16" else "float32",
    }
    recipe = {"type": "dsjax.train.pretrain:Pretrain", "model": to_dict(config), "data": data, "compute": compute}
    return from_dict(recipe, str(source.path / "config.json"))


def is_file_of(path: pathlib.Path, size: int) -> bool:
    """Whether there is a file of so many bytes."""
    return path.is_file() and path.stat().st_size == size


def check_space(folder: pathlib.Path, needed: int) -> None:
    """Nothing is begun that the disk has no room for.

    Raises:
        UserError: there is less.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} needs {needed / 1e9:,.2f} GB more; the disk has {free / 1e9:,.2f} GB free")


@contextlib.contextmanager
def told(target: pathlib.Path) -> Iterator[None]:
    """What the file system has against a conversion, as one sentence."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"converting into {target} stopped: {error.strerror or error}{where}; the same command goes on from here"
        ) from error
