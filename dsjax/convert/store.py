"""The arrays of a checkpoint, written and read by parts.

Orbax reads what is written here as it reads its own: a folder for each array, in the Zarr 3 format, with one file for
each part, that is for each layer and each expert. So a variable of 400 GB is written a matrix at a time, in any order,
and each file once. Within a file the part may be cut further, into what each device of a mesh holds, and every cut is
read alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dsjax.config import UserError, apply_overrides
from dsjax.convert.names import Variable
from dsjax.manifest import Damaged
from dsjax.sharding import MESH_AXES, MeshConfig, training_rules

METADATA = "_METADATA"
BY_PARTS = {"written": "by parts"}  # what it says of arrays that were written here
BLOCK = 2**18  # bytes that are hashed and written at a time: they are in the cache twice then
# A transposed matrix is brought into order tile by tile: as many columns as fill half a line of the cache, so that the
# lines of the source that a tile takes are read in runs, and those that it writes are still there for the next one.
TILE = 512, 16


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in files.

    Attributes:
        name: path in the checkpoint, ``params/group_0/ffn/w_up``.
        shape: of the whole array.
        dtype: of its numbers.
        num_index: leading axes, of layers and experts, each entry of which is a file of its own.
        cuts: parts along each of the other axes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    num_index: int
    cuts: tuple[int, ...]

    @property
    def folder(self) -> str:
        """Its folder in that of the state."""
        return self.name.replace("/", ".")

    @property
    def part_shape(self) -> tuple[int, ...]:
        return self.shape[self.num_index :]

    @property
    def cut_shape(self) -> tuple[int, ...]:
        return tuple(n // parts for n, parts in zip(self.part_shape, self.cuts, strict=True))

    def file(self, index: tuple[int, ...]) -> str:
        """The file of a part, in the folder of the state."""
        return f"{self.folder}/" + ".".join(["c", *map(str, index), *["0"] * len(self.part_shape)])

    @classmethod
    def of_folder(cls, state: pathlib.Path, name: str) -> StoredArray:
        """An array that :func:`write_array_files` wrote."""
        facts = json.loads((state / name.replace("/", ".") / "zarr.json").read_text(encoding="utf-8"))
        shape, chunk = tuple(facts["shape"]), facts["chunk_grid"]["configuration"]["chunk_shape"]
        cut = facts["codecs"][0].get("configuration", {}).get("chunk_shape", chunk)
        cuts = [whole // part for whole, part in zip(chunk, cut, strict=True)]
        num_index = facts["attributes"]["num_index"]
        return cls(name, shape, np.dtype(facts["data_type"]), num_index, tuple(cuts[num_index:]))

    def zarr_json(self) -> str:
        """What Zarr 3 wants to know of the array."""
        ones, plain = (1,) * self.num_index, [{"name": "bytes", "configuration": {"endian": "little"}}]
        codecs = plain
        if math.prod(self.cuts) > 1:
            cut = {"chunk_shape": [*ones, *self.cut_shape], "codecs": plain, "index_codecs": plain}
            codecs = [{"name": "sharding_indexed", "configuration": cut}]
        return json.dumps(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": self.shape,
                "data_type": str(self.dtype),
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*ones, *self.part_shape]}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "codecs": codecs,
                "fill_value": 0.0,
                "attributes": {"num_index": self.num_index},
            }
        )


def arranged(found: Mapping[str, tuple[Variable, np.dtype, int]], mesh: str) -> dict[str, StoredArray]:
    """How variables are laid out in files so that each device of a mesh reads its own part of them and no more.

    Args:
        found: shape and logical axes, type, and number of index axes, by name.
        mesh: sizes of mesh axes, ``fsdp=4,expert=8``; empty: one device.

    Raises:
        UserError: no such mesh, or one that does not divide a variable.
    """
    given = apply_overrides(MeshConfig(data=1), mesh.split(",") if mesh else [])
    given.validate()
    sizes = {axis: getattr(given, axis) for axis in MESH_AXES}
    if -1 in sizes.values():
        raise UserError(f"--mesh is {mesh!r}; it must give the number of devices along each axis, not -1")
    rules = training_rules(given)
    out = {}
    for name, (variable, dtype, num_index) in found.items():
        cuts: list[int] = []
        taken: set[str] = set()
        for size, axis in zip(variable.shape, variable.axes, strict=True):
            over = [a for a in getattr(rules, axis) if a not in taken]  # a mesh axis cuts one axis of an array
            taken |= set(over)
            parts = math.prod(sizes[a] for a in over)
            if size % parts:
                raise UserError(f"--mesh: {'*'.join(over)} is {parts}; it does not divide {axis}={size} of {name}")
            cuts.append(parts)
        out[name] = StoredArray(name, variable.shape, dtype, num_index, tuple(cuts[num_index:]))
    return out


def write_array_files(state: pathlib.Path, arrays: Mapping[str, StoredArray]) -> None:
    """Writes into the folder of a state all but its numbers."""
    tree = {}
    for array in arrays.values():
        (state / array.folder).mkdir(parents=True, exist_ok=True)
        (state / array.folder / "zarr.json").write_text(array.zarr_json(), encoding="utf-8")
        keys = array.name.split("/")
        chunk = [*(1,) * array.num_index, *array.part_shape]
        tree[repr(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": chunk},
        }
    facts = {"use_ocdbt": False, "use_zarr3": True, "store_array_data_equal_to_fill_value": True}
    text = json.dumps({"tree_metadata": tree, **facts, "custom_metadata": BY_PARTS})
    (state / METADATA).write_text(text, encoding="utf-8")


def write_part(state: pathlib.Path, array: StoredArray, index: tuple[int, ...], part: np.ndarray) -> dict[str, Any]:
    """Writes one part, whatever the order of ``part`` in memory; size and SHA-256 of its file."""
    path, digest, size = state / array.file(index), hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in _cuts_in_order(array, part.astype(array.dtype, copy=False)):
            digest.update(block)
            file.write(block)
            size += block.nbytes
    return {"bytes": size, "sha256": digest.hexdigest()}


def _cuts_in_order(array: StoredArray, part: np.ndarray) -> Iterator[memoryview]:
    """The bytes of a part's file: cut by cut, and, if there are several, where each begins and how long it is."""
    shape = array.cut_shape
    for place in itertools.product(*map(range, array.cuts)):
        yield from blocks(part[tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, shape, strict=True))])
    count = math.prod(array.cuts)
    if count > 1:
        size = math.prod(shape) * array.dtype.itemsize
        yield np.array([[i * size, size] for i in range(count)], "<u8").data.cast("B")


def blocks(x: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in the order of its axes, some at a time."""
    if x.ndim < 2 or x.flags.c_contiguous:
        flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        yield from (flat[start : start + BLOCK].data for start in range(0, flat.size, BLOCK))
        return
    for start in range(0, len(x), TILE[0]):
        rows = x[start : start + TILE[0]]
        ordered = np.empty(rows.shape, rows.dtype)
        _copy_by_tiles(rows, ordered)
        yield from blocks(ordered)


def _copy_by_tiles(x: np.ndarray, out: np.ndarray) -> None:
    if x.ndim > 2:
        for middle in range(x.shape[1]):
            _copy_by_tiles(x[:, middle], out[:, middle])
        return
    for start in range(0, x.shape[1], TILE[1]):
        out[:, start : start + TILE[1]] = x[:, start : start + TILE[1]]


def read_part(state: pathlib.Path, array: StoredArray, index: tuple[int, ...], sha256: str) -> np.ndarray:
    """Reads what :func:`write_part` wrote.

    Raises:
        Damaged: the file is missing, or another one than was written.
    """
    name = array.file(index)
    try:
        content = np.fromfile(state / name, np.uint8)
    except OSError as error:
        raise Damaged(f"state/{name} can not be read: {error.strerror}") from None
    if hashlib.sha256(content.data).hexdigest() != sha256:
        raise Damaged(f"state/{name} was changed: its SHA-256 is another one")
    shape, size = array.part_shape, math.prod(array.part_shape) * array.dtype.itemsize
    if math.prod(array.cuts) == 1:
        return content.view(array.dtype).reshape(shape)
    cuts = content[:size].view(array.dtype).reshape(*array.cuts, *array.cut_shape)
    order = [axis for pair in zip(range(len(shape)), range(len(shape), 2 * len(shape)), strict=True) for axis in pair]
    return cuts.transpose(order).reshape(shape)


class StoredArrays:
    """The arrays of a checkpoint, whoever wrote it.

    Args:
        folder: of the step, or of what will be one.
        files: size and SHA-256 of its files, as its manifest has them.
        names: the arrays.
    """

    CACHE = 2**30  # bytes kept of arrays whose files hold many parts at once

    def __init__(self, folder: pathlib.Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str]):
        self._state, self._files = folder / "state", files
        self._facts = json.loads((self._state / METADATA).read_text(encoding="utf-8"))
        self.by_parts = self._facts.get("custom_metadata") == BY_PARTS
        self._ours = {name: StoredArray.of_folder(self._state, name) for name in names if self.by_parts}
        self._opened = {} if self.by_parts else self._open(names)

    def _open(self, names: Iterable[str]) -> dict[str, Any]:
        import tensorstore as ts

        driver = "zarr3" if self._facts.get("use_zarr3") else "zarr"
        context = ts.Context({"cache_pool": {"total_bytes_limit": self.CACHE}})

        def opened(name: str) -> Any:
            folder = name.replace("/", ".")
            store = {"driver": "file", "path": f"{self._state.resolve() / folder}/"}
            if self._facts.get("use_ocdbt"):
                store = {"driver": "ocdbt", "base": f"file://{self._state.resolve()}/", "path": f"{folder}/"}
            spec = {"driver": driver, "kvstore": store, "recheck_cached_data": "open"}
            return ts.open(spec, context=context, read=True)

        opening = {name: opened(name) for name in names}
        return {name: future.result() for name, future in opening.items()}

    def dtype(self, name: str) -> np.dtype:
        """The type of an array."""
        return self._ours[name].dtype if self.by_parts else np.dtype(self._opened[name].dtype.numpy_dtype)

    def part(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        """What an array has at its first axes' ``index``; the files that :func:`write_part` wrote are verified.

        Raises:
            Damaged: one is not as it was written.
        """
        if not self.by_parts:
            return self._opened[name][index].read().result()
        array = self._ours[name]
        return read_part(self._state, array, index, self._files[f"state/{array.file(index)}"]["sha256"])

    def whole(self, name: str) -> np.ndarray:
        """A whole array."""
        if not self.by_parts:
            return self._opened[name].read().result()
        array = self._ours[name]
        out = np.empty(array.shape, array.dtype)
        for index in np.ndindex(*array.shape[: array.num_index]):
            out[index] = self.part(name, index)
        return out
