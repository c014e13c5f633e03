"""Bits per byte on held-out documents: -sum log2 p(token) / bytes of the text, every byte counted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from dsjax.data.batch import Batch
from dsjax.data.pipeline import eval_windows
from dsjax.data.prepare import HeldOut
from dsjax.nn.losses import token_losses
from dsjax.nn.masks import Documents
from dsjax.sharding import replicated, use_mesh


@functools.partial(jax.jit, static_argnames=("graph", "mesh"))
def _nats(graph: Any, mesh: Any, params: Any, tokens_BT, targets_BT, ids_BT, positions_BT, features_BTC):
    with use_mesh(mesh):
        model = nnx.merge(graph, params)
        out = model(tokens_BT, Documents(ids_BT, positions_BT), features_BTC=features_BTC)
        nats_BT = token_losses(out.hidden_BTD, model.output_weights(), targets_BT, out.copy)
    # Every process reads them all.
    return nats_BT if mesh is None else jax.lax.with_sharding_constraint(nats_BT, replicated(mesh))


def document_bits(
    graph: Any,
    params: Any,
    documents: Sequence[HeldOut],
    *,
    seq_len: int,
    end_id: int,
    context: int | None = None,
    batch_size: int = 8,
    mesh: Any = None,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    progress: Callable[[int, int], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Float[np.ndarray, " documents"]:
    """Bits that the model spends on each document, its closing boundary included.

    Args:
        graph, params: the model.
        documents: held-out documents.
        seq_len: positions that the model sees at a time.
        end_id: the document boundary.
        context: overlap of windows, half of ``seq_len`` when None: each token has at least so much context.
        batch_size: rows at a time.
        mesh: devices, None for one.
        place: puts a batch on the devices.
        progress: called with (batches done, batches in all).
        stopped: asked after each batch; if true, the rest is left out, and the result is of no use.
    """
    context = seq_len // 2 if context is None else context
    windows = eval_windows(documents, seq_len=seq_len, context=context, batch_size=batch_size, end_id=end_id)
    bits = np.zeros(len(documents))
    for index, (batch, owner_BT) in enumerate(zip(windows.batches, windows.document_BT, strict=True)):
        b = place(batch)
        rows = (b.tokens_BT, b.targets_BT, b.documents.ids_BT, b.documents.positions_BT, b.features_BTC)
        nats = _nats(graph, mesh, params, *rows)
        counted = owner_BT >= 0
        np.add.at(bits, owner_BT[counted], np.asarray(nats, np.float64)[counted] / np.log(2))
        if progress is not None:
            progress(index + 1, len(windows.batches))
        if stopped():
            break
    return bits


def bits_per_byte(bits: np.ndarray, documents: Sequence[HeldOut]) -> tuple[float, float]:
    """Bits over bytes, and the half-width of its 95 % interval over documents (bootstrap, 1,000 resamples)."""
    sizes = np.array([d.num_bytes for d in documents], np.float64)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(documents), (1000, len(documents)))
    resampled = bits[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(bits.sum() / sizes.sum()), float((high - low) / 2)
