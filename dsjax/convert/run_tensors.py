"""The checkpoint of a run, seen as tensors in Hugging Face's layout."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dsjax import manifest
from dsjax.config import UserError
from dsjax.convert.families import describes, hf_config, meant_length
from dsjax.convert.fp8 import BF16, FP8, SCALE, block_size, dequantize, has_powers_of_two, quantize, scales_for
from dsjax.convert.merged import MergedArrays
from dsjax.convert.names import copies_of, places, variables_of
from dsjax.convert.origin import FOLDER, Origin
from dsjax.convert.store import StoredArrays
from dsjax.data.tokenizer import load_tokenizer
from dsjax.manifest import Damaged
from dsjax.runs import RunFolder


class RunTensors:
    """The tensors that the checkpoint of a run has in Hugging Face's layout, each read when asked for.

    What makes a model's values has no place there: it is left out.

    Args:
        run: the run.

    Attributes:
        origin: the folder that the run was converted from, if its model is still the one of that folder.
        files: that folder's files but weights, in any case.
        hf_config: config.json, that folder's or a new one.

    Raises:
        UserError: there is no checkpoint that verifies, it is not the model of the config, or no family of Hugging
            Face's can express that.
    """

    def __init__(self, run: RunFolder):
        config = run.read_config()
        self.has_values = config.model.values != "none"
        self.config = dataclasses.replace(config, model=dataclasses.replace(config.model, values="none"))
        self.run, (self.step, self.about) = run, self._latest(run)
        variables = variables_of(self.config.model)
        self._arrays: StoredArrays | MergedArrays
        if "base" in self.about:
            with self._told():
                self._arrays = MergedArrays(run, self.step, self.about, variables)
            self.about = self.about | {"arrays": self._arrays.described}
        else:
            self._arrays = StoredArrays(run.checkpoints / str(self.step), self.about["files"], variables)
        folder = Origin(run.path / FOLDER) if (run.path / FOLDER).is_dir() else None
        self.files = {} if folder is None else folder.files()
        is_same = folder is not None and describes(folder.config, folder.tensors, self.config.model)
        self.origin = folder if is_same else None
        self.hf_config = self._new_config(folder) if self.origin is None else self.origin.config
        for name, variable in variables.items():
            if (found := self.about["arrays"].get(name, {}).get("shape")) != list(variable.shape):
                raise UserError(f"checkpoint {self.step} of {run.path}: {name} is {found}, not {list(variable.shape)}")
        self.places = places(self.config.model, self.hf_config, variables)
        for copy, of in copies_of(self.config.model).items():
            if self.origin is not None and copy in self.origin.tensors:
                self.places[copy] = self.places[of]
        self._kept = {n: files for files in (self.origin.kept.values() if self.origin else ()) for n in files}
        self._block = block_size(self.hf_config)

    @staticmethod
    def _latest(run: RunFolder) -> tuple[int, dict[str, Any]]:
        """The step to take, and the body of its manifest: the last one that verifies.

        What a conversion wrote is verified when it is read, file by file, and not read twice.
        """
        with contextlib.closing(run.open_checkpoints()) as checkpoints:
            step = max(checkpoints.steps(), default=None)
            if step is not None:
                with contextlib.suppress(Damaged):
                    if "converted" in (about := manifest.read(run.checkpoints / str(step))):
                        return step, about
                step = checkpoints.latest()
            if step is None:
                raise UserError(f"no checkpoint in {run.checkpoints} verifies")
            return step, checkpoints.about(step)

    def _new_config(self, began: Origin | None) -> dict[str, Any]:
        """config.json of a model that was made here, or of one that ``began`` as another, whose texts it has."""
        path, model, data = self.run.tokenizer, self.config.model, self.config.data
        dtype = self.about["arrays"]["params/embedding"]["dtype"]
        if began is not None:
            ids = {name: began.config[name] for name in ("bos_token_id", "eos_token_id") if name in began.config}
            return hf_config(model, max_length=meant_length(began.config, model, data.seq_len), dtype=dtype) | ids
        end_ids = (load_tokenizer(path, end_token=data.end_token).end_id,) if path.is_file() else ()
        return hf_config(model, max_length=data.seq_len, end_ids=end_ids, dtype=dtype)

    @property
    def trained(self) -> bool:
        """Whether the numbers are others than those of the origin."""
        return "converted" not in self.about

    @property
    def kept_fp8(self) -> bool:
        """Whether the scales of 8-bit weights are there."""
        return self.origin is not None and bool(self.origin.about["kept_fp8"])

    def __iter__(self) -> Iterator[str]:
        yield from self.places
        yield from (name for name in self._kept if not (name.endswith(SCALE) and name.removesuffix(SCALE) in self))

    def __contains__(self, name: object) -> bool:
        return name in self.places or name in self._kept

    def dtype(self, name: str) -> np.dtype:
        """The type of a tensor of the model, as the checkpoint has it."""
        return np.result_type(*(self._arrays.dtype(path) for path in self.places[name].variables))

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor of the model as the checkpoint has it; any other as it was."""
        if name not in self.places:
            return self._kept[name][name]
        place = self.places[name]
        with self._told():
            return place.join([self._arrays.part(path, place.index) for path in place.variables])

    def fp8(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """8-bit values and scales of a weight: the origin's if they still stand for it, else new ones."""
        x, scale = self[name].astype(BF16, copy=False), self._kept[name + SCALE][name + SCALE]
        values = quantize(x, scale, self._block)
        if self.trained and dequantize(values, scale, self._block).tobytes() != x.tobytes():
            scale = scales_for(x, self._block, powers_of_two=has_powers_of_two(self.hf_config))
            values = quantize(x, scale, self._block)
        return values, scale

    def plain(self, name: str) -> np.ndarray:
        """As ``self[name]``; an 8-bit tensor that is not the model's in bfloat16."""
        x = self[name]
        return x if x.dtype != FP8 else dequantize(x, self[name + SCALE], self._block)

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Every variable of the model, by its path, whole."""
        with self._told():
            return {path: self._arrays.whole(path) for place in self.places.values() for path in place.variables}

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A damaged file as one sentence."""
        try:
            yield
        except Damaged as error:
            raise UserError(f"checkpoint {self.step} in {self.run.checkpoints} is damaged: {error}") from None
