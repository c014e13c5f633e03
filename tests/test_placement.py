"""Where experts stand: the busiest device has no more than is promised, and no result changes."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError
from dsjax.nn.placement import (
    MEMORY,
    Placement,
    device_loads,
    moved_mean,
    place_experts,
    place_replicas,
    slots_at_home,
)
from pallas_kernels.expert_dispatch import top_k_route
from pallas_kernels.expert_dispatch.plan import positions

LOADS = st.lists(st.integers(0, 50), min_size=1, max_size=24)


def busiest(placement: Placement, load_E: np.ndarray, N: int) -> float:
    return float(device_loads(placement, load_E, N).max())


def best_possible(load_E: np.ndarray, N: int, slots: int) -> float:
    """Of all ways to fill the slots."""
    E = len(load_E)
    ways_WP = np.array(list(itertools.product(range(E), repeat=N * slots)))
    replicas_WE = np.sum(ways_WP[..., None] == np.arange(E), axis=1)
    ways_WP, replicas_WE = (a[(replicas_WE > 0).all(axis=1)] for a in (ways_WP, replicas_WE))
    weight_WP = np.take_along_axis(load_E / replicas_WE, ways_WP, axis=1)
    return float(weight_WP.reshape(-1, N, slots).sum(axis=2).max(axis=1).min())


def bound(placement: Placement, load_E: np.ndarray, N: int) -> float:
    """What :func:`place_experts` promises: the mean, and the largest difference within a round or before the first."""
    weight_E = load_E / np.bincount(placement.expert_P, minlength=len(load_E))
    weight_Np = weight_E[placement.expert_P].reshape(N, -1)
    fixed = len(load_E) // N if placement.home else 0
    before_N = weight_Np[:, :fixed].sum(axis=1)
    rounds = np.sort(weight_Np[:, fixed:], axis=None).reshape(-1, N)
    difference = max([np.ptp(before_N), *np.ptp(rounds, axis=1)])
    return load_E.sum() / N + (1 - 1 / N) * float(difference)


@pytest.mark.parametrize(("N", "E", "slots"), [(2, 4, 2), (2, 4, 3), (3, 3, 2), (2, 2, 3)])
def test_small_cases_against_all_placements(N: int, E: int, slots: int) -> None:
    rng, ratios = np.random.default_rng(0), []
    for _ in range(12):
        load_E = np.floor(rng.exponential(20, E)) + 1
        found, best = busiest(place_experts(load_E, N, slots), load_E, N), best_possible(load_E, N, slots)
        assert best <= found + 1e-9
        assert found < 2 * best
        ratios.append(found / best)
    print(f"{N} devices, {E} experts, {slots} slots: of the best {np.mean(ratios):.3f}, at worst {max(ratios):.3f}")
    assert np.mean(ratios) < 1.1


@settings(max_examples=300, deadline=None, derandomize=True)
@given(LOADS, st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_every_slot_is_filled_and_no_device_has_more_than_the_bound(
    load: list[int], N: int, more: int, home: bool
) -> None:
    load_E = np.array([*load, *[0] * (-len(load) % N)])
    E, slots = len(load_E), (len(load) + -len(load) % N) // N + more
    placement = place_experts(load_E, N, slots, home=home)
    experts_Np = placement.expert_P.reshape(N, slots)
    assert set(placement.expert_P.tolist()) == set(range(E))
    assert busiest(placement, load_E, N) >= load_E.sum() / N - 1e-9
    if home:
        np.testing.assert_array_equal(experts_Np[:, : E // N], np.arange(E).reshape(N, -1))
    assert busiest(placement, load_E, N) <= bound(placement, load_E, N) + 1e-9


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(0, 4))
def test_no_other_numbers_of_replicas_have_a_smaller_highest_load(load: list[int], more: int) -> None:
    load_E = np.array(load)
    placement = place_experts(load_E, 1, len(load) + more)
    highest = (load_E / np.bincount(placement.expert_P, minlength=len(load))).max()
    others = (r for r in itertools.product(range(1, more + 2), repeat=len(load)) if sum(r) == len(load) + more)
    assert highest == min((load_E / np.array(r)).max() for r in others)


@pytest.mark.parametrize(("E", "N", "more"), [(64, 8, 1), (256, 32, 1), (256, 64, 1)])
def test_skewed_loads_come_out_nearly_even(E: int, N: int, more: int) -> None:
    """DeepSeek-V3 adds one slot a device."""
    rng, before, after = np.random.default_rng(0), [], []
    for _ in range(10):
        load_E = rng.permutation(rng.lognormal(0, 0.7, E))
        before.append(load_E.reshape(N, -1).sum(axis=1).max() / load_E.sum() * N)
        after.append(busiest(place_experts(load_E, N, E // N + more), load_E, N) / load_E.sum() * N)
    print(f"{E} experts, {N} devices: busiest / mean {np.mean(before):.2f} -> {np.mean(after):.3f}")
    assert np.mean(before) > 1.3
    assert max(after) < 1.05


@functools.partial(jax.jit, static_argnames="top_k")
def chosen_slots(scores_TE, counted_T, expert_P, limit_E, shift, top_k: int):
    choice = top_k_route(scores_TE, top_k, counted_T=counted_T)
    slots, limit_P = Placement(expert_P, scores_TE.shape[1]).choice_of_slots(choice, limit_E, shift)
    return choice, slots, limit_P, positions(slots.experts_TX, len(expert_P))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1, 2), (5, 3, 0), (5, 3, 4)]), st.integers(0, 3))
def test_an_experts_pairs_take_turns_at_its_slots(seed: int, sizes: tuple[int, int, int], shift: int) -> None:
    rng, T, (E, X, more) = np.random.default_rng(seed), 9, sizes
    scores = (rng.random((T, E)) * (1 + np.arange(E))).astype(np.float32)
    expert_P = rng.permutation([*range(E), *rng.integers(0, E, more)]).astype(np.int32)
    limit_E = rng.integers(0, 9, E).astype(np.int32)
    found = chosen_slots(scores, rng.random(T) < 0.8, expert_P, limit_E, np.int32(shift), top_k=X)
    choice, slots, limit_P, (position_TX, counts_P) = jax.tree.map(np.asarray, found)
    counted = choice.experts_TX < E
    np.testing.assert_array_equal(expert_P[slots.experts_TX[counted]], choice.experts_TX[counted])
    assert (slots.experts_TX[~counted] == E + more).all()
    np.testing.assert_array_equal(slots.position_TX[counted], position_TX[counted])
    np.testing.assert_array_equal(slots.counts_E, counts_P)
    for e in range(E):  # no slot has two pairs more than another
        assert np.ptp(slots.counts_E[expert_P == e]) <= 1
    # The same pairs go nowhere.
    kept = slots.position_TX[counted] < limit_P[slots.experts_TX[counted]]
    np.testing.assert_array_equal(kept, choice.position_TX[counted] < limit_E[choice.experts_TX[counted]])


def test_replicas_of_a_stack_are_those_of_each_layer() -> None:
    load_LE = np.random.default_rng(0).lognormal(0, 1, (3, 8))
    found = place_replicas(load_LE, 4, 8)
    for load_E, replicas_R in zip(load_LE, found, strict=True):
        whole = place_experts(load_E, 4, 4, home=True).expert_P
        np.testing.assert_array_equal(slots_at_home(jnp.asarray(replicas_R), 8, 4), whole)
    with pytest.raises(UserError, match="num_replicas is 6; it must divide over 4 devices"):
        place_replicas(load_LE, 4, 6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=30))
def test_a_running_mean_forgets_and_never_leaves_the_range_of_its_loads(steps: list[tuple[int, int]]) -> None:
    mean_E = jnp.zeros(2)
    for load_E in steps:
        mean_E = moved_mean(mean_E, jnp.array(load_E))
    weights = (1 - MEMORY) * MEMORY ** np.arange(len(steps))[::-1]
    # float32, rounded in each of 30 steps
    np.testing.assert_allclose(mean_E, weights @ np.array(steps), rtol=1e-5)
    assert (mean_E <= np.max(steps, axis=0)).all()


@pytest.mark.parametrize(("devices", "slots"), [(3, 2), (2, 1)])
def test_sizes_that_do_not_go_together_are_said(devices: int, slots: int) -> None:
    with pytest.raises(UserError, match="4 experts"):
        place_experts(np.ones(4), devices, slots)
