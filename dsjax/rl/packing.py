"""Several texts in a row: an update has no position that is padding because another text is longer.

Texts that do not count have no place at all. What a text is read as does not change: each is a document of its row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsjax.config import UserError
from dsjax.nn.masks import Documents
from dsjax.rl.experience import Experience


class Packing:
    """Where each of N texts with its prompt has its place in rows of ``row_length`` positions.

    Longest first, each in the first row with room (first-fit decreasing, Johnson 1973).

    Args:
        lengths: positions of each; 0: it has no place.
        row_length: of a row.
        devices: the number of rows is a multiple of it, one of :func:`num_rows`.
        turn: texts begin at its multiples; of a model that cuts rows, ``DecoderConfig.turn``: so it cuts a text as when
            it wrote it.

    Attributes:
        num_rows: rows.
        row_N, start_N: the place of each; -1: none.
        part_N: number of the text in its row, from 1.

    Raises:
        UserError: one is longer than a row.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, row_length: int, devices: int, turn: int = 1):
        self._lengths, self._row_length = np.asarray(lengths), row_length
        if self._lengths.max(initial=0) > row_length:
            raise UserError(
                f"data.seq_len is {row_length}, but a prompt with its text has {self._lengths.max()} tokens; raise it,"
                " or lower rollout.max_tokens"
            )
        self.row_N, self.start_N, self.part_N = (np.full(len(self._lengths), -1) for _ in range(3))
        used, parts = list[int](), list[int]()
        for n in np.argsort(-self._lengths, kind="stable").tolist():
            size = int(self._lengths[n])
            if not size:
                continue
            row = next((row for row, end in enumerate(used) if end + size <= row_length), len(used))
            if row == len(used):
                used.append(0)
                parts.append(0)
            parts[row] += 1
            self.row_N[n], self.start_N[n], self.part_N[n] = row, used[row], parts[row]
            used[row] += -(-size // turn) * turn
        self.num_rows = num_rows(len(used), devices)

    def packed(self, x_NT: np.ndarray, empty: Any) -> np.ndarray:
        """Numbers of the texts' positions at their places, ``empty`` elsewhere: (rows, row_length, ...)."""
        out = np.full((self.num_rows, self._row_length, *x_NT.shape[2:]), empty, x_NT.dtype)
        for n in np.flatnonzero(self.row_N >= 0):
            start, size = self.start_N[n], self._lengths[n]
            out[self.row_N[n], start : start + size] = x_NT[n, :size]
        return out

    def unpacked(self, x_RT: np.ndarray, length: int) -> np.ndarray:
        """The way back, to (N, length, ...); 0 where nothing was packed."""
        out = np.zeros((len(self.row_N), length, *x_RT.shape[2:]), x_RT.dtype)
        for n in np.flatnonzero(self.row_N >= 0):
            start, size = self.start_N[n], self._lengths[n]
            out[n, :size] = x_RT[self.row_N[n], start : start + size]
        return out

    def experience(self, batch: Experience, end_id: int) -> Experience:
        """Rows of one text each as rows of several; ``end_id`` stands where nothing is."""
        ids_NT = np.asarray(batch.documents.ids_BT)
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "documents"}
        empty = {"tokens_BT": end_id, "targets_BT": end_id, "experts_BTLK": -1}
        found = {
            name: None if x is None else self.packed(np.asarray(x), empty.get(name, 0))
            for name, x in fields.items()
            if name != "kl_coef_B"
        }
        coefs = batch.kl_coef_B
        found["kl_coef_B"] = None if coefs is None else np.full(self.num_rows, np.asarray(coefs)[0], np.float32)
        parts_NT = np.where(ids_NT > 0, self.part_N[:, None], 0).astype(ids_NT.dtype)
        positions = self.packed(np.asarray(batch.documents.positions_BT), 0)
        return Experience(documents=Documents(self.packed(parts_NT, 0), positions), **found)


def packing_of(batch: Experience, row_length: int, devices: int, turn: int) -> Packing:
    """For the texts of a batch that count: those whose documents are there."""
    return Packing(np.asarray(batch.documents.ids_BT > 0).sum(axis=1), row_length, devices, turn)


def num_rows(used: int, devices: int) -> int:
    """The least of ``devices`` times 1, 2, 3, 4, 6, 8, 12, 16, 24 ... that is not below ``used``.

    So few different shapes are compiled, and less than a third of the rows, and ``devices``, are empty.
    """
    each = max(-(-used // devices), 1)
    whole = 1 << (each - 1).bit_length()  # a power of 2
    between = whole * 3 // 4
    return devices * (between if whole > 2 and each <= between else whole)
