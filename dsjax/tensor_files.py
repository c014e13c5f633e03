"""Tensors in .safetensors files, one file or many with an index, each read from disk when it is asked for.

    tensors = TensorFiles("DeepSeek-V3")          # a file, or a folder: NAME -> array, a Mapping
    tensors["model.norm.weight"]                  # numpy; bfloat16 and float8 by ml_dtypes
    tensors.kind("model.norm.weight")             # shape and dtype, nothing read

The `safetensors` library checks each header: sizes, bounds, that tensors fill the file without gap or overlap. It has
no NumPy arrays of 8-bit floats, so the bytes are read here. They are read, not mapped: a file that is cut short in
the meantime is an error and not the end of the process.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from dsjax.config import UserError, read_json
from dsjax.manifest import stays_inside

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# fmt: off
DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}
# fmt: on
_MOST_AXES = 32  # NumPy has 64, XLA fewer


@dataclasses.dataclass(frozen=True)
class TensorKind:
    """Shape and type of a tensor, and where in which file it is."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path
    offset: int


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a .safetensors file, or of a folder with one (`SINGLE`) or an index of several (`INDEX`).

    Raises:
        UserError: names the file, and the tensor if it is one: missing, damaged, of a type that is none of `DTYPES`,
            or an index that names what is not there or is outside the folder.
    """

    def __init__(self, path: str | pathlib.Path):
        path = pathlib.Path(path)
        if not path.is_dir():
            self._kinds = _read_header(path)
        elif (path / INDEX).exists():
            self._kinds = _read_index(path)
        else:
            self._kinds = _read_header(path / SINGLE)

    def kind(self, name: str) -> TensorKind:
        """Shape, type and place of a tensor; KeyError if there is none of that name."""
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def __getitem__(self, name: str) -> np.ndarray:
        kind = self._kinds[name]
        size = math.prod(kind.shape) * kind.dtype.itemsize
        try:
            content = np.fromfile(kind.file, np.uint8, size, offset=kind.offset)
        except OSError as error:
            raise UserError(f"{kind.file}: tensor {name!r} can not be read ({error.strerror or error})") from None
        if content.size != size:
            raise UserError(f"{kind.file}: tensor {name!r} is cut short, {content.size} of {size} bytes are there")
        return content.view(kind.dtype).reshape(kind.shape)


def _read_header(path: pathlib.Path) -> dict[str, TensorKind]:
    """Every tensor of a file."""
    try:
        if not path.is_file():
            raise UserError(f"no file {path}")
        with path.open("rb") as opened, safetensors.safe_open(path, framework="numpy") as file:
            # The library has checked that the tensors lie one behind the other from here to the end of the file.
            offset = 8 + int.from_bytes(opened.read(8), "little")
            kinds = {}
            for name in file.offset_keys():
                view = file.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                if dtype not in DTYPES:
                    raise UserError(
                        f"{path}: tensor {name[:100]!r} has type {dtype}; it must be one of {', '.join(DTYPES)}"
                    )
                if len(shape) > _MOST_AXES or max(shape, default=0) >= 2**31:
                    raise UserError(f"{path}: tensor {name[:100]!r} has shape {str(shape)[:100]}, which no array has")
                kinds[name] = TensorKind(shape, np.dtype(DTYPES[dtype]), path, offset)
                offset += math.prod(shape) * kinds[name].dtype.itemsize
            if offset != path.stat().st_size:
                raise UserError(f"{path}: not a safetensors file (tensors end at byte {offset}, not with the file)")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({' '.join(str(error).split())[:200]})") from None
    return kinds


def _read_index(folder: pathlib.Path) -> dict[str, TensorKind]:
    """Every tensor that an index names, each in the file that it names."""
    index = read_json(folder / INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not (isinstance(where, dict) and all(isinstance(file, str) for file in where.values())):
        raise UserError(f"{folder / INDEX} has no weight_map of tensor names to file names")
    files: dict[str, dict[str, TensorKind]] = {}
    for name, file in where.items():
        if file not in files:
            if not (stays_inside(file) and len(file) < 1000 and _inside(folder, folder / file)):
                raise UserError(f"{folder / INDEX} names {file[:100]!r}, which is no file of its folder")
            files[file] = _read_header(folder / file)
        if name not in files[file]:
            raise UserError(f"{folder / file}: tensor {name[:100]!r} is missing, {INDEX} says it is here")
    return {name: files[file][name] for name, file in where.items()}


def _inside(folder: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether a path, links followed, is below a folder, or among the blobs that a download's snapshot links to.

    The cache of huggingface_hub is models--OWNER--NAME/{blobs/HASH, snapshots/REVISION/NAME -> ../../blobs/HASH}.
    """
    try:
        file, folder = path.resolve(), folder.resolve()
        blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
        return file.is_relative_to(folder) or file.parent == blobs
    except (OSError, ValueError, RuntimeError):  # a name that no file can have; links in a circle
        return False
