"""Duplicates: what is dropped, what is kept, and that neither depends on order."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data import dedup
from dsjax.data.corpus import Document
from dsjax.data.dedup import deduplicate


def _text(seed: int, words: int = 200) -> str:
    return " ".join(f"w{random.Random(seed * 10_007 + i).randrange(500)}" for i in range(words))


def _changed(text: str, count: int) -> str:
    words = text.split()
    for i in range(count):
        words[(i + 1) * len(words) // (count + 1)] = f"changed{i}"
    return "\n    ".join(words)  # white space does not count


def _jaccard(a: str, b: str) -> float:
    grams = [{tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (a.split(), b.split())]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


# (base text, words changed): copies of a few bases at several distances.
_CORPORA = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 0, 1, 3, 12, 40])), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(_CORPORA, st.randoms(use_true_random=False))
def test_kept_differ_dropped_have_a_kept_partner_and_order_is_irrelevant(corpus, rng):
    documents = [Document(f"d{i}", _changed(_text(base), count)) for i, (base, count) in enumerate(corpus)]
    found = deduplicate(documents, 0.7)
    kept = set(found.kept)
    assert kept | {d.dropped for d in found.dropped} == set(range(len(documents)))
    for a in kept:
        assert all(_jaccard(documents[a].text, documents[b].text) < 0.7 for b in kept if b < a)
    for d in found.dropped:
        assert d.kept in kept
        assert d.dropped not in kept
        assert abs(d.similarity - _jaccard(documents[d.dropped].text, documents[d.kept].text)) < 1e-9
        assert d.similarity >= 0.7

    shuffled = list(documents)
    rng.shuffle(shuffled)
    again = deduplicate(shuffled, 0.7)
    assert {documents[i].name for i in kept} == {shuffled[i].name for i in again.kept}
    assert {(documents[d.dropped].name, documents[d.kept].name) for d in found.dropped} == {
        (shuffled[d.dropped].name, shuffled[d.kept].name) for d in again.dropped
    }


def test_short_and_symbol_free_texts():
    documents = [
        Document("a", "x"),
        Document("b", "x\n"),
        Document("c", "y"),
        Document("d", "\u200b"),
        Document("e", ""),
    ]
    found = deduplicate(documents)
    assert len(found.kept) == 4
    assert found.dropped[0].similarity == 1.0


def test_a_threshold_of_one_drops_equal_texts_alone():
    loop = "for i in x:\n    if i:\n        f(i)\n    g(i)\n"
    texts = [loop, loop.replace("    g", "        g"), "a b c d e " * 3, "a b c d e " * 4, loop]
    documents = [Document(f"d{i}", text) for i, text in enumerate(texts)]
    assert len(deduplicate(documents, 0.99).kept) == 2  # their 5-grams are the same
    assert deduplicate(documents, 1.0).dropped == (dedup.Duplicate(4, 0, 1.0),)


def test_signatures_estimate_jaccard():
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(200):
        values = rng.integers(0, 2**64, 1500, dtype=np.uint64)  # 1000 and 1000, of which 500 shared: 1/3
        estimates.append((dedup.signature(values[:1000]) == dedup.signature(values[500:])).mean())
    # One estimate has the standard deviation of a binomial, sqrt(p (1 - p) / 128) = 0.042; the mean of 200, 0.003.
    assert abs(np.mean(estimates) - 1 / 3) < 4 * 0.003
    assert np.std(estimates) < 1.2 * 0.042


def test_band_width_follows_the_threshold():
    for threshold in (0.3, 0.5, 0.7, 0.9, 1.0):
        rows = dedup._rows_per_band(threshold)
        assert 1 - (1 - threshold**rows) ** (dedup.NUM_HASHES // rows) >= 0.999
