"""What a run tells of its curriculum: metrics of each iteration, and a picture of the whole course."""

from __future__ import annotations

import collections
import io
import itertools
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsjax.metrics import write_atomic
from dsjax.rl.arms import CurriculumConfig
from dsjax.rl.curriculum import Choice, CurriculumState, Score, competence, shares


def metrics(
    cfg: CurriculumConfig, state: CurriculumState, choices: Sequence[Choice], scores: Sequence[Score]
) -> dict[str, float]:
    """Of one iteration, for ``metrics.jsonl``: where the course is, and how its exercises went.

    ``curriculum/phase`` (from 0), ``curriculum/competence`` in it, ``curriculum/share_replayed``, and for each arm
    ``curriculum/weight/FAMILY/LEVEL`` (its share of the prompts) and ``curriculum/accuracy/FAMILY/LEVEL`` (f); of the
    scores ``rl/reward``, ``rl/correct``, ``rl/unknown`` (share of the texts) and ``rl/dead_groups`` (of the groups of
    two known rewards or more, the share in which all are equal). What nothing is known of is left out.

    Args:
        state: before the scores, or behind them; weights are those of what would be asked next.
        choices, scores: of the iteration.
    """
    own, again = shares(cfg, state)
    values: dict[str, float] = {"curriculum/phase": state.phase}
    found = competence(cfg, state, cfg.phases_of(state.arms)[state.phase][1])
    if found is not None:
        values["curriculum/competence"] = found.mean
    if choices:
        values["curriculum/share_replayed"] = sum(choice.replayed for choice in choices) / len(choices)
    for arm, record, first, second in zip(state.arms, state.records, own, again, strict=True):
        values[f"curriculum/weight/{arm.family}/{arm.level}"] = first + second
        if record.texts:
            values[f"curriculum/accuracy/{arm.family}/{arm.level}"] = record.fast_correct / record.fast_texts
    rewards = [score.known_rewards for score in scores]
    groups = [group for group in rewards if len(group) > 1]
    num, known = sum(len(score.rewards) for score in scores), sum(map(len, rewards))
    verdicts = [verdict for score in scores for verdict in score.verdicts]
    if num:
        values["rl/unknown"] = 1 - known / num
    if known:
        values["rl/reward"] = math.fsum(x for group in rewards for x in group) / known
    if verdicts:
        values["rl/correct"] = sum(verdicts) / len(verdicts)
    if groups:
        values["rl/dead_groups"] = sum(min(group) == max(group) for group in groups) / len(groups)
    return values


# ---------------------------------------------------------------- picture

Line = list[tuple[float, float]]  # (step, value)
STYLES = ("-", "--", "-.", ":")
APART = 0.13  # of a panel's height, from one label to the next
MOST_FAMILIES = 24


def plot_course(records: Iterable[Mapping[str, Any]], path: pathlib.Path, *, phases: Sequence[str] = ()) -> None:
    """Draws phase, competence and share of replay over steps, and for each family weight and accuracy of its levels.

    Levels are told apart by darkness, by style and by a label at the line's end. Of records without a curriculum
    nothing is drawn.

    Args:
        records: lines of ``metrics.jsonl``.
        path: PNG to write.
        phases: their names.

    Raises:
        UserError: it can not be written.
    """
    lines = _lines(records)
    if "phase" not in lines:
        return
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    families = sorted({name.split("/", 1)[1].rsplit("/", 1)[0] for name in lines if name.startswith("weight/")})
    shown = families[:MOST_FAMILIES]
    figure = Figure(figsize=(10, 1.8 * (1 + len(shown))), layout="constrained")
    panels = figure.subplots(1 + len(shown), 2, sharex=True, squeeze=False)
    _draw_phase(panels[0][0], lines["phase"], phases)
    measured = {"replayed": "share_replayed", "competence": "competence"}
    _draw(panels[0][1], {label: lines[name] for label, name in measured.items() if name in lines})
    for (left, right), family in zip(panels[1:], shown, strict=True):
        for axes, kind in ((left, "weight"), (right, "accuracy")):
            prefix = f"{kind}/{family}/"
            levels = sorted(int(rest) for name in lines if (rest := name.removeprefix(prefix)).isdigit())
            _draw(axes, {f"level {level}": lines[f"{prefix}{level}"] for level in levels})
        left.set_ylabel(family)
    panels[0][1].set_title("shares", fontsize=10)
    if shown:
        panels[1][0].set_title("share of the prompts", fontsize=10)
        panels[1][1].set_title("share of correct texts", fontsize=10)
    changes = [step for (_, before), (step, now) in itertools.pairwise(lines["phase"]) if now != before]
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        for step in changes:
            axes.axvline(step, color="0.85", linewidth=1, zorder=0)
    for axes in panels[-1]:
        axes.set_xlabel("step" if shown == families else f"step ({len(shown)} of {len(families)} families)")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_atomic(path, png.getvalue())


def _lines(records: Iterable[Mapping[str, Any]]) -> dict[str, Line]:
    """What there is of each number of the curriculum, by its name without ``curriculum/``."""
    lines = collections.defaultdict[str, Line](list)
    for record in records:
        for name, value in record.items():
            if name.startswith("curriculum/") and value is not None and math.isfinite(value):
                lines[name.removeprefix("curriculum/")].append((record["step"], value))
    return lines


def _draw_phase(axes: Any, line: Line, names: Sequence[str]) -> None:
    steps, places = zip(*line, strict=True)
    axes.step(steps, places, where="post", color="0", linewidth=1.5)
    most = max(int(max(places)), len(names) - 1)
    axes.set_yticks(range(most + 1), [names[i] if i < len(names) else str(i + 1) for i in range(most + 1)])
    axes.set_ylim(-0.3, most + 0.3)
    axes.set_title("phase", fontsize=10)


def _draw(axes: Any, lines: Mapping[str, Line]) -> None:
    """Lines of shares with a label at the end of each, labels moved apart."""
    axes.set_ylim(0, max(1.1 * max((y for line in lines.values() for _, y in line), default=1.0), 1e-3))
    top = axes.get_ylim()[1]
    ends = list[tuple[float, str, str]]()
    for number, (label, line) in enumerate(lines.items()):
        grey = f"{0.55 * (1 - number / max(len(lines) - 1, 1)):.2f}"
        style = {"color": grey, "linestyle": STYLES[number % len(STYLES)], "linewidth": 1.3}
        axes.plot(*zip(*line, strict=True), **style, marker="" if len(line) > 1 else ".")
        ends.append((line[-1][1] / top, label, grey))
    ends.sort()
    heights = _apart([height for height, _, _ in ends])
    for height, (_, label, grey) in zip(heights, ends, strict=True):
        axes.text(1.01, height, label, color=grey, fontsize=8, va="center", transform=axes.transAxes)


def _apart(heights: Sequence[float]) -> list[float]:
    """Rising heights between 0 and 1, moved as little as it takes for labels to be apart."""
    apart = min(APART, 1 / max(len(heights) - 1, 1))
    found = list(heights)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + apart)
    for i in reversed(range(len(found))):
        found[i] = min(found[i], 1 - apart * (len(found) - 1 - i))
    return found
