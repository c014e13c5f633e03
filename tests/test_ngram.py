"""Kneser-Ney against the formulae, and as a probability distribution."""

from __future__ import annotations

import collections
import lzma
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.evals.compressors import xz_bits
from dsjax.evals.ngram import KneserNey

_V = 6  # end = 0, tokens 1 .. 5


class _SlowKneserNey:
    """The formulae of dsjax.evals.ngram with dictionaries of tuples."""

    def __init__(self, documents, order, vocab_size):
        self.order, self.vocab_size = order, vocab_size
        streams = [(0, *d, 0) for d in documents]
        raw = collections.Counter(
            s[i : i + n] for s in streams for n in range(1, order + 2) for i in range(len(s) - n + 1)
        )
        self.adjusted = collections.defaultdict(dict)
        for n in range(1, order + 1):
            grams = {g for g in raw if len(g) == n}
            for g in grams:
                if n == order:
                    count = raw[g] if n > 1 else sum(s[1:].count(g[0]) for s in streams)
                else:
                    before = len({h[0] for h in raw if len(h) == n + 1 and h[1:] == g})
                    opened = sum(s[:n] == g for s in streams) if n > 1 else 0
                    count = before + opened
                if count:
                    self.adjusted[g[:-1]][g[-1]] = count
        self.discounts = [self._discounts(n) for n in range(1, order + 1)]

    def _discounts(self, n):
        counts = [c for h, after in self.adjusted.items() if len(h) == n - 1 for c in after.values()]
        n1, n2, n3, n4 = (counts.count(j) for j in (1, 2, 3, 4))
        if not (n1 and n2 and n3 and n4):
            return 0.5, 1.0, 1.5
        y = n1 / (n1 + 2 * n2)
        found = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        return found if all(0 < d <= j for d, j in zip(found, (1, 2, 3), strict=True)) else (0.5, 1.0, 1.5)

    def probability(self, context, word):
        context = tuple(context)[-(self.order - 1) :] if self.order > 1 else ()
        return self._probability(context, word)

    def _probability(self, context, word):
        lower = self._probability(context[1:], word) if context else 1 / self.vocab_size
        after = self.adjusted.get(context)
        if not after:
            return lower
        total = sum(after.values())
        discount = lambda a: self.discounts[len(context)][min(a, 3) - 1]  # noqa: E731
        gamma = sum(discount(a) for a in after.values()) / total
        kept = after[word] - discount(after[word]) if word in after else 0
        return kept / total + gamma * lower


def _fit(documents, order=5, vocab_size=_V):
    flat = np.concatenate([np.asarray(d, np.int64) for d in documents]) if documents else np.empty(0, np.int64)
    offsets = np.cumsum([0] + [len(d) for d in documents])
    return KneserNey.fit(flat, offsets, order=order, vocab_size=vocab_size)


_DOCUMENT = st.lists(st.integers(1, _V - 2), max_size=12)  # V - 1 never occurs


@settings(max_examples=60, deadline=None)
@given(st.lists(_DOCUMENT, min_size=1, max_size=5), _DOCUMENT, st.integers(1, 5))
def test_equals_the_slow_implementation(documents, text, order):
    fast, slow = _fit(documents, order), _SlowKneserNey(documents, order, _V)
    stream = (0, *text, 0)
    expected = [-math.log2(slow.probability(stream[:i], stream[i])) for i in range(1, len(stream))]
    np.testing.assert_allclose(fast.bits(np.asarray(text, np.int64)), expected, rtol=1e-9)


def test_equals_the_slow_implementation_with_estimated_discounts():
    rng = np.random.default_rng(0)
    documents = [np.minimum(rng.geometric(0.2, 80), 28).tolist() for _ in range(12)]
    fast, slow = _fit(documents, 4, 30), _SlowKneserNey(documents, 4, 30)
    np.testing.assert_allclose(fast.discounts, slow.discounts, rtol=1e-12)
    assert all(d != (0.5, 1.0, 1.5) for d in fast.discounts[1:3])
    stream = (0, *documents[0][:20], *documents[1][:20], 0)
    expected = [-math.log2(slow.probability(stream[:i], stream[i])) for i in range(1, len(stream))]
    np.testing.assert_allclose(fast.bits(np.asarray(stream[1:-1])), expected, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(_DOCUMENT, min_size=1, max_size=5), st.lists(st.integers(1, _V - 1), max_size=7), st.integers(1, 5))
def test_distribution_sums_to_one_and_agrees_with_bits(documents, text, order):
    model = _fit(documents, order)
    bits = model.bits(np.asarray(text, np.int64))
    for i, word in enumerate((*text, 0)):
        p = model.distribution(np.asarray((0, *text[:i])))
        assert abs(p.sum() - 1) < 1e-9
        assert (p > 0).all()
        np.testing.assert_allclose(-np.log2(p[word]), bits[i], rtol=1e-9)


def test_documents_do_not_see_each_other():
    documents = [[1, 2, 3], [3, 1, 4], [2, 2]]
    text = np.asarray([1, 2, 4])
    for other in (documents[::-1], [documents[1], documents[0], documents[2]]):
        np.testing.assert_allclose(_fit(other).bits(text), _fit(documents).bits(text), rtol=1e-12)


def test_sample_follows_the_distribution_and_stops_at_the_end():
    model = _fit([[1, 2], [1, 3], [1, 2]], order=3)
    rng = np.random.default_rng(0)
    draws = [model.sample(rng, np.asarray([0]), 1) for _ in range(2000)]
    p = model.distribution(np.asarray([0]))
    share = np.mean([d.size == 1 and d[0] == 1 for d in draws])
    assert abs(share - p[1]) < 4 * math.sqrt(p[1] * (1 - p[1]) / 2000)
    assert max(model.sample(rng, np.asarray([0]), 50).size for _ in range(20)) <= 50


def test_order_must_be_positive():
    with pytest.raises(ValueError, match="order"):
        _fit([[1]], order=0)


def test_xz_bits_are_those_of_a_file():
    text = "é = 1\n" * 100
    (bits,) = xz_bits([text])
    file = lzma.compress(text.encode(), format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    assert file[:6] == b"\xfd7zXZ\0"  # the container that the command writes
    assert bits == 8 * len(file)
