"""Interpolated modified Kneser-Ney n-grams, in numpy: the baseline that a language model has to beat.

With w the next token, h its context and h' the context without its first token,

    p(w | h) = max(a(h w) - D(a(h w)), 0) / sum_v a(h v)  +  gamma(h) p(w | h'),      p(w | no context) ends in 1 / V,

where gamma(h) is what the discounts took: sum_v min(D(a(h v)), a(h v)) / sum_v a(h v). At the highest order a(g) is
the count of g; below it is the number of distinct tokens seen before g, plus how often g began a document (nothing
can precede it there). D has three values per order, for a = 1, 2 and >= 3, from the counts of counts
(Chen & Goodman 1998, section 3). A context never seen gives p(w | h'). Documents never see each other: each is
`end tokens end`, its first `end` only a context, its last one predicted.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float64, Integer

_SAFE_DISCOUNTS = (0.5, 1.0, 1.5)  # for corpora too small for counts of counts


@dataclasses.dataclass(frozen=True)
class _Order:
    """The n-grams of one length. A gram's id is its index in `keys`; ids of single tokens are the tokens.

    keys: sorted; the id of the gram's prefix (all but the last token) times V, plus its last token.
    probability: the interpolated p(last token | prefix).
    left_over: gamma of each gram of length n - 1 as a context, by its id; 1 where it was never one.
    """

    keys: Integer[np.ndarray, " grams"]
    probability: Float64[np.ndarray, " grams"]
    left_over: Float64[np.ndarray, " prefixes"]

    def find(self, prefix: np.ndarray, last: np.ndarray, vocab_size: int) -> np.ndarray:
        """Ids of the grams prefix + last; -1 where the gram or its prefix was never seen."""
        if not self.keys.size:  # every document is shorter than this
            return np.full(prefix.shape, -1, np.int64)
        wanted = prefix.astype(np.int64) * vocab_size + last
        index = np.minimum(np.searchsorted(self.keys, wanted), self.keys.size - 1)
        return np.where((prefix >= 0) & (self.keys[index] == wanted), index, -1)


@dataclasses.dataclass(frozen=True)
class KneserNey:
    """A fitted model; see the module for the formulae.

    vocab_size: V; every id below it has a probability > 0 in every context.
    end_id: the document boundary.
    discounts: (D1, D2, D3+) per order, from 1 upwards.
    """

    vocab_size: int
    end_id: int
    discounts: tuple[tuple[float, float, float], ...]
    unigram: Float64[np.ndarray, " V"]
    orders: tuple[_Order, ...]  # orders 2, 3, ...

    @classmethod
    def fit(
        cls,
        tokens: Integer[np.ndarray, " N"],
        offsets: Integer[np.ndarray, " bounds"],
        *,
        order: int = 5,
        vocab_size: int,
        end_id: int = 0,
    ) -> KneserNey:
        """Counts the documents tokens[offsets[d] : offsets[d + 1]], given without boundary tokens.

        3.5M tokens at order 5 take a few seconds and under 1 GB on one core.

        Raises:
            ValueError: order < 1.
        """
        if order < 1:
            raise ValueError(f"order is {order}; it must be at least 1")
        stream, starts, ends = _with_boundaries(np.asarray(tokens), np.asarray(offsets), end_id)
        is_start = np.zeros(stream.size, bool)
        is_start[starts] = True
        room = np.repeat(ends, ends - starts) - np.arange(stream.size)  # tokens from here to the document's end

        # Top down in length: the ids of the grams that start at each position, then counts from the longest down.
        ids = [stream.astype(np.int64)]
        keys: list[np.ndarray] = []
        firsts: list[np.ndarray] = []
        highest_counts = np.empty(0, np.int64)
        for length in range(2, order + 1):
            at = np.flatnonzero(room >= length)
            key = ids[-1][at] * vocab_size + stream[at + length - 1]
            unique, first, inverse, highest_counts = np.unique(
                key, return_index=True, return_inverse=True, return_counts=True
            )
            gram = np.full(stream.size, -1, np.int64)
            gram[at] = inverse
            ids.append(gram)
            keys.append(unique)
            firsts.append(at[first])

        # adjusted[n - 1]: a(g) of the grams of length n.
        sizes = [vocab_size] + [k.size for k in keys]
        adjusted: list[np.ndarray] = []
        for length in range(1, order + 1):
            if length == order:
                predicted = stream[~is_start]  # order 1: every token but the opening boundary is predicted
                counts = highest_counts if order > 1 else np.bincount(predicted, minlength=vocab_size)
            else:
                counts = np.bincount(ids[length - 1][firsts[length - 1] + 1], minlength=sizes[length - 1])
                if length > 1:
                    opening = ids[length - 1][starts[room[starts] >= length]]
                    counts = counts + np.bincount(opening, minlength=sizes[length - 1])
            adjusted.append(counts)
        return cls._from_counts(adjusted, keys, firsts, ids, sizes, vocab_size, end_id)

    @classmethod
    def _from_counts(
        cls,
        adjusted: list[np.ndarray],
        keys: list[np.ndarray],
        firsts: list[np.ndarray],
        ids: list[np.ndarray],
        sizes: list[int],
        vocab_size: int,
        end_id: int,
    ) -> KneserNey:
        discounts = tuple(_discounts(a) for a in adjusted)
        total = max(int(adjusted[0].sum()), 1)
        taken = _taken(adjusted[0], discounts[0])
        gamma = taken.sum() / total if adjusted[0].sum() else 1.0
        unigram = (adjusted[0] - taken) / total + gamma / vocab_size
        lower = unigram
        orders = []
        for length in range(2, len(adjusted) + 1):
            counts, key, first = adjusted[length - 1], keys[length - 2], firsts[length - 2]
            prefix = key // vocab_size
            totals = np.bincount(prefix, weights=counts, minlength=sizes[length - 2])
            taken = _taken(counts, discounts[length - 1])
            left_over = np.ones(sizes[length - 2])
            seen = totals > 0
            left_over[seen] = np.bincount(prefix, weights=taken, minlength=sizes[length - 2])[seen] / totals[seen]
            suffix = ids[length - 2][first + 1]  # the gram without its first token
            probability = (counts - taken) / totals[prefix] + left_over[prefix] * lower[suffix]
            orders.append(_Order(key, probability, left_over))
            lower = probability
        return cls(vocab_size, end_id, discounts, unigram, tuple(orders))

    def bits(self, ids: Integer[np.ndarray, " T"]) -> Float64[np.ndarray, " T+1"]:
        """-log2 p of each token of one document and of the boundary that closes it."""
        stream = np.concatenate(([self.end_id], np.asarray(ids, np.int64), [self.end_id]))
        probability = self.unigram[stream]
        grams = stream
        for number, table in enumerate(self.orders, start=2):
            if not table.keys.size or stream.size < number:
                break
            prefix = grams[:-1]  # gram i starts at position i, so it predicts position i + number - 1
            last = stream[number - 1 :]
            grams = table.find(prefix, last, self.vocab_size)
            backed_off = np.where(prefix >= 0, table.left_over[prefix], 1.0) * probability[number - 1 :]
            probability[number - 1 :] = np.where(grams >= 0, table.probability[grams], backed_off)
        return -np.log2(probability[1:])

    def distribution(self, context: Integer[np.ndarray, " T"]) -> Float64[np.ndarray, " V"]:
        """p(. | context) over the vocabulary; the context of a document's first token is `[end_id]`."""
        context = np.asarray(context, np.int64)
        probability = self.unigram.copy()
        for number, table in enumerate(self.orders, start=2):
            if context.size < number - 1:
                break
            prefix = self._gram(context[context.size - number + 1 :])
            if prefix < 0:
                continue
            low, high = np.searchsorted(table.keys, (prefix * self.vocab_size, (prefix + 1) * self.vocab_size))
            probability *= table.left_over[prefix]
            probability[table.keys[low:high] - prefix * self.vocab_size] = table.probability[low:high]
        return probability

    def sample(
        self, rng: np.random.Generator, context: Integer[np.ndarray, " T"], max_tokens: int
    ) -> Integer[np.ndarray, " new"]:
        """Draws tokens after a context until the boundary (not returned) or `max_tokens`."""
        reach = len(self.orders)
        tokens = [int(t) for t in context]
        start = len(tokens)
        while len(tokens) < start + max_tokens:
            probability = self.distribution(np.asarray(tokens[len(tokens) - min(reach, len(tokens)) :], np.int64))
            token = int(rng.choice(self.vocab_size, p=probability / probability.sum()))
            if token == self.end_id:
                break
            tokens.append(token)
        return np.asarray(tokens[start:], np.int32)

    def _gram(self, tokens: np.ndarray) -> int:
        gram = tokens[:1]
        for table, token in zip(self.orders, tokens[1:], strict=False):
            gram = table.find(gram, token[None], self.vocab_size)
        return int(gram[0])


def _with_boundaries(tokens: np.ndarray, offsets: np.ndarray, end_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stream `end tokens end end tokens end ...` and where each document starts and ends in it."""
    lengths = np.diff(offsets).astype(np.int64) + 2
    ends = np.cumsum(lengths)
    starts = ends - lengths
    stream = np.full(int(lengths.sum()), end_id, np.int64)
    inside = np.ones(stream.size, bool)
    inside[starts] = False
    inside[ends - 1] = False
    stream[inside] = tokens[offsets[0] : offsets[-1]]
    return stream, starts, ends


def _discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """D1, D2, D3+ of one order: j - (j + 1) Y n[j + 1] / n[j], Y = n1 / (n1 + 2 n2), n[j] grams counted j times."""
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)
    if (n == 0).any():
        return _SAFE_DISCOUNTS
    y = n[0] / (n[0] + 2 * n[1])
    d1, d2, d3 = (float(j - (j + 1) * y * n[j] / n[j - 1]) for j in (1, 2, 3))
    # Outside (0, j] a discount would leave nothing for unseen tokens, or take more than there is.
    return (d1, d2, d3) if 0 < d1 <= 1 and 0 < d2 <= 2 and 0 < d3 <= 3 else _SAFE_DISCOUNTS


def _taken(counts: np.ndarray, discounts: tuple[float, float, float]) -> np.ndarray:
    """What the discount takes from each count (0 from 0)."""
    return np.asarray((0.0, *discounts))[np.minimum(counts, 3)]
