"""Objectives of policies: beside rlax, by hand, by their formulas; estimators of KL; presets."""

from __future__ import annotations

import functools
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

from dsjax.config import UserError, apply_overrides, from_dict, to_dict, validate
from dsjax.nn.masks import Documents
from dsjax.rl.advantages import AdvantageConfig
from dsjax.rl.algorithms import PRESETS, AlgorithmConfig
from dsjax.rl.experience import Experience, experience_of, minibatch, token_weights
from dsjax.rl.policy import (
    PolicyConfig,
    adapted_kl,
    correction,
    explained_variance,
    kl_estimate,
    log_ratio,
    policy_objective,
    surrogate,
    value_loss,
)
from dsjax.rl.rollout import Rollout
from dsjax.rl.rows import written_rows

ORACLE = pathlib.Path(__file__).parent / "oracles" / "rlax.npz"  # benchmarks/rlax_reference.py made it
NAN = math.nan
MASK = np.array([[0, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]], np.float32)


def experience(mask: Any = MASK, aggregate: Any = "token", **arrays: Any) -> Experience:
    """Texts of which only what the objective looks at is there."""
    mask = np.asarray(mask, np.float32)
    nothing, ids = np.zeros(mask.shape, np.int32), jnp.ones(mask.shape, jnp.int32)
    given = {name: None if x is None else jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    given.setdefault("weight_BT", jnp.asarray(token_weights(mask, aggregate, 4)))
    given.setdefault("advantage_BT", jnp.asarray(mask))
    return Experience(nothing, nothing, jnp.asarray(mask), Documents(ids, nothing), **given)


def loss_of(cfg: PolicyConfig, batch: Experience, log_prob: Any, entropy: Any = None, value: Any = None) -> Any:
    """(loss, metrics), with the tokens of this batch as those of all."""
    log_prob = jnp.asarray(log_prob, jnp.float32)
    entropy = jnp.zeros_like(log_prob) if entropy is None else jnp.asarray(entropy, jnp.float32)
    value = None if value is None else jnp.asarray(value, jnp.float32)
    total = jnp.maximum(jnp.sum(batch.loss_weight_BT), 1)
    return policy_objective(cfg, batch, log_prob, entropy, value, total)


@functools.partial(jax.jit, static_argnums=0)
def compiled_slope(cfg: PolicyConfig, batch: Experience, log_prob: Any) -> Any:
    return jax.grad(lambda x: loss_of(cfg, batch, x)[0])(log_prob)


def slope_of(cfg: PolicyConfig, batch: Experience, log_prob: Any) -> np.ndarray:
    return np.asarray(compiled_slope(cfg, batch, jnp.asarray(log_prob, jnp.float32)))


# ---------------------------------------------------------------- the clipped surrogate


def test_the_surrogate_agrees_with_rlax() -> None:
    x = np.load(ORACLE)
    for case, epsilon in enumerate(x["epsilon"].tolist()):
        cfg = PolicyConfig(clip_low=epsilon, clip_high=epsilon)
        ratio, advantage = x["ratio"][case][None], jnp.asarray(x["advantage"][case][None])
        loss, slope = jax.value_and_grad(lambda r, a=advantage, c=cfg: -jnp.mean(surrogate(c, r, a)))(ratio)
        # one sum of nine float32 of size 1
        assert float(loss) == pytest.approx(float(x["loss"][case]), abs=1e-6)
        np.testing.assert_allclose(slope[0], x["d_loss_d_ratio"][case], atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        (1.5, 2.0, 1.3 * 2.0, 0.0),  # rises far enough
        (1.2, 2.0, 1.2 * 2.0, 2.0),  # within the upper clip, which is higher than the lower one
        (0.5, 2.0, 0.5 * 2.0, 2.0),  # fell though it was good: pulled back
        (0.5, -2.0, 0.9 * -2.0, 0.0),  # fell far enough
        (1.5, -2.0, 1.5 * -2.0, -2.0),  # rose though it was bad: pulled back
        (3.5, -2.0, 3.0 * -2.0, 0.0),  # but a dual clip bounds what that costs
    ],
)
def test_clips_by_hand(ratio: float, advantage: float, gain: float, slope: float) -> None:
    cfg = PolicyConfig(clip_low=0.1, clip_high=0.3, dual_clip=3.0)
    one = jnp.full((1, 1), ratio)
    value, got = jax.value_and_grad(lambda r: surrogate(cfg, r, jnp.full((1, 1), advantage))[0, 0])(one)
    assert float(value) == pytest.approx(gain, rel=1e-6)  # one product of float32
    assert float(got[0, 0]) == slope
    if ratio > 3:  # without it there is no bound
        assert float(surrogate(PolicyConfig(), one, jnp.full((1, 1), advantage))[0, 0]) == ratio * advantage


def test_shares_of_clipped_tokens_by_hand() -> None:
    cfg = PolicyConfig(clip_low=0.1, clip_high=0.3, dual_clip=3.0)
    old = np.zeros((3, 4))
    ratio = np.array([[9, 1.5, 0.5, 9], [9, 0.5, 1.5, 3.5], [1.0, 9, 9, 9]])
    advantage = np.array([[1, 1, 1, 1], [1, -1, -1, -1], [1, 1, 1, 1.0]])
    _, metrics = loss_of(cfg, experience(old_log_prob_BT=old, advantage_BT=advantage), np.log(ratio))
    for name in ("clip_high", "clip_low", "clip_dual"):  # one token of six each
        assert float(metrics[f"policy/{name}"]) == pytest.approx(1 / 6, rel=1e-6), name
    # means of six: |log ratio|, and ratio - 1 - log ratio
    logs = np.abs(np.log(ratio))[MASK > 0]
    assert float(metrics["policy/log_prob_gap"]) == pytest.approx(logs.mean(), rel=1e-6)
    k3 = (ratio - 1 - np.log(ratio))[MASK > 0]
    assert float(metrics["policy/kl_old"]) == pytest.approx(k3.mean(), rel=1e-5)


def test_at_ratio_one_nothing_is_clipped_and_the_slope_is_that_of_reinforce() -> None:
    advantage = np.array([[0, 1, -2, 0], [0, 3, -4, 5], [-6, 0, 0, 0]])
    log_prob = np.full((3, 4), -1.25)
    for old in (None, log_prob):  # None: it is the policy that learns, as it is
        batch = experience(advantage_BT=advantage, old_log_prob_BT=old)
        np.testing.assert_allclose(slope_of(PolicyConfig(), batch, log_prob), -advantage / 6 * MASK, rtol=1e-6)
        metrics = loss_of(PolicyConfig(), batch, log_prob)[1]
        for name in ("clip_low", "clip_high", "kl_old", "log_prob_gap"):
            assert float(metrics[f"policy/{name}"]) == 0.0, name


def test_numbers_stay_numbers_however_far_the_policy_went() -> None:
    for gone in (1e4, -1e4, 90.0, -90.0):
        for cfg in (PolicyConfig(kl_coef=0.1, kl=kind) for kind in ("k1", "k2", "k3")):
            for advantage in (1.0, -1.0):
                batch = experience(
                    old_log_prob_BT=np.zeros((3, 4)),
                    advantage_BT=np.full((3, 4), advantage),
                    reference_log_prob_BT=np.zeros((3, 4)),
                )
                assert np.isfinite(loss_of(cfg, batch, np.full((3, 4), gone))[0])
                assert np.isfinite(slope_of(cfg, batch, np.full((3, 4), gone))).all()


# ---------------------------------------------------------------- texts as wholes (GSPO)


@jax.jit
@jax.value_and_grad
def gspo_by_formula(log_prob: Any, old: Any, advantage_B: Any, mask: Any, low: float, high: float) -> Any:
    """-1/B sum_i min(s_i A_i, clip(s_i) A_i), s_i = (p(y_i) / p_old(y_i)) ^ (1 / |y_i|): equations 5 to 7."""
    length_B = jnp.sum(mask, axis=1)
    s_B = jnp.exp(jnp.sum((log_prob - old) * mask, axis=1) / length_B)
    return -jnp.mean(jnp.minimum(s_B * advantage_B, jnp.clip(s_B, 1 - low, 1 + high) * advantage_B))


@given(st.integers(0, 2**31), st.sampled_from([(3e-4, 4e-4), (0.2, 0.2)]))
@settings(max_examples=30, deadline=None)
def test_the_sequence_ratio_has_the_value_and_slope_of_gspo(seed: int, clips: tuple[float, float]) -> None:
    rng = np.random.default_rng(seed)
    log_prob, old = rng.normal(-1, 0.3, (2, 3, 4)).astype(np.float32)
    advantage = rng.normal(size=3).astype(np.float32)
    cfg = PolicyConfig(ratio="sequence", clip_low=clips[0], clip_high=clips[1])
    batch = experience(aggregate="sequence", old_log_prob_BT=old, advantage_BT=advantage[:, None] * MASK)
    expected, slope = gspo_by_formula(log_prob, old, advantage, MASK, *clips)
    # sums of three float32 of size 1
    assert float(loss_of(cfg, batch, log_prob)[0]) == pytest.approx(float(expected), abs=1e-6)
    np.testing.assert_allclose(slope_of(cfg, batch, log_prob), slope, atol=1e-6)


def test_one_unlikely_token_clips_its_whole_text_and_no_other() -> None:
    old, now = np.zeros((3, 4)), np.zeros((3, 4))
    now[0, 1] = 1.0  # the mean of two tokens is 0.5, its ratio 1.65
    batch = experience(aggregate="sequence", old_log_prob_BT=old)
    slope = slope_of(PolicyConfig(ratio="sequence"), batch, now)
    np.testing.assert_array_equal(slope[0], 0)
    np.testing.assert_allclose(slope[1:], -token_weights(MASK, "sequence", 4)[1:], rtol=1e-6)
    by_token = slope_of(PolicyConfig(), batch, now)
    assert by_token[0].tolist() == [0, 0, pytest.approx(-1 / 6), 0]  # the other token of it goes on


def test_log_ratios_are_zero_outside_of_the_texts() -> None:
    junk = np.where(MASK > 0, -1, NAN).astype(np.float32)
    for kind in ("token", "sequence"):
        got = log_ratio(
            kind, jnp.asarray(junk), jnp.asarray(junk - 0.5), jnp.asarray(MASK > 0), jnp.ones(MASK.shape, int)
        )
        np.testing.assert_array_equal(got, 0.5 * MASK)


# ---------------------------------------------------------------- estimators of KL


LOGITS = hypothesis_arrays(np.float32, (2, 5), elements=st.floats(-3, 3, width=32))


def kl(logits: Any, other: Any) -> Any:
    p = jax.nn.softmax(logits)
    return jnp.sum(p * (jax.nn.log_softmax(logits) - jax.nn.log_softmax(other)))


@jax.jit
def expected_estimates(logits: Any, other: Any) -> Any:
    """Of each estimator the mean over p, its least value, and the mean over p of its slope."""
    p, found = jax.nn.softmax(logits), []
    q = jax.nn.log_softmax(other)[None]
    for kind in ("k1", "k2", "k3"):
        of = lambda l, kind=kind: kl_estimate(kind, jax.nn.log_softmax(l)[None], q)[0]  # noqa: E731
        found.append((jnp.sum(p * of(logits)), jnp.min(of(logits)), p @ jax.jacobian(of)(logits)))
    return found


@given(LOGITS)
@settings(max_examples=100, deadline=None)
def test_k1_and_k3_are_unbiased_and_k3_is_never_negative(both: np.ndarray) -> None:
    k1, k2, k3 = expected_estimates(*both)
    exact = float(kl(*both))
    # log-probabilities of up to 8 in float32 are known to 1e-6; e^-x is up to e^8 times as large
    assert float(k1[0]) == pytest.approx(exact, abs=5e-6)
    assert float(k3[0]) == pytest.approx(exact, abs=5e-5, rel=1e-4)
    assert float(k3[1]) >= 0
    assert float(k2[1]) >= 0


@given(LOGITS)
@settings(max_examples=100, deadline=None)
def test_of_texts_of_the_policy_k2_has_the_slope_of_the_kl_and_k1_has_none(both: np.ndarray) -> None:
    k1, k2, _ = expected_estimates(*both)
    np.testing.assert_allclose(k1[2], np.zeros(5), atol=1e-5)  # so alone, in a loss, k1 does nothing
    np.testing.assert_allclose(k2[2], jax.grad(kl)(*jnp.asarray(both)), atol=2e-5)


def test_k2_is_near_the_kl_where_policies_are() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=5).astype(np.float32)
    near = logits + 0.1 * rng.normal(size=5).astype(np.float32)
    exact = float(kl(logits, near))
    assert float(expected_estimates(logits, near)[1][0]) == pytest.approx(exact, rel=0.1)  # off in the third order
    far = float(expected_estimates(logits, 20 * (near - logits))[1][0])
    assert abs(far - float(kl(logits, 20 * (near - logits)))) > 0.2  # but biased: this is no tautology


def test_the_kl_in_the_loss_by_hand() -> None:
    reference = np.full((3, 4), -2.0)
    batch = experience(advantage_BT=np.zeros((3, 4)), reference_log_prob_BT=reference)
    now = np.full((3, 4), -1.0)  # x = 1 for each token
    for kind, value in (("k1", 1.0), ("k2", 0.5), ("k3", math.exp(-1))):
        loss, metrics = loss_of(PolicyConfig(kl_coef=0.5, kl=kind), batch, now)
        assert float(loss) == float(metrics["loss/kl"]) == pytest.approx(0.5 * value, rel=1e-6)
        assert float(metrics["policy/kl_reference"]) == pytest.approx(math.exp(-1), rel=1e-6)  # always k3
    adapted = experience(advantage_BT=np.zeros((3, 4)), reference_log_prob_BT=reference, kl_coef_B=np.full(3, 2.0))
    assert float(loss_of(PolicyConfig(kl_coef=0.5, kl="k1"), adapted, now)[0]) == pytest.approx(2.0, rel=1e-6)
    in_reward = PolicyConfig(kl_coef=0.5, kl="k1", kl_in="reward")
    loss, metrics = loss_of(in_reward, adapted, now)
    assert (float(loss), "loss/kl" in metrics) == (0.0, False)
    with pytest.raises(ValueError, match="needs reference_log_prob_BT"):
        loss_of(PolicyConfig(kl_coef=0.5), experience(), now)


def test_the_coefficient_follows_what_is_measured() -> None:
    # Ziegler et al.: error (12 - 6) / 6 = 1, cut to 0.2; times 0.1
    assert adapted_kl(0.2, 12.0, 6.0) == pytest.approx(0.2 * 1.02)
    assert adapted_kl(0.2, 6.6, 6.0) == pytest.approx(0.2 * 1.01)
    assert adapted_kl(0.2, 6.0, 6.0) == 0.2
    assert adapted_kl(0.2, 0.0, 6.0) == pytest.approx(0.2 * 0.98)
    assert adapted_kl(0.2, 12.0, 6.0, gain=0.5) == pytest.approx(0.2 * 1.1)
    assert adapted_kl(0.2, NAN, 6.0) == adapted_kl(0.2, math.inf, 6.0) == 0.2


# ---------------------------------------------------------------- weights, values, entropy, other engines


def test_weights_of_tokens_by_hand() -> None:
    mask = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(token_weights(mask, "token", 8), mask / 6, rtol=1e-7)
    np.testing.assert_allclose(token_weights(mask, "sequence", 8), mask * [[1 / 4], [1 / 8], [0]], rtol=1e-7)
    np.testing.assert_allclose(token_weights(mask, "constant", 8), mask / 16, rtol=1e-7)  # the empty row is no text
    for aggregate in ("token", "sequence", "constant"):
        assert not token_weights(np.zeros((2, 3), np.float32), aggregate, 8).any()


@given(hypothesis_arrays(bool, (5, 7)))
@settings(max_examples=50, deadline=None)
def test_weights_add_up_to_one_over_the_whole_minibatch(mask: np.ndarray) -> None:
    some = float(mask.any())
    for aggregate in ("token", "sequence", "constant"):
        weight = token_weights(mask, aggregate, 7)
        # float32 of up to 35 numbers
        total = mask.sum() / (7 * max(mask.any(axis=1).sum(), 1)) if aggregate == "constant" else some
        assert np.asarray(weight, np.float64).sum() == pytest.approx(total, rel=1e-6)
        assert not weight[~mask].any()


def test_the_critics_loss_by_hand() -> None:
    values, returns, old = (jnp.full((1, 1), x) for x in (3.0, 1.0, 0.5))
    assert float(value_loss(values, returns)[0, 0]) == 2.0
    # nothing is gained behind 0.5 + 0.2: (0.7 - 1)^2 / 2 is less than (3 - 1)^2 / 2, and the larger one counts
    assert float(value_loss(values, returns, old, 0.2)[0, 0]) == 2.0
    near = jnp.full((1, 1), 0.9)  # better than the clip allows: 0.7 counts, without a slope
    loss, slope = jax.value_and_grad(lambda v: value_loss(v, returns, old, 0.2)[0, 0])(near)
    assert (float(loss), float(slope[0, 0])) == (pytest.approx(0.045, rel=1e-5), 0.0)
    with pytest.raises(ValueError, match="value_clip needs old_value_BT"):
        value_loss(values, returns, None, 0.2)
    batch = experience(advantage_BT=np.zeros((3, 4)), return_BT=np.where(MASK > 0, 1.0, NAN))
    loss, metrics = loss_of(PolicyConfig(value_coef=0.5), batch, np.zeros((3, 4)), value=np.where(MASK > 0, 3.0, NAN))
    assert float(loss) == float(metrics["loss/value"]) == pytest.approx(1.0, rel=1e-6)


def test_explained_variance_from_moments_that_add_up() -> None:
    rng = np.random.default_rng(0)
    returns = rng.normal(2, 1, (3, 4))
    value = returns + rng.normal(0.5, 0.3, (3, 4))
    metrics = loss_of(PolicyConfig(), experience(return_BT=returns), np.zeros((3, 4)), value=value)[1]
    of = lambda x: x[MASK > 0].var()  # noqa: E731
    expected = 1 - of(returns - value) / of(returns)
    assert explained_variance(metrics) == pytest.approx(expected, abs=1e-5)  # differences of float32 squares
    flat = loss_of(PolicyConfig(), experience(return_BT=np.ones((3, 4))), np.zeros((3, 4)), value=value)[1]
    assert explained_variance(flat) == 0.0


def test_entropy_is_rewarded() -> None:
    entropy = np.array([[9, 1, 2, 9], [9, 3, 4, 5], [6, 9, 9, 9.0]])
    loss, metrics = loss_of(PolicyConfig(entropy_coef=0.1), experience(advantage_BT=0 * MASK), 0 * MASK, entropy)
    assert float(metrics["policy/entropy"]) == pytest.approx(21 / 6, rel=1e-6)
    assert float(loss) == pytest.approx(-0.1 * 21 / 6, rel=1e-6)


def test_what_another_engine_wrote_counts_by_how_likely_it_is_here() -> None:
    trainer = np.log(np.array([[0.5, 0.5, 0.5, 0.5]], np.float32))
    sampler = np.log(np.array([[0.5, 0.25, 0.125, 1.0]], np.float32))
    sampler[0, 3] = NAN
    got = correction(trainer, sampler, 2.0)
    np.testing.assert_allclose(got, [[1, 2, 2, 1]], rtol=1e-6)  # 4 is cut to 2; of the last nothing is known
    assert correction(np.zeros((1, 1), np.float32), np.full((1, 1), -1e4, np.float32), 3.0)[0, 0] == 3.0
    assert correction(np.full((1, 1), -1e4, np.float32), np.zeros((1, 1), np.float32), 3.0)[0, 0] == 0.0
    batch = experience(correction_BT=np.where(MASK > 0, 2.0, NAN))
    plain = slope_of(PolicyConfig(), experience(), np.zeros((3, 4)))
    np.testing.assert_array_equal(slope_of(PolicyConfig(), batch, np.zeros((3, 4))), 2 * plain)
    assert float(loss_of(PolicyConfig(), batch, np.zeros((3, 4)))[1]["policy/correction"]) == 2.0


EVERY_SWITCH = PolicyConfig(
    clip_high=0.28, dual_clip=3.0, kl_coef=0.1, entropy_coef=0.01, value_clip=0.2, aggregate="sequence"
)
FIELDS = ("advantage", "old_log_prob", "reference_log_prob", "old_value", "return", "correction")


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_what_lies_outside_of_the_texts_changes_no_bit(ratio: Any) -> None:
    rng, cfg = np.random.default_rng(0), PolicyConfig(**{**vars(EVERY_SWITCH), "ratio": ratio})
    inside = {name: rng.normal(-1, 0.1, (3, 4)) for name in (*FIELDS, "now", "entropy", "value")}
    found = []
    for junk in (0.0, 1e30, NAN, -math.inf):
        x = {name: np.where(MASK > 0, value, junk) for name, value in inside.items()}
        batch = experience(aggregate="sequence", **{f"{name}_BT": x[name] for name in FIELDS})
        run = lambda now, batch=batch, x=x: loss_of(cfg, batch, now, x["entropy"], x["value"])  # noqa: E731
        (_, metrics), slope = jax.value_and_grad(run, has_aux=True)(jnp.asarray(x["now"], jnp.float32))
        found.append((metrics, slope))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)


def test_without_any_text_there_is_no_loss() -> None:
    loss, metrics = loss_of(PolicyConfig(), experience(0 * MASK), np.full((3, 4), -1.0))
    assert float(loss) == 0.0
    assert all(np.isfinite(x) for x in metrics.values())


# ---------------------------------------------------------------- rows of an iteration


def some_rows() -> Any:
    rollouts = [Rollout((7, 8), (-0.5, -1.0, -0.25), "", True), Rollout((5,), (-2.0,), "", False)]
    return written_rows([[0, 3], [0, 4]], rollouts, length=6, end_id=0)


def test_rows_that_do_not_count_are_padding() -> None:
    rows = some_rows()
    found = experience_of(rows, np.array([True, False]), rows.learned_NT, rows.told_NT)
    np.testing.assert_array_equal(found.loss_weight_BT, [[0, 1, 1, 1, 0, 0], [0] * 6])
    np.testing.assert_array_equal(found.documents.ids_BT, [[1, 1, 1, 1, 0, 0], [0] * 6])
    np.testing.assert_array_equal(found.documents.positions_BT, [[0, 1, 2, 3, 0, 0], [0] * 6])
    assert found.advantage_BT.dtype == found.old_log_prob_BT.dtype == np.float32


def test_a_minibatch_is_weighted_as_a_whole() -> None:
    rows = some_rows()
    everything = experience_of(rows, np.ones(2, bool), rows.learned_NT, kl_coef_B=np.array([0.1, 0.1]))
    both = minibatch(everything, [1, 0], "sequence", 4)
    np.testing.assert_array_equal(both.tokens_BT, everything.tokens_BT[::-1])
    np.testing.assert_allclose(both.weight_BT, [[0, 0.5, 0, 0, 0, 0], [0, *[1 / 6] * 3, 0, 0]], rtol=1e-6)
    one = minibatch(everything, np.array([0]), "sequence", 4)
    np.testing.assert_allclose(one.weight_BT, [[0, *[1 / 3] * 3, 0, 0]], rtol=1e-6)
    assert one.kl_coef_B.shape == (1,)


# ---------------------------------------------------------------- presets


def test_every_preset_is_what_its_paper_says() -> None:
    switches = {name: make() for name, make in PRESETS.items()}
    for policy, advantage in switches.values():
        validate(policy)
        validate(advantage)
    assert {name: advantage.kind for name, (_, advantage) in switches.items()} == {
        "ppo": "gae",
        "grpo": "group",
        "dapo": "group",
        "dr_grpo": "group_mean",
        "gspo": "group",
        "rloo": "leave_one_out",
    }
    dapo, gspo = switches["dapo"][0], switches["gspo"][0]
    assert (dapo.clip_low, dapo.clip_high, dapo.aggregate, dapo.kl_coef) == (0.2, 0.28, "token", 0)
    assert (gspo.ratio, gspo.clip_low, gspo.clip_high) == ("sequence", 3e-4, 4e-4)
    assert {name for name, (policy, _) in switches.items() if policy.kl_coef} == {"ppo", "grpo", "rloo"}
    assert {name for name, (policy, _) in switches.items() if policy.kl_in == "reward"} == {"ppo", "rloo"}


def test_an_algorithm_is_named_and_single_switches_are_set_otherwise() -> None:
    cfg = apply_overrides(AlgorithmConfig(), ["name=dapo", "clip_high=0.2", "advantage=group_mean"])
    policy, advantage = cfg.switches()
    assert policy == PolicyConfig(clip_high=0.2)  # also where the value is the class's own
    assert advantage == AdvantageConfig("group_mean")
    assert AlgorithmConfig("gspo").switches() == PRESETS["gspo"]()
    assert from_dict(to_dict(cfg)) == cfg
    own = {f for part in (PolicyConfig(), AdvantageConfig()) for f in vars(part)}
    assert set(vars(cfg)) == own - {"kind"} | {"name", "advantage"}  # no switch is missing


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["name=reinforce"], "name is 'reinforce'; it must be one of ppo, grpo, dapo, dr_grpo, gspo, rloo"),
        (["dual_clip=0.5"], "dual_clip is 0.5; it must be above 1, or 0 for none"),
        (["kl_in=reward"], "kl is k3; with kl_in=reward it must be k1"),
        (["clip_low=1.5"], "clip_low is 1.5; it must be"),
        (["gae_lambda=-0.1"], "gae_lambda is -0.1; it must be"),
        (["kl=k4"], "kl is 'k4'; it must be"),
    ],
)
def test_bad_switches_are_told(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        validate(apply_overrides(AlgorithmConfig(), overrides))
