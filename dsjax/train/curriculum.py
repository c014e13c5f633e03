"""The order in which a fine-tuning run meets its material: from single functions to modules, epoch after epoch.

    key_e(row) = place(row)  with probability  s_e = order * (1 - e / (epochs - 1)),  else  u,     u uniform in [0, 1)

where place(row) in [0, 1) is where the row stands if all rows are in the order of their stages. Epoch e takes the rows
in the order of their keys: the first one stage after stage, the last one shuffled, one between them partly so. Whatever
``order`` is, an epoch has the same rows.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from dsjax.config import NonNegativeInt, PositiveInt, Share, UserError
from dsjax.data.prepare import Corpus, TokenStore
from dsjax.data.structure.errors import RepairConfig
from dsjax.data.structure.repair import repairs
from dsjax.data.tokenizer import Tokenizer
from dsjax.nn.fields import BEGINNING, NUM_FIELDS, POINTERS

BETWEEN = "\n\n"  # functions of one document
OPEN_ROWS = 32  # that documents are put into, when rows are packed
_ENDLESS = 2**48  # rows on offer, see dsjax.data.pipeline


@dataclasses.dataclass(frozen=True)
class Stage:
    """A kind of documents.

    source: which of ``data.sources`` they are from.
    functions: so many of its documents, drawn at random, are one.
    """

    source: NonNegativeInt = 0
    functions: PositiveInt = 1


@dataclasses.dataclass(frozen=True)
class CourseConfig:
    """What is learned, and in which order.

    stages: kinds of documents, the simplest first; empty: the sources as they stand.
    order: how strictly the first epoch keeps to that; 0: every epoch is shuffled.
    epochs: how often everything is met.
    """

    stages: tuple[Stage, ...] = ()
    order: Share = 1.0
    epochs: PositiveInt = 3

    def strictness(self, epoch: int) -> float:
        """s_e."""
        return self.order * (1 - epoch / (self.epochs - 1) if self.epochs > 1 else 1)


def course_order(
    stage_R: Sequence[float] | Float64[np.ndarray, " R"], strictness: float, *seed: int
) -> Int64[np.ndarray, " R"]:
    """The order of rows by their keys, see above.

    Args:
        stage_R: of each row; more is later.
        strictness: s_e.
        seed: of everything random.
    """
    num = len(stage_R)
    keeps_R, u_R = np.random.Philox(np.random.SeedSequence(seed)).random_raw(2 * num).reshape(2, num) / 2**64
    place_R = np.empty(num)
    place_R[np.lexsort((u_R, np.asarray(stage_R)))] = np.arange(num) / num
    return np.argsort(np.where(keeps_R < strictness, place_R, u_R), kind="stable")


# ---------------------------------------------------------------- documents


def staged(corpus: Corpus, course: CourseConfig, seed: int) -> Corpus:
    """The corpus with a store for each stage in place of one for each source; a store of repairs stays behind them.

    Raises:
        UserError: a stage names a source that there is not.
    """
    if not course.stages:
        return corpus
    num_sources = len(corpus.stores) - len(corpus.further_shares)
    stores = []
    for number, stage in enumerate(course.stages):
        if stage.source >= num_sources:
            raise UserError(
                f"course.stages.{number}.source is {stage.source}; there are {num_sources} data.sources, from 0 on"
            )
        store = corpus.stores[stage.source]
        several = stage.functions > 1
        stores.append(joined(store, stage.functions, corpus.tokenizer, seed + number) if several else store)
    settings = repr((dataclasses.astuple(course)[0], seed, corpus.content))
    return dataclasses.replace(
        corpus,
        stores=(*stores, *corpus.stores[num_sources:]),
        content=hashlib.sha256(settings.encode()).hexdigest(),
    )


def joined(store: TokenStore, functions: int, tokenizer: Tokenizer, seed: int) -> TokenStore:
    """Documents of ``functions`` of the store's each, drawn without replacement; the last may have fewer.

    What stands between them is read and not learned.
    """
    order = course_order(np.zeros(store.offsets.size - 1), 0.0, seed)
    between = tokenizer.encode(BETWEEN, added=False)
    found = []
    for first in range(0, order.size, functions):
        parts = list[tuple[np.ndarray, np.ndarray]]()  # tokens, and whether they are learned
        for document in order[first : first + functions]:
            begin, end = store.offsets[document : document + 2].tolist()
            own = np.ones(end - begin, np.uint8) if store.weights is None else store.weights[begin:end]
            parts += [(between, np.zeros(between.size, np.uint8))] if parts else []
            parts.append((np.asarray(store.tokens[begin:end]), np.asarray(own)))
        found.append(_with_layout(parts, tokenizer) if tokenizer.layout else parts)
    return _store(found, np.asarray(store.tokens[:0]).dtype)


def _with_layout(parts: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer: Tokenizer) -> list[Any]:
    """The same texts in tokens that say how each is indented relative to what stands in front of it."""
    texts, learned = list[str | int](), list[int]()
    for tokens, weights in parts:
        for begin, end in itertools.pairwise([0, *np.flatnonzero(np.diff(weights)) + 1, tokens.size]):
            texts.append(tokenizer.decode(tokens[begin:end], behind=tokens[:begin]))
            learned.append(int(weights[begin]))
    forms = [tokenizer.encode_said(str(form)) for form in tokenizer.said(texts)]
    return [(form, np.full(form.size, weight, np.uint8)) for form, weight in zip(forms, learned, strict=True)]


def _store(documents: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], dtype: Any) -> TokenStore:
    """A store of documents in memory, each of parts (tokens, and whether they are learned)."""
    sizes = [sum(tokens.size for tokens, _ in parts) for parts in documents]
    tokens, weights = zip(*itertools.chain(*documents), strict=True)
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return TokenStore(np.concatenate(tokens).astype(dtype), offsets, weights=np.concatenate(weights).astype(np.uint8))


def repairs_in_words(corpus: Corpus, cfg: RepairConfig, seed: int) -> Corpus:
    """As :func:`dsjax.data.structure.repair.with_repairs`, for a tokenizer that has no tokens for it: comments say what
    is broken and what mends it. As many repairs as their share of the rows can hold.
    """
    tokenizer, documents, size = corpus.tokenizer, list[list[tuple[np.ndarray, np.ndarray]]](), 0
    most = cfg.share / (1 - cfg.share) * sum(store.tokens.size for store in corpus.stores)
    for case in repairs(_texts(corpus), cfg, seed):
        forms = tokenizer.said([f"# Broken:\n{case.text}# The line that mends it:\n", case.original])
        given, line = (tokenizer.encode_said(str(form), added=False) for form in forms)
        documents.append([(given, np.zeros(given.size, np.uint8)), (line, np.ones(line.size, np.uint8))])
        size += given.size + line.size
        if size >= most:
            break
    if not documents:
        raise UserError("data.repair found no Python function in the training documents to put an error into")
    store = _store(documents, np.asarray(corpus.stores[0].tokens[:0]).dtype)
    settings = repr(("repairs in words", dataclasses.astuple(cfg), seed, corpus.content))
    return dataclasses.replace(
        corpus,
        stores=(*corpus.stores, store),
        further_shares=(*corpus.further_shares, cfg.share),
        content=hashlib.sha256(settings.encode()).hexdigest(),
    )


def _texts(corpus: Corpus) -> Iterator[str]:
    """The training documents, in an order that mixes the sources."""
    places = [(number, d) for number, store in enumerate(corpus.stores) for d in range(store.offsets.size - 1)]
    for place in course_order(np.zeros(len(places)), 0.0, 0):
        number, document = places[place]
        begin, end = corpus.stores[number].offsets[document : document + 2].tolist()
        yield corpus.tokenizer.decode(corpus.stores[number].tokens[begin:end])


# ---------------------------------------------------------------- rows


# Positions begin .. end of a document's own stream: the boundary in front of it, then its tokens. What is to be
# predicted at each is the next token, at last the boundary behind it.
Piece = tuple[int, int, int]  # document, begin, end


def packed(offsets: Int64[np.ndarray, " bounds"], seq_len: int, *seed: int) -> list[list[Piece]]:
    """Rows of at most ``seq_len`` positions that hold whole documents, in an order drawn at random, each in the first
    open row with room; a longer document is cut."""
    rows: list[list[Piece]] = []
    open_rows: list[tuple[int, list[Piece]]] = []  # (room, row)
    for document in course_order(np.zeros(offsets.size - 1), 0.0, *seed).tolist():
        length = int(offsets[document + 1] - offsets[document]) + 1
        for begin in range(0, length, seq_len):
            piece = (document, begin, min(begin + seq_len, length))
            size = piece[2] - begin
            place = next((i for i, (room, _) in enumerate(open_rows) if room >= size), None)
            if place is None:
                rows.append([piece])
                open_rows.append((seq_len - size, rows[-1]))
            else:
                room, row = open_rows[place]
                row.append(piece)
                open_rows[place] = (room - size, row)
            open_rows = [entry for entry in open_rows if entry[0] > 1][-OPEN_ROWS:]
    return rows


class CourseRows:
    """Random access to the rows of a run, epoch after epoch; `rows[i]` is the fields of a `Batch`, (T,) each.

    Rows are packed once. In every epoch a share of them, others each time, gives its place to repairs, if there are
    such; so an epoch has as many rows with repairs as without.

    Attributes:
        num_rows: rows of an epoch, a multiple of the batch: at the end of one its first rows may come again.
    """

    def __init__(self, corpus: Corpus, course: CourseConfig, *, seq_len: int, batch_size: int, seed: int):
        self._corpus, self._course, self._seq_len, self._seed = corpus, course, seq_len, seed
        rows = [packed(store.offsets, seq_len, seed, 0, number) for number, store in enumerate(corpus.stores)]
        num_stages = len(rows) - len(corpus.further_shares)
        self._rows = [(number, row) for number in range(num_stages) for row in rows[number]]
        self._repairs = [(number, row) for number in range(num_stages, len(rows)) for row in rows[number]]
        self._stage_R = [number / max(num_stages - 1, 1) for number, _ in self._rows]
        self.num_rows = -(-len(self._rows) // batch_size) * batch_size
        self._num_repairs = round(sum(corpus.further_shares) * self.num_rows)
        # Two, because the threads that read ahead may be in the next epoch already.
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> list[tuple[int, list[Piece]]]:
        strictness = self._course.strictness(min(epoch, self._course.epochs - 1))
        order = course_order(self._stage_R, strictness, self._seed, 1, epoch)
        rows = [self._rows[i] for i in np.resize(order, self.num_rows)]
        for count in range(self._num_repairs):  # spread evenly
            place = (2 * count + 1) * self.num_rows // (2 * self._num_repairs)
            rows[place] = self._repairs[(epoch * self._num_repairs + count) % len(self._repairs)]
        return rows

    def stage(self, index: int) -> int:
        """The store that row ``index`` is from."""
        epoch, place = divmod(index, self.num_rows)
        return self._order(epoch)[place][0]

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(index, self.num_rows)
        number, pieces = self._order(epoch)[place]
        store, end_id = self._corpus.stores[number], self._corpus.tokenizer.end_id
        row = empty_row(self._seq_len, end_id, with_features=store.features is not None)
        at = 0
        for part, piece in enumerate(pieces, 1):
            at = _put(row, at, part, piece, store, end_id)
        return row


def empty_row(seq_len: int, end_id: int, *, with_features: bool) -> dict[str, np.ndarray]:
    """The fields of a row in which nothing counts."""
    zeros = {name: np.zeros(seq_len, np.int32) for name in ("document_ids", "positions")}
    row = {"tokens": np.full(seq_len, end_id, np.int32), "targets": np.full(seq_len, end_id, np.int32)} | zeros
    row["loss_weight"] = np.zeros(seq_len, np.float32)
    if with_features:
        row["features"] = np.tile(np.array(BEGINNING, np.int16), (seq_len, 1))
    return row


def _put(row: dict[str, Any], at: int, part: int, piece: Piece, store: TokenStore, end_id: int) -> int:
    """Writes a piece of a document into a row from position ``at`` on; returns where it ends."""
    document, begin, end = piece
    first, last = store.offsets[document : document + 2].tolist()
    here, size = slice(at, at + end - begin), end - begin
    stream = np.concatenate(([end_id], store.tokens[first:last][max(begin - 1, 0) : end], [end_id]))
    window = stream[min(begin, 1) : min(begin, 1) + size + 1]
    row["tokens"][here], row["targets"][here] = window[:-1], window[1:]
    row["document_ids"][here], row["positions"][here] = part, np.arange(size)
    learned = np.ones(last - first, np.float32) if store.weights is None else store.weights[first:last]
    row["loss_weight"][here] = np.append(learned, 1)[begin:end]
    if store.features is not None:
        flat = store.features[(first + max(begin - 1, 0)) * NUM_FIELDS : (first + end - 1) * NUM_FIELDS]
        seen = flat.reshape(-1, NUM_FIELDS)
        row["features"][at + size - len(seen) : at + size] = seen
        columns = list(POINTERS.values())
        own = row["features"][here]
        own[:, columns] = np.where(own[:, columns] <= np.arange(size)[:, None], own[:, columns], 0)
    return at + size
