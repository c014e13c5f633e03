"""Each loss by its equation; the multipliers hold what they are to hold, in a layer and in training, on any mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from routed_runs import ATTENTION, ONE, E, arrays, job, random_batch, routed_by, trained

from dsjax.models.decoder import Decoder, DecoderConfig, LayerGroup
from dsjax.nn.moe import MoEConfig
from dsjax.nn.router import RouterStats, RouterSums
from dsjax.nn.routing_losses import (
    EntropyConstraint,
    entropy_gaps,
    entropy_loss,
    moved_multipliers,
    sequence_loss,
    switch_loss,
    z_loss,
)
from dsjax.sharding import MeshConfig

MULTIPLIERS = "buffers/group_0/ffn/entropy_multipliers"


def test_the_switch_loss_is_one_if_balanced_and_e_if_one_expert_gets_all() -> None:
    even, one = jnp.full(4, 0.25), jnp.asarray([1.0, 0, 0, 0])
    assert float(switch_loss(jnp.asarray([4, 4, 4, 4]), even, jnp.float32(8), 2)) == pytest.approx(1)
    assert float(switch_loss(jnp.asarray([8, 0, 0, 0]), one, jnp.float32(8), 1)) == pytest.approx(4)
    by_hand = 4 * (5 * 0.4 + 3 * 0.3 + 2 * 0.2 + 6 * 0.1) / 16
    found = switch_loss(jnp.asarray([5, 3, 2, 6]), jnp.asarray([0.4, 0.3, 0.2, 0.1]), jnp.float32(8), 2)
    assert float(found) == pytest.approx(by_hand)


def test_the_sequence_loss_is_a_loop_over_rows() -> None:
    """Equations 17 to 20 of DeepSeek-V3, row by row."""
    rng, (B, T, X) = np.random.default_rng(0), (4, 6, 2)
    scores = 1 / (1 + np.exp(-rng.normal(size=(B, T, E))))
    probs = scores / scores.sum(axis=-1, keepdims=True)
    counted = np.ones((B, T), np.float32)
    counted[1, 3:] = counted[2] = 0  # the end of a row, and a row
    losses = []
    for b in range(B):
        tokens = np.flatnonzero(counted[b])
        if len(tokens):
            best = np.argsort(-scores[b, tokens], axis=-1)[:, :X]
            f = np.array([E / (X * len(tokens)) * (best == e).sum() for e in range(E)])
            losses.append(np.sum(f * probs[b, tokens].mean(axis=0)))
    found = sequence_loss(*(jnp.asarray(x, jnp.float32) for x in (scores, probs, counted)), X)
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(sequence_loss(jnp.asarray(scores), jnp.asarray(probs), jnp.zeros((B, T)), X)) == 0


def test_the_sequence_loss_sees_what_the_batch_as_a_whole_hides() -> None:
    """Each row has its own favourite: balanced over the batch, not within a row."""
    probs = jnp.broadcast_to(jax.nn.softmax(9 * jnp.eye(4))[:, None], (4, 5, 4))
    assert float(sequence_loss(probs, probs, jnp.ones((4, 5)), 1)) == pytest.approx(4, rel=1e-2)
    found = switch_loss(jnp.full(4, 5), jnp.mean(probs, axis=(0, 1)), jnp.float32(20), 1)
    assert float(found) == pytest.approx(1, rel=1e-5)


def test_the_z_loss_by_hand_leaves_padding_out() -> None:
    logits = jnp.log(jnp.asarray([[[1.0, 2.0], [3.0, 1.0], [50.0, 50.0]]]))
    found = z_loss(logits, jnp.asarray([[1.0, 1.0, 0.0]]), jnp.float32(2))
    assert float(found) == pytest.approx((np.log(3) ** 2 + np.log(4) ** 2) / 2)


# ---------------------------------------------------------------- entropies


def sums_of(probs_TE: jax.Array) -> RouterSums:
    """Of tokens with these routing distributions, top-1; what the entropies do not need is left out."""
    nothing = jnp.int32(0)
    entropy = jnp.sum(jax.scipy.special.entr(probs_TE))
    tokens, best_T1 = jnp.int32(len(probs_TE)), jnp.argmax(probs_TE, axis=1)[:, None]
    load_E = jnp.sum(best_T1 == jnp.arange(probs_TE.shape[1]), axis=0, dtype=jnp.int32)
    return RouterSums(tokens, tokens, load_E, nothing, nothing, {}, jnp.sum(probs_TE, axis=0), entropy)


CFG = EntropyConstraint(0.3, 0.8, "probabilities", 0.9, rate=0.1, damping=0.0, max_multiplier=0.5)


@pytest.mark.parametrize(
    ("probs", "h", "m"),
    [
        (np.eye(4), 0, 1),  # each token sure, all experts used
        (np.full((4, 4), 0.25), 1, 1),  # none sure
        (np.eye(4)[[0] * 4], 0, 0),  # all sure of the same
        (np.array([[0.5, 0.5, 0, 0]] * 2 + [[0, 0, 0.5, 0.5]] * 2), 0.5, 1),
    ],
)
def test_the_gaps_by_hand(probs: np.ndarray, h: float, m: float) -> None:
    found = entropy_gaps(CFG, sums_of(jnp.asarray(probs, jnp.float32)))
    np.testing.assert_allclose(found, [0.3 - h, h - 0.8, 0.9 - m], atol=1e-6)


def test_the_marginal_of_loads_has_their_value_and_pulls_probability_to_the_starved() -> None:
    """Each token prefers expert 0 or 1 by a little: the mean probabilities are even, the loads are not."""
    cfg = dataclasses.replace(CFG, marginal="loads")
    logits = jnp.zeros((8, 4)).at[:6, 0].set(0.01).at[6:, 1].set(0.01)  # loads 6, 2, 0, 0

    def gap(logits, cfg):
        return entropy_gaps(cfg, sums_of(jax.nn.softmax(logits)))[2]

    h = (0.75 * np.log(4 / 3) + 0.25 * np.log(4)) / np.log(4)
    assert float(gap(logits, cfg)) == pytest.approx(0.9 - h, abs=1e-6)
    assert float(gap(logits, CFG)) == pytest.approx(0.9 - 1, abs=1e-4)
    pull_E = -np.asarray(jnp.sum(jax.grad(gap)(logits, cfg), axis=0))  # descent of the gap
    assert pull_E[0] < pull_E[1] < pull_E[2]
    # The slope by p_e is -log f_e / log 4, and a softmax of p = 1/4 passes on (g_e - mean g) / 4.
    slope = -np.log(np.array([6.5, 2.5, 0.5, 0.5]) / 10) / np.log(4)
    np.testing.assert_allclose(pull_E, (slope - slope.mean()) / 4, rtol=0.02)  # p is 1/4 to 1 %


def test_the_gaps_of_a_stack_are_those_of_its_layers() -> None:
    layers = [sums_of(jax.nn.softmax(jax.random.normal(jax.random.key(i), (5, 4)))) for i in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    want = jnp.stack([entropy_gaps(CFG, sums) for sums in layers])
    np.testing.assert_allclose(entropy_gaps(CFG, stack), want, atol=1e-6)


def test_multipliers_go_up_while_violated_down_when_slack_and_stay_in_their_bounds() -> None:
    same = sums_of(jnp.asarray(np.eye(4)[[0] * 4], jnp.float32))  # gaps 0.3, -0.8, 0.9
    found = moved_multipliers(CFG, jnp.asarray([0.0, 0.1, 0.45]), same)
    np.testing.assert_allclose(found, [0.03, 0.02, 0.5], atol=1e-6)
    found = moved_multipliers(CFG, found, same)
    np.testing.assert_allclose(found, [0.06, 0.0, 0.5], atol=1e-6)
    padding = dataclasses.replace(same, tokens=jnp.int32(0))
    assert moved_multipliers(CFG, found, padding).tolist() == found.tolist()


def test_a_slack_constraint_without_multiplier_has_no_gradient_and_a_violated_one_pulls_inwards() -> None:
    logits = jnp.asarray([[4.0, 0, 0, 0], [4.0, 0.1, 0, 0], [4.0, 0, 0.2, 0]])  # sure of the same: h too low, m too low
    cfg = dataclasses.replace(CFG, damping=1.0)

    def loss(logits, cfg, multipliers):
        return entropy_loss(cfg, jnp.asarray(multipliers), sums_of(jax.nn.softmax(logits)))

    gaps = entropy_gaps(cfg, sums_of(jax.nn.softmax(logits)))
    assert (np.sign(gaps) == [1, -1, 1]).all()
    assert not jax.grad(loss)(logits, CFG, [0.0, 0.0, 0.0]).any()  # without damping, multipliers alone act
    for cfg_and_start in ((cfg, [0.0, 0.0, 0.0]), (CFG, [0.1, 0.0, 0.1])):
        moved = logits - 0.1 * jax.grad(loss)(logits, *cfg_and_start)
        after = entropy_gaps(CFG, sums_of(jax.nn.softmax(moved)))
        assert after[0] < gaps[0]
        assert after[2] < gaps[2]
    loose = dataclasses.replace(cfg, token_low=0.0, marginal_low=0.0)
    assert not jax.grad(loss)(logits, loose, [0.0, 0.0, 0.0]).any()


@pytest.mark.parametrize("start", ["all sure of the same", "none sure"])
@pytest.mark.parametrize(("damping", "marginal"), [(0.0, "probabilities"), (1.0, "probabilities"), (1.0, "loads")])
def test_descent_and_ascent_bring_the_entropies_inside(start: str, damping: float, marginal: str) -> None:
    """Free logits, with a pull of their own to where they start: the multipliers must come to outweigh it."""
    cfg = EntropyConstraint(0.3, 0.6, marginal, 0.95, rate=0.05, damping=damping, max_multiplier=10.0)
    noise = 0.1 * jax.random.normal(jax.random.key(0), (64, 8))
    home = noise + (6 * jnp.eye(8)[0] if start == "all sure of the same" else 0)

    @jax.jit
    def step(carry, _):
        logits, multipliers = carry

        def loss(logits):
            sums = sums_of(jax.nn.softmax(logits))
            pull = 0.001 * jnp.sum((logits - home) ** 2) / len(logits)
            return pull + entropy_loss(cfg, multipliers, sums), sums

        slope, sums = jax.grad(loss, has_aux=True)(logits)
        return (logits - 5.0 * slope, moved_multipliers(cfg, multipliers, sums)), entropy_gaps(cfg, sums)

    (_, multipliers), gaps = jax.lax.scan(step, (home, jnp.zeros(3)), length=3000)
    assert gaps[0].max() > 0.3, "nothing was violated: the test says nothing"
    assert np.asarray(gaps[-100:]).max() < 0.02  # of log E
    assert (multipliers < 10.0).all()  # none had to stop


# ---------------------------------------------------------------- in training

CONSTRAINED = routed_by(balance_coef=0.0, entropy=EntropyConstraint(rate=0.1), bias_update_rate=0.01)


@functools.cache
def multipliers_of(mesh: MeshConfig = ONE, accumulate: int = 1, steps: int = 4) -> np.ndarray:
    return arrays(trained(steps, cfg=CONSTRAINED, mesh=mesh, accumulate=accumulate)[0])[MULTIPLIERS]


def test_a_step_moves_the_multipliers_by_the_gaps_of_its_batch() -> None:
    place, trainer = job(CONSTRAINED)
    state = trainer.init(np.uint32(0))
    assert not arrays(state)[MULTIPLIERS].any()
    _, metrics = trainer.step(state, place(random_batch(0)), jnp.int32(1000))
    first = multipliers_of(steps=1)
    # Of the token's entropy at the beginning, near log E, the second gap is known: h - token_high, mean over layers.
    h = float(metrics["router/group_0/entropy"]) / np.log(E)
    assert first[:, 1].mean() == pytest.approx(0.1 * (h - 0.8), rel=1e-4)
    assert (first[:, 0] == 0).all()
    assert (multipliers_of() != first).any()


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(fsdp=2, expert=2, context=2)], ids=["data", "mixed"])
def test_devices_move_the_multipliers_as_one_does(mesh: MeshConfig) -> None:
    """The marginal is that of the whole batch: the means of one device's rows have lower entropies."""
    # rtol: float32 sums over devices, over four steps of training.
    np.testing.assert_allclose(multipliers_of(mesh), multipliers_of(), rtol=2e-4, atol=1e-6)


def test_micro_batches_move_the_multipliers_as_the_whole_batch_does() -> None:
    """In the first step, since the loss of micro-batches looks at their own marginals."""
    one, cut = multipliers_of(steps=1), multipliers_of(accumulate=4, steps=1)
    np.testing.assert_allclose(cut, one, rtol=1e-5, atol=1e-7)
    assert np.abs(one).max() > 0


def test_all_losses_at_once_are_logged_and_add_up() -> None:
    weights = {"balance_coef": 0.01, "z_coef": 0.001, "sequence_coef": 0.003, "entropy": EntropyConstraint()}
    metrics = trained(1, cfg=routed_by(**weights))[1][0]
    found = {name for name in metrics if name.startswith("loss/")}
    assert found == {"loss/balance", "loss/router_z", "loss/sequence_balance", "loss/entropy_constraint"}
    assert 0.9 < metrics["loss/balance"] / (2 * 0.01) < 2  # of two layers
    assert 0.9 < metrics["loss/sequence_balance"] / (2 * 0.003) < 3
    assert metrics["router/group_0/unaccounted"] == 0


@pytest.mark.parametrize("listed", [[4], [2, 2], [3, 1], [1, 1, 1, 1]])
def test_how_a_config_lists_its_layers_changes_no_loss(listed: list[int]) -> None:
    experts = MoEConfig(E, 2, 8, balance_coef=0.01, sequence_coef=0.003)
    groups = tuple(LayerGroup(experts, ATTENTION, num_layers=num) for num in listed)
    model = Decoder(DecoderConfig(64, 16, 4, groups), rngs=nnx.Rngs(0))
    zero = jnp.zeros(1)
    sums = RouterSums(zero, zero, zero, zero, zero, {}, zero, zero)
    router = {
        name: RouterStats(sums, {"balance": jnp.ones(num), "sequence_balance": jnp.full(num, 2.0)})
        for name, num in zip(model.cfg.experts(), listed, strict=True)
    }
    losses = model.auxiliary_losses(router)
    assert {name: float(x) for name, x in losses.items()} == pytest.approx({"balance": 0.04, "sequence_balance": 0.024})
