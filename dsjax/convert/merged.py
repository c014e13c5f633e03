"""The weights of a run that trained low-rank pairs: those of its base, with the pairs' products added part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsjax import manifest
from dsjax.convert.names import Variable
from dsjax.convert.store import StoredArrays
from dsjax.nn.lora import target_of, tuned
from dsjax.runs import Base, RunFolder


class MergedArrays:
    """As :class:`dsjax.convert.store.StoredArrays`; every array is float32, so that no product is rounded away.

    Args:
        run: the run.
        step: of its checkpoint.
        about: the body of that checkpoint's manifest.
        variables: of the model.

    Raises:
        UserError: the base is not there, or is another one.
        Damaged: it is not as it was saved.
    """

    def __init__(self, run: RunFolder, step: int, about: Mapping[str, Any], variables: Mapping[str, Variable]):
        config, base = run.read_config(), Base(**about["base"])
        self._lora, self._variables = config.lora, variables
        there = base.run(config.train.start_from).checkpoints / str(base.step)
        body = manifest.read(there)
        if "converted" not in body:  # else every file is verified when it is read
            manifest.verify(there, body)
        own = [name for name in about["arrays"] if name.startswith(("params/", "buffers/"))]
        weights = [name for name in variables if name.startswith("params/") and name in body["arrays"]]
        self._pairs = StoredArrays(run.checkpoints / str(step), about["files"], own)
        self._base = StoredArrays(there, body["files"], weights)
        self._own = frozenset(own)
        found = {name: body["arrays"][name] for name in weights} | {name: about["arrays"][name] for name in own}
        self.described = {name: {"shape": kind["shape"], "dtype": "float32"} for name, kind in found.items()}

    def dtype(self, name: str) -> np.dtype:
        """The type of an array."""
        del name
        return np.dtype(np.float32)

    def part(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        """What an array has at its first axes' ``index``.

        Raises:
            Damaged: a file is not as it was written.
        """
        if name in self._own:
            return self._pairs.part(name, index)
        x = self._base.part(name, index).astype(np.float32)
        if target_of(tuple(name.split("/")[1:]), self._variables[name].axes) is None:
            return x
        pair = [self._pairs.part(f"{name}/{part}", index) for part in "ab"] if f"{name}/a" in self._own else []
        return tuned(self._lora, x, pair)

    def whole(self, name: str) -> np.ndarray:
        """A whole array."""
        variable = self._variables[name]
        out = np.empty(variable.shape, np.float32)
        stacked = sum(axis in ("layers", "expert") for axis in variable.axes[:2])
        for index in np.ndindex(*variable.shape[:stacked]):
            out[index] = self.part(name, index)
        return out
