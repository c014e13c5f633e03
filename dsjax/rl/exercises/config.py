"""Which exercises a run has, and how they are put."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal, cast

from dsjax.config import PositiveInt, UserError
from dsjax.rl.exercises import gym, lines, programs
from dsjax.rl.exercises.exercise import Family, check_level
from dsjax.rl.exercises.form import AnswerForm
from dsjax.rl.exercises.letters import LETTERS
from dsjax.rl.gym_datasets import REFUSED


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
    """A family, and which of its levels count.

    Attributes:
        name: "sort", "program/list", "gym/basic_arithmetic", "file/gsm8k" ...
        levels: ascending or not; none: all that it has.
    """

    name: str = ""
    levels: tuple[PositiveInt, ...] = ()


@dataclasses.dataclass(frozen=True)
class ExercisesConfig:
    """Where exercises come from.

    Attributes:
        families: by name. Of files, families that are not named here are not used, unless none of the file's is.
        files: of JSON lines (:mod:`dsjax.rl.exercises.lines`); NAME.jsonl has families file/NAME.
        answer_mark: in front of an answer (:class:`dsjax.rl.exercises.form.AnswerForm`).
        template: "plain", or "think" for DeepSeek-R1's conversation with tags.
    """

    families: tuple[FamilyConfig, ...] = (FamilyConfig("reverse"), FamilyConfig("sort"))
    files: tuple[str, ...] = ()
    answer_mark: str = "#### "
    template: Literal["plain", "think"] = "plain"

    @property
    def form(self) -> AnswerForm:
        """How questions are put, and answers found."""
        return AnswerForm(self.answer_mark, self.template)

    def validate(self) -> None:
        """Raises ``UserError`` for families that are there twice, none at all, or an impossible mark."""
        self.form.validate()
        if not self.families and not self.files:
            raise UserError("families is empty, and so is files; a run needs at least one family of exercises")
        names = [family.name for family in self.families]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise UserError(f"families.{number}.name is {name!r}, which is there already; name each family once")


def families_of(cfg: ExercisesConfig) -> dict[str, Family]:
    """The families that a config names, with the levels that it names, by name.

    Raises:
        UserError: there is no such family or level, a file is wrong, what a family needs is not installed, or the
            answer mark occurs where no answer begins.
    """
    read: dict[str, Family] = {}
    chosen: dict[str, tuple[int, ...]] = {family.name: family.levels for family in cfg.families}
    for number, path in enumerate(cfg.files):
        own = lines.read_families(path, cfg.form)
        for name in own:
            if name in read:
                raise UserError(
                    f"exercises.files.{number} is {path!r}, and another file has a family {name!r}, too; rename one"
                )
        read |= own
        if not any(name in chosen for name in own):
            chosen |= dict.fromkeys(own, ())
    found = {}
    for number, (name, levels) in enumerate(chosen.items()):
        family = read[name] if name in read else _built_in(name, number, cfg.form, tuple(read))
        for level in levels:
            check_level(family, level)
        found[name] = dataclasses.replace(cast(Any, family), levels=tuple(sorted(set(levels)))) if levels else family
        _check_mark(found[name], cfg.form)
    return found


def names(files: tuple[str, ...] = ()) -> tuple[str, ...]:
    """All families that there are here; ``files``: names of those from files."""
    return (*(family.name for family in LETTERS), *programs.names(), *gym.names(), *files)


def _built_in(name: str, number: int, form: AnswerForm, files: tuple[str, ...]) -> Family:
    for family in LETTERS:
        if family.name == name:
            return dataclasses.replace(family, form=form)
    if name in programs.names():
        return programs.Programs(name, form=form)
    refused = tuple(f"{gym.PREFIX}{short}" for short in REFUSED)
    if name.startswith(gym.PREFIX) and (not gym.names() or name in (*gym.names(), *refused)):
        return gym.family(name, form)
    known = names(files)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or [n for n in known if "/" not in n]
    raise UserError(
        f"exercises.families.{number}.name is {name!r}; there is no such family; near ones are {', '.join(near)}"
    )


def _check_mark(family: Family, form: AnswerForm) -> None:
    """Raises ``UserError`` if the mark would be found elsewhere than in front of the answer: of a family without end,
    in the first solution of each level."""
    for level in family.levels:
        for exercise in (family.exercise(level, number) for number in range(family.size(level) or 1)):
            if exercise.scorer == "program":
                return
            text = exercise.solution
            if text and (form.answer(text, True) != exercise.answer or not form.follows(text, True, work=False)):
                raise UserError(
                    f"answer_mark is {form.mark!r}, which solutions of {family.name} have elsewhere, too"
                    f" ({text!r:.100}); choose another one"
                )
