"""Rows and batches: packing, shuffling, mixing and sharding over hosts with Grain; windows for evaluation.

A row is T tokens of its source's stream: the training documents in a shuffled order, each led by the boundary token,

    end a b c end d e end f ...      inputs
    a   b c end d e end f ...        targets: always the next token of the stream

so the boundary that closes a document is the one that opens the next: every token is predicted once, the first and
the closing boundary of each document included, and no position is spent on a target that crosses documents.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int16, Int32, Int64, Integer

from dsjax.config import UserError
from dsjax.data.batch import Batch
from dsjax.data.prepare import Corpus, DataConfig, HeldOut, TokenStore
from dsjax.nn.fields import BEGINNING, NUM_FIELDS, POINTERS
from dsjax.nn.masks import Documents

_PREFETCH_THREADS = 2
_PREFETCH_BATCHES = 8


# Rows that a source is said to have. Past any run's end, and far enough from 2**63 for Grain's arithmetic in floats:
# `repeat()` without a number says 2**63 - 1, on which `batch(1)` overflows.
_ENDLESS = 2**48


@dataclasses.dataclass(frozen=True)
class _Layout:
    """One epoch of a source: the order of its documents, where each starts in the stream, the order of the rows."""

    documents: Int64[np.ndarray, " documents"]
    starts: Int64[np.ndarray, " bounds"]
    rows: Int64[np.ndarray, " rows"]


class PackedRows:
    """Random access to the rows of one source, epoch after epoch; `rows[i]` is the fields of a `Batch`, (T,) each.

    Every epoch shuffles the documents, cuts their stream into rows and shuffles the rows: each token comes once, and
    the cuts fall elsewhere than in the epoch before. The last row of the stream is padded, so that no token is lost.

    Attributes:
        num_rows: rows in an epoch. (`len` is the number of rows on offer, which is endless.)
    """

    def __init__(self, store: TokenStore, *, seq_len: int, seed: int, end_id: int):
        self._store = store
        self._seq_len = seq_len
        self._seed = seed
        self._end_id = end_id
        self._num_tokens = int(store.tokens.size + store.offsets.size - 1)  # with each document's leading boundary
        self.num_rows = -(-self._num_tokens // seq_len)
        # Two, because the threads that read ahead may be in the next epoch already.
        self._layout = functools.lru_cache(maxsize=2)(self._make_layout)

    def _make_layout(self, epoch: int) -> _Layout:
        documents = _permutation(self._store.offsets.size - 1, self._seed, epoch, 0)
        lengths = np.diff(self._store.offsets)[documents] + 1
        starts = np.concatenate(([0], np.cumsum(lengths)))
        return _Layout(documents, starts, _permutation(self.num_rows, self._seed, epoch, 1))

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(index, self.num_rows)
        layout = self._layout(epoch)
        begin = int(layout.rows[place]) * self._seq_len
        used = min(self._num_tokens - begin, self._seq_len)
        low, high = np.searchsorted(layout.starts, (begin, begin + used))
        parts = np.union1d([0], layout.starts[low:high] - begin)
        store, length = self._store, self._seq_len + 1  # one more: the last target
        pieces = list(self._pieces(layout, begin, begin + length))
        window = np.full(length, self._end_id, np.int32)
        features = None if store.features is None else np.tile(np.array(BEGINNING, np.int16), (length, 1))
        weights = None if store.weights is None else np.ones(length, np.float32)
        for low, high, source in pieces:
            window[low:high] = store.tokens[source : source + high - low]
            if store.features is not None and features is not None:
                first, last = source * NUM_FIELDS, (source + high - low) * NUM_FIELDS
                features[low:high] = store.features[first:last].reshape(-1, NUM_FIELDS)
            if store.weights is not None and weights is not None:
                weights[low:high] = store.weights[source : source + high - low]
        row = _row(window[:-1], window[1:], used, parts, None if features is None else features[:-1])
        if weights is not None:
            row["loss_weight"] *= weights[1:]
        return row

    def _pieces(self, layout: _Layout, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Where documents stand in begin .. end of the stream, and where in the store; between them are boundaries."""
        first = int(np.searchsorted(layout.starts, begin, side="right")) - 1
        last = int(np.searchsorted(layout.starts[:-1], end))
        for place in range(first, last):
            source = int(self._store.offsets[layout.documents[place]])
            start = int(layout.starts[place]) + 1  # after the boundary
            low, high = max(start, begin), min(int(layout.starts[place + 1]), end)
            if low < high:
                yield low - begin, high - begin, source + low - start


def _permutation(size: int, *seed: int) -> np.ndarray:
    """A permutation of 0 .. size that depends on nothing else, not on versions either.

    NumPy promises stable bits from a bit generator, but not the same `Generator.permutation` in its next release; and
    Grain's `shuffle` takes 20 ms an index on a data set of two rows (it draws until it hits one of them).
    """
    return np.argsort(np.random.Philox(np.random.SeedSequence(seed)).random_raw(size), kind="stable")


def _row(
    tokens_T: np.ndarray, targets_T: np.ndarray, used: int, parts: np.ndarray, features_TC: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """A row of which the first `used` positions count, cut into documents at `parts` (the first is 0)."""
    place_T = np.arange(tokens_T.size, dtype=np.int32)
    real_T = place_T < used
    part_T = np.searchsorted(parts, place_T, side="right")
    positions_T = place_T - parts[part_T - 1]
    fields = {
        "tokens": tokens_T.astype(np.int32),
        "targets": targets_T.astype(np.int32),
        "loss_weight": real_T.astype(np.float32),
        "document_ids": np.where(real_T, part_T, 0).astype(np.int32),
        "positions": np.where(real_T, positions_T, 0).astype(np.int32),
    }
    if features_TC is not None:
        fields["features"] = within_row(features_TC, positions_T)
    return fields


def within_row(features_TC: Int16[np.ndarray, "T C"], positions_T: Integer[np.ndarray, " T"]) -> np.ndarray:
    """Features of a row, in which no token points to in front of the row, or of the part of it that it belongs to.

    Args:
        features_TC: of whole documents.
        positions_T: place of each token in its part of the row.
    """
    out_TC, columns = features_TC.copy(), list(POINTERS.values())
    out_TC[:, columns] = np.where(features_TC[:, columns] <= positions_T[:, None], features_TC[:, columns], 0)
    return out_TC


def _as_batch(rows: dict[str, np.ndarray]) -> Batch:
    documents = Documents(ids_BT=rows["document_ids"], positions_BT=rows["positions"])
    return Batch(rows["tokens"], rows["targets"], rows["loss_weight"], documents, rows.get("features"))


def mixed_rows(corpus: Corpus, cfg: DataConfig) -> grain.MapDataset[dict[str, np.ndarray]]:
    """The endless sequence of rows that every host agrees on: sources mixed by weight, each in its own epochs.

    Each source's share of the rows is its share of the weights, to within one in a hundred of itself (Grain mixes by
    whole numbers), from the start and throughout.
    """
    datasets = []
    for number, store in enumerate(corpus.stores):
        # Seeds are hashed: with consecutive ones two sources would use the same shuffles.
        digest = hashlib.sha256(f"{cfg.seed}/{number}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
        rows = PackedRows(store, seq_len=cfg.seq_len, seed=seed, end_id=corpus.tokenizer.end_id)
        datasets.append(grain.MapDataset.source(rows))
    weights = [source.weight for source in cfg.sources]
    rest, of_sources = 1 - sum(corpus.further_shares), sum(weights)
    further = [share * of_sources / rest for share in corpus.further_shares]
    return grain.MapDataset.mix(datasets, [*weights, *further])


class BatchIterator:
    """An endless iterator of this host's rows of each global batch, read ahead by background threads.

    Global batch g is rows g * B .. g * B + B of `mixed_rows`, and host h has the h-th of its equal parts, so the
    global batch does not depend on the number of hosts.
    """

    def __init__(self, corpus: Corpus, cfg: DataConfig, *, host_index: int, num_hosts: int, rows: Any = None):
        if not 0 <= host_index < num_hosts:
            raise ValueError(f"host_index {host_index} is not below num_hosts {num_hosts}")
        if cfg.batch_size % num_hosts:
            raise UserError(
                f"data.batch_size is {cfg.batch_size}; it must be a multiple of the number of hosts, {num_hosts}"
            )
        self._rows = mixed_rows(corpus, cfg) if rows is None else grain.MapDataset.source(rows)
        self._fingerprint = corpus.fingerprint
        self._batch_size = cfg.batch_size
        self._host_index = host_index
        self._num_hosts = num_hosts
        self._iterator: grain.DatasetIterator[Batch] | None = None
        self._start(0)

    def _start(self, rows_taken: int) -> None:
        self.close()
        self._rows_taken = rows_taken
        # Equal parts of a batch are batches themselves: every num_hosts-th of them is this host's.
        parts = self._rows[rows_taken:].batch(self._batch_size // self._num_hosts)
        mine = parts[self._host_index :: self._num_hosts].map(_as_batch)
        options = grain.ReadOptions(num_threads=_PREFETCH_THREADS, prefetch_buffer_size=_PREFETCH_BATCHES)
        self._iterator = iter(mine.to_iter_dataset(options))

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise ValueError("the iterator is closed")
        batch = next(self._iterator)
        self._rows_taken += self._batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Plain data, the same on every host: rows taken so far, over all hosts, and the data's fingerprint."""
        return {"rows_taken": self._rows_taken, "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any], *, changes: str = "") -> None:
        """Goes on exactly where `get_state` was called, also with another batch size or number of hosts.

        Args:
            state: from `get_state`.
            changes: which files are known to have changed, should the data be other data.

        Raises:
            UserError: the state is of other data.
        """
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                f"the training data changed: the run was trained on data with fingerprint"
                f" {state['fingerprint'][:16]}, found {self._fingerprint[:16]}{changes and f' ({changes})'}; restore"
                " the documents, tokenizer, data.seq_len, data.seed and weights it had, or start a new run"
            )
        self._start(int(state["rows_taken"]))

    def close(self) -> None:
        """Ends the background threads."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def make_batches(
    corpus: Corpus, cfg: DataConfig, *, host_index: int = 0, num_hosts: int = 1, rows: Any = None
) -> BatchIterator:
    """An endless iterator of training batches, (batch_size / num_hosts, seq_len) each, numpy arrays.

    ``rows``: the rows to take in their order, with random access as :class:`PackedRows`; None: :func:`mixed_rows`.

    Raises:
        UserError: batch_size is no multiple of num_hosts.
    """
    return BatchIterator(corpus, cfg, host_index=host_index, num_hosts=num_hosts, rows=rows)


@dataclasses.dataclass(frozen=True)
class EvalWindows:
    """Held-out documents in rows of fixed shape, each token counted once.

    batches: `loss_weight_BT` is 1 at each counted target and 0 elsewhere (context seen before, padding).
    document_BT: for each batch, the index of the document that each counted target belongs to; -1 elsewhere.
    num_bytes: UTF-8 bytes of each document. num_targets: its tokens and its closing boundary.
    """

    batches: tuple[Batch, ...]
    document_BT: tuple[Int32[np.ndarray, "B T"], ...]
    num_bytes: Int64[np.ndarray, " documents"]
    num_targets: Int64[np.ndarray, " documents"]


@dataclasses.dataclass(frozen=True)
class _Window:
    document: int
    tokens: np.ndarray
    targets: np.ndarray
    num_seen: int  # targets at the front that an earlier window counts
    features: np.ndarray | None


def eval_windows(
    documents: Sequence[HeldOut], *, seq_len: int, context: int, batch_size: int, end_id: int
) -> EvalWindows:
    """Cuts documents into windows that overlap by `context` tokens and packs them into rows.

    Every token of every document, and its closing boundary, is a counted target exactly once, predicted from at
    least `context` earlier tokens of its document (boundary included) or from all of them.

    Args:
        documents: any number, empty ones included.
        seq_len: T of the rows.
        context: tokens of overlap, below seq_len. More is closer to unlimited context and costs seq_len /
            (seq_len - context) as much.
        batch_size: rows per batch; the last one is filled with padding.
        end_id: the boundary token, also the padding.
    """
    if not 0 <= context < seq_len:
        raise UserError(f"the context of evaluation is {context}; it must be at least 0 and below seq_len, {seq_len}")
    windows = []
    for number, document in enumerate(documents):
        stream, features = _bounded(document.ids, end_id), None
        if document.features_TC is not None:
            features = np.concatenate((np.array([BEGINNING], np.int16), document.features_TC))
        for start in range(0, max(stream.size - 1 - context, 1), seq_len - context):
            piece = stream[start : start + seq_len + 1]
            seen = None if features is None else features[start : start + piece.size - 1]
            windows.append(_Window(number, piece[:-1], piece[1:], context if start else 0, seen))

    with_features = any(document.features_TC is not None for document in documents)
    rows = [_eval_row(row, seq_len, end_id, with_features) for row in _first_fit(windows, seq_len)]
    empty = _eval_row([], seq_len, end_id, with_features)
    rows += [empty] * (-len(rows) % batch_size)
    batches, owners = [], []
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        batches.append(_as_batch({key: np.stack([fields[key] for fields, _ in chunk]) for key in empty[0]}))
        owners.append(np.stack([owner for _, owner in chunk]))
    return EvalWindows(
        tuple(batches),
        tuple(owners),
        np.asarray([d.num_bytes for d in documents], np.int64),
        np.asarray([d.ids.size + 1 for d in documents], np.int64),
    )


def _bounded(ids: Integer[np.ndarray, " T"], end_id: int) -> np.ndarray:
    return np.concatenate(([end_id], ids, [end_id])).astype(np.int32)


def _first_fit(windows: Sequence[_Window], seq_len: int) -> list[list[_Window]]:
    """Windows in rows of at most seq_len tokens, longest first: tails and short documents share rows."""
    rows: list[list[_Window]] = []
    open_rows: list[tuple[int, list[_Window]]] = []  # (room, row)
    for window in sorted(windows, key=lambda w: -w.tokens.size):
        size = window.tokens.size
        place = next((i for i, (room, _) in enumerate(open_rows) if room >= size), None)
        if place is None:
            row = [window]
            rows.append(row)
            if size < seq_len:
                open_rows.append((seq_len - size, row))
        else:
            room, row = open_rows[place]
            row.append(window)
            open_rows[place] = (room - size, row)
            if room == size:
                del open_rows[place]
    return rows


def _eval_row(
    windows: Sequence[_Window], seq_len: int, end_id: int, with_features: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The fields of a row and the document of each counted target (-1 elsewhere)."""
    tokens_T = np.full(seq_len, end_id, np.int32)
    targets_T = np.full(seq_len, end_id, np.int32)
    owner_T = np.full(seq_len, -1, np.int32)
    features_TC = np.tile(np.array(BEGINNING, np.int16), (seq_len, 1)) if with_features else None
    boundaries = [0]
    place = 0
    for window in windows:
        end = place + window.tokens.size
        tokens_T[place:end] = window.tokens
        targets_T[place:end] = window.targets
        owner_T[place + window.num_seen : end] = window.document
        if features_TC is not None and window.features is not None:
            features_TC[place:end] = window.features
        boundaries.append(end)
        place = end
    fields = _row(tokens_T, targets_T, place, np.asarray(boundaries[:-1] or [0]), features_TC)
    fields["loss_weight"] = (owner_T >= 0).astype(np.float32)
    return fields, owner_T
