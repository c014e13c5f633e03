"""Checkpoints: Orbax, asynchronous, the whole state of a run in one commit.

A checkpoint holds two items: ``state`` (the arrays of :class:`~dsjax.train.step.TrainState`) and ``host`` (plain data:
data iterator, counters). Both are committed together or not at all. Arrays are restored onto whatever mesh the
resumed run has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dsjax.config import PositiveInt, UserError

HostState = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """``every``: steps between saves; ``keep``: how many of the last are kept."""

    every: PositiveInt = 200
    keep: PositiveInt = 2


class Checkpoints:
    """The checkpoints of one run folder. An error of a background save surfaces at the next call."""

    def __init__(self, folder: pathlib.Path, *, keep: int = 2, read_only: bool = False):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traces of what it raises
        self._ocp = ocp
        options = (
            ocp.CheckpointManagerOptions(read_only=True)
            if read_only
            else ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        )
        self.folder = folder.resolve()
        handlers = {"state": ocp.StandardCheckpointHandler(), "host": ocp.JsonCheckpointHandler()}
        self._saving: int | None = None
        with self._told_as("opened"):
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The step that a resume takes."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All committed steps."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, host: HostState) -> None:
        """Starts to save; returns once the arrays are copied, the rest goes on in the background.

        Raises:
            UserError: this save, or the one before, can not be written.
        """
        ocp = self._ocp
        self.wait()
        self._saving = step
        with self._told_as("saved"):
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(as_tree(state)), host=ocp.args.JsonSave(host)),
                force=True,
            )

    def check(self) -> None:
        """Raises, without waiting, what went wrong with a save that has ended; cheap enough for every step."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until the save under way is committed.

        Raises:
            UserError: it can not be written.
        """
        with self._told_as("saved"):
            self._manager.wait_until_finished()
        self._saving = None

    def close(self) -> None:
        """Ends the background threads, once the save under way is committed or has failed."""
        with self._told_as("saved"):
            self._manager.close()
        self._saving = None

    @contextlib.contextmanager
    def _told_as(self, done: str) -> Iterator[None]:
        """What Orbax raises as one sentence."""
        try:
            yield
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            which = "checkpoints" if self._saving is None else f"checkpoint {self._saving}"
            self._saving = None
            raise UserError(
                f"{which} in {self.folder} could not be {done}: {reason[:300]}; earlier checkpoints stay as they are"
            ) from error

    def restore(self, shapes: Any, step: int | None = None) -> tuple[Any, HostState, int]:
        """State, host state and step of the latest checkpoint (or of ``step``).

        Args:
            shapes: abstract state whose shardings say where each array goes.
            step: which one.

        Raises:
            UserError: there is none, or its arrays are not those of ``shapes``.
        """
        ocp = self._ocp
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self.folder}")
        self._check(shapes, step)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(as_tree(shapes)), host=ocp.args.JsonRestore()),
        )
        by_name = flatten(restored["state"])
        leaves = [by_name[path_name(path)] for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), dict(restored["host"]), step

    def _check(self, shapes: Any, step: int) -> None:
        """Every array must be there with the expected shape: a clear sentence instead of a trace of the library."""
        stored = flatten(self._manager.item_metadata(step)["state"].tree)
        asked = flatten(as_tree(shapes))
        for name in sorted(set(stored) | set(asked)):
            there, here = (_kind(found.get(name)) for found in (stored, asked))
            if there != here:
                raise UserError(
                    f"checkpoint {step} in {self.folder} does not fit the config: {name} is {there} there, {here} here"
                )

    def load_numpy(self, step: int | None = None) -> tuple[dict[str, np.ndarray], HostState, int]:
        """All arrays by name as numpy, whatever devices they were saved from.

        Raises:
            UserError: there is no checkpoint.
        """
        ocp = self._ocp
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self.folder}")
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        tree = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device),
            self._manager.item_metadata(step)["state"].tree,
        )
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(tree), host=ocp.args.JsonRestore())
        )
        arrays = {name: np.asarray(x) for name, x in flatten(restored["state"]).items()}
        return arrays, dict(restored["host"]), step


def _kind(array: Any) -> str:
    """Type and shape, as in ``float32[8,16]``."""
    return "missing" if array is None else f"{array.dtype}[{','.join(map(str, array.shape))}]"


def as_tree(state: Any) -> Any:
    """A state as nested dicts with text keys: the layout on disk, whatever containers the optimizer uses."""
    tree: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        node = tree
        names = [key_name(k) for k in path]
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = leaf
    return tree


def key_name(key: Any) -> str:
    """The text of one step of a tree path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_name(path: tuple) -> str:
    """A tree path as ``a/b/c``."""
    return "/".join(key_name(k) for k in path)


def flatten(tree: Any) -> dict[str, Any]:
    """``a/b/c`` -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {path_name(path): leaf for path, leaf in leaves}


# ---------------------------------------------------------------- hashes


PARTS = {"params": "parameters", "opt_state": "optimizer", "rng": "rng", "step": "step"}


def state_hashes(arrays: dict[str, np.ndarray], host: HostState) -> dict[str, str]:
    """SHA-256 of each part of a checkpoint: names, dtypes, shapes and bytes of its arrays; canonical JSON of data."""
    digests: dict[str, Any] = {}
    for name in sorted(arrays):
        part = PARTS.get(name.split("/")[0], name.split("/")[0])
        digest = digests.setdefault(part, hashlib.sha256())
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}|{array.dtype}|{array.shape}|".encode())
        digest.update(array.tobytes())
    hashes = {part: digest.hexdigest() for part, digest in digests.items()}
    for part, value in host.items():
        hashes[part] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return dict(sorted(hashes.items()))


def combined_hash(hashes: dict[str, str]) -> str:
    """One SHA-256 over all parts."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
