"""State without a gradient: what the step does to buffers, on any number of devices and micro-batches."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from routed_runs import ONE, RATE, E, arrays, job, model_config, random_batch, trained

from dsjax.checkpoint import Checkpoints, as_tree, flatten
from dsjax.data.batch import Batch
from dsjax.models.decoder import Decoder
from dsjax.sharding import MeshConfig, joined, split_variables
from dsjax.train.step import Trainer, TrainState

BIAS = "buffers/group_0/ffn/selection_bias"


def loads(trainer: Trainer, state: TrainState, batch: Batch) -> np.ndarray:
    """What the experts of the first group of them receive of a batch, L x E."""
    return np.asarray(_loads(trainer.graph, state.variables, batch)["group_0"])


@functools.partial(jax.jit, static_argnums=0)
def _loads(graph: Any, variables: Any, batch: Batch) -> Any:
    return nnx.merge(graph, variables)(batch.tokens_BT, batch.documents).loads


def counted(metrics: dict[str, float]) -> dict[str, float]:
    """Of a step's metrics, those that follow from counts alone: equal, however the counting was shared out."""
    assert metrics["router/group_0/unaccounted"] == 0
    names = ("max_over_mean_load", "dead_experts", "drop_rate", "unaccounted", "load_entropy")
    return {name: round(metrics[f"router/group_0/{name}"], 5) for name in names}


def error_sign(load_LE: np.ndarray) -> np.ndarray:
    return np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)


# ---------------------------------------------------------------- what a buffer is


def test_buffers_are_no_parameters_and_the_optimizer_never_sees_them() -> None:
    _, trainer = job()
    names = flatten(as_tree(trainer.shapes))
    assert [name for name in names if "selection_bias" in name] == [BIAS]
    assert names[BIAS].shape == (2, E)
    assert names[BIAS].dtype == np.float32
    assert "selection_bias" not in str(trainer.axes)
    cfg = model_config()
    assert cfg.num_params() == sum(x.size for name, x in names.items() if name.startswith("params/"))
    assert cfg.num_params() == model_config(rate=0.0).num_params()


def test_a_model_without_buffers_has_none_in_its_state_or_checkpoint() -> None:
    _, trainer = job(model_config(rate=0.0))
    assert trainer.shapes.buffers == {}
    assert trainer.shapes.variables == trainer.shapes.params
    assert {name.split("/")[0] for name in flatten(as_tree(trainer.shapes))} == {"step", "params", "opt_state", "rng"}


def test_parameters_and_buffers_joined_are_all_variables_of_the_model() -> None:
    model = Decoder(model_config(several=True), rngs=nnx.Rngs(0))
    graph, params, buffers = split_variables(model)
    whole_graph, state = nnx.split(model)
    assert graph == whole_graph
    assert sorted(buffers) == ["group_0", "group_2"]
    assert jax.tree.structure(joined(params, buffers)) == jax.tree.structure(nnx.to_pure_dict(state))
    jax.tree.map(np.testing.assert_array_equal, joined(params, buffers), nnx.to_pure_dict(state))


# ---------------------------------------------------------------- how it moves


def test_a_step_moves_the_bias_against_the_load_error_of_its_batch() -> None:
    place, trainer = job()
    state = trainer.init(np.uint32(0))
    for i in range(3):
        batch = place(random_batch(i))
        load, before = loads(trainer, state, batch), arrays(state)[BIAS]
        assert load.sum(axis=1).tolist() == [2 * random_batch(i).documents.ids_BT.sum()] * 2  # no padding in it
        state, _ = trainer.step(state, batch, jnp.int32(9))
        want = before + np.float32(RATE) * error_sign(load).astype(np.float32)
        assert arrays(state)[BIAS].tolist() == want.tolist()
    assert len(set(np.round(want[0] / RATE))) > 2  # not one sign throughout


def test_every_group_has_a_bias_of_its_own() -> None:
    found = arrays(trained(4, cfg=model_config(several=True))[0])
    first, second = (found[f"buffers/group_{i}/ffn/selection_bias"] for i in (0, 2))
    rows = [tuple(row) for row in np.concatenate([first, second]).tolist()]
    assert len(set(rows)) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_step_leaves_every_bit_of_the_buffers(bad: float) -> None:
    place, trainer = job()
    good = random_batch(7)
    weight = good.loss_weight_BT.copy()
    weight[0, 0] = bad
    for batch, finite in ((dataclasses.replace(good, loss_weight_BT=weight), 0.0), (good, 1.0)):
        state, _ = trained(2)
        before = arrays(state)
        state, metrics = trainer.step(state, place(batch), jnp.int32(9))
        assert float(metrics["finite"]) == finite
        same = {name for name, x in arrays(state).items() if x.tobytes() == before[name].tobytes()}
        assert (same == set(before)) == (not finite)
        assert (BIAS in same) == (not finite)  # the control: its loads alone would have moved it


@pytest.mark.parametrize("accumulate", [2, 8])
def test_micro_batches_move_the_bias_as_the_whole_batch_does(accumulate: int) -> None:
    place, trainer = job()
    state, batch = trainer.init(np.uint32(0)), random_batch(0)
    part = jax.tree.map(lambda x: x[::accumulate], batch)  # the first micro-batch
    assert (error_sign(loads(trainer, state, part)) != error_sign(loads(trainer, state, place(batch)))).any()
    (whole, records), (cut, found) = (trained(4, accumulate=n) for n in (1, accumulate))
    assert arrays(cut)[BIAS].tolist() == arrays(whole)[BIAS].tolist()
    assert counted(found[0]) == counted(records[0])


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
        MeshConfig(expert=4, tensor=2),
        MeshConfig(fsdp=2, expert=2, context=2),
    ],
    ids=["data=8", "expert=4,tensor=2", "fsdp=2,expert=2,context=2"],
)
def test_devices_move_the_bias_as_one_does(mesh: MeshConfig) -> None:
    place, trainer = job()
    state, batch = trainer.init(np.uint32(0)), random_batch(0)
    whole = error_sign(loads(trainer, state, place(batch)))
    row = jax.tree.map(lambda x: x[:1], batch)  # what one device of data=8 has
    assert (error_sign(loads(trainer, state, row)) != whole).any()
    (one, records), (found, measured) = (trained(4, mesh=m) for m in (ONE, mesh))
    assert counted(measured[0]) == counted(records[0])
    assert arrays(found)[BIAS].tolist() == arrays(one)[BIAS].tolist()
    # Every device holds the whole of it.
    assert all(s.data.shape == (2, E) for s in found.buffers["group_0"]["ffn"]["selection_bias"].addressable_shards)


@pytest.mark.parametrize("compute", [{"remat": "full"}, {"remat": "dots", "unroll": True}], ids=str)
def test_how_it_is_computed_moves_the_bias_alike(compute: dict) -> None:
    plain, found = (arrays(trained(4, **kind)[0])[BIAS] for kind in ({}, compute))
    assert np.abs(plain).max() > 0
    assert found.tolist() == plain.tolist()


# ---------------------------------------------------------------- what it is good for


def test_the_bias_balances() -> None:
    """Max over mean load of the last 20 of 100 steps, with no other balancing, at equal seeds and batches."""
    name = "router/group_0/max_over_mean_load"
    for seed in (0, 1, 2, 3):
        without, balanced = (
            np.mean([r[name] for r in trained(100, seed=seed, cfg=model_config(rate))[1][-20:]]) for rate in (0.0, RATE)
        )
        print(f"seed {seed}: {without:.2f} without a bias, {balanced:.2f} with it")
        assert without > 1.6, "nothing to balance: the test says nothing"
        assert balanced - 1 < 0.5 * (without - 1)


# ---------------------------------------------------------------- that it is kept


def test_a_restored_bias_goes_on_bitwise_and_a_lost_one_does_not(tmp_path: pathlib.Path) -> None:
    place, trainer = job()
    state, _ = trained(4)
    kept = arrays(state)
    with_checkpoints = Checkpoints(tmp_path / "checkpoints")
    try:
        with_checkpoints.save(4, state, {})
        restored = with_checkpoints.restore(trainer.shapes)[0]
        lost = with_checkpoints.restore(trainer.shapes)[0]
    finally:
        with_checkpoints.close()
    assert {name: x.tobytes() for name, x in arrays(restored).items()} == {n: x.tobytes() for n, x in kept.items()}
    lost = dataclasses.replace(lost, buffers=jax.tree.map(jnp.zeros_like, lost.buffers))
    ends = []
    for begin in (state, restored, lost):
        for i in range(4, 6):
            begin, _ = trainer.step(begin, place(random_batch(i)), jnp.int32(1000))
        ends.append(arrays(begin))
    assert all(ends[0][name].tobytes() == ends[1][name].tobytes() for name in ends[0])
    assert ends[0]["params/embedding"].tobytes() != ends[2]["params/embedding"].tobytes()
