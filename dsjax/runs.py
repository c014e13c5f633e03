"""A run is a folder.

It holds ``config.json``, ``data.json`` (the digest of each file that it is trained on), ``metrics.jsonl``,
``checkpoints/``, ``tokenizer.json``, ``loss.png``, ``report.md``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from dsjax import manifest
from dsjax.checkpoint import Checkpoints, committed, path_name
from dsjax.config import UserError, from_dict, read_json, to_dict
from dsjax.data.corpus import changed_documents
from dsjax.data.prepare import Corpus
from dsjax.data.tokenizer import Tokenizer, load_tokenizer
from dsjax.manifest import Damaged, make_folder
from dsjax.metrics import write_atomic
from dsjax.models.decoder import Decoder
from dsjax.nn.lora import target_of, tuned
from dsjax.sharding import joined, logical_axes, sides, split_variables


def cache_dir() -> pathlib.Path:
    """Where prepared data and compiled programs are kept: ``$DSJAX_CACHE``, else ``~/.cache/dsjax``."""
    return pathlib.Path(os.environ.get("DSJAX_CACHE") or pathlib.Path.home() / ".cache" / "dsjax")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: pathlib.Path

    @property
    def name(self) -> str:
        """Of the folder, as text: bytes that are not UTF-8 are escaped."""
        return self.path.name.encode("utf-8", "backslashreplace").decode()

    @property
    def config(self) -> pathlib.Path:
        return self.path / "config.json"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> pathlib.Path:
        return self.path / "tokenizer.json"

    @property
    def data(self) -> pathlib.Path:
        return self.path / "data.json"

    @property
    def failure(self) -> pathlib.Path:
        return self.path / "failure.json"

    def check(self) -> None:
        """Looks whether a run can be here; makes nothing.

        Raises:
            UserError: it can not be made or written, or holds something else.
        """
        try:
            above = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
            held = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
        except OSError as error:
            raise UserError(f"run folder {self.path} can not be made: {error.strerror}") from None
        if not above.is_dir():
            raise UserError(f"run folder {self.path} can not be made: {above} is a file")
        if not os.access(above, os.W_OK):
            raise UserError(f"run folder {self.path} can not be made: {above} is not writable")
        if not self.config.exists() and not all(name.startswith(".") for name in held):
            raise UserError(f"folder {self.path} is not empty and holds no run (no config.json); give another --run")

    def has_checkpoint(self) -> bool:
        """Whether something was trained here already."""
        there = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return bool(committed(self.checkpoints)) or any(p.name.startswith("damaged-") for p in there)

    def write(self, config: Any, corpus: Corpus) -> None:
        """Makes the folder, or brings that of a run to go on with up to date.

        Raises:
            UserError: it can not be written.
        """
        try:
            make_folder(self.path)
        except OSError as error:
            raise UserError(f"run folder {self.path} can not be made: {error.strerror}") from None
        write_atomic(self.config, json.dumps(to_dict(config), indent=1) + "\n")
        write_atomic(self.tokenizer, corpus.tokenizer.to_json())
        write_atomic(self.data, json.dumps(corpus.documents) + "\n")

    def read_config(self) -> Any:
        """The resolved config of the run.

        Raises:
            UserError: no run here.
        """
        try:
            if not self.path.is_dir():
                raise UserError(f"no run folder {self.path}")
        except (OSError, ValueError) as error:  # too long, no permission
            raise UserError(f"run folder {self.path} can not be read: {error}") from None
        if not self.config.exists():
            raise UserError(f"{self.path} is no run: it holds no config.json")
        config = from_dict(read_json(self.config), str(self.config))
        if not all(hasattr(config, part) for part in ("model", "data", "compute")):
            raise UserError(f"{self.config} holds a {type(config).__name__}, which describes no run")
        return config

    def changed_data(self, corpus: Corpus) -> str:
        """Which files of the data are others than those that the run was trained on; empty if none is known to be."""
        try:
            return changed_documents(json.loads(self.data.read_bytes()), corpus.documents)
        except (OSError, ValueError, RecursionError):
            return ""

    def open_checkpoints(self) -> Checkpoints:
        """Its checkpoints, to read.

        Raises:
            UserError: there is none yet.
        """
        self.read_config()
        if not self.checkpoints.is_dir():
            raise UserError(f"{self.path} has no checkpoint yet; train it first")
        return Checkpoints(self.checkpoints, read_only=True)

    def base(self) -> Base | None:
        """The checkpoint beside whose weights its pairs are trained; None: it has no pairs, or no checkpoint yet."""
        for step in reversed(committed(self.checkpoints)):
            with contextlib.suppress(Damaged):
                about = manifest.read(self.checkpoints / str(step))
                return Base(**about["base"]) if "base" in about else None
        return None


@dataclasses.dataclass(frozen=True)
class Base:
    """A checkpoint whose weights stay as they are, while pairs beside them are trained and saved alone.

    Attributes:
        path: of its run, absolute.
        step: its number.
        sha256: that its manifest states, and so of every byte.
    """

    path: str
    step: int
    sha256: str

    @classmethod
    def at(cls, run: RunFolder, step: int) -> Base:
        """The one of a run's ``step``."""
        return cls(str(run.path.resolve()), step, manifest.seal(manifest.read(run.checkpoints / str(step))))

    def run(self, said: str) -> RunFolder:
        """Its run, where ``said`` says or where it was.

        Raises:
            UserError: it is at neither, or another one.
        """
        why = ""
        for path in (said, self.path):
            run = RunFolder(pathlib.Path(path))
            try:
                if manifest.seal(manifest.read(run.checkpoints / str(self.step))) == self.sha256:
                    return run
                why = f"checkpoint {self.step} there is another one now"
            except Damaged as error:
                why = str(error) if run.path.is_dir() else "there is no such folder"
        raise UserError(
            f"the pairs were trained beside checkpoint {self.step} of {self.path}: {why}; bring it back, or name the"
            " folder where it is now as train.start_from"
        )


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model on one device, ready to run; ``params`` are all variables, buffers included."""

    graph: Any
    params: Any
    tokenizer: Tokenizer
    config: Any
    step: int


def load_model(run: RunFolder) -> LoadedModel:
    """The model of a run's latest checkpoint, with its tokenizer.

    Raises:
        UserError: no run, no checkpoint, no tokenizer, or one that does not fit.
    """
    graph, variables, step = load_variables(run)
    config = run.read_config()
    tokenizer = load_tokenizer(run.tokenizer, end_token=config.data.end_token)
    return LoadedModel(graph, variables, tokenizer, config, step)


def load_variables(run: RunFolder) -> tuple[Any, Any, int]:
    """Graph, all variables and step of a run's latest checkpoint, which may have been converted without a tokenizer.

    Raises:
        UserError: no run, no checkpoint, or one that does not fit the config or the tokenizer that is there.
    """
    config = run.read_config()
    checkpoints = run.open_checkpoints()
    arrays, _, step = checkpoints.load_numpy()
    if (base := run.base()) is not None:
        arrays |= _with_base(config, arrays, base)
    there = hashlib.sha256(run.tokenizer.read_bytes()).hexdigest() if run.tokenizer.is_file() else None
    if checkpoints.about(step).get("tokenizer_sha256") != there:
        said = "is not" if there else "is missing: it is"
        raise UserError(f"{run.tokenizer} {said} the tokenizer that checkpoint {step} of {run.path} was trained with")
    abstract = nnx.eval_shape(lambda: Decoder(config.model, config.compute, rngs=nnx.Rngs(0)))
    graph, params, buffers = split_variables(abstract)

    def take(path: tuple, leaf: Any) -> jax.Array:
        name = path_name(path)
        if name not in arrays or arrays[name].shape != leaf.shape:
            raise UserError(f"checkpoint {step} of {run.path} does not fit its config: {name} should be {leaf.shape}")
        return jnp.asarray(arrays[name])

    found = jax.tree_util.tree_map_with_path(take, {"params": params, "buffers": buffers})
    return graph, joined(found["params"], found["buffers"]), step


def _with_base(config: Any, arrays: dict[str, np.ndarray], base: Base) -> dict[str, np.ndarray]:
    """The parameters of the base, with the products of the pairs in ``arrays`` added; by name, float32."""
    with contextlib.closing(base.run(config.train.start_from).open_checkpoints()) as checkpoints:
        weights = checkpoints.load_numpy(base.step)[0]
    abstract = nnx.eval_shape(lambda: Decoder(config.model, config.compute, rngs=nnx.Rngs(0)))
    found = {}
    for path, axes in traverse_util.flatten_dict(logical_axes(abstract, nnx.Param)).items():
        name = "/".join(("params", *path))
        if name not in weights:
            continue  # told of by who takes it
        x = weights[name].astype(np.float32)
        if target_of(path, axes) is not None:
            pair = [arrays[f"{name}/{part}"] for part in "ab"] if f"{name}/a" in arrays else []
            for index in np.ndindex(x.shape[: sides(axes)[0][0]]):
                x[index] = tuned(config.lora, x[index], [part[index] for part in pair])
        found[name] = x
    return found
