"""The alarm for a router that has collapsed: a shared expert can keep the loss falling while the others do nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

THRESHOLD = 0.4  # spread below which a router counts as collapsed
RECOVERED = 0.5  # spread above which it does no longer
MEMORY = 0.98  # of the running mean: 46 steps from balance to the threshold with all tokens at the same experts


def spread(load_entropy: float, num_experts: int, top_k: int) -> float:
    """Where a load entropy lies between that of the same ``top_k`` experts for all tokens, 0, and of balance, 1."""
    low, high = math.log(top_k), math.log(num_experts)
    return (load_entropy - low) / (high - low)


class CollapseAlarm:
    """Follows the least load entropy of each group's layers; says so once when its running mean gets too low.

    Args:
        experts: (num_experts, top_k) of each group; where both are equal, nothing can collapse.
        state: plain data, saved with the run; empty at its beginning. Changed in place.
    """

    def __init__(self, experts: Mapping[str, tuple[int, int]], state: dict[str, Any]):
        self._experts = {name: (E, k) for name, (E, k) in experts.items() if k < E}
        self._state = state
        for name in self._experts:
            state.setdefault(name, {"spread": 1.0, "collapsed": False})

    def observe(self, metrics: Mapping[str, Any]) -> list[str]:
        """Takes the numbers of one step; what there is to say about them."""
        said = []
        for name, (E, k) in self._experts.items():
            if f"router/{name}/min_load_entropy" not in metrics:
                continue  # another loss function
            entropy, state = float(metrics[f"router/{name}/min_load_entropy"]), self._state[name]
            state["spread"] = MEMORY * state["spread"] + (1 - MEMORY) * spread(entropy, E, k)
            if not state["collapsed"] and state["spread"] < THRESHOLD:
                state["collapsed"] = True
                dead = float(metrics[f"router/{name}/dead_experts"])
                said.append(
                    f"warning: the router of {name} has collapsed: the tokens of one layer go to about"
                    f" {math.exp(entropy):.1f} of {E} experts, {k} each; {dead:.0%} of the group's experts got no token"
                    " (docs/routing.md says what helps)"
                )
            elif state["collapsed"] and state["spread"] > RECOVERED:
                state["collapsed"] = False
                said.append(f"the router of {name} has recovered: it uses about {math.exp(entropy):.1f} of {E} experts")
        return said
