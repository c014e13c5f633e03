"""What is timed and how: the two benchmark models, and contenders timed in alternation.

Each contender lives in its own process, started and warmed up one after another; then, round by
round, each in turn takes a few steps while the others wait. So a slow spell of the machine
hits all of them, and none pays for another's threads, allocator or compiler.

A contender is a module with ``make(name) -> (state, step_fn, make_batch)``, where
``state, loss = step_fn(state, batch)`` and ``float(loss)`` waits for the step.

    python -m benchmarks.timing compare dense bare_jax torch      # a table as JSON
    python -m benchmarks.timing peak                              # the machine's matmul peak
"""

import dataclasses
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

CONTENDERS = {
    "dsjax": "benchmarks.dsjax_model",
    "dsjax_returning_memory": "benchmarks.dsjax_model:make_returning_memory",
    "bare_jax": "benchmarks.bare_jax",
    "torch": "benchmarks.torch_model",
    "torch_compile": "benchmarks.torch_model:make_compiled",
}
ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One benchmark model and its batch."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    num_experts: int = 0
    experts_per_token: int = 0
    batch_size: int = 8
    length: int = 256

    @property
    def d_head(self) -> int:
        return self.d_model // self.num_heads

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.length

    @property
    def flops_per_token(self) -> int:
        """6 per weight that a token is multiplied by, and 12 L T D for attention (counted whole, not causal)."""
        ff = 3 * self.d_model * self.d_ff
        if self.num_experts:
            ff = self.experts_per_token * ff + self.d_model * self.num_experts
        weights = self.num_layers * (4 * self.d_model**2 + ff) + self.d_model * self.vocab_size
        return 6 * weights + 12 * self.num_layers * self.length * self.d_model


SPECS = {
    "dense": Spec(vocab_size=4096, d_model=256, num_layers=8, num_heads=4, d_ff=1024),
    "moe": Spec(
        vocab_size=1024, d_model=128, num_layers=4, num_heads=4, d_ff=256, num_experts=8, experts_per_token=2,
        batch_size=2,
    ),
}  # fmt: skip


def make_batch(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens in two documents per row, every token weighted one."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, spec.vocab_size, (spec.batch_size, spec.length + 1), dtype=np.int32)
    cuts = rng.integers(1, spec.length, (spec.batch_size, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "documents": (np.arange(spec.length) >= cuts).astype(np.int32),
        "weights": np.ones((spec.batch_size, spec.length), np.float32),
    }


def matmul_peak_gflops(repeats: int = 15) -> float:
    """The best median rate, in GFLOP/s, of a jitted f32 matrix product over three sizes that reach the peak."""
    import jax
    import jax.numpy as jnp

    best = 0.0
    for m, k, n in (1024, 1024, 1024), (2048, 256, 2048), (2048, 1024, 1024):
        x, y = jnp.full((m, k), 0.5), jnp.full((k, n), 0.5)
        product = jax.jit(jnp.matmul)
        product(x, y).block_until_ready()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(4):
                out = product(x, y)
            out.block_until_ready()
            seconds.append((time.perf_counter() - start) / 4)
        best = max(best, 2 * m * k * n / statistics.median(seconds) / 1e9)
    return best


def _serve(make_path: str, model: str) -> None:
    """The worker: one step, then for each number read from stdin that many timed steps; answers are JSON lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a contender prints goes to stderr.
    module, _, function = make_path.partition(":")
    state, step, make_batch = getattr(importlib.import_module(module), function or "make")(model)
    batch = make_batch()

    def timed_step():
        nonlocal state
        start = time.perf_counter()
        state, loss = step(state, batch)
        loss = float(loss)
        return time.perf_counter() - start, loss

    _, loss = timed_step()
    print(json.dumps({"first_loss": loss}), file=answers, flush=True)
    for line in sys.stdin:
        results = [timed_step() for _ in range(int(line))]
        # Linux counts ru_maxrss in KiB.
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"seconds": [s for s, _ in results], "loss": results[-1][1], "peak_bytes": peak_bytes}
        print(json.dumps(answer), file=answers, flush=True)


class _Worker:
    """A contender's process. ``first_step_seconds`` counts from its start: imports, compilation and one step."""

    def __init__(self, name: str, model: str, python: str):
        self.name = name
        command = [python, "-m", "benchmarks.timing", "serve", CONTENDERS[name], model]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        start = time.perf_counter()
        self.process: Any = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.first_loss = self._answer()["first_loss"]
        self.first_step_seconds = time.perf_counter() - start

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.name} contender stopped with exit code {self.process.wait()}")
        return json.loads(line)

    def steps(self, count: int) -> dict:
        print(count, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(
    names: list[str], model: str, *, rounds: int = 5, steps: int = 3, pythons: dict[str, str] | None = None
) -> dict:
    """Times the contenders in alternation; the keys that ``scripts/bench train`` writes.

    Args:
        names: keys of ``CONTENDERS``.
        model: ``dense`` or ``moe``.
        rounds: how often each contender has its turn; the order is reversed every other round.
        steps: steps in a turn, after one that is not counted.
        pythons: another interpreter for a contender (PyTorch may live in its own environment).

    Returns:
        Per contender ``tokens_per_second`` (from the median of all counted steps), ``matmul_peak_share``,
        ``peak_bytes`` (resident set), ``first_step_seconds``, ``first_loss``; and ``matmul_peak_gflops``, measured
        before and after (the better counts).
    """
    spec, pythons = SPECS[model], pythons or {}
    peaks = [_peak_in_subprocess()]
    workers: list[_Worker] = []
    seconds: dict[str, list[float]] = {name: [] for name in names}
    last: dict[str, dict] = {}
    try:
        for name in names:
            workers.append(_Worker(name, model, pythons.get(name, sys.executable)))
        for turn in range(rounds):
            for worker in workers if turn % 2 == 0 else reversed(workers):
                last[worker.name] = worker.steps(steps + 1)
                seconds[worker.name] += last[worker.name]["seconds"][1:]
    finally:
        for worker in workers:
            worker.close()
    peaks.append(_peak_in_subprocess())
    results: dict = {"model": model, "rounds": rounds, "matmul_peak_gflops": max(peaks)}
    for worker in workers:
        rate = spec.tokens_per_step / statistics.median(seconds[worker.name])
        results[worker.name] = {
            "tokens_per_second": rate,
            "matmul_peak_share": rate * spec.flops_per_token / (max(peaks) * 1e9),
            "peak_bytes": last[worker.name]["peak_bytes"],
            "first_step_seconds": worker.first_step_seconds,
            "first_loss": worker.first_loss,
        }
    return results


def _peak_in_subprocess() -> float:
    """The peak from a process of its own, so that this one starts no threads."""
    command = [sys.executable, "-m", "benchmarks.timing", "peak"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return float(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", make_path, model]:
            _serve(make_path, model)
        case ["peak"]:
            print(matmul_peak_gflops())
        case ["compare", model, *names]:
            print(json.dumps(compare(names, model), indent=2))
        case _:
            sys.exit(__doc__)
