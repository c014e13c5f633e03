"""Whether two checkpoints hold the same model: tensor by tensor, and in what they compute."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.checkpoint import path_name
from dsjax.convert.fp8 import Dequantized, block_size
from dsjax.convert.names import match, read_arrays
from dsjax.convert.origin import HFFolder
from dsjax.convert.parallel import each
from dsjax.convert.read import IN_FLIGHT, Say, silent
from dsjax.convert.run_tensors import RunTensors
from dsjax.models.decoder import Decoder, DecoderConfig
from dsjax.runtime import memory_bytes
from dsjax.sharding import joined, split_variables

NUM_TOKENS = 16
ROWS = 1024  # of a tensor, compared at a time
MEMORY = 3.0  # a model's size in float32 times this must fit: what was read, what is computed with, and the rest


@runtime_checkable
class Side(Protocol):
    """One of the two: its tensors under the names of Hugging Face, and the model that they make."""

    config: DecoderConfig

    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def __getitem__(self, name: str) -> np.ndarray: ...
    def arrays(self) -> Mapping[str, np.ndarray]:
        """Every variable of the model, by its path."""
        ...

    def describe(self) -> str:
        """What it is, in a line."""
        ...


class HFSide:
    """A folder of Hugging Face's layout; every tensor of it has its place.

    Raises:
        UserError: or has not.
    """

    def __init__(self, folder: HFFolder, config: DecoderConfig):
        self.folder, self.config = folder, config
        self._tensors = Dequantized(folder.tensors, block_size(folder.config))
        self.matched = match(self._tensors, folder.config, config)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def arrays(self) -> Mapping[str, np.ndarray]:
        return read_arrays(self.folder.tensors, self.folder.config, self.config)

    def describe(self) -> str:
        eight_bit = f", {len(self._tensors.scales)} of them in 8 bits" if self._tensors.scales else ""
        kept = f", {len(self.matched.kept)} not the model's" if self.matched.kept else ""
        return f"{len(self.folder.shards)} file(s), {len(self._tensors)} tensors{eight_bit}{kept}"


class ThereAndBack(HFSide):
    """The same folder, each tensor brought to its place in the decoder and back."""

    def __getitem__(self, name: str) -> np.ndarray:
        x, place = super().__getitem__(name), self.matched.places.get(name)
        return x if place is None else place.join([np.ascontiguousarray(part) for part in place.split(x)])


class RunSide:
    """A run."""

    def __init__(self, tensors: RunTensors):
        self._tensors, self.config = tensors, tensors.config.model

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors.plain(name)

    def arrays(self) -> Mapping[str, np.ndarray]:
        return self._tensors.arrays()

    def describe(self) -> str:
        trained = "trained" if self._tensors.trained else "converted, not trained since"
        return f"run at step {self._tensors.step} ({trained}), {sum(1 for _ in self)} tensors"


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two tensors of one name differ: the largest difference of two numbers, or why there is none."""

    name: str
    largest: float
    text: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What a comparison found.

    Attributes:
        compared: tensors that both have.
        numbers: in them.
        only: tensors that one of them has, by which.
        differences: of tensors that are not equal to the bit, the largest first.
        logits: largest difference of two logits, or why they were not compared.
    """

    compared: int
    numbers: int
    only: tuple[list[str], list[str]]
    differences: list[Difference]
    logits: float | str

    @property
    def equal(self) -> bool:
        """Whether the two are the same model to the bit."""
        return not (self.differences or any(self.only)) and (isinstance(self.logits, str) or self.logits == 0)


def compare(a: Side, b: Side, say: Say = silent) -> Report:
    """Compares every tensor, and the logits where both models fit in memory.

    Args:
        a: one checkpoint.
        b: the other.
        say: told of the progress.
    """
    names = [name for name in a if name in b]
    found, count = [], 0

    def difference(name: str) -> tuple[int, Difference | None]:
        x = a[name]
        return x.size, difference_of(name, x, b[name])

    for done, (name, (size, different)) in enumerate(
        each(difference, ((n, IN_FLIGHT // 2) for n in names), IN_FLIGHT), 1
    ):
        count += size
        if different is not None:
            found.append(different)
        say(done, len(names), name)
    found.sort(key=lambda d: (-d.largest, d.name))
    only = [name for name in a if name not in b], [name for name in b if name not in a]
    return Report(len(names), count, only, found, _logits_apart(a, b))


def difference_of(name: str, x: np.ndarray, y: np.ndarray) -> Difference | None:
    """How two tensors differ; None: not in a bit."""
    if x.shape != y.shape:
        return Difference(name, np.inf, f"shapes {x.shape} and {y.shape}")
    largest, equal = 0.0, x.dtype == y.dtype
    x, y = np.atleast_1d(x), np.atleast_1d(y)
    for part in (slice(first, first + ROWS) for first in range(0, len(x), ROWS)):
        equal = equal and x[part].tobytes() == y[part].tobytes()
        largest = max(largest, _apart(x[part].astype(np.float64), y[part].astype(np.float64)))
    types = f"{x.dtype}" if x.dtype == y.dtype else f"{x.dtype} and {y.dtype}"
    return None if equal else Difference(name, largest, f"differ by up to {largest:.3g} ({types})")


def _apart(x: np.ndarray, y: np.ndarray) -> float:
    """The largest difference of two numbers; infinite if one of them is none and the other is."""
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    apart = np.where(same, 0.0, np.abs(x - y))
    return float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0))


def _logits_apart(a: Side, b: Side) -> float | str:
    if isinstance(b, ThereAndBack):
        return "not compared: there is one checkpoint"
    if a.config != b.config:
        return "not compared: the configs of the models differ"
    needed = MEMORY * 4 * a.config.num_params()
    if needed > memory_bytes():
        return f"not compared: a model takes {needed / 1e9:,.0f} GB, this machine has {memory_bytes() / 1e9:,.0f} GB"
    tokens_BT = np.random.default_rng(0).integers(0, a.config.vocab_size, (1, NUM_TOKENS))
    return float(np.max(np.abs(logits(a, tokens_BT) - logits(b, tokens_BT))))


def logits(side: Side, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) of the model, computed in float32."""
    arrays = side.arrays()
    graph, params, buffers = split_variables(nnx.eval_shape(lambda: Decoder(side.config, rngs=nnx.Rngs(0))))
    found = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(arrays[path_name(path)], leaf.dtype), {"params": params, "buffers": buffers}
    )
    variables = joined(found["params"], found["buffers"])
    return np.asarray(_logits(graph, variables, jnp.asarray(tokens_BT, jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: Any, variables: Any, tokens_BT: jax.Array) -> jax.Array:
    model = nnx.merge(graph, variables)
    return model.logits(model(tokens_BT))
