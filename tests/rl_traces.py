"""Made-up metrics of reinforcement learning: noisy, and healthy unless something is planted."""

from __future__ import annotations

import numpy as np


def healthy(seed: int, steps: int = 400, phases: bool = True) -> list[dict[str, float]]:
    """What a run that learns may look like: correctness rises, entropy falls to 40 % of what it was, texts get up to a
    quarter longer or shorter, groups die towards the end; with neighbouring steps alike (AR(1), 0.5), 64 texts a step.

    Args:
        seed: of everything random.
        steps: of the run.
        phases: at a third and at two thirds exercises get harder and their texts longer.
    """
    chance = np.random.default_rng(seed)
    noise = chance.normal(size=(8, steps))
    for i in range(1, steps):
        noise[:, i] = 0.5 * noise[:, i - 1] + np.sqrt(0.75) * noise[:, i]
    when = np.arange(steps) / steps
    phase = np.floor(when * 3) if phases else np.zeros(steps)
    drift, speed, start = chance.uniform(-0.25, 0.25), chance.uniform(2, 8), chance.uniform(0.2, 1.0)
    learned = 1 - np.exp(-speed * when)
    correct = np.clip(0.15 + 0.7 * learned - 0.15 * phase + 0.06 * noise[0], 0, 1)
    form = np.clip(0.8 + 0.18 * learned + 0.03 * noise[1], 0, 1)
    traces = {
        "rl/entropy": start * (1 - 0.6 * learned) * np.exp(0.1 * noise[2]),
        "rl/length": 40 * (1 + drift * when) * (1 + 0.4 * phase) * np.exp(0.1 * noise[3]),
        "rl/correct": correct,
        "rl/format": form,
        "rl/reward": 0.9 * correct + 0.1 * form,
        "rl/kl": 0.3 * learned * np.exp(0.5 * noise[4]),
        "rl/kl_old": 0.005 * np.exp(noise[5]),
        "rl/dead_groups": np.clip(0.3 + 0.3 * learned + 0.1 * noise[6], 0, 1),
        "rl/unknown": np.where(noise[7] > 2, 0.1, 0.0),
        "rl/log_prob_gap": 0.01 * np.exp(0.3 * noise[7]),
    }
    if phases:
        traces |= {"curriculum/phase": phase, "curriculum/competence": correct}
    return [{name: float(values[i]) for name, values in traces.items()} for i in range(steps)]


def ramp(i: int, at: int, steps: int) -> float:
    """From 0 in front of step ``at`` to 1 at the end of ``steps``."""
    return min(max((i - at + 1) / steps, 0.0), 1.0)


def planted(what: str, values: dict[str, float], i: int, at: int) -> dict[str, float]:
    """A step of a trace in which something goes wrong from step ``at`` on."""
    if i < at:
        return values
    new = dict(values)
    if what == "entropy collapses":  # to a fiftieth within 20 steps
        new["rl/entropy"] *= 1 - 0.98 * ramp(i, at, 20)
    elif what == "entropy is gone":
        new["rl/entropy"] = 0.01
    elif what == "texts grow":  # to 2.5 times their length within 50 steps, and nothing comes of it
        new["rl/length"] *= 1 + 1.5 * ramp(i, at, 50)
        new["rl/correct"] -= 0.003 * (i - at)  # what healthy runs gain in a step, at the most
    elif what == "texts shrink":  # to 30 % within 20 steps
        new["rl/length"] *= 1 - 0.7 * ramp(i, at, 20)
        new["rl/correct"] -= 0.003 * (i - at)
    elif what == "form for substance":  # correctness falls to 40 % of itself within 30 steps, format becomes perfect
        new["rl/correct"] *= 1 - 0.6 * ramp(i, at, 30)
        new["rl/format"] += (1 - new["rl/format"]) * ramp(i, at, 30)
        new["rl/reward"] = 0.5
    elif what == "reward without correctness":
        new["rl/correct"] *= 1 - 0.6 * ramp(i, at, 30)
        new["rl/reward"] += 0.3 * ramp(i, at, 30)
        new["rl/format"] = 0.5
    elif what == "KL jumps":  # to twice its limit
        new["rl/kl"] = 2.0
    elif what == "KL is infinite":
        new["rl/kl"] = float("inf")
    elif what == "KL grows":  # by a tenth each step
        new["rl/kl"] *= 1.1 ** (i - at)
    elif what == "updates too far":
        new["rl/kl_old"] = 0.3
    elif what == "groups die":
        new["rl/dead_groups"] = 0.97
    elif what == "nothing is judged":
        new["rl/unknown"] = 1.0
    elif what == "half is judged":
        new["rl/unknown"] = 0.5
    elif what == "engines disagree":
        new["rl/log_prob_gap"] = 0.2
    else:
        raise ValueError(what)
    return new
