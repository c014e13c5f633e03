"""Advantages: groups and critics, by hand, beside rlax, and what must hold for any numbers."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as hypothesis_arrays

from dsjax.rl.advantages import (
    AdvantageConfig,
    advantages,
    alive,
    gae,
    group_advantages,
    overlong_penalty,
    token_rewards,
    whitened,
)

ORACLE = pathlib.Path(__file__).parent / "oracles" / "rlax.npz"  # benchmarks/rlax_reference.py made it
NAN = math.nan
KINDS = ("group", "group_mean", "leave_one_out")
REWARDS = st.floats(-100, 100, width=32)


GROUPS = hypothesis_arrays(np.float32, (4, 5), elements=st.one_of(REWARDS, st.sampled_from([NAN, 0.0, 1.0])))


# ---------------------------------------------------------------- groups


def test_groups_by_hand() -> None:
    rewards = np.array([[1, 0, 0, 1], [3, 1, 1, 1]], np.float32)
    # mean 1/2, deviation 1/2; mean 3/2, deviation sqrt(3)/2; 1e-6 beside the deviation
    root = math.sqrt(3)
    expected = [[1, -1, -1, 1], [root, -1 / root, -1 / root, -1 / root]]
    np.testing.assert_allclose(group_advantages(rewards, "group"), expected, rtol=1e-5)
    np.testing.assert_array_equal(group_advantages(rewards, "group_mean"), [[0.5, -0.5, -0.5, 0.5], [1.5, *[-0.5] * 3]])
    # against the mean of the other three; one rounding of float32
    others = [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [2, -2 / 3, -2 / 3, -2 / 3]]
    np.testing.assert_allclose(group_advantages(rewards, "leave_one_out"), others, rtol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [[0.1] * 3, [NAN, 0.3, NAN], [0.7], [NAN, NAN], [NAN, 0.1, 0.1, 0.1], [0.0, -0.0]])
def test_a_group_that_teaches_nothing_has_exactly_zero(kind: Any, group: list[float]) -> None:
    # the float32 mean of three 0.1 is not 0.1: what is left, over its own size, would be 1
    np.testing.assert_array_equal(group_advantages(np.array([group], np.float32), kind), np.zeros((1, len(group))))
    assert not alive(np.array([group], np.float32)).any()


def by_formula(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Of one group, in float64, text by text."""
    known = np.flatnonzero(np.isfinite(rewards))
    found = np.zeros(len(rewards))
    for k in known:
        others = rewards[known[known != k]].astype(np.float64)
        if kind == "leave_one_out":
            found[k] = rewards[k] - others.mean() if others.size else 0
        else:
            own = rewards[known].astype(np.float64)
            found[k] = (rewards[k] - own.mean()) / (own.std() + 1e-6 if kind == "group" else 1)
    return found


@pytest.mark.parametrize("kind", KINDS)
@given(rewards=GROUPS)
@settings(max_examples=100, deadline=None)
def test_groups_are_what_the_formulas_say_and_unknown_rewards_have_no_part(kind: Any, rewards: np.ndarray) -> None:
    found = np.asarray(group_advantages(rewards, kind), np.float64)
    expected = np.array([by_formula(own, kind) for own in rewards])
    # rewards up to 100 are off from their mean by 100 * 2**-22 in float32, which a small deviation makes more of
    spread = np.array([own[np.isfinite(own)].std() if np.isfinite(own).any() else 0 for own in rewards])
    off = np.abs(found - expected) * (np.maximum(spread, 1e-6)[:, None] if kind == "group" else 1)
    assert off.max() < 1e-4
    # the better text never has less
    for own, got in zip(rewards, found, strict=True):
        assert (got[:, None] - got[None])[own[:, None] > own[None]].min(initial=0) >= 0


def test_what_a_prompt_teaches_does_not_depend_on_the_others() -> None:
    rewards = np.array([[1, 0, 0.5], [7, 8, 9]], np.float32)
    for kind in KINDS:
        both = group_advantages(rewards, kind)
        np.testing.assert_array_equal(both[0], group_advantages(rewards[:1], kind)[0])


# ---------------------------------------------------------------- tokens


def test_rewards_come_at_the_last_token_less_what_each_token_costs() -> None:
    mask = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], np.float32)
    penalty = np.full((3, 5), 0.25, np.float32)
    penalty[1, 2] = -1
    penalty[2] = NAN
    got = token_rewards(np.array([2.0, 3.0, 5.0], np.float32), mask, penalty)
    expected = [[0, -0.25, -0.25, 1.75, 0], [0, 0, 4, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(got, expected)


def test_gae_by_hand() -> None:
    # two tokens, gamma 1/2, lambda 1/2, V = (1, 2), a reward of 4 behind: d_1 = 4 - 2, d_0 = 1/2 * 2 - 1
    mask = np.array([[0, 1, 1, 0]], np.float32)
    reward, value = np.array([[9, 0, 4, 9.0]], np.float32), np.array([[NAN, 1, 2, 7]], np.float32)
    advantage, returns = gae(reward, value, mask, discount=0.5, gae_lambda=0.5)
    np.testing.assert_array_equal(advantage, [[0, 0.5, 2, 0]])
    np.testing.assert_array_equal(returns, [[0, 1.5, 4, 0]])


def test_gae_agrees_with_rlax() -> None:
    x = np.load(ORACLE)
    for case, expected in enumerate(x["gae"]):
        reward, value = x["reward"][case][None], x["value"][case][None, :-1]
        discount, gae_lambda = float(x["discount"][case]), float(x["gae_lambda"][case])
        got, returns = gae(reward, value, np.ones_like(reward), discount=discount, gae_lambda=gae_lambda)
        # the same sums of at most nine float32 of size 1, which XLA may fuse otherwise
        np.testing.assert_allclose(got[0], expected, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(returns, np.asarray(got) + value, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_where_a_text_stands_does_not_matter(length: int, seed: int) -> None:
    rng, discount, gae_lambda = np.random.default_rng(seed), 0.9, 0.7
    reward, value = rng.normal(size=(2, 2, 12)).astype(np.float32)
    begin = int(rng.integers(0, 12 - length + 1))
    text, mask = slice(begin, begin + length), np.zeros((2, 12), bool)
    mask[:, text] = True
    got, _ = gae(reward, value, mask, discount=discount, gae_lambda=gae_lambda)
    assert not np.asarray(got)[~mask].any()
    here = np.zeros((2, 12), np.float32), np.zeros((2, 12), np.float32), np.zeros((2, 12), bool)
    for x, source in zip(here, (reward, value, mask), strict=True):
        x[:, :length] = source[:, text]
    alone, _ = gae(*here, discount=discount, gae_lambda=gae_lambda)
    np.testing.assert_array_equal(np.asarray(got)[:, text], np.asarray(alone)[:, :length])


def test_with_lambda_one_returns_are_what_came_and_with_zero_what_the_critic_says() -> None:
    reward = np.array([[1.0, 2.0, 4.0]], np.float32)
    value, mask = np.array([[5.0, 6.0, 7.0]], np.float32), np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(gae(reward, value, mask, discount=1.0, gae_lambda=1.0)[1], [[7, 6, 4]])
    np.testing.assert_array_equal(gae(reward, value, mask, discount=1.0, gae_lambda=0.0)[1], [[1 + 6, 2 + 7, 4]])


def test_positions_between_parts_of_a_text_are_passed_over() -> None:
    """As when an answer of a tool stands between two turns."""
    mask = np.array([[1, 0, 0, 1]], np.float32)
    reward, value = np.array([[0, 9, 9, 1.0]], np.float32), np.array([[2, 50, 60, 4.0]], np.float32)
    got, _ = gae(reward, value, mask, discount=1.0, gae_lambda=1.0)
    np.testing.assert_array_equal(got, [[-1, 0, 0, -3]])


def test_whitened_by_hand() -> None:
    mask = np.array([[1, 1, 0], [1, 1, 0]], np.float32)
    x = np.array([[1, 3, NAN], [1, 3, 8]], np.float32)
    np.testing.assert_allclose(whitened(x, mask), [[-1, 1, 0], [-1, 1, 0]], rtol=2e-6)  # 1e-6 beside a deviation of 1
    np.testing.assert_array_equal(whitened(np.full((2, 3), 0.1, np.float32), mask), np.zeros((2, 3)))
    np.testing.assert_array_equal(whitened(x, np.zeros((2, 3), np.float32)), np.zeros((2, 3)))


# ---------------------------------------------------------------- an iteration


MASK = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 0]], np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_a_text_has_its_advantage(kind: Any) -> None:
    rewards = np.array([[1.0, 0.0], [NAN, 1.0]], np.float32)
    found = advantages(AdvantageConfig(kind), rewards, MASK)
    of_texts = np.asarray(group_advantages(rewards, kind)).reshape(-1, 1)
    np.testing.assert_array_equal(found.advantage_BT, of_texts * MASK)
    assert found.counts_B.tolist() == [True, True, False, True]
    assert found.return_BT is None


def test_groups_compare_what_a_penalty_leaves() -> None:
    penalty = np.full((4, 4), 0.25, np.float32)
    found = advantages(
        AdvantageConfig("group_mean"), np.array([[1, 1], [1, 1.0]], np.float32), MASK, penalty_BT=penalty
    )
    # texts of 2, 1, 3 and 2 tokens: 0.5 and 0.75 are left, 0.25 and 0.5
    expected = np.array([-0.125, 0.125, -0.125, 0.125])[:, None] * MASK
    np.testing.assert_array_equal(found.advantage_BT, expected)


def test_a_critic_learns_nothing_of_texts_that_do_not_count() -> None:
    rewards = np.array([[1.0, 0.0], [NAN, 1.0]], np.float32)
    value = np.arange(16, dtype=np.float32).reshape(4, 4) / 16
    cfg = AdvantageConfig("gae")
    found = advantages(cfg, rewards, MASK, value_BT=value)
    assert found.return_BT is not None
    for row in (found.advantage_BT[2], found.return_BT[2]):
        np.testing.assert_array_equal(row, np.zeros(4))
    other = np.where(np.arange(4)[:, None] == 2, 1e6, value).astype(np.float32)
    again = advantages(cfg, rewards, MASK, value_BT=other)
    np.testing.assert_array_equal(found.advantage_BT, again.advantage_BT)
    inside = np.asarray(found.advantage_BT)[(MASK > 0) & np.asarray(found.counts_B)[:, None]]
    assert inside.mean() == pytest.approx(0, abs=1e-6)  # five float32 of size 1
    assert inside.std() == pytest.approx(1, abs=1e-5)  # 1e-6 beside a deviation of some tenths


def test_gae_needs_a_critic() -> None:
    with pytest.raises(ValueError, match="kind gae needs value_BT"):
        advantages(AdvantageConfig("gae"), np.ones((2, 2), np.float32), MASK)


def test_all_of_it_can_be_compiled() -> None:
    rewards = np.array([[1.0, 0.0], [NAN, 1.0]], np.float32)
    run = jax.jit(lambda r: advantages(AdvantageConfig("group"), r, jnp.asarray(MASK)).advantage_BT)
    np.testing.assert_allclose(
        run(rewards), advantages(AdvantageConfig("group"), rewards, MASK).advantage_BT, rtol=1e-6
    )


# ---------------------------------------------------------------- length


def test_too_long_texts_are_punished_softly() -> None:
    lengths = np.array([0, 60, 80, 85, 90, 100, 120])
    np.testing.assert_array_equal(overlong_penalty(lengths, 100, 20), [0, 0, 0, -0.25, -0.5, -1, -1])
    np.testing.assert_array_equal(overlong_penalty(np.array([99, 100, 101]), 100, 0), [0, 0, -1])
