"""Removing exact and near duplicates: MinHash with banded LSH, every pair verified by its true Jaccard similarity.

Two documents are near duplicates when the Jaccard similarity of their sets of token 5-grams reaches the threshold
(Broder 1997; banding as in Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, ch. 3). What is kept depends on
contents only, never on names or order, so that adding or renaming a file does not reshuffle the corpus.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from dsjax.data.corpus import Document

SHINGLE = 5  # tokens; whitespace is not a token, so re-indented copies are still found
NUM_HASHES = 128
_RECALL = 0.999  # chance that a pair exactly at the threshold becomes a candidate
_MOST_TOKENS = 2**20  # distinct ones whose hashes are kept, about 100 MB
_NOTHING = np.uint64(2**64 - 1)  # the signature of a text without tokens
_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Duplicate:
    """A dropped document, the kept one that stands for it (indices into the input) and their Jaccard similarity."""

    dropped: int
    kept: int
    similarity: float


@dataclasses.dataclass(frozen=True)
class Dedup:
    """`kept`: indices of the documents that stay, ascending; `dropped`: the others, each with its partner."""

    kept: tuple[int, ...]
    dropped: tuple[Duplicate, ...]


def deduplicate(documents: Sequence[Document], threshold: float = 0.7) -> Dedup:
    """Keeps one document of each group of near duplicates; see :func:`find_duplicates`.

    Args:
        documents: any number of documents; their shingles are all held in memory.
        threshold: Jaccard similarity in (0, 1] from which two documents count as the same; 1: equal texts alone.
    """
    shingle = Shingles()
    sets = [shingle(document.text) for document in documents]
    keys = [(document.digest, document.name) for document in documents]
    return find_duplicates(keys, sets.__getitem__, lambda i: signature(sets[i]), threshold)


def find_duplicates(
    keys: Sequence[tuple[bytes, str]],
    shingles_of: Callable[[int], np.ndarray],
    signature_of: Callable[[int], np.ndarray],
    threshold: float,
) -> Dedup:
    """Keeps one text of each group of near duplicates, without holding any text.

    Texts are visited in the order of their SHA-256; each is dropped if it is similar to one already kept. So no
    two kept texts are near duplicates (of pairs exactly at the threshold, LSH misses one in a thousand), and
    every dropped one is similar to the kept partner that is reported. Memory: about 6 KB for each text that is kept.

    Args:
        keys: SHA-256 of the content, and name, of each text.
        shingles_of: the sorted shingles of text i, from :class:`Shingles`; empty if it has no token. Asked for again
            and again of texts that are alike.
        signature_of: the :func:`signature` of text i. Asked for once at the most.
        threshold: Jaccard similarity in (0, 1] from which two texts count as the same. 1: those with equal keys alone;
            equal sets of shingles are not enough, which texts have that differ in white space or in repetitions.
    """
    order = sorted(range(len(keys)), key=lambda i: (*keys[i], i))
    rank = {index: place for place, index in enumerate(order)}  # breaks ties by content, not by input order
    rows = _rows_per_band(threshold)
    # One table per band: band of a signature -> the kept texts that have it. Texts kept are never similar to
    # each other, so the lists stay short however many copies the corpus holds.
    tables: list[dict[bytes, list[int]]] = [collections.defaultdict(list) for _ in range(NUM_HASHES // rows)]
    kept: list[int] = []
    partner: dict[int, Duplicate] = {}
    previous = -1  # the last content's first copy: equal contents follow each other in `order`
    for index in order:
        if previous >= 0 and keys[index][0] == keys[previous][0]:
            # A copy of a dropped text is as similar to that one's partner.
            stand_in = partner.get(previous, Duplicate(previous, previous, 1.0))
            partner[index] = dataclasses.replace(stand_in, dropped=index)
            continue
        previous = index
        buckets = _buckets(signature_of(index), rows, tables) if threshold < 1 else []
        candidates = sorted(set(itertools.chain(*buckets)), key=rank.__getitem__)
        found = _most_similar(shingles_of, index, candidates)
        if found is not None and found.similarity >= threshold:
            partner[index] = found
            continue
        kept.append(index)
        for bucket in buckets:
            bucket.append(index)
    return Dedup(tuple(sorted(kept)), tuple(partner[i] for i in sorted(partner)))


def _buckets(signature: np.ndarray, rows: int, tables: list[dict[bytes, list[int]]]) -> list[list[int]]:
    """The bucket of each band that a text falls into; none for a text without tokens."""
    if (signature == _NOTHING).all():
        return []
    return [table[signature[band * rows : (band + 1) * rows].tobytes()] for band, table in enumerate(tables)]


def _most_similar(shingles_of: Callable[[int], np.ndarray], index: int, others: list[int]) -> Duplicate | None:
    """The first of the most similar `others`."""
    best: Duplicate | None = None
    mine = shingles_of(index) if others else np.empty(0, np.uint64)
    for other in others:
        theirs = shingles_of(other)
        shared = np.intersect1d(mine, theirs, assume_unique=True).size
        similarity = shared / (mine.size + theirs.size - shared)
        if best is None or similarity > best.similarity:
            best = Duplicate(index, other, similarity)
    return best


class _TokenHashes(dict[str, int]):
    """64-bit hash of each distinct token; Python's own hash() of a string differs from process to process."""

    def __missing__(self, token: str) -> int:
        value = int.from_bytes(
            hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
        )
        self[token] = value
        return value


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser: a bijection of uint64 that spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Shingles:
    """Makes the set of shingles of a text: sorted distinct 64-bit hashes of its token n-grams, (n,) uint64.

    It is empty for a text without any token; a text shorter than one shingle is one shingle.
    """

    def __init__(self, width: int = SHINGLE) -> None:
        self._hashes = _TokenHashes()
        self._width = width

    def has_full(self, text: str) -> bool:
        """Whether a text is as long as a shingle."""
        return len(_TOKEN.findall(text)) >= self._width

    def __call__(self, text: str) -> np.ndarray:
        tokens = _TOKEN.findall(text)
        values = np.fromiter(map(self._hashes.__getitem__, tokens), np.uint64, len(tokens))
        if len(self._hashes) > _MOST_TOKENS:
            self._hashes.clear()
        width = min(self._width, max(len(values), 1))
        count = max(len(values) - width + 1, 0)
        shingle = np.zeros(count, np.uint64)
        for offset in range(width):
            shingle = _mix(shingle * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + count])
        return np.unique(shingle)


def _rows_per_band(threshold: float) -> int:
    """The largest band (fewest false candidates) that still finds a pair at the threshold with `_RECALL`."""
    for rows in range(16, 1, -1):
        if 1 - (1 - threshold**rows) ** (NUM_HASHES // rows) >= _RECALL:
            return rows
    return 1


_SALTS = _mix(np.arange(1, NUM_HASHES + 1, dtype=np.uint64))


def signature(shingles: np.ndarray) -> np.ndarray:
    """The MinHash signature, (NUM_HASHES,) uint64: the least shingle under each of as many hash functions.

    That of a union of sets is the least of their signatures, hash by hash.
    """
    least = np.full(NUM_HASHES, _NOTHING)
    for start in range(0, shingles.size, 2048):  # in pieces that fit the cache
        piece = shingles[start : start + 2048]
        # Shingles are well mixed already: a salt and one odd multiplication suffice, as every pair is verified.
        hashed = (piece[None, :] ^ _SALTS[:, None]) * np.uint64(0x9E3779B97F4A7C15)
        least = np.minimum(least, hashed.min(axis=1))
    return least
