"""``dsjax eval --task exercises``: which held-out exercises a model solves, by family and level.

Asked are those of the run, if it learned from some; else of the run in whose folder it is (a warm start, a control), or
of the one that it began with. Any other model can be asked the exercises of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsjax.config import UserError, validate
from dsjax.evals.solved import prompt_tokens, solved
from dsjax.infer.sampling import SamplingConfig
from dsjax.loaded import LoadedModel, load
from dsjax.metrics import write_atomic
from dsjax.rl.exercises.config import families_of
from dsjax.rl.exercises.exercise import Exercise, Family, distinct
from dsjax.rl.rewards import Rewards
from dsjax.rl.rollout import Sampler
from dsjax.runs import RunFolder

ROWS = 64  # texts that are written at a time
NUM_EXERCISES, NUM_SAMPLES = 128, 4  # where neither the user nor a report says how many


@dataclasses.dataclass(frozen=True)
class HeldOutExercises:
    """What is asked, and how.

    Attributes:
        k: of pass@k, beside 1 and the number of samples.
        samples: texts for each exercise; 0: as many as the report of the run has, or the largest k if that is more.
        limit: different exercises of each family and level; 0: as many as the report of the run has.
        max_tokens: of a text; none: as the run writes.
        temperature: of sampling; none: as the run writes.
        seed: of the texts; none: that of the run.
        source: the run whose exercises are asked; empty: the own one's.
    """

    k: tuple[int, ...] = (1,)
    samples: int = 0
    limit: int = 0
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    source: str = ""

    def validate(self) -> None:
        """Raises UserError: an option is out of range, or does not go with another."""
        if not self.k or min(self.k) < 1:
            raise UserError(f"--k is {','.join(map(str, self.k))}; it must be whole numbers from 1")
        if self.samples and self.samples < max(self.k):
            raise UserError(f"--samples is {self.samples}; for pass@{max(self.k)} it must be at least {max(self.k)}")
        if self.limit < 0:
            raise UserError(f"--limit is {self.limit}; it must be at least 0")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"--max-tokens is {self.max_tokens}; it must be at least 1")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}; it must be at least 0 and below 2**32")
        try:
            validate(SamplingConfig(0.0 if self.temperature is None else self.temperature))
        except UserError as error:
            raise UserError(f"--{error}") from None

    def of(self, config: Any) -> HeldOutExercises:
        """With what the config of the asked run says where nothing was said."""
        report, rollout = getattr(config, "report", None), config.rollout
        return dataclasses.replace(
            self,
            samples=self.samples or max(*self.k, report.samples if report else NUM_SAMPLES),
            limit=self.limit or (report.prompts if report else NUM_EXERCISES),
            max_tokens=rollout.max_tokens if self.max_tokens is None else self.max_tokens,
            temperature=rollout.temperature if self.temperature is None else self.temperature,
            seed=config.train.seed if self.seed is None else self.seed,
        )


def evaluate_exercises(
    folder: pathlib.Path, asked: HeldOutExercises, *, output: pathlib.Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Has texts written and judged; prints the report, and writes it as JSON into a run's folder or to ``output``.

    Raises:
        UserError: no such model, it writes no texts, or nothing says which exercises to ask.
    """
    asked.validate()
    if output is not None and not output.parent.is_dir():  # known before hours of work, not behind them
        raise UserError(f"--output is {output}; there is no folder {output.parent}")
    config = asked_config(folder, asked.source)
    families, asked = families_of(config.exercises), asked.of(config)
    exercises = held_out_exercises(families, asked.limit, key="--limit")
    with Rewards(config.rewards, families) as rewards:  # before the model is read: whether there can be one
        model = load(folder)
        if not quiet:
            print(f"{len(exercises):,} held-out exercises, {asked.samples} + 1 texts each", file=sys.stderr, flush=True)
        report = figures(model, exercises, rewards, asked, config.rollout.stop)
    print(markdown(report))
    if output is None and (folder / "checkpoints").is_dir():
        output = folder / "exercises.json"
    if output is not None:
        write_atomic(output, json.dumps(report, indent=1) + "\n")
    return report


def held_out_exercises(families: Mapping[str, Family], num: int, *, key: str) -> list[Exercise]:
    """``num`` different ones of each family and level, of the side that nobody learns from.

    ``key``: what says so many.

    Raises:
        UserError: a family has fewer.
    """
    return [
        exercise
        for family in families.values()
        for level in family.levels
        for exercise in distinct(family, level, "held_out", num, key=key)
    ]


# ---------------------------------------------------------------- kinds of runs


def asked_config(folder: pathlib.Path, source: str) -> Any:
    """The config that says which exercises a model is asked.

    Raises:
        UserError: the model writes no texts, or there is no such config.
    """
    if getattr(_config_of(folder), "method", "") == "reward":
        raise UserError(
            f"{folder} is a model of rewards, which writes no texts; what it says of held-out pairs is in metrics.jsonl"
        )
    place = pathlib.Path(source) if source else folder
    if (found := _nearest(place)) is None:
        RunFolder(place).read_config()  # what is no run is told as such
        raise UserError(f"{place} knows no exercises; name a run that learned from some: --exercises RUN")
    return found


def task_of(folder: pathlib.Path) -> str:
    """What ``dsjax eval`` does with a run if it is not told."""
    return "exercises" if _taught_by(folder) else "report"


def refuse_without_documents(folder: pathlib.Path, task: str) -> None:
    """Raises ``UserError`` if the run has learned from something else than documents: it has none to hold out."""
    if what := _taught_by(folder):
        raise UserError(
            f"{folder} learned from {what}, so there are no held-out documents for --task {task}; --task exercises asks"
            " what it solves"
        )


def _taught_by(folder: pathlib.Path) -> str:
    """What a run learned from in place of documents; empty: from those."""
    own = _config_of(folder)
    if own is None:
        return ""
    if hasattr(own, "pairs"):
        return "pairs"
    around = _config_of(folder.resolve().parent)
    return "exercises" if _has_exercises(own) or _has_exercises(around) else ""


def _nearest(folder: pathlib.Path) -> Any | None:
    """The config of the nearest run with exercises: itself, the one around it, the one that it began with ..."""
    seen = set[pathlib.Path]()
    while (place := folder.resolve()) not in seen:
        seen.add(place)
        own, around = _config_of(place), _config_of(place.parent)
        for config in (own, around):
            if _has_exercises(config):
                return config
        start = getattr(getattr(own, "train", None), "start_from", "")
        if not start:
            return None
        folder = pathlib.Path(start)
    return None


def _config_of(folder: pathlib.Path) -> Any | None:
    """Of a run; None: there is none there."""
    with contextlib.suppress(UserError):
        return RunFolder(folder).read_config()
    return None


def _has_exercises(config: Any) -> bool:
    return hasattr(config, "exercises")


# ---------------------------------------------------------------- figures


def figures(
    model: LoadedModel, exercises: Sequence[Exercise], rewards: Rewards, asked: HeldOutExercises, stop: Sequence[str]
) -> dict[str, Any]:
    """What the report says. Texts whose verdict is unknown are left out of shares, and counted.

    Args:
        model: what writes.
        exercises: by family and level.
        rewards: judges.
        asked: with everything said (:meth:`HeldOutExercises.of`).
        stop: texts that end one.

    Raises:
        UserError: the model has no tokenizer, or too few positions.
    """
    tokenizer, max_tokens, temperature, seed = model.tokenizer, asked.max_tokens, asked.temperature, asked.seed
    if tokenizer is None:
        raise UserError("the model's folder has no tokenizer.json: it can write no texts")
    assert max_tokens is not None
    assert temperature is not None
    assert seed is not None
    longest = max(len(prompt_tokens(tokenizer, exercise)) for exercise in exercises)
    room = min(longest + max_tokens, model.max_length)
    found = solved(
        Sampler(model.graph, tokenizer, model.mesh, num_rows=ROWS, max_length=room),
        model.params,
        tokenizer,
        exercises,
        lambda some, texts: rewards(some, texts).parts["correct"],
        num_samples=asked.samples,
        max_tokens=max_tokens,
        sampling=SamplingConfig(temperature, top_p=1.0),
        greedy=True,
        seed=seed,
        stop=stop,
    )
    assert found is not None
    table = found.by_level(asked.k)
    return {
        "exercises_of_a_level": asked.limit,
        "samples": asked.samples,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "without_verdict": sum(level["unknown"] for levels in table.values() for level in levels.values()),
        "mean_of_levels": {family: _mean(levels.values()) for family, levels in table.items()},
        "mean": _mean([level for levels in table.values() for level in levels.values()]),
        "by_level": {
            family: {str(level): values for level, values in levels.items()} for family, levels in table.items()
        },
    }


def _mean(levels: Any) -> float | None:
    """pass@1, every level alike; None: nothing is known."""
    known = [level["pass@1"]["value"] for level in levels if "pass@1" in level]
    return float(np.mean(known)) if known else None


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    r = report
    levels = [(family, level, values) for family, own in r["by_level"].items() for level, values in own.items()]
    names = list(dict.fromkeys(name for _, _, values in levels for name in values if name.startswith("pass@")))
    lines = [
        f"# exercises: {r['exercises_of_a_level']} held-out ones of each level, {r['samples']} text(s) each",
        "",
        f"| | level | {' | '.join(names)} | greedy |",
        "|---" * (len(names) + 3) + "|",
    ]
    for family, level, values in levels:
        cells = [_said(values.get(name)) for name in names]
        greedy = f"{values['greedy']:.1%}" if "greedy" in values else ""
        lines.append(f"| {family} | {level} | {' | '.join([*cells, greedy])} |")
    if r["mean"] is not None:
        lines += ["", f"pass@1 is {r['mean']:.1%} in the mean of all levels; in brackets: 95 % intervals."]
    if r["without_verdict"]:
        lines.append(f"{r['without_verdict']} texts could not be judged and are left out.")
    return "\n".join(lines) + "\n"


def _said(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"
