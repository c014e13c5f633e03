"""Contenders that take turns: so a slow spell of the machine hits all of them, and none pays for another's threads."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.timing import ROOT


class Worker:
    """A contender's process (``python -m MODULE serve CONTENDER``), which answers each line with one of JSON."""

    def __init__(self, contender: str, python: str, module: str):
        command = [python, "-m", module, "serve", contender]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        self.contender = contender
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, case: str) -> Any:
        """Its answer; RuntimeError if there will be none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(case, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.contender} contender stopped with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Lets it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def by_turns(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each call gives in each round, after one that is not counted (it compiles); each other round backwards."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for number in range(rounds):
        for name in list(calls) if number % 2 == 0 else reversed(list(calls)):
            found[name].append(calls[name]())
    return found


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median_s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)}


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, list[float]]:
    """The median over rounds of over / under, and its 95 % bootstrap interval over rounds."""
    by_round = np.array(over) / np.array(under)
    again = np.random.default_rng(0).choice(by_round, (5000, len(by_round)))
    return float(np.median(by_round)), np.quantile(np.median(again, axis=1), [0.025, 0.975]).tolist()
