"""Milliseconds that a verified reward takes for a text, by scorer: ``scripts/bench rewards``.

Right and wrong answers to exercises of each kind, no two texts alike, judged by one worker that has started. A right
text is the known solution, or the same written otherwise; a wrong one is the solution of another exercise.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from benchmarks.turns import spread
from dsjax.rl.exercises.config import ExercisesConfig, FamilyConfig, families_of
from dsjax.rl.exercises.exercise import Exercise, distinct
from dsjax.rl.rewards import RewardConfig, Rewards
from dsjax.rl.rollout import Rollout

# Scorer and what it judges: a family and its level. Those of files are written here.
CASES = {
    "exact": ("sort", 4),
    "arithmetic": ("countdown", 2),
    "math, whole numbers": ("file/whole", 1),
    "math, fractions": ("file/fractions", 1),
    "gym": ("gym/word_sorting", 1),
    "gym, integrals": ("gym/simple_integration", 1),
    "program": ("program/list", 1),
}


def measure(texts: int, rounds: int, cases: Sequence[str] = tuple(CASES)) -> dict[str, Any]:
    """Figures of each of some of :data:`CASES`, right and wrong."""
    figures: dict[str, Any] = {"texts": texts, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        files = tuple(str(path) for path in write_files(pathlib.Path(folder), 24 * texts))
        for case in cases:
            name, level = CASES[case]
            config = ExercisesConfig((FamilyConfig(name, (level,)),), files if name.startswith("file/") else ())
            families = families_of(config)
            exercises = distinct(families[name], level, "training", texts)
            with Rewards(RewardConfig(workers=1), families) as rewards:
                figures[case] = {
                    kind: timed(rewards, exercises, own, float(kind == "right"), rounds)
                    for kind, own in {"right": right(exercises), "wrong": wrong(exercises)}.items()
                }
    return figures


def timed(
    rewards: Rewards, exercises: Sequence[Exercise], texts: Sequence[Rollout], expected: float, rounds: int
) -> dict[str, float]:
    """Milliseconds for a text: median of the rounds, and their range.

    Raises:
        AssertionError: a verdict is not the expected one.
    """
    found = rewards(exercises, texts)  # and all has started
    if set(found.parts["correct"].tolist()) != {expected}:
        raise AssertionError(f"{exercises[0].family}: {found.parts['correct']} is not all {expected}: {found.reasons}")
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        rewards(exercises, texts)
        seconds.append((time.perf_counter() - begin) / len(texts))
    return {name.replace("_s", "_ms"): 1e3 * value for name, value in spread(seconds).items()}


def written(text: str) -> Rollout:
    """A text that ended by itself."""
    return Rollout((), (), text, ended=True)


def right(exercises: Sequence[Exercise]) -> list[Rollout]:
    """Known solutions; fractions are not in lowest terms, and integrals begin with 0, or nothing would be computed."""
    return [written(otherwise(exercise)) for exercise in exercises]


def otherwise(exercise: Exercise) -> str:
    answer = exercise.answer
    if exercise.family == "file/fractions":
        above, below = (int(part.strip("{}")) for part in answer.removeprefix(r"\frac").split("}{"))
        return exercise.solution.replace(answer, rf"\frac{{{2 * above}}}{{{2 * below}}}")
    return exercise.solution.replace(answer, f"0 + {answer}") if "integration" in exercise.family else exercise.solution


def wrong(exercises: Sequence[Exercise]) -> list[Rollout]:
    """Each the solution of the next exercise that has another one."""
    texts = []
    for place, exercise in enumerate(exercises):
        others = (*exercises[place + 1 :], *exercises[:place])
        other = next(other for other in others if other.solution != exercise.solution)
        texts.append(written(other.solution))
    return texts


def write_files(folder: pathlib.Path, lines: int) -> list[pathlib.Path]:
    """Questions with numbers for answers."""
    fractions = [Fraction(3 * n + 1, 7 * n + 5) for n in range(lines)]
    answers = {
        "whole": [str(17 * n + 3) for n in range(lines)],
        "fractions": [rf"\frac{{{x.numerator}}}{{{x.denominator}}}" for x in fractions],
    }
    paths = []
    for name, own in answers.items():
        path = folder / f"{name}.jsonl"
        rows = [json.dumps({"question": f"number {n}", "answer": answer}) for n, answer in enumerate(own)]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def table(figures: dict[str, Any]) -> str:
    """Markdown."""
    text = "| scorer | right, ms | wrong, ms |\n|---|---:|---:|\n"
    for case in (case for case in CASES if case in figures):
        cells = [f"{f['median_ms']:.3g} ({f['least_ms']:.3g} to {f['most_ms']:.3g})" for f in figures[case].values()]
        text += f"| {case} | {' | '.join(cells)} |\n"
    return text
