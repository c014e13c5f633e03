"""Alarms of reinforcement learning: each goes off for what is planted, in time, and none for a healthy run."""

from __future__ import annotations

import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rl_traces import healthy, planted

from dsjax.config import UserError, apply_overrides, validate
from dsjax.rl.health import MOST, Health, HealthConfig

DEFAULT = HealthConfig()
AT = 120
# What is planted: the alarm that it is for, and the steps within which that goes off. The bounds are those of
# docs/rl_health.md; they were read off 20 seeds of each and rounded up.
PLANTED = {
    "entropy collapses": ("entropy is", 25),
    "entropy is gone": ("entropy is", 15),
    "texts grow": ("texts have", 60),
    "texts shrink": ("texts have", 25),
    "form for substance": ("the format reward is", 30),
    "reward without correctness": ("the reward went", 30),
    "KL jumps": ("KL to the reference", 8),
    "KL is infinite": ("KL to the reference", 3),
    "KL grows": ("KL to the reference", 40),
    "updates too far": ("KL from the policy that wrote", 5),
    "groups die": ("of the groups have equal rewards", 20),
    "nothing is judged": ("of the rewards are unknown", 3),
    "half is judged": ("of the rewards are unknown", 3),
    "engines disagree": ("log-probabilities of engine and trainer", 5),
}


def followed(trace: list[dict[str, Any]], state: dict[str, Any] | None = None) -> list[tuple[int, str]]:
    """What is said of a trace, and behind how many steps."""
    health = Health(DEFAULT, {} if state is None else state)
    return [(step, sentence) for step, values in enumerate(trace, 1) for sentence in health.observe(values)]


def constant(steps: int, **values: Any) -> list[dict[str, Any]]:
    return [{f"rl/{name}": value for name, value in values.items()}] * steps


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_raises_its_alarm_in_time(what: str) -> None:
    words, within = PLANTED[what]
    for seed in range(5):
        trace = healthy(seed, AT + within, phases=False)
        said = followed([planted(what, values, i, AT) for i, values in enumerate(trace)])
        assert all(step > AT for step, _ in said)
        assert [sentence for _, sentence in said if words in sentence and sentence.startswith("warning: ")], said


@pytest.mark.slow
@pytest.mark.parametrize("what", PLANTED)
def test_what_is_planted_raises_its_alarm_in_time_for_many_seeds(what: str) -> None:
    words, within = PLANTED[what]
    for seed in range(5, 25):
        trace = healthy(seed, AT + within, phases=False)
        said = followed([planted(what, values, i, AT) for i, values in enumerate(trace)])
        assert any(words in sentence for _, sentence in said), seed


def test_a_healthy_run_raises_none() -> None:
    for seed in range(20):
        assert followed(healthy(seed, 240, phases=bool(seed % 2))) == []


@pytest.mark.slow
def test_two_hundred_healthy_runs_raise_none() -> None:
    """0 of 200 seeds of 600 steps: less than 1.5 % of such runs have a false alarm, at 95 %."""
    assert [seed for seed in range(200) if followed(healthy(seed, 600, phases=bool(seed % 2)))] == []


def test_the_sentences() -> None:
    """The running mean of a constant x behind n steps is x (1 - 0.9^n) from 0."""
    said = followed(constant(30, kl=2.0, dead_groups=1.0, unknown=0.0))
    assert said == [
        (
            7,  # 1 - 0.9^7 = 0.52
            "warning: KL to the reference is 1.04 nats a token, the limit 1: the policy is far from what training began"
            " with; a lower optim.lr or more weight on KL helps (docs/rl_health.md)",
        ),
        (
            16,  # 1 - 0.9^16 = 0.81
            "warning: 81% of the groups have equal rewards, the limit is 80%: they teach nothing; other levels, more"
            " samples of a prompt or dynamic sampling help (docs/rl_health.md)",
        ),
    ]


def test_entropy_is_held_against_its_beginning_or_a_floor() -> None:
    fallen = constant(20, entropy=1.0) + constant(100, entropy=0.0)
    ((step, sentence),) = followed(fallen)
    # Weights of 20 steps add up to 10 (1 - 0.9^20): n zeros later the mean is 0.9^n (1 - 0.9^20) / (1 - 0.9^(20 + n)),
    # 0.257 for n = 12 and 0.230 for n = 13.
    assert step == 20 + 13
    assert sentence.startswith("warning: entropy is 0.2")
    assert "at the beginning it was 1:" in sentence
    assert followed(constant(20, entropy=1.0) + constant(300, entropy=0.3)) == []
    ((step, sentence),) = followed(constant(40, entropy=0.015))  # from the beginning
    assert (step, sentence[:26]) == (20, "warning: entropy is 0.015 ")


def test_it_is_said_once_and_once_more_when_it_is_over() -> None:
    trace = constant(200, kl=2.0) + constant(100, kl=0.1) + constant(100, kl=3.0)
    assert [sentence.split(":")[0] for _, sentence in followed(trace)] == ["warning", "over again", "warning"]
    to_and_fro = constant(100, kl=1.1) + (constant(3, kl=0.9) + constant(3, kl=1.1)) * 50
    assert len(followed(to_and_fro)) == 1


@pytest.mark.parametrize("name", ["kl", "kl_old", "dead_groups", "unknown", "log_prob_gap"])
def test_one_outlier_is_no_alarm_and_counts_so_much_at_the_most(name: str) -> None:
    limit = getattr(DEFAULT, name)
    trace = constant(50, **{name: 0.1 * limit})
    assert followed([*trace, *constant(1, **{name: math.inf}), *trace]) == []
    # In limits: 0.1 * 0.9 + 5 * 0.1 = 0.59, and 0.1 * 0.81 + 5 * 0.19 = 1.03 behind the second.
    assert followed([*trace, *constant(9, **{name: 1e30})])[0][0] == 52
    state: dict[str, Any] = {}
    followed(constant(200, **{name: math.inf}), state)
    assert state["levels"][name] == pytest.approx(MOST * limit)


def test_length_may_change_while_correctness_rises() -> None:
    rising = [{"rl/length": 20 * 1.01**i, "rl/correct": 0.1 + 0.8 * i / 200} for i in range(200)]
    assert followed(rising) == []
    still = [values | {"rl/correct": 0.5} for values in rising]
    ((step, sentence),) = followed(still)
    assert "texts have" in sentence
    assert 20 < step < 100
    assert "it is 50.0%" in sentence


def test_noise_is_no_change_of_length_and_no_rise_of_correctness() -> None:
    wrong = 0
    for seed in range(10):
        chance = np.random.default_rng(seed)
        noisy = [{"rl/length": 20 * math.exp(0.7 * x), "rl/correct": 0.5} for x in chance.normal(size=150)]
        wrong += bool(followed(noisy))
        # Texts grow by 1 % a step while a few texts a step say of correctness anything between 0 and 1.
        coins = chance.integers(0, 5, 80) / 4
        said = followed([{"rl/length": 20 * 1.01**i, "rl/correct": float(x)} for i, x in enumerate(coins)])
        assert [sentence[:19] for _, sentence in said] == ["warning: texts have"]
    # Lengths differ by a factor of 2.7 from step to step. If errors did not count, 9 of the 10 would raise an alarm.
    assert wrong <= 1


def test_what_falls_with_its_format_is_no_format_hacking() -> None:
    start = constant(40, correct=0.6, format=0.8, reward=0.6)
    assert followed(start + constant(60, correct=0.3, format=0.7, reward=0.3)) == []
    said = followed(start + constant(60, correct=0.3, format=0.95, reward=0.3))
    assert [sentence[:32] for _, sentence in said] == ["warning: the format reward is 0."]


def test_a_new_phase_is_a_new_beginning() -> None:
    def phase(number: int, steps: int, **values: float) -> list[dict[str, float]]:
        place = {"curriculum/phase": float(number), "curriculum/competence": values["correct"]}
        return [row | place for row in constant(steps, **values)]

    easy, hard = {"correct": 0.9, "format": 0.95, "length": 10.0}, {"correct": 0.2, "format": 0.95, "length": 40.0}
    assert len(followed(phase(0, 60, **easy) + phase(0, 60, **hard))) == 2  # length, format
    assert followed(phase(0, 60, **easy) + phase(1, 60, **hard)) == []
    # and what is wrong in the new phase is found there
    worse = {"correct": 0.2, "format": 0.95, "length": 90.0}
    assert len(followed(phase(0, 60, **easy) + phase(1, 60, **hard) + phase(1, 60, **worse))) == 1


def test_harder_exercises_asked_more_often_are_no_fall_of_correctness() -> None:
    def mixed(i: int) -> dict[str, float]:
        easy = 0.5 - 0.4 * min(i / 100, 1)  # share of the prompts
        return {
            "rl/correct": easy * 0.95 + (1 - easy) * 0.1,
            "rl/format": 0.97,
            "curriculum/phase": 0.0,
            "curriculum/competence": 0.525,
        }

    trace = [mixed(i) for i in range(200)]
    assert followed(trace) == []
    texts = [{name: x for name, x in values.items() if name.startswith("rl/")} for values in trace]
    assert "the format reward is 0.97" in followed(texts)[0][1]
    forgotten = [values | {"curriculum/competence": 0.525 - 0.3 * min(i / 100, 1)} for i, values in enumerate(trace)]
    assert "the format reward is 0.97" in followed(forgotten)[0][1]


def test_what_is_missing_or_no_number_is_left_out() -> None:
    trace = [dict(values) for values in healthy(0, 160, phases=False)]
    holes = []
    for i, values in enumerate(trace):
        bad = {name: [None, math.nan, jnp.float32(value), np.float32(value)][i % 4] for name, value in values.items()}
        holes += [values, {}, {"loss": 1.0}, {name: bad[name] for name in bad if i % 4 < 2}]
    assert followed(holes) == followed(trace) == []
    states: list[dict[str, Any]] = [{}, {}]
    followed(holes, states[0])
    followed(trace, states[1])
    assert states[0] == states[1]
    assert followed([{"rl/entropy": -math.inf, "rl/length": math.inf, "rl/correct": math.inf}] * 60) == []


def test_its_state_is_plain_data_and_goes_on_exactly() -> None:
    trace = [planted("form for substance", values, i, 120) for i, values in enumerate(healthy(3, 200, phases=False))]
    whole: dict[str, Any] = {}
    said = followed(trace, whole)
    assert len(said) > 0
    for cut in (1, 19, 50, 121, 150):
        state: dict[str, Any] = {}
        first = followed(trace[:cut], state)
        state = json.loads(json.dumps(state, allow_nan=False))
        second = [(step + cut, sentence) for step, sentence in followed(trace[cut:], state)]
        assert first + second == said
        assert state == whole


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"correct": 0.0, "format": 1.0, "length": 0.0, "reward": 0.0}, []),
        ({"entropy": 0.0}, ["entropy is 0 nats a token"]),
        ({"kl": -5.0, "kl_old": -1e30}, []),
        ({"correct": 1e300, "length": 1e-300, "reward": -1e308}, []),
    ],
)
def test_extremes_are_no_errors(values: dict[str, float], words: list[str]) -> None:
    state: dict[str, Any] = {}
    said = [sentence for _, sentence in followed(constant(80, **values), state)]
    followed(constant(3, **{name: -x for name, x in values.items()}), state)  # jumps
    json.dumps(state, allow_nan=False)
    assert len(said) == len(words)
    assert all(word in sentence for word, sentence in zip(words, said, strict=True))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("memory=1", "memory is 1.0; it must be a number >= 2"),
        ("length=1", "length is 1.0; it must be a number > 1"),
        ("unknown=0", "unknown is 0.0; it must be a number > 0 and <= 1"),
        ("kl=nan", "kl is 'nan'; it must be a number"),
        ("kll=1", "did you mean kl?"),
    ],
)
def test_a_wrong_config_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        validate(apply_overrides(DEFAULT, [override]))
    assert words in str(error.value)
