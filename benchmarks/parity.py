"""Logits, loss, gradients and greedy tokens of tiny random models, beside Hugging Face transformers' in float32."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsjax
from benchmarks.plans import table
from benchmarks.timing import ROOT
from dsjax.checkpoint import path_name
from dsjax.convert.names import places, variables_of
from dsjax.loaded import LoadedModel

LIMIT, GRADIENT_LIMIT = 1e-4, 1e-3  # absolute; relative to the largest value of the gradient


def compare_folder(folder: pathlib.Path) -> dict[str, Any]:
    """Largest differences of the model in a folder from what ``reference.npz`` beside it holds."""
    reference, model = np.load(folder / "reference.npz"), dsjax.load(folder, dtype="float32")
    ids_BT, real_BT = reference["input_ids"], reference["pad_mask"] > 0
    value, gradients = jax.jit(jax.value_and_grad(loss_of(model, ids_BT)))(model.params)
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    greedy = reference["greedy"]
    out = model.generate(ids_BT[:, : -greedy.shape[1] - 4], max_new_tokens=greedy.shape[1], stop_at_eos=False)
    padded = np.abs(model.logits(ids_BT, reference["pad_mask"]) - reference["pad_logits"])[real_BT]
    return {
        "logits": float(np.abs(model.logits(ids_BT) - reference["logits"]).max()),
        "padded logits": float(padded.max()),
        "loss": abs(float(value) - float(reference["loss"])),
        "gradients": gradient_difference(hf, model, gradients, reference)[1],
        "greedy tokens equal": float((out[:, -greedy.shape[1] :] == greedy).mean()),
    }


def loss_of(model: LoadedModel, ids_BT: np.ndarray) -> Callable[[Any], Any]:
    """The mean loss of each next token, as a function of the parameters."""

    def loss(params: Any) -> Any:
        module = nnx.merge(model.graph, params)
        log_probs = jax.nn.log_softmax(module.logits(module(jnp.asarray(ids_BT)))[:, :-1])
        return -jnp.take_along_axis(log_probs, jnp.asarray(ids_BT)[:, 1:, None], axis=2).mean()

    return loss


def gradient_difference(hf: dict[str, Any], model: LoadedModel, gradients: Any, reference: Any) -> tuple[int, float]:
    """Of how many tensors gradients are compared, and the largest difference over the largest value of its tensor."""
    flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    placed, largest, compared = places(model.config, hf, variables_of(model.config)), 0.0, 0
    for key in (key for key in reference.files if key.startswith("grad/")):
        place = placed.get(key.removeprefix("grad/"))
        if place is None:  # experts that are stored together
            continue
        parts = [np.asarray(flat[name.partition("/")[2]][place.index]) for name in place.variables]
        want = reference[key].reshape(place.shape)
        largest = max(largest, float(np.abs(place.join(parts) - want).max() / max(np.abs(want).max(), 1e-12)))
        compared += 1
    return compared, largest


def compare(torch_python: str, names: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """All variants of benchmarks/torch_parity.py, by name."""
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "benchmarks" / "torch_parity.py"
        subprocess.run([torch_python, str(script), folder, *names], check=True, stdout=sys.stderr)
        return {path.name: compare_folder(path) for path in sorted(pathlib.Path(folder).iterdir())}


def as_table(figures: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    names = list(next(iter(figures.values())))
    lines = [(name, *(f"{row[key]:.1e}" if row[key] < 0.5 else f"{row[key]:.0%}" for key in names))
             for name, row in figures.items()]  # fmt: skip
    return table(("model", *names), lines)
