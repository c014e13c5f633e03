"""The selection bias: it decides which experts a token visits, never how much they count, and has no gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.nn.router import moved_bias, route

jitted_route = jax.jit(route, static_argnames=("top_k", "normalize"))
PROBS = [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]


def routed(logits: np.ndarray, bias: np.ndarray | None, *, top_k: int, normalize: bool = False):
    bias_E = None if bias is None else jnp.asarray(bias, jnp.float32)
    experts, weights, stats = jitted_route(
        jnp.asarray(logits, jnp.float32), jnp.ones(logits.shape[:2]), top_k=top_k, normalize=normalize, bias_E=bias_E
    )
    return np.asarray(experts), np.asarray(weights), stats


@pytest.mark.parametrize(
    ("bias", "experts", "weights"),
    [
        (None, [[0, 1], [1, 2]], [[0.5, 0.3], [0.6, 0.3]]),
        ([0.0, 0.0, 0.0], [[0, 1], [1, 2]], [[0.5, 0.3], [0.6, 0.3]]),
        ([0.0, 0.0, 0.2], [[0, 2], [1, 2]], [[0.5, 0.2], [0.6, 0.3]]),  # 0.2 + 0.2 beats 0.3
        ([0.0, -0.4, 0.2], [[0, 2], [2, 1]], [[0.5, 0.2], [0.3, 0.6]]),  # the order is that of the biased scores
        ([9.0, 0.0, 0.0], [[0, 1], [0, 1]], [[0.5, 0.3], [0.1, 0.6]]),
    ],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_the_bias_by_hand(bias: list | None, experts: list, weights: list, normalize: bool) -> None:
    bias_E = None if bias is None else np.array(bias)
    got, got_weights, stats = routed(np.log([PROBS]), bias_E, top_k=2, normalize=normalize)
    want = np.array(weights)
    assert got[0].tolist() == experts
    np.testing.assert_allclose(got_weights[0], want / want.sum(axis=1, keepdims=True) if normalize else want, rtol=1e-5)
    assert stats.load_E.tolist() == np.bincount(np.ravel(experts), minlength=3).tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([1, 2, 5]), st.booleans(), st.integers(0, 10**6))
def test_routing_with_a_bias_is_a_loop_over_tokens(X: int, normalize: bool, seed: int) -> None:
    T, E, rng = 6, 5, np.random.default_rng(seed)
    logits, bias = rng.normal(size=(1, T, E)), rng.normal(size=E)
    probs = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    experts, weights, _ = routed(logits, bias, top_k=X, normalize=normalize)
    for t in range(T):
        best = np.argsort(-(probs[0, t] + bias.astype(np.float32)), kind="stable")[:X]
        assert experts[0, t].tolist() == best.tolist()
        total = probs[0, t, best].sum() if normalize else 1.0
        np.testing.assert_allclose(weights[0, t], probs[0, t, best] / total, rtol=1e-5)


def test_a_bias_of_zero_changes_no_bit() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 50, 7)).round(1)  # with ties
    assert (np.sort(logits)[..., 1:] == np.sort(logits)[..., :-1]).any()
    for a, b in zip(*(routed(logits, bias, top_k=3, normalize=True)[:2] for bias in (None, np.zeros(7))), strict=True):
        assert a.tobytes() == b.tobytes()


def test_the_bias_has_no_gradient_and_the_logits_have_that_of_the_chosen_weights() -> None:
    rng = np.random.default_rng(1)
    logits, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 5, 4), 4))
    scale = jnp.asarray(rng.normal(size=(1, 5, 2)), jnp.float32)
    chosen = routed(logits, bias, top_k=2)[0]

    def fast(logits, bias):
        return jnp.sum(scale * route(logits, jnp.ones((1, 5)), top_k=2, normalize=True, bias_E=bias)[1])

    def plain(logits):
        weights = jnp.stack([jax.nn.softmax(logits)[0, t, chosen[0, t]] for t in range(5)])
        return jnp.sum(scale[0] * weights / weights.sum(axis=1, keepdims=True))

    by_logits, by_bias = jax.grad(fast, argnums=(0, 1))(logits, bias)
    assert not np.asarray(by_bias).any()
    assert np.abs(by_logits).max() > 1e-2
    np.testing.assert_allclose(by_logits, jax.grad(plain)(logits), rtol=1e-4, atol=1e-6)


def test_the_bias_moves_by_the_sign_of_the_load_error_in_each_layer() -> None:
    bias = jnp.asarray([[0.0, 0.5, -0.5, 1.0], [0.0, 0.0, 0.0, 0.0]])
    load = jnp.asarray([[9.0, 1.0, 5.0, 5.0], [3.0, 3.0, 3.0, 3.0]])  # mean 5; balanced
    want = [[-0.25, 0.75, -0.5, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert moved_bias(bias, load, 0.25).tolist() == want
    assert moved_bias(bias[0], load[0], 0.25).tolist() == want[0]
    assert moved_bias(bias, jnp.zeros((2, 4)), 0.25).tolist() == bias.tolist()  # a batch of padding
