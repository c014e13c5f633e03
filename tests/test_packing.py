"""Several texts in a row: each has one place, and a policy learns the same from it there."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import ATTENTION

from dsjax.config import UserError
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.masks import Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.rl.experience import Experience, experience_of, minibatch
from dsjax.rl.packing import Packing, num_rows, packing_of
from dsjax.rl.policy import PolicyConfig
from dsjax.rl.rollout import Rollout
from dsjax.rl.rows import row_length, written_rows
from dsjax.train.policy_loss import policy_loss

END, V = 0, 32


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 16), max_size=40),
    spare=st.integers(0, 20),
    devices=st.integers(1, 5),
    turn=st.sampled_from([1, 1, 2, 5, 40]),
)
def test_every_text_has_one_place_and_no_two_the_same(lengths: list[int], spare: int, devices: int, turn: int) -> None:
    size = max([*lengths, 1]) + spare
    packing = Packing(lengths, size, devices, turn)
    assert packing.num_rows % devices == 0
    assert packing.num_rows >= devices
    taken = np.zeros((packing.num_rows, size), int)
    for length, row, start, part in zip(lengths, packing.row_N, packing.start_N, packing.part_N, strict=True):
        if length:
            taken[row, start : start + length] += 1
            assert start + length <= size
            assert start % turn == 0
            assert part >= 1
        else:
            assert row == start == part == -1
    assert taken.max(initial=0) <= 1
    assert taken.sum() == sum(lengths)
    # First-fit: no two rows of those used could have been one.
    used = np.sort(taken.sum(axis=1)[taken.sum(axis=1) > 0])
    assert turn > 1 or len(used) < 2 or used[0] + used[1] > size
    values = np.arange(len(lengths) * size).reshape(len(lengths), size) + 1
    there = packing.unpacked(packing.packed(values, 0), size)
    inside = np.arange(size) < np.asarray(lengths, int).reshape(-1, 1)
    np.testing.assert_array_equal(there, values * inside)


def test_a_text_longer_than_a_row_is_said() -> None:
    with pytest.raises(UserError, match=r"data\.seq_len is 8, but a prompt with its text has 9 tokens"):
        Packing([3, 9], 8, 1)


def test_rows_come_in_few_numbers() -> None:
    assert [num_rows(used, 1) for used in range(10)] == [1, 1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert num_rows(11, 1) == 12
    assert num_rows(4, 8) == 8
    assert num_rows(17, 8) == 24
    found = {num_rows(used, 4) for used in range(1, 1025)}
    assert found == {4 * n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)}
    assert row_length(33, 32) == 64


@given(used=st.integers(1, 5000), devices=st.integers(1, 64))
def test_few_rows_are_empty(used: int, devices: int) -> None:
    found = num_rows(used, devices)
    assert used <= found
    assert found % devices == 0
    assert found - used < found / 3 + devices


# ---------------------------------------------------------------- in a policy's loss


def texts(seed: int, num: int = 7) -> Experience:
    """Texts of different lengths, some cut off, one of which nothing is known."""
    chance = np.random.default_rng(seed)
    prompts = [[END, *chance.integers(1, V, chance.integers(1, 5)).tolist()] for _ in range(num)]
    rollouts = []
    for n in range(num):
        tokens = chance.integers(1, V, chance.integers(0 if n % 2 else 1, 6)).tolist()
        told = (-chance.uniform(1, 6, len(tokens) + n % 2)).tolist()
        rollouts.append(Rollout(tuple(tokens), tuple(told), "", bool(n % 2)))
    rows = written_rows(prompts, rollouts, length=16, end_id=END)
    counts = np.arange(num) != 2
    advantage = chance.normal(size=(num, 1)) * np.ones((1, 16))
    further = {"reference_log_prob_BT": np.nan_to_num(rows.told_NT) - 0.1, "kl_coef_B": np.full(num, 0.3, np.float32)}
    return experience_of(rows, counts, advantage.astype(np.float32), np.nan_to_num(rows.told_NT), **further)


@pytest.mark.parametrize(
    ("ratio", "aggregate", "segmented"),
    [
        *itertools.product(["token", "sequence"], ["token", "sequence", "constant"], [None]),
        ("token", "token", Segmented(4, 2, 1)),  # as each was written, however rows are cut
    ],
)
def test_the_loss_and_its_gradient_are_those_of_a_row_for_each(ratio: Any, aggregate: Any, segmented: Any) -> None:
    group = LayerGroup(MLPConfig(d_ff=16), dataclasses.replace(ATTENTION, segmented=segmented))
    model = Decoder(DecoderConfig(V, d_model=8, num_layers=1, groups=(group,)), ComputeConfig(), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    cfg = PolicyConfig(ratio=ratio, aggregate=aggregate, kl_coef=0.3, entropy_coef=0.01)
    alone = minibatch(texts(0), range(7), aggregate, 6)
    packing = packing_of(alone, 24, 1, model.cfg.turn)
    together = packing.experience(alone, END)
    assert packing.num_rows < 6  # six texts that count
    assert together.documents.ids_BT.max() > 1

    def loss(params: Any, batch: Experience) -> Any:
        batch = jax.tree.map(jnp.asarray, batch)
        total = jnp.maximum(jnp.sum(batch.loss_weight_BT), 1.0)
        return policy_loss(cfg)(nnx.merge(graph, params), batch, jax.random.key(0), total)[0]

    (a, slope_a), (b, slope_b) = (jax.value_and_grad(loss)(params, batch) for batch in (alone, together))
    assert float(a) == pytest.approx(float(b), rel=1e-5)  # float32 sums in another order
    assert float(a) != 0
    for x, y in zip(jax.tree.leaves(slope_a), jax.tree.leaves(slope_b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)
    turned = dataclasses.replace(together, advantage_BT=-together.advantage_BT)
    assert float(loss(params, turned)) != pytest.approx(float(a), rel=1e-2)  # or the test could not fail
