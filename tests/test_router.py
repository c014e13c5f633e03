"""The router's parts: distribution, weights, the bias and how it moves, what is counted and reported."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.nn.router import (
    RouterSums,
    Scoring,
    capacity_of,
    chosen_weights,
    drop_rates,
    load_entropy,
    log_distribution,
    moved_bias,
    router_metrics,
)

# ---------------------------------------------------------------- scores and weights


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_distribution_is_the_scores_over_their_sum(scoring: Scoring) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 5, 7)) * 3
    scores = np.exp(logits) if scoring == "softmax" else 1 / (1 + np.exp(-logits))
    found = jnp.exp(log_distribution(jnp.asarray(logits, jnp.float32), scoring))
    np.testing.assert_allclose(found, scores / scores.sum(axis=-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_distribution_of_extreme_logits_and_its_entropy_are_finite(scoring: Scoring) -> None:
    def entropy(logits):
        log_probs = log_distribution(logits, scoring)
        return -jnp.sum(jnp.exp(log_probs) * log_probs)

    for logits in ([1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [-200.0, -300.0, -1e30], [1e30, 1e30, 0.0]):
        value, slope = jax.value_and_grad(entropy)(jnp.asarray(logits))
        assert np.isfinite(value)
        assert np.isfinite(slope).all()
        assert -1e-6 <= value <= np.log(3) + 1e-6


def test_weights_by_hand() -> None:
    scores = jnp.asarray([[0.5, 0.3], [0.6, 0.2]])
    assert chosen_weights(scores, normalize=False, scale=1.0).tolist() == scores.tolist()
    np.testing.assert_allclose(chosen_weights(scores, normalize=False, scale=16.0), scores * 16, rtol=1e-6)
    want = [[2.5 * 0.625, 2.5 * 0.375], [2.5 * 0.75, 2.5 * 0.25]]
    np.testing.assert_allclose(chosen_weights(scores, normalize=True, scale=2.5), want, rtol=1e-6)
    np.testing.assert_allclose(chosen_weights(scores[:, :1], normalize=True, scale=2.0), [[2.0], [2.0]], rtol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0.0, 1e-38, 1e-30, 1e-19, 1e-12, 1e-3, 1.0]), min_size=1, max_size=4))
def test_weights_and_their_gradients_are_finite_down_to_nothing(scores: list[float]) -> None:
    """The smallest scores a sigmoid has, and the zeros of padding."""

    def total(scores_TX, scale_TX):
        return jnp.sum(scale_TX * chosen_weights(scores_TX, normalize=True, scale=1.0))

    scores_TX = jnp.asarray([scores], jnp.float32)
    weights = chosen_weights(scores_TX, normalize=True, scale=1.0)
    assert np.isfinite(weights).all()
    assert 0 <= float(weights.sum()) <= 1 + 1e-6
    for scale in (np.zeros(len(scores)), np.arange(1.0, len(scores) + 1)):  # nothing comes back from padding
        assert np.isfinite(jax.grad(total)(scores_TX, jnp.asarray([scale], jnp.float32))).all()


# ---------------------------------------------------------------- the bias


def test_the_bias_moves_by_the_sign_of_the_load_error_in_each_layer() -> None:
    bias = jnp.asarray([[0.0, 0.5, -0.5, 1.0], [0.0, 0.0, 0.0, 0.0]])
    load = jnp.asarray([[9, 1, 5, 5], [3, 3, 3, 3]])  # mean 5; balanced
    want = [[-0.25, 0.75, -0.5, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert moved_bias(bias, load, 0.25).tolist() == want
    assert moved_bias(bias[0], load[0], 0.25).tolist() == want[0]
    assert moved_bias(bias, jnp.zeros((2, 4), int), 0.25).tolist() == bias.tolist()  # a batch of padding


# ---------------------------------------------------------------- what is counted and reported


def sums(load: list, kept: list | None = None, dropped: list | None = None, **fields) -> RouterSums:
    """Of two layers of 4 experts, top-2."""
    load_LE = jnp.asarray(load)
    kept_LE = load_LE if kept is None else jnp.asarray(kept)
    dropped_LE = jnp.zeros_like(load_LE) if dropped is None else jnp.asarray(dropped)
    tokens = fields.get("tokens", 8)
    counted = {"tokens": jnp.asarray([tokens] * 2), "pairs": jnp.asarray([2 * tokens] * 2)}
    rest = {"dropped_at": fields.get("dropped_at", {}), "prob_E": load_LE / 2.0, "entropy": jnp.asarray([4.0, 8.0])}
    return RouterSums(**counted, load_E=load_LE, kept_E=kept_LE, dropped_E=dropped_LE, **rest)


def test_the_metrics_of_two_layers_by_hand() -> None:
    found = router_metrics(sums([[4, 4, 4, 4], [8, 8, 0, 0]], [[4, 4, 4, 4], [6, 6, 0, 0]], [[0] * 4, [2, 2, 0, 0]]))
    want = {
        "max_over_mean_load": (1 + 2) / 2,
        "load_entropy": (np.log(4) + np.log(2)) / 2,
        "min_load_entropy": np.log(2),
        "dead_experts": 2 / 8,
        "entropy": (4 / 8 + 8 / 8) / 2,
        "drop_rate": 4 / 32,
        "unaccounted": 0,
    }
    assert {name: pytest.approx(float(value), abs=1e-6) for name, value in found.items()} == want


def test_the_pairs_of_all_layers_of_deepseek_v3_are_more_than_int32_holds() -> None:
    """58 layers of 256 experts, 8 for each of 15,360 * 4,096 tokens; a thousandth of the pairs is dropped."""
    layers, experts, tokens = 58, 256, 15_360 * 4_096
    load = np.full((layers, experts), tokens * 8 // experts, np.int32)
    dropped = load // 1000
    v3 = RouterSums(
        tokens=jnp.full(layers, tokens),
        pairs=jnp.full(layers, tokens * 8),
        load_E=jnp.asarray(load),
        kept_E=jnp.asarray(load - dropped).at[3, 7].add(-1),  # and one is lost
        dropped_E=jnp.asarray(dropped),
        dropped_at={"1.0": jnp.asarray(dropped.sum(axis=1, dtype=np.int32)), "2.0": jnp.zeros(layers, jnp.int32)},
        prob_E=jnp.ones((layers, experts)),
        entropy=jnp.ones(layers),
    )
    found, rate = router_metrics(v3), dropped[0, 0] / load[0, 0]
    # Float32 sums of 58 numbers.
    assert float(found["drop_rate"]) == pytest.approx(rate, rel=1e-5)
    assert float(found["max_over_mean_load"]) == pytest.approx(1, rel=1e-5)
    assert float(found["unaccounted"]) == 1
    rates = drop_rates({"group_1": v3, "group_2": v3})
    assert {name: float(x) for name, x in rates.items()} == {"1.0": pytest.approx(rate, rel=1e-5), "2.0": 0}


def test_the_mean_load_may_be_less_than_a_pair() -> None:
    found = router_metrics(sums([[1, 1, 0, 0], [2, 0, 0, 0]], tokens=1))
    assert float(found["max_over_mean_load"]) == (1 / 0.5 + 2 / 0.5) / 2


@pytest.mark.parametrize(
    ("kept", "dropped"),
    [
        ([[4, 4, 4, 4], [6, 5, 0, 0]], [[0] * 4, [2, 2, 0, 0]]),  # an expert lost a row
        ([[4, 4, 4, 4], [6, 7, 0, 0]], [[0] * 4, [2, 2, 0, 0]]),  # one computed a row twice
        ([[3, 4, 4, 4], [7, 6, 0, 0]], [[0] * 4, [2, 2, 0, 0]]),  # both, in two layers: they do not cancel
    ],
)
def test_pairs_that_are_missing_or_too_many_are_reported(kept: list, dropped: list) -> None:
    assert float(router_metrics(sums([[4, 4, 4, 4], [8, 8, 0, 0]], kept, dropped))["unaccounted"]) > 0


def test_a_batch_of_padding_has_finite_metrics() -> None:
    found = router_metrics(sums([[0] * 4, [0] * 4], tokens=0))
    assert all(np.isfinite(value) for value in found.values())
    assert float(found["drop_rate"]) == 0.0


def test_load_entropy_by_hand() -> None:
    found = load_entropy(jnp.asarray([[1, 1, 1, 1], [9, 0, 0, 0], [0, 0, 0, 0], [1, 1, 2, 0]]))
    np.testing.assert_allclose(found, [np.log(4), 0, 0, 1.5 * np.log(2)], atol=1e-6)


def test_drop_rates_are_those_of_all_layers_that_have_a_dynamic_capacity() -> None:
    load = [[4, 4, 4, 4], [8, 8, 0, 0]]
    dynamic = sums(load, dropped_at={"1.0": jnp.asarray([0, 8]), "1.5": jnp.asarray([0, 4])})
    found = drop_rates({"group_0": dynamic, "group_1": sums(load), "group_2": dynamic})
    assert {name: float(rate) for name, rate in found.items()} == {"1.0": 8 / 32, "1.5": 4 / 32}
    assert drop_rates({"group_1": sums(load)}) == {}


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "room"),
    [
        (1.0, 8, 2, 4, 4),
        (1.25, 8, 2, 4, 5),
        (1.0, 17, 1, 4, 5),
        (1.1, 40, 2, 8, 11),
        (0.01, 8, 2, 4, 1),
        (1.25, 2048, 2, 8, 640),
        (9.0, 8, 2, 4, 8),  # one pair of each token is all that there can be
        (1e38, 62_914_560, 8, 256, 62_914_560),
        (2.0, 0, 2, 4, 1),
    ],
)
def test_the_room_of_an_expert_by_hand(factor: float, tokens: int, top_k: int, experts: int, room: int) -> None:
    assert capacity_of(factor, tokens, top_k, experts) == room
