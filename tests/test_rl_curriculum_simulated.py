"""The curriculum on models of a learner: where it must win, and where it must not; and the picture of a course."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from learners import Apart, Chain, Ladder, final, trained
from matplotlib.image import imread

from dsjax.config import UserError
from dsjax.metrics import MetricsLog, read_metrics
from dsjax.rl.arms import Arm, CurriculumConfig
from dsjax.rl.course_report import APART, _apart, metrics, plot_course
from dsjax.rl.curriculum import Choice, Score, begin, sample, shares, update

CURRICULUM = CurriculumConfig()
UNIFORM, HARDEST = CurriculumConfig(mode="uniform"), CurriculumConfig(mode="hardest")
SEEDS = range(6)


# ---------------------------------------------------------------- learners


def test_it_wins_where_levels_can_be_learned_only_once_easier_ones_are() -> None:
    """Uniform mixing spends most prompts on dead groups; the same prompts for all, six paired seeds."""
    found = {cfg.mode: final(lambda: Ladder(8, 0.2), cfg, SEEDS, steps=80) for cfg in (CURRICULUM, UNIFORM, HARDEST)}
    gained = found["curriculum"].mean(axis=1) - found["uniform"].mean(axis=1)
    # Seen: +0.21 to +0.31. At the fifth level 0.83 against 0.22.
    assert min(gained) > 0.15
    assert found["curriculum"][:, 4].mean() > 0.6 > 0.4 > found["uniform"][:, 4].mean()
    assert found["hardest"].max() < 0.25  # 0.2^8: no group was ever alive


def test_it_does_not_win_where_levels_have_nothing_to_do_with_each_other() -> None:
    """By symmetry an even mixture is the best there is. Seen: 0.84 against 0.93, then 0.975 against 0.976."""
    for steps, least, most in ((60, -0.15, -0.05), (120, -0.02, 0.01)):
        found = {cfg.mode: final(lambda: Apart(6, 0.15), cfg, SEEDS, steps=steps) for cfg in (CURRICULUM, UNIFORM)}
        gained = found["curriculum"].mean() - found["uniform"].mean()
        assert least < gained < most


def test_it_does_not_win_where_hard_levels_teach_easy_ones_and_are_alive() -> None:
    """Seen: 0.90 against 0.94."""
    found = {cfg.mode: final(Chain, cfg, SEEDS, steps=40).mean() for cfg in (CURRICULUM, UNIFORM)}
    assert -0.1 < found["curriculum"] - found["uniform"] < 0


def test_replay_keeps_what_would_be_forgotten() -> None:
    """Seen: 0.75 with it, 0.16 without: a ladder whose lowest step is gone leads nowhere."""

    def learner() -> Ladder:
        return Ladder(6, 0.3, fading=0.02)

    with_replay = final(learner, CURRICULUM, SEEDS, steps=100).mean()
    without = final(learner, dataclasses.replace(CURRICULUM, replay=0.0), SEEDS, steps=100).mean()
    assert with_replay > 0.6 > 0.3 > without


def test_phases_follow_the_learner_and_not_the_steps() -> None:
    moves = {}
    for rate in (0.001, 0.02, 0.1):
        _, states = trained(Ladder(5, 0.3, rate), CURRICULUM, steps=120)
        phases = [state.phase for state in states]
        assert phases == sorted(phases)
        moves[rate] = phases.count(0)
    assert moves[0.001] == 120 > moves[0.02] > moves[0.1]


# ---------------------------------------------------------------- metrics

ARMS = (Arm("a", 1), Arm("a", 2), Arm("b/c", 1))


def test_metrics_by_hand() -> None:
    cfg = dataclasses.replace(CURRICULUM, observations=4)
    state, score = begin(cfg, ARMS), Score
    scores = [
        score(ARMS[0], (1.0, 0.0, None), (True, False, None)),
        score(ARMS[0], (0.5, 0.5, math.nan), (False, False, None)),
        score(ARMS[2], (1.0,), (True,)),
        score(ARMS[2], (None, None), (None, None)),
    ]
    choices = [
        Choice(ARMS[0], 0, 0),
        Choice(ARMS[0], 1, 0),
        Choice(ARMS[2], 2, 0, replayed=True),
        Choice(ARMS[2], 3, 0),
    ]
    found = metrics(cfg, update(cfg, state, scores), choices, scores)
    own, _ = shares(cfg, update(cfg, state, scores))
    assert found == {
        "curriculum/phase": 0,
        "curriculum/share_replayed": 0.25,
        "curriculum/weight/a/1": own[0],
        "curriculum/weight/a/2": 0.0,
        "curriculum/weight/b/c/1": own[2],
        "curriculum/accuracy/a/1": 0.25,
        "curriculum/accuracy/b/c/1": 1.0,
        "rl/unknown": pytest.approx(4 / 9),
        "rl/reward": 0.6,
        "rl/correct": 0.4,
        "rl/dead_groups": 0.5,  # a group of one and one without a reward are none
    }
    assert set(metrics(cfg, state, [], [])) == {"curriculum/phase"} | {
        f"curriculum/weight/{arm.family}/{arm.level}" for arm in ARMS
    }


def test_competence_is_told_when_there_is_a_verdict() -> None:
    cfg = dataclasses.replace(CURRICULUM, observations=2)
    scores = [Score(arm, (1.0, 1.0), (True, True)) for arm in ARMS]
    assert metrics(cfg, update(cfg, begin(cfg, ARMS), scores), [], scores)["curriculum/competence"] == 0.75


# ---------------------------------------------------------------- picture


def course(families: int = 2, levels: int = 5, steps: int = 40) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    learners = {f"family {i}": Ladder(levels, 0.3 + 0.1 * i, 0.1) for i in range(families)}
    state = begin(CURRICULUM, [Arm(name, arm.level) for name, one in learners.items() for arm in one.arms])
    records, chance = [], np.random.default_rng(0)
    for step in range(steps):
        choices = sample(CURRICULUM, state, step, 16)
        groups = [learners[arm.family].practise(Arm("chain", arm.level), chance) for arm, *_ in choices]
        scores = [Score(c.arm, tuple(map(float, group)), group) for c, group in zip(choices, groups, strict=True)]
        records.append({"step": step + 1} | metrics(CURRICULUM, state, choices, scores))
        state = update(CURRICULUM, state, scores)
    return records, state.phases


def test_the_picture_is_drawn_in_grey(tmp_path: pathlib.Path) -> None:
    records, phases = course()
    plot_course(records, tmp_path / "course.png", phases=phases)
    picture = imread(tmp_path / "course.png")
    assert picture.shape[0] == 120 * 1.8 * 3
    assert np.array_equal(picture[..., 0], picture[..., 1])
    assert np.array_equal(picture[..., 0], picture[..., 2])
    assert 0.01 < (picture[..., 0] < 0.5).mean() < 0.2  # there is something on it


def test_the_picture_shows_what_there_is(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels and points of every panel, read from the figure."""
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: figures.append(self))
    records, phases = course(families=2, levels=4, steps=60)
    plot_course(records, tmp_path / "course.png", phases=phases)
    (figure,) = figures
    assert len(figure.axes) == 6
    phase, _, _, accuracy, *_ = figure.axes
    assert [label.get_text() for label in phase.get_yticklabels()] == ["foundations", "multi-step", "open exploration"]
    assert {text.get_text() for text in accuracy.texts} == {"level 1", "level 2", "level 3", "level 4"}
    lines = [line for line in accuracy.get_lines() if len(line.get_xdata()) > 2]
    (first,) = [line for line in lines if line.get_xdata()[0] == 2 and line.get_linestyle() == "-"]
    want = [r["curriculum/accuracy/family 0/1"] for r in records if "curriculum/accuracy/family 0/1" in r]
    assert list(first.get_ydata()) == want
    for axes in figure.axes:
        heights = sorted(text.get_position()[1] for text in axes.texts)
        assert all(b - a > APART - 1e-9 for a, b in itertools.pairwise(heights))
        assert axes.get_legend() is None


def test_what_is_written_to_metrics_is_what_is_drawn(tmp_path: pathlib.Path) -> None:
    records, phases = course(steps=12)
    log = MetricsLog(tmp_path)
    for record in records:
        values = {name: value for name, value in record.items() if name != "step"}
        log.write(record["step"], values | {"loss": math.nan, "tokens_seen": 0, "seconds": 0.0})
    log.close()
    plot_course(read_metrics(log.path), tmp_path / "read.png", phases=phases)
    plot_course(records, tmp_path / "told.png", phases=phases)
    assert (tmp_path / "read.png").read_bytes() == (tmp_path / "told.png").read_bytes()


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 1, "curriculum/phase": 0}],
        [{"step": 1, "curriculum/phase": 2.0, "curriculum/weight/a/b/10": 1.0, "curriculum/accuracy/a/b/10": None}],
        [{"step": i, "curriculum/phase": 0, **{f"curriculum/weight/{f}/1": 0.0 for f in range(4)}} for i in (1, 2)],
        [{"step": i, "curriculum/phase": i % 2, "curriculum/weight/f/1": math.nan} for i in range(5)],
        [{"step": 1, "curriculum/phase": 0, **{f"curriculum/weight/f/{level}": 0.1 for level in range(1, 21)}}],
    ],
    ids=["nothing but a phase", "slash", "many families", "no number", "many levels"],
)
def test_odd_records_are_drawn_too(
    records: list[dict[str, Any]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsjax.rl.course_report.MOST_FAMILIES", 2)
    plot_course(records, tmp_path / "course.png")
    assert imread(tmp_path / "course.png").size > 0


def test_of_a_run_without_a_curriculum_nothing_is_drawn(tmp_path: pathlib.Path) -> None:
    plot_course([{"step": 1, "loss": 2.0}], tmp_path / "course.png")
    plot_course([], tmp_path / "course.png")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_is_one_sentence(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "no" / "course.png"))):
        plot_course(course(steps=2)[0], tmp_path / "no" / "course.png")


@given(st.lists(st.floats(0, 1), max_size=12).map(sorted))
def test_labels_are_apart_and_as_near_as_can_be(heights: list[float]) -> None:
    found = _apart(heights)
    apart = min(APART, 1 / max(len(heights) - 1, 1))
    # a dozen roundings
    assert all(b - a >= apart - 1e-12 for a, b in itertools.pairwise(found))
    assert all(-1e-12 <= x <= 1 for x in found)
    if all(b - a >= apart for a, b in itertools.pairwise(heights)):
        assert found == pytest.approx(heights, abs=1e-12)
