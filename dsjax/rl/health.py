"""Alarms for reinforcement learning that goes wrong while its reward may look well (docs/rl_health.md).

Four numbers have a limit, and their running mean, which begins at 0, is held against it: KL to the reference and to the
policy that wrote, dead groups, unknown rewards, the gap between the log-probabilities of engine and trainer. Entropy is
held against where it began. Length, format and reward are held against where they were when correctness last rose: what
changes while that rises is learning, what changes without it may be a way around.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from dsjax.config import Bounds, NonNegativeFloat, PositiveFloat, PositiveInt, Share

RECOVERED = 0.8  # of what raises an alarm: below it is over
MOST = 5.0  # times the limit that one step can count: one outlier, infinity too, is half an alarm
LARGEST = 1e12  # that is told apart: squares of larger numbers would not be finite for long
SURE = 4.0  # standard errors that a change must have beside its size

Factor = Annotated[float, Bounds(gt=1, le=100)]


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """From where on something is wrong.

    Attributes:
        memory: of the running means, in steps.
        warm_up: steps before entropy, length, format and reward are held against anything.
        entropy_share: of the entropy at the beginning; entropy_floor: in nats; below the larger one it has collapsed.
        length: factor by which texts get longer or shorter.
        rise: of correctness, that makes the present length, format and reward the ones to compare with.
        fall: of correctness, while format is above format_high or has risen by format_rise, or reward by reward_rise.
        kl, kl_old: nats a token, to the reference, and from the policy that wrote to the one that learns.
        dead_groups, unknown: shares of the groups, and of the texts.
        log_prob_gap: nats a token, between engine and trainer. In float32 1e-5 is normal, in bfloat16 1e-2.
    """

    memory: Annotated[float, Bounds(ge=2, lt=1e6)] = 10.0
    warm_up: PositiveInt = 20
    entropy_share: Share = 0.25
    entropy_floor: NonNegativeFloat = 0.02
    length: Factor = 1.5
    rise: PositiveFloat = 0.03
    fall: PositiveFloat = 0.15
    format_high: NonNegativeFloat = 0.9
    format_rise: PositiveFloat = 0.1
    reward_rise: PositiveFloat = 0.1
    kl: PositiveFloat = 1.0
    kl_old: PositiveFloat = 0.1
    dead_groups: Annotated[float, Bounds(gt=0, le=1)] = 0.8
    unknown: Annotated[float, Bounds(gt=0, le=1)] = 0.1
    log_prob_gap: PositiveFloat = 0.05


# Metrics that have a limit: what is said of the running mean and that, and what helps.
LIMITED = {
    "kl": (
        "KL to the reference is {:.3g} nats a token, the limit {:.3g}",
        "the policy is far from what training began with; a lower optim.lr or more weight on KL helps",
    ),
    "kl_old": (
        "KL from the policy that wrote is {:.3g} nats a token, the limit {:.3g}",
        "updates go too far for their samples; fewer epochs or minibatches, or a lower optim.lr help",
    ),
    "dead_groups": (
        "{:.0%} of the groups have equal rewards, the limit is {:.0%}",
        "they teach nothing; other levels, more samples of a prompt or dynamic sampling help",
    ),
    "unknown": (
        "{:.0%} of the rewards are unknown, the limit is {:.0%}",
        "what judges the texts fails; look at the sandbox and the scorers",
    ),
    "log_prob_gap": (
        "log-probabilities of engine and trainer differ by {:.3g} nats a token, the limit is {:.3g}",
        "they do not compute the same model; router replay, float32 or a correction by importance help",
    ),
}
COMPARED = ("correct", "length", "format", "reward")  # with where they were when the first of them last rose


class Finding(NamedTuple):
    """How bad something is (from 1 on it is said), what it is, and what helps."""

    severity: float = 0.0
    what: str = ""
    advice: str = ""


NOTHING = Finding()


class Health:
    """Follows the ``rl/...`` metrics of each step; says once what is wrong, and once when it no longer is.

    What is missing, None or NaN in a step is left out of it. With a curriculum, correctness is its competence, the mean
    over arms: that of the texts falls when harder exercises are asked more often. Where ``curriculum/phase`` changes,
    so do the exercises, and what is compared is compared within the new phase only.

    Args:
        cfg: limits.
        state: plain data, saved with the run; empty at its beginning. Changed in place.
    """

    def __init__(self, cfg: HealthConfig, state: dict[str, Any]):
        self._cfg, self._state = cfg, state
        for name in ("levels", "means", "anchor", "raised"):
            state.setdefault(name, {})

    def observe(self, metrics: Mapping[str, Any]) -> list[str]:
        """Takes the numbers of one step; what there is to say about them."""
        self._follow(metrics)
        found = {"entropy": self._entropy(), "length": self._length()}
        found |= {"format": self._format(), "reward": self._reward()}
        found |= {name: self._limited(name, *words) for name, words in LIMITED.items()}
        said, raised = [], self._state["raised"]
        for name, finding in found.items():
            if finding.severity >= 1 and not raised.get(name):
                raised[name] = True
                said.append(f"warning: {finding.what}: {finding.advice} (docs/rl_health.md)")
            elif finding.severity < RECOVERED and raised.get(name):
                raised[name] = False
                said.append(f"over again: {finding.what}")
        return said

    # ------------------------------------------------------------ what is followed

    def _follow(self, metrics: Mapping[str, Any]) -> None:
        cfg, state = self._cfg, self._state
        phase = _number(metrics, "curriculum/phase")
        if phase is not None and phase != state.get("phase", phase):
            state["anchor"] = {}
            for name in COMPARED:
                state["means"].pop(name, None)
        if phase is not None:
            state["phase"] = phase
        for name in LIMITED:
            x = _number(metrics, f"rl/{name}")
            if x is not None:
                x = min(max(x, 0.0), MOST * getattr(cfg, name))
                state["levels"][name] = state["levels"].get(name, 0.0) * (1 - 1 / cfg.memory) + x / cfg.memory
        for name in ("entropy", *COMPARED):
            of_phase = name == "correct" and phase is not None
            x = _number(metrics, "curriculum/competence" if of_phase else f"rl/{name}")
            if x is not None and math.isfinite(x):
                x = min(max(x, -LARGEST), LARGEST)
                state["means"][name] = _followed(state["means"].get(name), x, cfg.memory)
        if "start" not in state and self._is_warm("entropy"):
            state["start"] = self._mean("entropy")
        self._renew_anchor()

    def _renew_anchor(self) -> None:
        """Length, format and reward of now are those to compare with, if correctness has risen or is newly known."""
        anchor = self._state["anchor"]
        if not self._is_warm("correct"):
            return
        correct = self._mean("correct")
        if not anchor or correct > anchor["correct"] + max(self._cfg.rise, SURE * self._error("correct")):
            anchor.clear()
        for name in COMPARED:
            if name not in anchor and self._is_warm(name):
                anchor[name] = self._mean(name)

    def _is_warm(self, name: str) -> bool:
        return name in self._state["means"] and self._state["means"][name]["steps"] >= self._cfg.warm_up

    def _mean(self, name: str) -> float:
        found = self._state["means"][name]
        return found["sum"] / found["weight"]

    def _error(self, name: str) -> float:
        """Standard error of a difference of two means at different times, from how much neighbouring steps differ, to
        which a slow change adds nothing."""
        found = self._state["means"][name]
        return math.sqrt(2 * found["jumps"] / max(found["steps"] - 1, 1) / (2 * self._cfg.memory - 1))

    def _change(self, name: str) -> float | None:
        """Of the mean since correctness last rose, 0 if it may be noise; None: there is nothing to compare with."""
        if name not in self._state["anchor"] or not self._is_warm(name):
            return None
        change = self._mean(name) - self._state["anchor"][name]
        return change if abs(change) > SURE * self._error(name) else 0.0

    # ------------------------------------------------------------ alarms

    def _entropy(self) -> Finding:
        if "start" not in self._state:
            return NOTHING
        start, now = self._state["start"], self._mean("entropy")
        least = max(self._cfg.entropy_share * start, self._cfg.entropy_floor)
        return Finding(
            least / now if now > 0 else math.inf if least else 0.0,
            f"entropy is {now:.3g} nats a token, at the beginning it was {start:.3g}",
            "the policy hardly explores any more; a lower optim.lr, an entropy bonus, a higher upper clip or KL to the"
            " reference help",
        )

    def _length(self) -> Finding:
        change = self._change("length")
        if change is None:
            return NOTHING
        before, now = self._state["anchor"]["length"], self._mean("length")
        ratio = max(now / before, before / max(now, 1e-9)) if change and before > 0 else 1.0
        return Finding(
            math.log(ratio) / math.log(self._cfg.length),
            f"texts have {now:.1f} tokens, {before:.1f} when correctness last rose; it is {self._mean('correct'):.1%}",
            "length is what is rewarded; weigh it less, or judge the whole text and not its end alone",
        )

    def _fall(self) -> float:
        """Of correctness, 1: as much as is too much."""
        return max(-(self._change("correct") or 0.0), 0.0) / self._cfg.fall

    def _correct_fell(self) -> str:
        return f"correctness went from {self._state['anchor']['correct']:.1%} to {self._mean('correct'):.1%}"

    def _format(self) -> Finding:
        change = self._change("format")
        if change is None:
            return NOTHING
        now = self._mean("format")
        suspect = now >= self._cfg.format_high or change >= self._cfg.format_rise
        return Finding(
            self._fall() * suspect,
            f"the format reward is {now:.3g} while {self._correct_fell()}",
            "form is learned in place of substance; give format less weight, or to correct texts alone",
        )

    def _reward(self) -> Finding:
        change = self._change("reward")
        if change is None:
            return NOTHING
        now = self._mean("reward")
        return Finding(
            self._fall() * (change >= self._cfg.reward_rise),
            f"the reward went from {now - change:.3g} to {now:.3g} while {self._correct_fell()}",
            "it is earned by something else; read texts that are wrong and have a high reward",
        )

    def _limited(self, name: str, what: str, advice: str) -> Finding:
        """``what`` has a place for the running mean and one for its limit."""
        level, limit = self._state["levels"].get(name, 0.0), getattr(self._cfg, name)
        return Finding(level / limit, what.format(level, limit), advice)


def _followed(before: dict[str, float] | None, x: float, memory: float) -> dict[str, float]:
    """A running mean with one value more, and how much neighbours differ."""
    if before is None:
        return {"sum": x, "weight": 1.0, "last": x, "jumps": 0.0, "steps": 1}
    keep = 1 - 1 / memory
    return {
        "sum": keep * before["sum"] + x,
        "weight": keep * before["weight"] + 1,
        "last": x,
        "jumps": before["jumps"] + (x - before["last"]) ** 2 / 2,
        "steps": before["steps"] + 1,
    }


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric, if it is there and is a number; infinity is one."""
    value = metrics.get(name)
    return None if value is None or math.isnan(float(value)) else float(value)
