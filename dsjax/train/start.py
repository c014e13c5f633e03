"""Training that begins with the weights of another run: fine-tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil

import jax

from dsjax.checkpoint import flatten, path_name
from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer, load_tokenizer
from dsjax.runs import RunFolder
from dsjax.train.step import TrainState

ORIGIN = "hf"  # what a converted run keeps for the way back


class Start:
    """A run whose weights training begins with.

    Args:
        path: of the run, trained or converted.
        tokenizer: of the new run.

    Raises:
        UserError: there is no such run, or its ids mean something else.
    """

    def __init__(self, path: pathlib.Path, tokenizer: Tokenizer):
        self.run = RunFolder(path)
        config = self.run.read_config()
        if self.run.tokenizer.is_file():
            there = load_tokenizer(self.run.tokenizer, end_token=config.data.end_token)
            if there.to_json() != tokenizer.to_json():
                raise UserError(
                    f"train.start_from is {path}, which has another tokenizer; set data.tokenizer_path="
                    f"{self.run.tokenizer} and data.end_token={config.data.end_token}"
                )

    def with_weights(self, shapes: TrainState, state: TrainState) -> TrainState:
        """A new state with the parameters and buffers of the run; buffers that it has not stay new.

        Args:
            shapes: abstract state, whose shardings say where each array goes.
            state: whose parameters are given up: there need not be room for two sets of them.

        Raises:
            UserError: no checkpoint verifies, or it is of another model.
        """
        with contextlib.closing(self.run.open_checkpoints()) as checkpoints:
            step = checkpoints.latest()
            if step is None:
                raise UserError(f"train.start_from is {self.run.path}; no checkpoint there verifies")
            there = checkpoints.about(step)["arrays"]
            asked = flatten({"params": shapes.params, "buffers": shapes.buffers})
            wanted = {name: x for name, x in asked.items() if name.startswith("params/") or name in there}
            jax.tree.map(lambda x: x.delete(), state.params)
            found = checkpoints.restore_part(wanted, step)

        def take(kind: str, old: object) -> object:
            return jax.tree_util.tree_map_with_path(lambda path, x: found.get(f"{kind}/{path_name(path)}", x), old)

        return dataclasses.replace(state, params=take("params", state.params), buffers=take("buffers", state.buffers))

    def hand_on(self, run: RunFolder) -> None:
        """What the run keeps of the folder that it was converted from, the new one keeps, too: so it can go back."""
        if (origin := self.run.path / ORIGIN).is_dir() and not (run.path / ORIGIN).exists():
            copying = run.path / f".{ORIGIN}"
            shutil.copytree(origin, copying, dirs_exist_ok=True)
            copying.rename(run.path / ORIGIN)  # whole, or not there
