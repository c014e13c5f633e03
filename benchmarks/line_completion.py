"""How well a model of code completes held-out files: its next token, the rest of a line, and bits per byte.

A line is given up to the middle of its tokens, with all that stands before it, and a model completes it if its greedy
continuation is the rest of the line to the letter. That is so if the most probable token is the right one at each
position of the rest, given the text so far; so one pass over the files tells it of every line, and nothing is
generated. (A continuation that spells the same letters in other tokens than the tokenizer's counts as wrong.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from dsjax.data.prepare import HeldOut
from dsjax.data.tokenizer import Tokenizer
from dsjax.nn.losses import token_losses
from dsjax.nn.masks import Documents

LEAST_TOKENS = 4  # of a line, its end included


@dataclasses.dataclass(frozen=True)
class Read:
    """What a model makes of one document: of each of its tokens and its closing boundary, T in all.

    Attributes:
        nats_T: negative log-likelihoods.
        best_T: the most probable tokens.
        targets_T: the right ones.
    """

    nats_T: np.ndarray
    best_T: np.ndarray
    targets_T: np.ndarray


def read(
    graph: Any, variables: Any, documents: Sequence[HeldOut], *, seq_len: int, end_id: int, batch_size: int = 16
) -> list[Read]:
    """Every document, each token from at least ``seq_len // 2`` earlier ones or from all.

    Args:
        graph, variables: the model.
        documents: held-out documents.
        seq_len: positions that the model sees at a time.
        end_id: the document boundary.
        batch_size: rows at a time.
    """
    streams = [np.concatenate(([end_id], d.ids, [end_id])).astype(np.int32) for d in documents]
    found = [Read(np.zeros(len(s) - 1, np.float32), np.zeros(len(s) - 1, np.int32), s[1:]) for s in streams]
    context = seq_len // 2
    windows = [
        (document, start)
        for document, stream in enumerate(streams)
        for start in range(0, max(stream.size - 1 - context, 1), seq_len - context)
    ]
    for first in range(0, len(windows), batch_size):
        rows = windows[first : first + batch_size]
        tokens_BT, targets_BT, ids_BT = np.zeros((3, batch_size, seq_len), np.int32)
        for row, (document, start) in enumerate(rows):
            piece = streams[document][start : start + seq_len + 1]
            size = piece.size - 1
            tokens_BT[row, :size], targets_BT[row, :size], ids_BT[row, :size] = piece[:-1], piece[1:], 1
        nats_BT, best_BT = map(np.asarray, _forward(graph, variables, tokens_BT, targets_BT, ids_BT))
        for row, (document, start) in enumerate(rows):
            seen = context if start else 0  # those the window before has told
            there = slice(start + seen, start + int(ids_BT[row].sum()))
            here = slice(seen, seen + there.stop - there.start)
            found[document].nats_T[there], found[document].best_T[there] = nats_BT[row, here], best_BT[row, here]
    return found


@functools.partial(jax.jit, static_argnames="graph")
def _forward(graph: Any, variables: Any, tokens_BT: Any, targets_BT: Any, ids_BT: Any) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graph, variables)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    out = model(tokens_BT, Documents(ids_BT, positions_BT))
    nats_BT = token_losses(out.hidden_BTD, model.output_weights(), targets_BT, out.copy)
    return nats_BT, jnp.argmax(model.logits(out), axis=-1)


def line_ends(tokenizer: Tokenizer) -> list[str | None]:
    """Of each id, what it holds of the line that it ends; None: it ends none."""
    texts = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
    return [text.partition("\n")[0] if "\n" in text else None for text in texts]


def lines_completed(document: Read, ends: Sequence[str | None]) -> Int[np.ndarray, " lines"]:
    """For each line of at least ``LEAST_TOKENS`` tokens, whether the rest behind the middle is right: 1 or 0.

    The token that ends a line may hold the next one's indentation, about which nothing is asked.
    """
    right_T, hits, begin = document.best_T == document.targets_T, [], 0
    for t, target in enumerate(document.targets_T):
        if ends[target] is None:
            continue
        if t + 1 - begin >= LEAST_TOKENS:
            middle = begin + (t + 1 - begin) // 2
            hits.append(bool(right_T[middle:t].all()) and ends[document.best_T[t]] == ends[target])
        begin = t + 1
    return np.array(hits, np.int32)


def figures(
    graph: Any, variables: Any, documents: Sequence[HeldOut], tokenizer: Tokenizer, *, seq_len: int
) -> dict[str, float]:
    """Shares of right next tokens and of completed lines, how many there were, and bits per byte."""
    found, ends = read(graph, variables, documents, seq_len=seq_len, end_id=tokenizer.end_id), line_ends(tokenizer)
    right = np.concatenate([r.best_T == r.targets_T for r in found])
    lines = np.concatenate([lines_completed(r, ends) for r in found])
    nats = sum(float(r.nats_T.sum()) for r in found)
    return {
        "bits_per_byte": nats / float(np.log(2)) / sum(d.num_bytes for d in documents),
        "next_token": float(right.mean()),
        "exact_line": float(lines.mean()),
        "num_tokens": len(right),
        "num_lines": len(lines),
    }
