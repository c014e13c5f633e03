"""Rollouts as rows of arrays: one prompt and the text behind it each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int16, Int32, Integer

from dsjax.nn.fields import BEGINNING
from dsjax.rl.rollout import Rollout


@dataclasses.dataclass(frozen=True)
class WrittenRows:
    """N rows of T positions; numpy arrays.

    tokens_NT, targets_NT: as in a ``Batch``; the boundary behind what there is.
    learned_NT: 1 at each target that belongs to a text, its end included; 0 in the prompt and behind.
    ids_NT: 1 at each input of the row, 0 behind.
    told_NT: log-probabilities that the engine gave the targets, in nats; NaN where it gave none.
    features_NTC: as in a ``Batch``, or none.
    experts_NTLK: the engine's router decisions at each input, -1 behind, or none.
    """

    tokens_NT: Int32[np.ndarray, "N T"]
    targets_NT: Int32[np.ndarray, "N T"]
    learned_NT: Float32[np.ndarray, "N T"]
    ids_NT: Int32[np.ndarray, "N T"]
    told_NT: Float32[np.ndarray, "N T"]
    features_NTC: Int16[np.ndarray, "N T C"] | None = None
    experts_NTLK: Integer[np.ndarray, "N T L K"] | None = None

    @property
    def positions_NT(self) -> Int32[np.ndarray, "N T"]:
        """Place of each input in its row; 0 behind."""
        return np.where(self.ids_NT > 0, np.arange(self.ids_NT.shape[1], dtype=np.int32), 0).astype(np.int32)


def written_rows(
    prompts: Sequence[Sequence[int]], rollouts: Sequence[Rollout], *, length: int, end_id: int, at_start: Any = None
) -> WrittenRows:
    """Each prompt with the text that was written behind it.

    Args:
        prompts: token ids of each row, the boundary in front included.
        rollouts: of each row.
        length: of a row, T; all fit.
        end_id: the boundary, which also ends a text.
        at_start: a scanner, for a model that is told the structure of its text.
    """
    shape = (len(rollouts), length)
    tokens, targets, ids = np.full(shape, end_id, np.int32), np.full(shape, end_id, np.int32), np.zeros(shape, np.int32)
    learned, told = np.zeros(shape, np.float32), np.full(shape, np.nan, np.float32)
    features = None if at_start is None else np.tile(np.array(BEGINNING, np.int16), (*shape, 1))
    experts = None
    for n, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True)):
        row = [*prompt, *rollout.tokens]
        first, last = len(prompt) - 1, len(row) - 1 + rollout.ended  # places of targets that are the text's
        tokens[n, : len(row)], ids[n, : len(row)] = row, 1
        targets[n, : len(row) - 1] = row[1:]
        learned[n, first:last] = 1
        told[n, first:last] = rollout.log_probs
        if features is not None and at_start is not None:
            features[n, 1 : len(row)] = at_start.copy().scan(row[1:])
        if rollout.experts is not None:
            if experts is None:
                experts = np.full((*shape, *rollout.experts.shape[1:]), -1, rollout.experts.dtype)
            experts[n, : len(rollout.experts)] = rollout.experts[: len(row)]
    return WrittenRows(tokens, targets, learned, ids, told, features, experts)


def row_length(longest: int, step: int) -> int:
    """Positions of rows whose longest one has so many: a multiple of ``step``, so that there are few distinct ones."""
    return -(-longest // step) * step
