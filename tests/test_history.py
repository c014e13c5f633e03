"""Look-ups among earlier tokens: against plain Python written from the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.nn.history import History, ShortConv, longest_match, ngram_buckets

T = 10


def history(tokens: np.ndarray, positions: np.ndarray) -> History:
    slots = np.broadcast_to(np.arange(T), tokens.shape)
    return History(*(jnp.asarray(x, jnp.int32) for x in (tokens, slots, positions, slots - positions)))


def by_definition(tokens: list[int], positions: list[int], max_match: int) -> tuple[list[int], list[int]]:
    """The longest earlier match of each suffix, the latest of those; what followed it."""
    following, lengths = [], []
    for p, place in enumerate(positions):
        begin, best, after = p - place, 0, 0
        for slot in range(begin, p):
            length = 0
            while length < max_match and slot - length >= begin and tokens[slot - length] == tokens[p - length]:
                length += 1
            if length and length >= best:
                best, after = length, tokens[slot + 1]
        following.append(after)
        lengths.append(best)
    return following, lengths


match = jax.jit(longest_match, static_argnums=1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 2), min_size=T, max_size=T),
    st.lists(st.booleans(), min_size=T, max_size=T),
    st.sampled_from([1, 3]),
)
def test_longest_match_is_the_definition(tokens: list[int], starts: list[bool], max_match: int) -> None:
    positions, place = [], -1
    for i in range(T):
        place = 0 if starts[i] or i == 0 else place + 1
        positions.append(place)
    following, lengths = match(history(np.array([tokens]), np.array([positions])), max_match)
    want = by_definition(tokens, positions, max_match)
    assert (following[0].tolist(), lengths[0].tolist()) == want


def test_ngram_buckets_depend_on_the_ngram_alone() -> None:
    tokens = np.array([[1, 2, 3, 1, 2, 3, 9, 2, 3, 4]])
    buckets = np.asarray(ngram_buckets(history(tokens, np.arange(T)[None]), 2, 10_000))[0]
    assert buckets[1] == buckets[4]  # 1 2
    assert buckets[2] == buckets[5] == buckets[8]  # 2 3
    assert len(set(buckets.tolist())) == 7  # (start) 1, 12, 23, 31, 39, 92, 34


def test_ngrams_do_not_reach_into_the_document_before() -> None:
    tokens = np.array([[5, 6, 7, 8, 9, 1, 2, 7, 8, 9]])
    positions = np.array([[0, 1, 0, 1, 2, 0, 1, 0, 1, 2]])
    buckets = np.asarray(ngram_buckets(history(tokens, positions), 3, 10_000))[0]
    assert buckets[2:5].tolist() == buckets[7:10].tolist()


def test_buckets_spread_evenly() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4096, (1000, T))
    positions = np.broadcast_to(np.arange(T), tokens.shape)
    load = np.bincount(np.asarray(ngram_buckets(history(tokens, positions), 3, 64)).ravel(), minlength=64)
    # 10,000 throws into 64 bins: the standard deviation of a load is 12.4
    assert abs(load - 10_000 / 64).max() < 5 * 12.4


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_short_convolution_by_hand_and_in_two_parts(cut: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, T, 4)), jnp.float32)
    w = rng.normal(size=(3, 4)).astype(np.float32)
    conv = ShortConv(3, 4, rngs=nnx.Rngs(0))
    conv.w[...] = jnp.asarray(w)
    positions = jnp.arange(T)[None]
    want = np.array(x)
    for p in range(T):
        for i in range(min(3, p + 1)):
            want[0, p] += w[i] * np.asarray(x)[0, p - i]
    np.testing.assert_allclose(conv(x, positions), want, rtol=1e-5, atol=1e-6)
    before = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))[:, cut : cut + 2]
    np.testing.assert_allclose(conv(x[:, cut:], positions[:, cut:], before), want[:, cut:], rtol=1e-5, atol=1e-6)
