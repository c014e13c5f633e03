"""The archive: what is new is worth something, what is wrong is not, and the order of texts does not matter."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.config import UserError, apply_overrides, validate
from dsjax.rl.archive import ArchiveConfig, Found, bonuses, plain_form, python_form, remembered

DEFAULT = ArchiveConfig()
SMALL = ArchiveConfig(exercises=3, solutions=2)

texts = st.lists(
    st.builds(
        Found, st.sampled_from("abcde"), st.sampled_from(["x", "y", "z", ""]), st.sampled_from([True, False, None])
    ),
    max_size=12,
)


def test_bonuses_by_hand() -> None:
    first = [Found("a", "x", True), Found("a", "y", True), Found("a", "x", True), Found("b", "x", True)]
    assert bonuses({}, first) == [0.5, 1, 0.5, 1]  # two texts share what x is worth; b is another exercise
    archive = remembered(DEFAULT, {}, first)
    assert [sorted(solutions.values()) for solutions in archive.values()] == [[1, 2], [1]]
    again = [Found("a", "x", True), Found("a", "y", True), Found("a", "z", True), Found("c", "x", True)]
    assert bonuses(archive, again) == [1 / 3, 1 / 2, 1, 1]
    assert bonuses(archive, again[:1] * 4) == [1 / 12] * 4


def test_what_is_wrong_or_unknown_earns_nothing_and_is_not_remembered() -> None:
    wrong = [Found("a", f"nonsense {i}", correct) for i, correct in enumerate([False, None] * 50)]
    assert bonuses({}, wrong) == [0.0] * 100
    assert remembered(DEFAULT, {}, wrong) == {}
    # Nor does it make the same text, once it is right, any older.
    assert bonuses(remembered(DEFAULT, {}, wrong), [Found("a", "nonsense 0", True)]) == [1.0]


def test_a_policy_that_wants_novelty_alone_has_to_be_right() -> None:
    """One writes something new and wrong each time, one the same right text, one another right text."""
    policies = {
        "wrong": lambda i: Found("a", f"new {i}", False),
        "one": lambda i: Found("a", "same", True),
        "many": lambda i: Found("a", f"right {i}", True),
    }
    earned = {}
    for name, write in policies.items():
        archive: dict[str, dict[str, int]] = {}
        earned[name] = 0.0
        for i in range(20):
            earned[name] += math.fsum(bonuses(archive, [write(i)]))
            archive = remembered(DEFAULT, archive, [write(i)])
    assert earned["wrong"] == 0
    assert earned["one"] == pytest.approx(math.fsum(1 / (1 + i) for i in range(20)))
    assert earned["many"] == 20


def test_what_goes_over_the_size_is_what_was_seen_longest_ago() -> None:
    archive: Any = {}
    for exercise, solution in [("a", "1"), ("b", "1"), ("c", "1"), ("a", "2"), ("d", "1"), ("a", "1"), ("a", "3")]:
        archive = remembered(SMALL, archive, [Found(exercise, solution, True)])
    assert list(archive) == ["c", "d", "a"]  # b is the oldest
    assert bonuses(archive, [Found("a", s, True) for s in "123"]) == [1 / 3, 1, 1 / 2]  # of a's, 2 is
    smaller = remembered(ArchiveConfig(exercises=1), archive, [Found("c", "1", True)])
    assert list(smaller) == ["c"]


@given(st.lists(texts, max_size=6), st.data())
def test_whatever_comes(batches: list[list[Found]], data: Any) -> None:
    """Shares add up, sizes hold, order does not matter, nothing that is given changes, JSON keeps it all."""
    archive: Any = {}
    for found in batches:
        before = json.dumps(archive)
        worth = bonuses(archive, found)
        order = data.draw(st.permutations(range(len(found))))
        assert bonuses(archive, [found[i] for i in order]) == [worth[i] for i in order]
        assert all(0 < x <= 1 if one.correct else x == 0 for x, one in zip(worth, found, strict=True))
        for place in {one.place for one in found if one.correct}:
            together = math.fsum(x for x, one in zip(worth, found, strict=True) if one.correct and one.place == place)
            assert together == pytest.approx(1 / (1 + archive.get(place[0], {}).get(place[1], 0)))
        new = remembered(SMALL, archive, found)
        assert json.dumps(remembered(SMALL, archive, [found[i] for i in order])) == json.dumps(new)
        assert json.dumps(archive) == before
        assert len(new) <= 3
        assert all(0 < len(solutions) <= 2 for solutions in new.values())
        again = json.loads(json.dumps(new))
        assert (again, json.dumps(again)) == (new, json.dumps(new))
        archive = again


def test_plain_forms() -> None:
    assert plain_form(" 3 + 4\n =\t7 ") == "3 + 4 = 7"
    assert plain_form("ＡＢ　Straße") == plain_form("ab strasse")
    assert plain_form("3 + 4") != plain_form("4 + 3")
    assert plain_form("") == plain_form(" \n") == ""


ONE = '''
def f(numbers, least):
    """What is large."""
    found = []  # of them
    for x in numbers:
        if x > least:
            found.append(x)
    return found
'''
SAME = "def g(a,b):\n  out=[]\n  for y in a:\n    if y > b: out.append(y)\n  return out"


def test_programs_that_differ_in_form_alone_are_one_solution() -> None:
    assert python_form(ONE) == python_form(SAME)
    for other in (
        SAME.replace(">", ">="),
        SAME.replace("append", "extend"),
        SAME.replace("return out", "return a"),
        SAME.replace("y > b", "b > y"),
        SAME.replace("(a,b)", "(b,a)"),
    ):
        assert python_form(other) != python_form(SAME)


def test_names_that_a_program_does_not_define_stay() -> None:
    assert python_form("import math\nx = math.pi") != python_form("import math\nx = math.e")
    assert python_form("x = len(y)") != python_form("x = sum(y)")
    assert python_form("import a") != python_form("import b")
    assert python_form("try:\n  f()\nexcept E as e:\n  print(e)") == python_form(
        "try:\n  f()\nexcept E as q:\n  print(q)"
    )
    assert python_form("def f(a): return f(a=1)") == python_form("def g(b): return g(b=1)")


@pytest.mark.parametrize(
    "code",
    ["def (", "x = '\\d'\nx = (", "\0", "(" * 5000, "-" * 100_000 + "1", "\ud800", "a\n  b\n c", "9" * 5000 + "x"],
)
def test_what_is_no_program_is_a_text(code: str) -> None:
    assert python_form(code) == plain_form(code)
    assert bonuses({}, [Found("a", code, True)]) == [1.0]


@pytest.mark.parametrize("override", ["exercises=0", "solutions=0", "solutions=1.5"])
def test_a_wrong_size_is_one_sentence(override: str) -> None:
    with pytest.raises(UserError, match=override.split("=")[0]):
        validate(apply_overrides(DEFAULT, [override]))
