"""Fault injection: stop, break and damage a run at every place that can be named, and look at what is left."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a series of faults came to.

    Attributes:
        name: what has to hold.
        n: how many faults were tried.
        failures: a sentence for each one that broke it.
        seconds: that it all took.
        mutant: what the same check reports with the defence off; empty if that was not tried.
    """

    name: str
    n: int
    failures: tuple[str, ...]
    seconds: float
    mutant: str = ""
