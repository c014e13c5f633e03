"""The alarm: it goes off for a router that collapsed, within 100 steps, and for no healthy one."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed_runs import job, random_batch, routed_by
from small_runs import changed, small, small_moe, training_records

from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.routing_losses import EntropyConstraint
from dsjax.train import alarms, loop, pretrain
from dsjax.train.alarms import CollapseAlarm, spread

EXPERTS = {"group_0": (8, 2)}


def metrics(entropy: float, name: str = "group_0", dead: float = 0.5) -> dict[str, float]:
    return {f"router/{name}/min_load_entropy": entropy, f"router/{name}/dead_experts": dead}


def steps_to_alarm(entropies: list[float], state: dict[str, Any] | None = None) -> tuple[int | None, list[str]]:
    alarm, said, first = CollapseAlarm(EXPERTS, {} if state is None else state), [], None
    for step, entropy in enumerate(entropies, 1):
        said += alarm.observe(metrics(entropy))
        first = step if said and first is None else first
    return first, said


@pytest.mark.parametrize(("entropy", "want"), [(np.log(2), 0), (np.log(8), 1), (np.log(4), 0.5), (0.0, -0.5)])
def test_the_spread_by_hand(entropy: float, want: float) -> None:
    assert spread(entropy, 8, 2) == pytest.approx(want)


def test_the_sentence_and_when_it_comes() -> None:
    first, said = steps_to_alarm([np.log(8)] * 500 + [np.log(2)] * 100)
    # 0.98^46 is the first power below the threshold.
    assert first == 546
    assert said == [
        "warning: the router of group_0 has collapsed: the tokens of one layer go to about 2.0 of 8 experts, 2 each;"
        " 50% of the group's experts got no token (docs/routing.md says what helps)"
    ]


def test_it_is_silent_for_dips_and_says_once_what_lasts_and_when_it_ends() -> None:
    good, bad = np.log(7), np.log(2)
    assert steps_to_alarm(([good] * 60 + [bad] * 20) * 9) == (None, [])
    _, said = steps_to_alarm([bad] * 300 + [good] * 300 + [bad] * 300)
    assert [text.split(" has ")[1][:9] for text in said] == ["collapsed", "recovered", "collapsed"]


def test_its_state_is_plain_data_and_goes_on() -> None:
    entropies = list(np.log(8) - np.arange(120) / 60)
    whole: dict[str, Any] = {}
    _, said = steps_to_alarm(entropies, whole)
    cut: dict[str, Any] = {}
    first = steps_to_alarm(entropies[:50], cut)[1]
    cut = json.loads(json.dumps(cut))
    assert first + steps_to_alarm(entropies[50:], cut)[1] == said
    assert len(said) == 1
    assert cut == whole


def test_groups_are_apart_and_what_can_not_collapse_is_left_out() -> None:
    alarm = CollapseAlarm({"group_0": (8, 2), "group_1": (4, 4), "group_2": (8, 2)}, {})
    said = []
    for _ in range(100):
        said += alarm.observe(metrics(np.log(8)) | metrics(np.log(4), "group_1") | metrics(np.log(2), "group_2"))
        assert alarm.observe({"loss": 1.0}) == []  # another loss function
    assert len(said) == 1
    assert "group_2" in said[0]


def test_modules_and_a_critic_are_followed_under_the_names_that_are_logged() -> None:
    config = changed(small_moe(), model={"multi_token": MultiTokenConfig(), "values": "decoder"})
    followed = pretrain.routed(config.model)
    assert list(followed) == ["group_1", "multi_token", "critic/group_1"]
    mesh, trainer = pretrain.build(config, jax.devices()[:1])
    logged = jax.eval_shape(trainer.step, trainer.shapes, config.step_batch(mesh), jnp.int32(8))[1]
    assert {f"router/{name}/min_load_entropy" for name in ("group_1", "multi_token")} <= logged.keys()
    assert list(pretrain.routed(small().model)) == []


# ---------------------------------------------------------------- small training runs

HEALTHY = {
    "switch": {},
    "entropy": {"balance_coef": 0.0, "entropy": EntropyConstraint()},
    "deepseek_v3": {"balance_coef": 0.0, "scoring": "sigmoid", "sequence_coef": 1e-4, "bias_update_rate": 0.01},
    "bias": {"balance_coef": 0.0, "bias_update_rate": 0.01},
    "sequence": {"balance_coef": 0.0, "sequence_coef": 0.01},
}
LONG = ("bias", "sequence")  # alike, and each compiles a step of its own
KINDS = [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in HEALTHY]


def followed(kind: dict[str, Any], seed: int, steps: int, planted_at: int | None = None) -> tuple[list[str], list]:
    """What the alarm says of a run of two layers with a shared expert, after which steps, and the losses."""
    place, trainer = job(routed_by(num_shared_experts=1, **kind))
    alarm, state, said, losses = CollapseAlarm(EXPERTS, {}), trainer.init(np.uint32(seed)), [], []
    for i in range(steps):
        if i == planted_at:
            state = collapsed(state)
        state, found = trainer.step(state, place(random_batch(1000 * seed + i)), jnp.int32(1000))
        said += [f"{i}: {sentence}" for sentence in alarm.observe(found)]
        losses.append(float(found["loss"]))
    return said, losses


def collapsed(state: Any) -> Any:
    """Sends all tokens of the second layer to experts 0 and 1; the bias moves too slowly to mend it."""
    buffers = jax.tree.map(jnp.copy, state.buffers)
    bias = buffers["group_0"]["ffn"]["selection_bias"]
    buffers["group_0"]["ffn"]["selection_bias"] = bias.at[1, :2].set(9.0)
    return dataclasses.replace(state, buffers=buffers)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_silent_in_healthy_runs(name: str) -> None:
    for seed in range(4):
        assert followed(HEALTHY[name], seed, 150)[0] == []


@pytest.mark.parametrize("name", [pytest.param("bias", marks=pytest.mark.slow), "deepseek_v3"])
def test_a_planted_collapse_is_told_within_100_steps_though_the_loss_falls(name: str) -> None:
    for seed in range(3):
        said, losses = followed(HEALTHY[name], seed, 160, planted_at=60)
        assert len(said) == 1
        assert 60 < int(said[0].split(":")[0]) < 160
        assert losses[-1] < losses[59]  # as if nothing were wrong


@pytest.mark.slow
def test_a_router_that_nothing_balances_is_told_of_when_it_collapses() -> None:
    """Not planted: of two seeds without any balancing, one keeps about three of eight experts."""
    kept = {seed: bool(followed({"balance_coef": 0.0}, seed, 200)[0]) for seed in range(2)}
    assert kept[1]


def test_a_run_says_it_in_its_log_and_keeps_it_over_a_resumption(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(alarms, "MEMORY", 0.5)  # a run of few steps
    monkeypatch.setattr(loop.CollapseAlarm, "observe", always_collapsed(loop.CollapseAlarm.observe))
    for steps in (4, 8):
        config = changed(small_moe(), train={"steps": steps, "log_every": 1}, checkpoint={"every": 4})
        assert pretrain.run(config, tmp_path / "run") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "collapsed" in line]
    assert len(said) == 1  # in the first part, not again in the second
    assert said[0].startswith("step 2: warning: the router of group_1 has collapsed")
    assert [r["router/group_1/collapsed"] for r in training_records(tmp_path / "run")] == [0.0] + [1.0] * 7


def always_collapsed(observe: Any) -> Any:
    return lambda self, found: observe(self, {**found, "router/group_1/min_load_entropy": np.log(2)})
