"""Arms and phases: which levels belong where, and what a config may not say."""

from __future__ import annotations

import pytest

from dsjax.config import UserError, apply_overrides, validate
from dsjax.rl.arms import MULTI_STEP, Arm, CurriculumConfig, PhaseConfig
from dsjax.rl.curriculum import begin

FIVE = tuple(Arm(family, level) for family in ("reverse", "sort") for level in range(1, 6))
DEFAULT = CurriculumConfig()


def test_the_default_phases_are_bands_of_levels() -> None:
    found = [(phase.name, members) for phase, members in DEFAULT.phases_of(FIVE)]
    # of five levels those with 0, .2 | .4, .6 | ... of the others below them
    assert found == [
        ("foundations", (0, 1, 5, 6)),
        ("multi-step", (2, 3, 7, 8)),
        ("open exploration", tuple(range(10))),
    ]
    assert [phase.novelty > 0 for phase in DEFAULT.phases] == [False, False, True]


@pytest.mark.parametrize(
    ("levels", "want"),
    [
        ((1,), [[1], [1]]),
        ((3, 7), [[3], [7], [3, 7]]),
        ((1, 2, 3), [[1, 2], [3], [1, 2, 3]]),
        ((4, 2), [[2], [4], [4, 2]]),
    ],
)
def test_every_family_has_its_easiest_level_in_the_first_phase_and_a_phase_without_arms_is_left_out(
    levels: tuple[int, ...], want: list[list[int]]
) -> None:
    arms = [Arm("f", level) for level in levels]
    assert [[arms[i].level for i in members] for _, members in DEFAULT.phases_of(arms)] == want


def test_explicit_arms_and_families_make_a_phase() -> None:
    phases = (PhaseConfig("one", arms=(FIVE[7], FIVE[0])), PhaseConfig("two", families=("sort",), levels_from=0.8))
    cfg = CurriculumConfig(phases=phases)
    assert [members for _, members in cfg.phases_of(FIVE)] == [(0, 7), (9,)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mode=random", "mode is 'random'; it must be one of curriculum, uniform, hardest"),
        ("floor=0", "floor is 0.0; it must be a number > 0 and <= 1"),
        ("replay=1", "replay is 1.0; it must be a number >= 0 and < 1"),
        ("slow=5", "slow is 5; it must be above fast, 5"),
        ("phases.0.retreat=0.7", "phases.0.retreat is 0.7; it must be below advance, 0.7"),
        ("phases.1.levels_to=0.4", "phases.1.levels_to is 0.4; it must be above levels_from, 0.4"),
        ("phases.1.name=foundations", "phases has 2 with the name 'foundations'; each needs its own"),
        ("phases.0.name=''", "phases.0.name is ''; a phase needs one"),
        ("phases.0.advanced=0.8", "did you mean phases.0.advance?"),
        ("fast=0.5", "fast is 0.5; it must be a number >= 1"),
        ("observations=0", "observations is 0"),
    ],
)
def test_a_wrong_config_is_one_sentence(override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        validate(apply_overrides(DEFAULT, [override]))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("cfg", "arms", "words"),
    [
        (DEFAULT, (), "curriculum has nothing to choose from"),
        (DEFAULT, (FIVE[0], FIVE[0]), "curriculum has 'reverse' level 1 2 times"),
        (
            CurriculumConfig(phases=(PhaseConfig(families=("sortt",)),)),
            FIVE,
            "curriculum.phases.0.families names 'sortt'; the run has reverse, sort",
        ),
        (
            CurriculumConfig(phases=(PhaseConfig(arms=(Arm("sort", 9),)),)),
            FIVE[:2],
            "curriculum.phases.0.arms names 'sort 9'; the run has reverse 1, reverse 2",
        ),
        (CurriculumConfig(phases=(MULTI_STEP,)), FIVE[:1], "curriculum.phases has none with an arm"),
    ],
)
def test_arms_that_do_not_go_with_the_phases_are_one_sentence(
    cfg: CurriculumConfig, arms: tuple[Arm, ...], words: str
) -> None:
    with pytest.raises(UserError) as error:
        begin(cfg, arms)
    assert words in str(error.value)


def test_phases_may_be_empty_neither_nor_families_stand_beside_arms() -> None:
    with pytest.raises(UserError, match="phases is empty"):
        validate(CurriculumConfig(phases=()))
    with pytest.raises(UserError, match=r"phases\.0\.families is given beside arms"):
        validate(CurriculumConfig(phases=(PhaseConfig(families=("f",), arms=(Arm("f", 1),)),)))
