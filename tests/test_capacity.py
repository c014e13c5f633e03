"""The dynamic capacity: what the controller chooses, that it is resumed bitwise, and how much is compiled for it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import changed, home, small_moe, state_hash, training_records

from dsjax.config import UserError, apply_overrides, from_dict, to_dict, validate
from dsjax.data.batch import Batch
from dsjax.nn.masks import Documents
from dsjax.nn.moe import DynamicCapacity, set_capacity
from dsjax.train import pretrain
from dsjax.train.capacity import CompiledSteps, Controller, drop_rate_name
from dsjax.train.pretrain import Pretrain

CFG = DynamicCapacity(factors=(1.0, 1.5, 2.0), target_drop_rate=0.1, quantile=0.75, window=4, hysteresis=0.5)


def metrics(*rates: float, cfg: DynamicCapacity = CFG) -> dict[str, float]:
    return {drop_rate_name(factor): rate for factor, rate in zip(cfg.factors, rates, strict=True)}


def factors_of(steps: list[tuple[float, ...] | None], cfg: DynamicCapacity = CFG, early: Any = ()) -> list[float]:
    """The factor of each step; the numbers of a step in ``early`` are looked at before the next one begins."""
    state: dict[str, Any] = {}
    controller, found, waiting = Controller(cfg, state), [], None
    for iteration, rates in enumerate(steps):
        found.append(controller.factor(iteration))
        if waiting is not None:
            controller.observe(*waiting)
        waiting = (None if rates is None else metrics(*rates, cfg=cfg),)
        if iteration in early:
            controller.observe(*waiting)
            waiting = None
            state = json.loads(json.dumps(state))  # as if it were saved here, and resumed
            controller = Controller(cfg, state)
    return found


GOOD, BETTER, BAD = (0.2, 0.08, 0.0), (0.2, 0.04, 0.0), (0.4, 0.3, 0.2)


def test_it_begins_with_the_largest_and_shrinks_when_a_window_says_so() -> None:
    # The window is full behind step 3; step 4 is dispatched before its numbers are known.
    assert factors_of([BETTER] * 7) == [2.0] * 5 + [1.5] * 2


def test_a_smaller_factor_must_be_good_with_a_margin_and_a_larger_one_must_not() -> None:
    assert factors_of([GOOD] * 9) == [2.0] * 9  # 0.08 is less than the target, not than half of it
    shrunk = [BETTER] * 6 + [GOOD] * 9
    assert factors_of(shrunk)[5:] == [1.5] * 10  # but it is enough to stay


def test_it_grows_when_more_steps_than_the_quantile_allows_drop_too_many() -> None:
    assert factors_of([BETTER] * 6 + [BAD] + [BETTER] * 6)[5:] == [1.5] * 8  # one of four
    # Two of four, behind step 7: the smallest factor that is enough, none is, so the largest.
    assert factors_of([BETTER] * 6 + [BAD] * 2 + [BETTER] * 9)[5:] == [1.5] * 4 + [2.0] * 3 + [1.5] * 5


def test_it_may_skip_entries() -> None:
    free = (0.0, 0.0, 0.0)
    assert factors_of([free] * 7) == [2.0] * 5 + [1.0] * 2
    assert factors_of([free] * 7 + [BAD] * 7)[7:] == [1.0] * 3 + [2.0] * 4


def test_bad_steps_say_nothing_but_count() -> None:
    assert factors_of([BETTER, None, BETTER, None, BETTER, BETTER, BETTER, BETTER]) == [2.0] * 7 + [1.5]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([GOOD, BETTER, BAD, (0.0, 0.0, 0.0), None]), min_size=1, max_size=40),
    st.sets(st.integers(0, 40)),
)
def test_when_numbers_are_looked_at_and_the_run_is_resumed_changes_nothing(steps: list, early: set) -> None:
    found = factors_of(steps)
    assert factors_of(steps, early=early) == found
    assert set(found) <= set(CFG.factors)


def test_it_aims_at_the_drop_rate() -> None:
    """Loads that swing: no step's factor would have been chosen with the numbers of that step, yet the rate is met."""
    cfg = DynamicCapacity((1.0, 1.25, 1.5, 2.0), target_drop_rate=0.01, quantile=0.9, window=20, hysteresis=0.5)
    rng, state = np.random.default_rng(0), {}
    controller, dropped, used = Controller(cfg, state), [], []
    for iteration in range(600):
        spread = 0.1 + 0.1 * (iteration > 300)
        load = rng.gamma(1 / spread**2, size=16)
        load /= load.mean()
        rates = [np.maximum(load - factor, 0).sum() / 16 for factor in cfg.factors]
        factor = controller.factor(iteration)
        dropped.append(rates[cfg.factors.index(factor)])
        used.append(factor)
        controller.observe(metrics(*rates, cfg=cfg))
    assert {used[250], used[599]} == {1.25, 1.5}
    for half in (dropped[:300], dropped[300:]):
        assert np.mean(half) < 0.01
    assert sum(a != b for a, b in itertools.pairwise(used)) < 8  # it does not flutter
    fixed = np.mean(np.maximum(load - 1.0, 0))
    assert fixed > 0.01  # the smallest factor would not do


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OtherBatch(Batch):
    """Another kind."""


def test_each_factor_kind_and_shape_of_batch_is_compiled_once_and_told_of() -> None:
    compiled, said = [], []
    ints, weights = np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32)
    plain, other = (kind(ints, ints, weights, Documents(ints, ints)) for kind in (Batch, OtherBatch))

    def compile_for(batch: Any, factor: float | None) -> Any:
        compiled.append((batch, factor))
        return lambda state, batch, total: (state, {"factor": factor})

    steps = CompiledSteps(compile_for, plain, {2.0: lambda *_: (None, {"factor": 2.0})}, said.append)
    taken = [2.0, 1.25, 2.0, 1.0, 1.25, 1.0]
    assert [steps(None, plain, None, factor)[1]["factor"] for factor in taken] == taken
    assert [(batch is plain, factor) for batch, factor in compiled] == [(True, 1.25), (True, 1.0)]
    assert said == [f"capacity factor {factor}: compiling a step for it" for factor in ("1.25", "1")]
    for _ in range(2):
        assert steps(None, other, None, None)[1]["factor"] is None
    assert [(batch is other, factor) for batch, factor in compiled[2:]] == [(True, None)]
    longer = jax.tree.map(lambda x: np.concatenate([x, x], axis=1), other)
    for _ in range(2):
        assert steps(None, longer, None, None)[1]["factor"] is None
    assert [batch is longer for batch, _ in compiled[2:]] == [False, True]
    assert said[2:] == [f"a OtherBatch of (1, {length}): compiling a step for it" for length in (2, 4)]


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module", autouse=True)
def _compiled_once() -> Iterator[None]:
    """The runs of this file share their programs."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(home() / "cache" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def dynamic(capacity: DynamicCapacity, **parts: dict[str, Any]) -> Pretrain:
    config = small_moe()
    groups = config.model.groups
    moe = dataclasses.replace(groups[1].ffn, capacity=capacity)
    model = dataclasses.replace(config.model, groups=(groups[0], dataclasses.replace(groups[1], ffn=moe)))
    return changed(dataclasses.replace(config, model=model), **parts)


# Everything may be dropped, so the smallest is chosen as soon as the window is full; 4.0 holds all pairs of 4 experts.
LENIENT = DynamicCapacity((0.5, 4.0), target_drop_rate=0.9, window=3, hysteresis=0.0)


def test_a_run_takes_the_factors_and_a_resumed_one_the_same(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    compiled, compile_step = [], pretrain.compile_step

    def counted(trainer: Any, batch: Any, factor: float | None = None) -> Any:
        compiled.append(factor)
        return compile_step(trainer, batch, factor)

    monkeypatch.setattr(pretrain, "compile_step", counted)
    parts = {"checkpoint": {"every": 4}, "train": {"steps": 8, "log_every": 1}}
    assert pretrain.run(dynamic(LENIENT, **parts), tmp_path / "whole") == 0
    records = training_records(tmp_path / "whole")
    assert [r["capacity/factor"] for r in records] == [4.0] * 4 + [0.5] * 4
    assert compiled == [None, 0.5]  # the largest, as planned, and the one other
    assert "capacity factor 0.5: compiling a step for it" in capsys.readouterr().err
    drops = [r["router/group_1/drop_rate"] for r in records]
    assert drops[:4] == [0.0] * 4
    assert min(drops[4:]) > 0
    for r in records:
        assert r["router/group_1/drop_rate"] == r[f"capacity/drop_rate_at_{r['capacity/factor']}"]
        assert r["router/group_1/unaccounted"] == 0

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "8")  # as if killed while the last checkpoint was written
    parts["train"]["log_every"] = 3
    assert pretrain.run(dynamic(LENIENT, **parts), tmp_path / "cut", quiet=True) == 0
    assert compiled[2:] == [None, 0.5]
    assert state_hash(tmp_path / "cut", 8) == state_hash(tmp_path / "whole", 8)


def test_evaluation_drops_nothing() -> None:
    """The graph that a trainer gives to others is that of a model without capacities."""
    _, trainer = pretrain.build(dynamic(DynamicCapacity((0.01,))))
    model = nnx.merge(trainer.graph, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), trainer.shapes.variables))
    assert model.group_1.ffn.capacity_factor is None
    set_capacity(model)  # the control: what the trainer does with its own
    assert model.group_1.ffn.capacity_factor == 0.01


# ---------------------------------------------------------------- configs


def test_a_dynamic_capacity_goes_through_overrides_and_json() -> None:
    config = dynamic(DynamicCapacity())
    config = apply_overrides(config, ["model.groups.1.ffn.capacity.factors=1.0,3.0", "train.steps=3"])
    validate(config)
    assert config.model.dynamic_capacity() == DynamicCapacity((1.0, 3.0))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    fixed = apply_overrides(small_moe(), ["model.groups.1.ffn.capacity=1.25"])
    assert fixed.model.dynamic_capacity() is None
    assert fixed.model.experts()["group_1"].capacity == 1.25


def test_groups_with_two_controllers_are_one_sentence() -> None:
    config = dynamic(DynamicCapacity())
    dense, experts = config.model.groups
    other = dataclasses.replace(experts, ffn=dataclasses.replace(experts.ffn, capacity=LENIENT), num_layers=1)
    model = dataclasses.replace(config.model, num_layers=3, groups=(dense, experts, other))
    with pytest.raises(
        UserError, match=r"^groups differ in their dynamic ffn.capacity; one controller chooses for all"
    ):
        validate(model)
