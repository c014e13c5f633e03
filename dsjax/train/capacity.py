"""Dynamic capacity: a controller that chooses the factor, and the steps compiled for the factors that it chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dsjax.nn.moe import DynamicCapacity


def drop_rate_name(factor: float) -> str:
    """The metric that says which share of a step's pairs this capacity factor drops or would have dropped."""
    return f"capacity/drop_rate_at_{factor}"


class Controller:
    """Chooses the capacity factor of each step from the drop rates of the steps before.

    The loads of a step say what each factor of the list would have dropped, whichever was in force. Of the last
    ``window`` steps, take for each factor the ``quantile`` of its drop rates. The next factor is the smallest one for
    which that is at most the target, or (1 - hysteresis) times the target if the factor is smaller than the one in
    force.

    A step's numbers are looked at while the next one runs, or before, if they are logged or saved. Which one it is must
    not matter; so a step's factor depends on the numbers up to the step before the last.

    Args:
        cfg: the list and the rules.
        state: plain data, saved with the run; empty at its beginning. Changed in place.
    """

    def __init__(self, cfg: DynamicCapacity, state: dict[str, Any]):
        self._cfg, self._state = cfg, state
        if not state:
            state |= {"factor": cfg.factors[-1], "before": cfg.factors[-1], "steps": 0, "drop_rates": []}

    def factor(self, iteration: int) -> float:
        """For the step that follows ``iteration`` others."""
        return self._state["before" if self._state["steps"] == iteration else "factor"]

    def observe(self, metrics: Mapping[str, Any] | None) -> None:
        """The numbers of the next step, each once and in order; None: they were bad, and say nothing."""
        state = self._state
        if metrics is not None:
            rates = [float(metrics[drop_rate_name(factor)]) for factor in self._cfg.factors]
            state["drop_rates"] = [*state["drop_rates"], rates][-self._cfg.window :]
        state["before"] = state["factor"]
        state["factor"] = self._choice()
        state["steps"] += 1

    def _choice(self) -> float:
        cfg, now, rates = self._cfg, self._state["factor"], self._state["drop_rates"]
        if len(rates) < cfg.window:
            return now
        found = np.quantile(np.array(rates), cfg.quantile, axis=0, method="inverted_cdf")
        for factor, rate in zip(cfg.factors, found, strict=True):
            if rate <= cfg.target_drop_rate * (1 - cfg.hysteresis if factor < now else 1):
                return factor
        return cfg.factors[-1]


class CompiledSteps:
    """A training step for each kind and shape of batch and each capacity factor, compiled when it is first needed:
    never more than there are kinds, times the length of the list.

    Args:
        compile_for: (batch, factor) -> compiled step.
        first: a batch, or its shapes, of the kind that there are steps for.
        known: those, by capacity factor.
        note: told of each compilation.
    """

    def __init__(
        self,
        compile_for: Callable[[Any, float | None], Any],
        first: Any,
        known: dict[float | None, Any],
        note: Callable[[str], None],
    ):
        self._compile_for, self._note = compile_for, note
        self._steps = {(kind_of(first), factor): step for factor, step in known.items()}

    def __call__(self, state: Any, batch: Any, total_steps: Any, factor: float | None = None) -> tuple[Any, Any]:
        kind = kind_of(batch), factor
        if kind not in self._steps:
            what = f"a {type(batch).__name__} of {batch.tokens_BT.shape}"
            what = what if factor is None else f"capacity factor {factor:g}"
            self._note(f"{what}: compiling a step for it")
            self._steps[kind] = self._compile_for(batch, factor)
        return self._steps[kind](state, batch, total_steps)


def kind_of(batch: Any) -> tuple[Any, ...]:
    """What a step is compiled for: its structure and the shapes of its arrays."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple(leaf.shape for leaf in leaves)
