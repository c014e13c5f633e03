"""The curriculum: shares add up and keep their floors, phases move by what is measured alone, states are exact."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError, from_dict, to_dict, validate
from dsjax.rl import curriculum
from dsjax.rl.arms import FOUNDATIONS, MULTI_STEP, OPEN_EXPLORATION, Arm, CurriculumConfig, PhaseConfig
from dsjax.rl.curriculum import Record, Score, begin, competence, from_plain, phase_of, sample, shares, to_plain, update

FIVE = tuple(Arm(family, level) for family in ("reverse", "sort") for level in range(1, 6))
DEFAULT = CurriculumConfig()


def score(arm: Arm, *correct: bool | float | None) -> Score:
    return Score(arm, tuple(None if x is None else float(x) for x in correct), correct)


def told(cfg: CurriculumConfig, state: Any, rate: dict[Arm, float] | float, steps: int, group: int = 20) -> Any:
    """The state behind steps in which each arm has one group, with this pass rate exactly."""
    for _ in range(steps):
        scores = []
        for arm in state.arms:
            right = round(group * (rate if isinstance(rate, float) else rate[arm]))
            scores.append(score(arm, *([True] * right + [False] * (group - right))))
        state = update(cfg, state, scores)
    return state


# ---------------------------------------------------------------- by hand


def test_a_record_by_hand() -> None:
    arms = (Arm("f", 1),)
    cfg = CurriculumConfig(phases=(PhaseConfig(),), fast=2.0, slow=4.0, observations=8)
    state = update(cfg, begin(cfg, arms), [score(arms[0], True, False, False, False), score(arms[0], True)])
    # The variance of 1 of 4 is 1 * 3 / (4 * 3); a group of one has none.
    assert state.records == (Record(5, 2, 5, 2, 5, 0.25, 1),)
    state = update(cfg, state, [score(arms[0], True, True, None, float("nan"), True)])
    assert state.records == (Record(8, 2 / 2 + 3, 5 / 2 + 3, 2 * 0.75 + 3, 5 * 0.75 + 3, 0.125, 1.5, 4.5 / 6.75),)
    (record,) = state.records
    assert record.progress == pytest.approx(4 / 5.5 - 4.5 / 6.75)
    assert record.pass_rate == 5 / 7.5
    assert record.liveness == 0.375 / 2.5
    assert record.forgotten == 0


def test_shares_by_hand() -> None:
    arms = tuple(Arm("f", level) for level in (1, 2, 3, 4))
    cfg = CurriculumConfig(
        phases=(PhaseConfig("a", levels_to=0.5), PhaseConfig("b", levels_from=0.5)), replay=0.4, floor=0.2, live=2.0
    )
    state = begin(cfg, arms)
    assert shares(cfg, state) == ((0.5, 0.5, 0, 0), (0, 0, 0, 0))
    records = (
        Record(100, 10, 40, 10, 40, 2, 7, best=0.45),  # 20 points below its best
        Record(100, 20, 40, 20, 40, 2, 7, best=0.5),
        Record(100, 20, 40, 20, 80, 2.75, 9),  # |1/2 - 1/4| and (2.75 + 1/4) / (9 + 1)
        Record(),  # 0 and 1/4
    )
    own, again = shares(cfg, dataclasses.replace(state, records=records, phase=1))
    useful = (0.25 + 2 * 0.3, 2 * 0.25)
    assert own == pytest.approx((0, 0, *(0.6 * (0.1 + 0.8 * u / sum(useful)) for u in useful)))
    assert again == pytest.approx((*(0.4 * (0.1 + 0.8 * r / 0.4) for r in (0.3, 0.1)), 0, 0))


def test_the_other_modes_have_one_phase_and_even_shares() -> None:
    wanted = {CurriculumConfig(mode="uniform"): [0.1] * 10, CurriculumConfig(mode="hardest"): [0, 0, 0, 0, 0.5] * 2}
    for cfg, want in wanted.items():
        state = told(cfg, begin(cfg, FIVE), {arm: arm.level / 5 for arm in FIVE}, 30)
        own, again = shares(cfg, state)
        assert (list(own), set(again), state.phase, state.phases) == (want, {0.0}, 0, (cfg.mode,))
        assert phase_of(cfg, state).novelty == phase_of(cfg, state).revisit == 0
        assert state.records[0].texts == 600  # what is measured is the same as of the curriculum


def test_a_dead_arm_keeps_its_floor_and_a_live_one_has_the_rest() -> None:
    cfg = CurriculumConfig(phases=(PhaseConfig(),))
    arms = FIVE[:4]
    state = told(cfg, begin(cfg, arms), dict(zip(arms, (0.0, 0.5, 1.0, 0.0), strict=True)), 40)
    own, _ = shares(cfg, state)
    # Of 5 groups that are remembered and one more at 1/4: 0.25 / 6, and (5 * 10 * 10 / (20 * 19) + 0.25) / 6.
    dead, live = 0.25 / 6, (5 * 100 / 380 + 0.25) / 6
    want = [0.05 + 0.8 * u / (3 * dead + live) for u in (dead, live, dead, dead)]
    assert own == pytest.approx(want, abs=1e-3)  # 0.8^40 of the groups are still missing
    assert want[0] < 0.14 < 0.59 < want[1]


def test_an_arm_whose_exercises_are_all_easy_or_all_impossible_is_dead_at_any_pass_rate() -> None:
    cfg, (one, two) = CurriculumConfig(phases=(PhaseConfig(),)), FIVE[:2]
    state = begin(cfg, (one, two))
    for _ in range(40):
        split = [score(one, *[True] * 8), score(one, *[False] * 8)]
        state = update(cfg, state, [*split, score(two, True, *[False] * 7), score(two, *[False] * 8)])
    own, _ = shares(cfg, state)
    assert state.records[0].pass_rate == pytest.approx(0.5)
    assert own[0] < own[1]


def test_groups_of_one_text_count_by_their_pass_rate() -> None:
    cfg, (one, two) = CurriculumConfig(phases=(PhaseConfig(),)), FIVE[:2]
    state = begin(cfg, (one, two))
    for step in range(40):
        state = update(cfg, state, [score(one, bool(step % 2)), score(two, True)])
    assert state.records[0].groups == state.records[1].groups == 0
    own, _ = shares(cfg, state)
    assert own[0] > 0.6


# ---------------------------------------------------------------- sampling


def test_of_each_arm_its_share_is_drawn_to_within_one() -> None:
    cfg = DEFAULT
    state = dataclasses.replace(told(cfg, begin(cfg, FIVE), {arm: 1 - arm.level / 6 for arm in FIVE}, 5), phase=1)
    own, again = shares(cfg, state)
    for key in range(50):
        choices = sample(cfg, state, (7, key), 64)
        found = Counter((choice.arm, choice.replayed) for choice in choices)
        for arm, first, second in zip(FIVE, own, again, strict=True):
            assert abs(found[arm, False] - 64 * first) < 1
            assert abs(found[arm, True] - 64 * second) < 1
        assert abs(sum(choice.replayed for choice in choices) - 64 * 0.3) < 1
        assert {choice.phase for choice in choices} == {1}


def test_few_prompts_are_drawn_without_bias_and_in_no_order() -> None:
    state = begin(DEFAULT, FIVE)
    found = Counter(choice.arm for key in range(300) for choice in sample(DEFAULT, state, key, 1))
    # 300 draws of 4 arms: a standard error of 7.5
    assert all(abs(found[FIVE[i]] - 75) < 30 for i in (0, 1, 5, 6))
    first = Counter(sample(DEFAULT, state, key, 8)[0].arm for key in range(300))
    assert all(abs(first[FIVE[i]] - 75) < 30 for i in (0, 1, 5, 6))


def test_the_same_state_and_key_give_the_same_choices_and_another_key_others() -> None:
    state = begin(DEFAULT, FIVE)
    random.seed(0)
    np.random.seed(0)  # what it must not depend on
    first = sample(DEFAULT, state, (3, 4), 16)
    random.seed(1)
    np.random.seed(1)
    assert sample(DEFAULT, state, (3, 4), 16) == first
    numbers = [choice.number for key in range(200) for choice in sample(DEFAULT, state, (3, key), 16)]
    assert len(set(numbers)) == len(numbers)  # no exercise twice
    assert max(numbers) < curriculum.NUMBERS
    assert sample(DEFAULT, state, 0, 0) == []


def test_the_choices_of_a_key_stay_what_they_are() -> None:
    """A run that goes on under another version of numpy or of this file would go on with other exercises."""
    found = sample(DEFAULT, begin(DEFAULT, FIVE), (1, 2), 3)
    assert [(str(choice.arm), choice.number) for choice in found] == PINNED


PINNED = [("reverse 1", 7403492735538667), ("sort 2", 8100389515644176), ("reverse 2", 4527200827320912)]


def test_exploration_asks_some_exercises_again() -> None:
    cfg = DEFAULT
    state = dataclasses.replace(begin(cfg, FIVE), phase=2)
    choices = [choice for key in range(60) for choice in sample(cfg, state, key, 32)]
    again = [choice for choice in choices if choice.number < phase_of(cfg, state).pool]
    own = sum(not choice.replayed for choice in choices)
    # 1,344 own prompts, half of them: a standard error of 18
    assert abs(len(again) - own / 2) < 80
    assert not any(choice.replayed for choice in again)
    assert 120 < len({(choice.arm, choice.number) for choice in again}) <= 10 * 16  # of about 670


# ---------------------------------------------------------------- phases


def test_it_goes_on_when_the_phase_is_mastered_for_long_enough_and_not_before() -> None:
    cfg, state = DEFAULT, begin(DEFAULT, FIVE)
    phases = [state := told(cfg, state, 0.9, 1, group=8) for _ in range(12)]
    # 32 texts of each arm are there behind the 4th step; 3 steps must say so; then the same for the next phase.
    assert [s.phase for s in phases] == [0] * 5 + [1] * 3 + [2] * 4
    assert told(cfg, state, 1.0, 200).phase == 2


def test_a_lucky_group_moves_nothing() -> None:
    cfg = dataclasses.replace(DEFAULT, observations=1, patience=1, confidence=1.0)
    arms = (Arm("f", 1), Arm("f", 2))
    state = update(cfg, begin(cfg, arms), [score(arms[0], True, True, True)])
    # 4/5 with a standard error of sqrt(0.16 / 5) = 0.18: not surely above 0.7
    found = competence(cfg, state, (0,))
    assert found is not None
    assert (found.mean, found.error) == pytest.approx((0.8, 0.17889), abs=1e-5)
    assert state.phase == 0
    assert update(dataclasses.replace(cfg, confidence=0.0), begin(cfg, arms), [score(arms[0], *[True] * 3)]).phase == 1


def test_an_arm_that_was_not_judged_holds_the_phase() -> None:
    state = begin(DEFAULT, FIVE)
    for _ in range(50):
        state = update(DEFAULT, state, [score(arm, *[True] * 8) for arm in FIVE if arm != FIVE[5]])
    assert state.phase == 0
    assert competence(DEFAULT, state, (0, 1, 5, 6)) is None


def test_patience_counts_new_evidence_on_the_phase_alone() -> None:
    state = told(DEFAULT, begin(DEFAULT, FIVE), 0.9, 4, group=8)
    assert (state.phase, state.above) == (0, 1)
    for _ in range(20):  # says nothing of foundations
        state = update(DEFAULT, state, [score(FIVE[4], *[True] * 8), score(FIVE[0], None, None)])
    assert (state.phase, state.above) == (0, 1)


def test_low_pass_rates_of_a_new_phase_do_not_throw_it_back_but_forgetting_does() -> None:
    easy = {arm: 1.0 if arm.level < 3 else 0.0 for arm in FIVE}
    state = told(DEFAULT, begin(DEFAULT, FIVE), easy, 30)
    assert state.phase == 1
    assert told(DEFAULT, state, easy, 300).phase == 1
    lost = told(DEFAULT, state, 0.0, 12)
    assert lost.phase == 0
    assert max(shares(DEFAULT, lost)[1]) == 0  # nothing is earlier than the first phase


def test_any_earlier_phase_that_is_forgotten_calls_back_one_phase_at_a_time() -> None:
    state = told(DEFAULT, begin(DEFAULT, FIVE), 1.0, 30)
    assert state.phase == 2
    phases = []
    for _ in range(30):
        state = told(DEFAULT, state, {arm: float(arm.level > 2) for arm in FIVE}, 1)
        phases.append(state.phase)
    assert [phase for phase, _ in itertools.groupby(phases)] == [2, 1, 0]


def in_second_phase() -> Any:
    """Foundations are mastered, and nothing is known of what comes then."""
    state = begin(DEFAULT, FIVE)
    while not state.phase:
        state = update(DEFAULT, state, [score(arm, *[True] * 20) for arm in FIVE if arm.level < 3])
    return state


def test_what_was_forgotten_comes_first_even_if_the_present_phase_is_mastered() -> None:
    state, phases = in_second_phase(), []
    for _ in range(8):
        state = told(DEFAULT, state, {arm: float(arm.level > 2) for arm in FIVE}, 1)
        phases.append((state.phase, state.above, state.below))
    # Behind 4 steps at 1 and n at 0 the rate is (59 * 0.8^n + 1) / (100 (1 - 0.8^(4 + n)) + 2): 0.51 and then 0.39.
    assert phases[:5] == [(1, 0, 0), (1, 1, 0), (1, 2, 1), (1, 3, 2), (0, 0, 0)]


def test_patience_with_forgetting_counts_new_evidence_on_what_was_forgotten_alone() -> None:
    state = told(DEFAULT, in_second_phase(), dict.fromkeys(FIVE, 0.0), 3)
    assert (state.phase, state.below) == (1, 1)
    for _ in range(20):  # says nothing of foundations
        state = update(DEFAULT, state, [score(FIVE[2], *[False] * 8)])
    assert (state.phase, state.below) == (1, 1)


def test_replay_goes_where_most_was_forgotten() -> None:
    state = told(DEFAULT, begin(DEFAULT, FIVE), {arm: 1.0 if arm.level < 3 else 0.2 for arm in FIVE}, 20)
    assert state.phase == 1
    state = told(DEFAULT, state, {arm: 1.0 if arm.level < 2 else 0.6 for arm in FIVE}, 3)
    _, again = shares(DEFAULT, state)
    assert again[1] > 2 * again[0] > 0
    assert again[2] == 0  # of the present phase


@pytest.mark.parametrize("group", [2, 8])
def test_noise_at_a_threshold_does_not_move_it_to_and_fro(group: int) -> None:
    """A true pass rate exactly at ``advance``, then exactly at ``retreat``; 16 prompts a step, by their shares."""
    arms = (Arm("f", 1), Arm("f", 2), Arm("g", 1), Arm("g", 2))
    cfg = CurriculumConfig(phases=(FOUNDATIONS, dataclasses.replace(MULTI_STEP, levels_to=1.0)))
    moves = []
    for seed in range(4):
        chance, state, phases = np.random.default_rng(seed), begin(cfg, arms), []
        for step in range(200):
            scores = [
                score(choice.arm, *(chance.random(group) < (0.7 if step < 100 else 0.5)).tolist())
                for choice in sample(cfg, state, (seed, step), 16)
            ]
            state = update(cfg, state, scores)
            phases.append(state.phase)
        moves.append(sum(a != b for a, b in itertools.pairwise([0, *phases])))
    assert max(moves) <= 2  # on, and perhaps back


# ---------------------------------------------------------------- any config, any history

arms_of = st.lists(st.builds(Arm, st.sampled_from("abc"), st.integers(1, 6)), min_size=1, max_size=8, unique=True).map(
    tuple
)
verdicts = st.lists(st.sampled_from([True, False, None, math.nan]), max_size=5).map(tuple)


@st.composite
def configs(draw: Any) -> CurriculumConfig:
    phases = []
    for number in range(draw(st.integers(1, 4))):
        low, high = sorted(draw(st.lists(st.integers(0, 10), min_size=2, max_size=2, unique=True)))
        thresholds = sorted(draw(st.lists(st.integers(0, 20), min_size=2, max_size=2, unique=True)))
        phases.append(
            PhaseConfig(
                f"phase {number}",
                levels_from=0.0 if number == 0 else low / 10,
                levels_to=high / 10,
                retreat=thresholds[0] / 20,
                advance=thresholds[1] / 20,
                revisit=draw(st.sampled_from([0.0, 0.5, 1.0])),
            )
        )
    cfg = CurriculumConfig(
        mode=draw(st.sampled_from(["curriculum", "curriculum", "uniform", "hardest"])),
        phases=tuple(phases),
        replay=draw(st.sampled_from([0.0, 0.3, 0.9])),
        floor=draw(st.sampled_from([0.01, 0.2, 1.0])),
        progress=draw(st.sampled_from([0.0, 1.0])),
        live=draw(st.sampled_from([0.0, 1.0])),
        fast=draw(st.sampled_from([1.0, 2.0, 5.0])),
        observations=draw(st.sampled_from([1, 8])),
        confidence=draw(st.sampled_from([0.0, 1.0])),
        patience=draw(st.sampled_from([1, 3])),
    )
    validate(cfg)
    return cfg


@given(st.data(), configs(), arms_of)
@settings(deadline=None, max_examples=60)
def test_whatever_happens(data: Any, cfg: CurriculumConfig, arms: tuple[Arm, ...]) -> None:
    """Of every state that arises: shares, floors, sampling, one phase at a time, exact through JSON."""
    state = begin(cfg, arms)
    for step in range(data.draw(st.integers(0, 12))):
        own, again = shares(cfg, state)
        assert math.fsum([*own, *again]) == pytest.approx(1, abs=1e-12)  # a dozen roundings
        members = cfg.phases_of(arms)[state.phase][1]
        replay = cfg.replay if math.fsum(again) > 0 else 0.0
        # less than the floor by a rounding at the most
        assert all(own[i] >= cfg.floor / len(members) * (1 - replay) - 1e-15 for i in members)
        assert all(own[i] == 0 for i in range(len(arms)) if i not in members)
        assert min(again) >= 0
        choices = sample(cfg, state, step, data.draw(st.integers(0, 9)))
        assert all((own, again)[choice.replayed][arms.index(choice.arm)] > 0 for choice in choices)
        scores = [Score(choice.arm, (), data.draw(verdicts)) for choice in choices]
        scores += [
            Score(arm, (), data.draw(verdicts)) for arm in data.draw(st.lists(st.sampled_from(arms), max_size=4))
        ]
        new = update(cfg, state, scores)
        assert update(cfg, state, data.draw(st.permutations(scores))) == new
        assert abs(new.phase - state.phase) <= 1
        assert 0 <= new.phase < len(new.phases)
        if not any(s.verdicts for s in scores):
            assert new is state
        plain = to_plain(new)
        assert from_plain(cfg, arms, json.loads(json.dumps(plain))) == new
        assert json.loads(json.dumps(plain)) == json.loads(json.dumps(to_plain(from_plain(cfg, arms, plain))))
        state = new


def test_a_run_that_was_saved_goes_on_as_one_that_was_not() -> None:
    arms = FIVE

    def steps(state: Any, first: int, last: int) -> Any:
        for step in range(first, last):
            chance = np.random.default_rng(step)
            choices = sample(DEFAULT, state, (0, step), 8)
            state = update(DEFAULT, state, [score(c.arm, *(chance.random(4) < 0.8).tolist()) for c in choices])
        return state

    whole = steps(begin(DEFAULT, arms), 0, 60)
    cut = json.loads(json.dumps(to_plain(steps(begin(DEFAULT, arms), 0, 23))))
    assert steps(from_plain(DEFAULT, arms, cut), 23, 60) == whole
    assert whole.phase > 0


# ---------------------------------------------------------------- what the user may get wrong


@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_any_phase_can_be_left_out(gone: tuple[int, ...]) -> None:
    phases = tuple(phase for i, phase in enumerate(DEFAULT.phases) if i not in gone)
    cfg = dataclasses.replace(DEFAULT, phases=phases)
    validate(cfg)
    assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg
    state = told(cfg, begin(cfg, FIVE), 1.0, 60)
    assert state.phase == len(phases) - 1
    assert {choice.arm for choice in sample(cfg, state, 0, 100)} <= set(FIVE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": []}, "the config reverse 1"),
        (
            {"phases": ["foundations"]},
            "the saved curriculum has the phases foundations, the config foundations, multi-",
        ),
        ({"phase": 3}, "a run keeps its phases"),
        ({"phase": -1}, "phase is -1; it must be an integer >= 0"),
        ({"records": None}, "can not be read"),
        ({"more": 1}, "can not be read"),
    ],
)
def test_a_saved_state_of_something_else_is_one_sentence(change: dict[str, Any], words: str) -> None:
    plain = to_plain(begin(DEFAULT, FIVE)) | change
    with pytest.raises(UserError) as error:
        from_plain(DEFAULT, FIVE, plain)
    assert words in str(error.value)


@pytest.mark.parametrize("plain", [None, [], 3, {}, {"arms": 3, "records": [], "phases": []}])
def test_what_is_no_state_is_one_sentence(plain: Any) -> None:
    with pytest.raises(UserError, match="the saved curriculum can not be read"):
        from_plain(DEFAULT, FIVE, plain)


@pytest.mark.parametrize("value", [math.nan, -1.0, 1e9])
def test_a_record_that_can_not_be_is_refused(value: float) -> None:
    plain = json.loads(json.dumps(to_plain(begin(DEFAULT, FIVE))))
    plain["records"][3]["fast_correct"] = value
    with pytest.raises(UserError, match=r"can not be read: records\.3"):
        from_plain(DEFAULT, FIVE, plain)


def test_a_score_of_another_arm_is_an_error() -> None:
    with pytest.raises(ValueError, match="a score is of sort 77; the curriculum has reverse 1"):
        update(DEFAULT, begin(DEFAULT, FIVE), [score(Arm("sort", 77), True)])


def test_exploration_is_what_rewards_novelty() -> None:
    assert phase_of(DEFAULT, dataclasses.replace(begin(DEFAULT, FIVE), phase=2)) == OPEN_EXPLORATION
