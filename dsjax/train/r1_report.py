"""What a run of R1 came to: held-out exercises before and behind it, and of its control.

RUN/report.json     families: {name: {before, after, sft_control}}, pass@1 of the level named beforehand; and more
RUN/solved.png      pass@1 by level
RUN/course.png      phase, weights and accuracy over time
"""

from __future__ import annotations

import contextlib
import io
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.checkpoint import flatten, path_name
from dsjax.config import UserError
from dsjax.data.tokenizer import load_tokenizer
from dsjax.evals.exercises import held_out_exercises
from dsjax.evals.solved import solved
from dsjax.infer.sampling import SamplingConfig
from dsjax.metrics import read_metrics, write_atomic
from dsjax.rl.exercises.exercise import Exercise, Family
from dsjax.rl.rewards import Rewards
from dsjax.rl.rollout import Sampler
from dsjax.runs import RunFolder, load_model
from dsjax.sharding import joined

Table = dict[str, dict[int, dict[str, Any]]]  # family -> level -> figures (dsjax.evals.solved.Solved.by_level)


def held_out(config: Any, families: Mapping[str, Family]) -> list[Exercise]:
    """The exercises of a report: so many different ones of each family and level, of the side that nobody learns from.

    Raises:
        UserError: a family has fewer.
    """
    return held_out_exercises(families, config.report.prompts, key="report.prompts")


def named_levels(config: Any, families: Mapping[str, Family]) -> dict[str, int]:
    """Of each family the level that its verdict is about: that of ``report.named``, or the middle one.

    Raises:
        UserError: a name is no family's, or its level none of that family's.
    """
    levels = {name: family.levels[(len(family.levels) - 1) // 2] for name, family in families.items()}
    for number, arm in enumerate(config.report.named):
        if arm.family not in families or arm.level not in families[arm.family].levels:
            there = ", ".join(f"{name} {'/'.join(map(str, f.levels))}" for name, f in families.items())
            raise UserError(f"report.named.{number} is {arm}; the run has {there}")
        levels[arm.family] = arm.level
    return levels


def variables_of(run: RunFolder, trainer: Any) -> Any:
    """All variables of a run's latest checkpoint, where ``trainer`` has them; what it has beside those is 0."""
    if trainer.base is not None:
        return load_model(run).params
    wanted = flatten({"params": trainer.shapes.params, "buffers": trainer.shapes.buffers})
    with contextlib.closing(run.open_checkpoints()) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"no checkpoint of {run.path} verifies")
        there = checkpoints.about(step)["arrays"]
        found = checkpoints.restore_part({name: x for name, x in wanted.items() if name in there}, step, again=True)

    def take(kind: str, tree: Any) -> Any:
        def one(path: Any, x: Any) -> Any:
            name = f"{kind}/{path_name(path)}"
            return found[name] if name in found else jnp.zeros(x.shape, x.dtype, device=x.sharding)

        return jax.tree_util.tree_map_with_path(one, tree)

    return joined(take("params", trainer.shapes.params), take("buffers", trainer.shapes.buffers))


def solved_by(
    config: Any,
    trainer: Any,
    mesh: Any,
    runs: Mapping[str, RunFolder],
    exercises: list[Exercise],
    rewards: Rewards,
    *,
    greedy: bool = True,
) -> dict[str, Table]:
    """What each of some runs solves of the same exercises, by the same seeds."""
    rollout, tokenizer = config.rollout, load_tokenizer(next(iter(runs.values())).tokenizer)
    rows = rollout.rows or rollout.prompts * rollout.samples
    sampler = Sampler(trainer.graph, tokenizer, mesh, num_rows=rows, max_length=config.data.seq_len)
    tables = {}
    for name, run in runs.items():
        found = solved(
            sampler,
            variables_of(run, trainer),
            tokenizer,
            exercises,
            lambda some, texts: rewards(some, texts).parts["correct"],
            num_samples=config.report.samples,
            max_tokens=rollout.max_tokens,
            sampling=SamplingConfig(rollout.temperature, top_p=1.0),
            greedy=greedy,
            seed=config.train.seed,
            stop=rollout.stop,
        )
        assert found is not None
        tables[name] = found.by_level()
    return tables


def report_of(config: Any, levels: Mapping[str, int], tables: Mapping[str, Table], **further: Any) -> dict[str, Any]:
    """The report: of each family the level that was named, the mean over levels, and everything."""

    def named(figure: Callable[[dict[str, Any]], float | None]) -> dict[str, dict[str, float | None]]:
        return {
            family: {name: figure(tables[name][family][level]) for name in tables} for family, level in levels.items()
        }

    def over_levels(name: str, family: str) -> float | None:
        return mean_of(pass_at_1(figures) for figures in tables[name][family].values())

    return {
        "levels_named": dict(levels),
        "families": named(pass_at_1),
        "greedy": named(lambda figures: figures.get("greedy")),
        "mean_of_levels": {f: {name: over_levels(name, f) for name in tables} for f in levels},
        "mean": {name: mean_of(over_levels(name, f) for f in levels) for name in tables},
        "by_level": {
            f: {level: {name: tables[name][f][level] for name in tables} for level in tables["after"][f]}
            for f in levels
        },
        "prompts_of_a_level": config.report.prompts,
        "samples_of_a_prompt": config.report.samples,
        "seed": config.train.seed,
        **further,
    }


def pass_at_1(figures: Mapping[str, Any]) -> float | None:
    """Of one level; None where nothing is known."""
    return figures["pass@1"]["value"] if "pass@1" in figures else None


def mean_of(shares: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [share for share in shares if share is not None]
    return float(np.mean(known)) if known else None


def in_words(shares: Mapping[str, float | None]) -> str:
    """The shares of some models."""
    return "  ".join(f"{name} {'unknown' if share is None else f'{share:.1%}'}" for name, share in shares.items())


def spent_on(run: RunFolder) -> dict[str, Any]:
    """Tokens and seconds of a run."""
    records = list(read_metrics(run.metrics))
    return {
        "tokens_learned": max((r["tokens_seen"] for r in records), default=0),
        "seconds": max((r["seconds"] for r in records), default=0.0),
    }


def plot_solved(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """pass@1 by level, a panel for each family, a line for each run with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    families = report["by_level"]
    figure, panels = plt.subplots(1, len(families), figsize=(1 + 3.2 * len(families), 3.2), sharey=True, squeeze=False)
    looks = {"before": ("0.6", ":"), "sft_control": ("C1", "--"), "after": ("C0", "-")}
    names = {"before": "before", "sft_control": "control: more solutions", "after": "after RL"}
    for axes, (family, levels) in zip(panels[0], families.items(), strict=True):
        for name, (color, style) in looks.items():
            rows = [(int(n), found[name]["pass@1"]) for n, found in levels.items() if "pass@1" in found.get(name, {})]
            if rows:
                x, y = [level for level, _ in rows], [f["value"] for _, f in rows]
                axes.plot(x, y, style, color=color, marker="o", markersize=3, label=names[name])
                axes.fill_between(
                    x, [f["low"] for _, f in rows], [f["high"] for _, f in rows], color=color, alpha=0.15, linewidth=0
                )
        axes.axvline(report["levels_named"][family], color="0.85", zorder=0)
        axes.set(title=family, xlabel="level", ylim=(-0.02, 1.02), xticks=[int(level) for level in levels])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("pass@1 of held-out exercises")
    panels[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    with io.BytesIO() as picture:
        figure.savefig(picture, format="png", dpi=130)
        write_atomic(path, picture.getvalue())
    plt.close(figure)
