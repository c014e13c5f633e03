"""Training that begins with the weights of another run: fine-tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import traverse_util

from dsjax.checkpoint import flatten, path_name
from dsjax.config import UserError, validate
from dsjax.data.prepare import DataConfig
from dsjax.data.tokenizer import Tokenizer, load_tokenizer
from dsjax.runs import Base, RunFolder
from dsjax.train.step import Trainer, TrainState

C = TypeVar("C")
CRITIC = "critic/"  # what the names of a decoder of values begin with
ORIGIN = "hf"  # what a converted run keeps for the way back


def begun_with(config: Any, run_folder: RunFolder) -> tuple[RunFolder, Any]:
    """The run that fine-tuning begins with, or the one in ``run_folder`` that has begun, and its config.

    Raises:
        UserError: there is no such run.
    """
    start = run_folder if run_folder.has_checkpoint() else RunFolder(pathlib.Path(config.train.start_from))
    return start, start.read_config()


def with_tokenizer(data: DataConfig, base: Any, path: str) -> DataConfig:
    """``data`` with the tokenizer of a run whose config is ``base``, in the file ``path``."""
    end, size = base.data.end_token, base.data.vocab_size
    return dataclasses.replace(data, tokenizer_path=path, special_tokens=(), vocab_size=size, end_token=end)


def inherited(config: C, run_folder: RunFolder, *, values: str | None = None, plain: str = "") -> tuple[C, Tokenizer]:
    """The config with the model and the tokenizer that fine-tuning begins with; those of a run that goes on stay.

    Args:
        config: of a recipe with a ``train.start_from``. Its ``data.tokenizer_path`` goes before the tokenizer there.
        run_folder: of the new run.
        values: what the model makes values with; None: that stays, too.
        plain: whose learners are models of plain tokens; empty: the model may be given the structure of code.

    Raises:
        UserError: there is no such run, it has no tokenizer, or its model needs more than tokens.
    """
    settings: Any = config
    start, base = begun_with(settings, run_folder)
    path = settings.data.tokenizer_path or str(start.tokenizer)
    if not settings.data.tokenizer_path and not start.tokenizer.is_file():
        raise UserError(f"train.start_from is {start.path}, which has no tokenizer.json; set data.tokenizer_path")
    if plain and base.model.structure is not None:
        raise UserError(
            f"train.start_from is {start.path}, whose model is given the structure of code; {plain} are learned by"
            " models of plain tokens"
        )
    data = with_tokenizer(settings.data, base, path)
    model = base.model if values is None else dataclasses.replace(base.model, values=values)
    config = dataclasses.replace(settings, model=model, data=data)
    validate(config)
    return config, load_tokenizer(pathlib.Path(path), end_token=data.end_token)


class Start:
    """A run whose weights training begins with.

    Args:
        path: of the run, trained or converted.
        tokenizer: of the new run.
        base: its checkpoint, known already; None: the latest that verifies.

    Raises:
        UserError: there is no such run, its ids mean something else, no checkpoint verifies, or it is not ``base``.
    """

    def __init__(self, path: pathlib.Path, tokenizer: Tokenizer, base: Base | None = None):
        self.run = RunFolder(path) if base is None else base.run(str(path))
        config = self.run.read_config()
        if self.run.tokenizer.is_file():
            there = load_tokenizer(self.run.tokenizer, end_token=config.data.end_token)
            if there.to_json() != tokenizer.to_json():
                raise UserError(
                    f"train.start_from is {path}, which has another tokenizer; set data.tokenizer_path="
                    f"{self.run.tokenizer} and data.end_token={config.data.end_token}"
                )
        if self.run.base() is not None:
            raise UserError(
                f"train.start_from is {path}, which holds low-rank pairs and not the weights that they belong to;"
                f" write both into one model first: dsjax convert {path} DST, and that back to a run"
            )
        self.base = base or self._latest()

    def _latest(self) -> Base:
        with contextlib.closing(self.run.open_checkpoints()) as checkpoints:
            step = checkpoints.latest()
        if step is None:
            raise UserError(f"train.start_from is {self.run.path}; no checkpoint there verifies")
        return Base.at(self.run, step)

    def with_weights(self, trainer: Trainer, state: TrainState) -> TrainState:
        """A new state with the parameters and buffers of the run; buffers, indexers and heads that it has not stay new.

        An indexer is what a model of full attention begins its way to DeepSeek-V3.2 with. A new decoder of values
        begins with the weights of the run's own decoder, and its head with 0. Pairs beside frozen weights are new;
        those are given by :meth:`frozen`.

        Args:
            trainer: whose abstract state says where each array goes.
            state: whose parameters are given up: there need not be room for two sets of them.

        Raises:
            UserError: no checkpoint verifies, or it is of another model.
        """
        taken = {"params": {} if trainer.base else trainer.shapes.params, "buffers": trainer.shapes.buffers}
        with contextlib.closing(self.run.open_checkpoints()) as checkpoints:
            there = checkpoints.about(self.base.step)["arrays"]
            named = {name: _source(name, there) for name in flatten(taken)}
            wanted = {name: x for name, x in flatten(taken).items() if named[name] in there or not _may_be_new(name)}
            if not trainer.base:
                for name, x in flatten({"params": state.params}).items():
                    if name in wanted:
                        x.delete()
            found: dict[str, Any] = {}
            for of_critic in (False, True):  # what the decoder of values begins with is read for both
                some = {name: x for name, x in wanted.items() if (named[name] != name) == of_critic}
                if some:
                    arrays = {named[name]: x for name, x in some.items()}
                    read = checkpoints.restore_part(arrays, self.base.step, again=True)
                    found |= {name: read[named[name]] for name in some}

        def take(kind: str, old: object) -> object:
            return jax.tree_util.tree_map_with_path(lambda path, x: found.get(f"{kind}/{path_name(path)}", x), old)

        return dataclasses.replace(state, params=take("params", state.params), buffers=take("buffers", state.buffers))

    def frozen(self, trainer: Trainer) -> dict[str, Any]:
        """The weights of the run as ``trainer`` keeps them, read one after the other; empty if it trains them.

        Raises:
            UserError: the checkpoint does not verify, or is of another model.
        """
        if trainer.base is None:
            return {}
        kept: dict[tuple[str, ...], Any] = {}
        with contextlib.closing(self.run.open_checkpoints()) as checkpoints:
            there = checkpoints.about(self.base.step)["arrays"]
            for path, array in trainer.base.weights.items():
                name = "/".join(("params", *path))
                kind = there[name]["dtype"] if name in there else array.dtype
                array = jax.ShapeDtypeStruct(array.shape, kind, sharding=array.sharding)
                x = checkpoints.restore_part({name: array}, self.base.step, again=bool(kept))[name]
                kept[path] = trainer.base.freeze(path, x)
        return traverse_util.unflatten_dict(kept)

    def variables(self, trainer: Trainer, seed: int) -> Any:
        """All variables of the model that training begins with, where ``trainer`` has them.

        Args:
            trainer: of the run that begins.
            seed: of what the run has not.

        Raises:
            UserError: as :meth:`with_weights`.
        """
        number: Any = np.uint32(seed)  # a seed may not fit int32
        state = self.with_weights(trainer, trainer.init(number))
        return dataclasses.replace(state, frozen=self.frozen(trainer)).variables

    def hand_on(self, run: RunFolder) -> None:
        """What the run keeps of the folder that it was converted from, the new one keeps, too: so it can go back."""
        if (origin := self.run.path / ORIGIN).is_dir() and not (run.path / ORIGIN).exists():
            copying = run.path / f".{ORIGIN}"
            shutil.copytree(origin, copying, dirs_exist_ok=True)
            copying.rename(run.path / ORIGIN)  # whole, or not there


def _source(name: str, there: Mapping[str, Any]) -> str:
    """The name of what an array begins with, of those that are there."""
    kind, _, rest = name.partition("/")
    return f"{kind}/{rest.removeprefix(CRITIC)}" if name not in there and rest.startswith(CRITIC) else name


def _may_be_new(name: str) -> bool:
    """Whether training can begin with an array that the run before it has not."""
    return name.startswith(("buffers/", "params/w_values", f"params/{CRITIC}w_values")) or "/indexer/" in name
