"""Generation on a CPU: decoding at several batch sizes and prefill, beside Hugging Face's transformers.

As in :mod:`benchmarks.timing` each contender is a process of its own, warmed up, and takes its turn while the others
wait. All read the same checkpoint of random weights from disk, in float32, and continue the same prompts greedily; the
tokens are compared first. What is timed is what each calls from its own interface: dsjax's engine, and ``generate`` of
transformers with the cache that is faster there. A decode step is timed from the first token of a batch to the last,
prefill up to the first token.

    python -m benchmarks.generate serve dsjax@FOLDER      # a worker: a case a line, seconds back
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.generate_models import MODELS, cache_bytes, write_checkpoint
from benchmarks.timing import ROOT
from benchmarks.turns import Worker, by_turns, ratio, spread

PROMPT, NEW, LONG = 64, 64, 512  # tokens: of a prompt to decode behind, decoded, of a prompt to prefill
CASES = {"decode 1": 1, "decode 8": 8, "decode 64": 64, "prefill": 1}  # batch sizes
HUGGING_FACE = {"dynamic": "hf_dynamic", "static": "hf_static"}


def compare(
    *, models: tuple[str, ...] = tuple(MODELS), rounds: int = 5, torch_python: str = "", new: int = NEW
) -> dict[str, Any]:
    """All figures; seconds are medians with the least and the most, ratios those of rounds, with an interval of 95 %.

    Args:
        models: which of the models.
        rounds: turns of each contender in each case; the order is reversed every other round.
        torch_python: an interpreter with PyTorch and transformers; empty: without them.
        new: tokens to decode.
    """
    pythons = {"dsjax": sys.executable}
    if torch_python:
        pythons |= dict.fromkeys(HUGGING_FACE.values(), torch_python)
    figures: dict[str, Any] = {"prompt": PROMPT, "new": new, "long_prompt": LONG, "dtype": "float32", "rounds": rounds}
    figures["cache_bytes_per_token"] = cache_bytes()
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(model, pathlib.Path(folder))
            figures[model] = _compare_one(folder, pythons, rounds, new)
    return figures


def _compare_one(folder: str, pythons: dict[str, str], rounds: int, new: int) -> dict[str, Any]:
    found: dict[str, Any] = {"first_token": first_token(folder)}
    workers = {name: Worker(f"{name}@{folder}", python, "benchmarks.generate") for name, python in pythons.items()}
    try:
        found["equal_tokens"] = _equal_tokens(workers, new)
        for case, batch in CASES.items():
            found[case] = _turns(workers, case, rounds, new)
            for name in workers:
                tokens = LONG if case == "prefill" else batch * (new - 1)
                found[case][name]["tokens_per_second"] = tokens / found[case][name]["median_s"]
    finally:
        for worker in workers.values():
            worker.close()
    return found


def first_token(folder: str) -> dict[str, float]:
    """Seconds from the start of ``dsjax generate`` to its first token: the first time, and with compiled programs."""
    words = ["--prompt", "some words", "--max-tokens", "1", "--temperature", "0", "--quiet"]
    command = [sys.executable, "-m", "dsjax", "generate", folder, *words]
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "DSJAX_CACHE": cache}
        for when in ("first", "cached"):
            begin = time.perf_counter()
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            found[when] = time.perf_counter() - begin
    return found


def first_token_of(model: str) -> dict[str, float]:
    """The same for one of :data:`benchmarks.generate_models.SHAPES`."""
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        write_checkpoint(model, pathlib.Path(folder))
        return first_token(folder)


def _equal_tokens(workers: dict[str, Worker], new: int) -> dict[str, float]:
    """The share of greedy tokens that are dsjax's, up to the first that is not, of 8 prompts."""
    rows = {name: worker.ask(f"tokens 8 {new}") for name, worker in workers.items()}
    shares = {}
    for name, theirs in rows.items():
        equal = np.cumprod(np.array(theirs) == np.array(rows["dsjax"]), axis=1)
        shares[name] = float(equal.mean())
    return shares


def _turns(workers: dict[str, Worker], case: str, rounds: int, new: int) -> dict[str, Any]:
    calls = {name: functools.partial(worker.ask, f"{case} {new}") for name, worker in workers.items()}
    seconds = by_turns(calls, rounds)
    found: dict[str, Any] = {name: spread(s) for name, s in seconds.items()}
    theirs = [name for name in HUGGING_FACE.values() if name in workers]
    for name in theirs:  # how many times their throughput dsjax has
        times = ratio(seconds[name], seconds["dsjax"])
        found[name] |= dict(zip(("dsjax_times_it", "interval"), times, strict=True))
    if theirs:
        found["fastest_hugging_face"] = min(theirs, key=lambda name: found[name]["median_s"])
    return found


def table(figures: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [f"{'model, case':24} {'contender':12} {'tokens/s':>9}  {'dsjax has, times it':>24}"]
    for model in (name for name in MODELS if name in figures):
        for case in CASES:
            for name, t in figures[model][case].items():
                if isinstance(t, dict):
                    times = t.get("dsjax_times_it")
                    said = "" if times is None else f"{times:.2f} ({t['interval'][0]:.2f} to {t['interval'][1]:.2f})"
                    lines.append(f"{model + ', ' + case:24} {name:12} {t['tokens_per_second']:9.1f}  {said:>24}")
        first = figures[model]["first_token"]
        lines.append(f"{model}: `dsjax generate` has its first token after {first['first']:.1f} s the first time,")
        lines.append(
            f"    after {first['cached']:.1f} s with compiled programs; equal tokens: {figures[model]['equal_tokens']}"
        )
    for name, size in figures["cache_bytes_per_token"].items():
        lines.append(f"cache of {name}: {size:,.0f} bytes a token")
    return "\n".join(lines)


# ---------------------------------------------------------------- within a worker


def prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """Random ids, the same for all contenders; none is a prefix of another."""
    rows = np.random.default_rng(batch * 10_000 + length).integers(10, vocab_size, (batch, length))
    return rows.tolist()


def _dsjax(folder: str) -> Callable[[str, int, int, int], tuple[float, list[list[int]]]]:
    """(case, batch, length of prompts, new tokens) -> seconds and tokens."""
    import dsjax
    from dsjax.infer.batching import Engine
    from dsjax.infer.requests import Request
    from dsjax.infer.sampling import SamplingConfig
    from dsjax.runtime import configure

    configure()
    model = dsjax.load(folder)

    @functools.cache
    def engine(batch: int, positions: int) -> Engine:
        return Engine(
            model.graph, model.params, end_ids=(), max_length=positions, batch_size=batch, chunk=LONG, steps=16
        )

    def run(case: str, batch: int, length: int, new: int) -> tuple[float, list[list[int]]]:
        made = engine(batch, -(-(length + new) // 64) * 64)
        while made.prefixes.forget():
            pass
        begin = time.perf_counter()
        numbers = [
            made.submit(Request(p, new, SamplingConfig(0.0))) for p in prompts(batch, length, model.config.vocab_size)
        ]
        tokens: dict[int, list[int]] = {number: [] for number in numbers}
        first, last, before, at_last = 0.0, 0.0, 0, 0
        while made.busy:
            for event in made.step():
                tokens[event.request] += event.tokens
            now, count = time.perf_counter(), sum(map(len, tokens.values()))
            if not first and all(tokens.values()):
                first, before = now, count
            if not last and any(len(row) == new for row in tokens.values()):
                last, at_last = now, count
        if case == "prefill":
            return first - begin, list(tokens.values())
        # While all rows are decoded; of as many tokens as the others decode behind their first ones.
        return (last - first) * batch * (new - 1) / max(at_last - before, 1), list(tokens.values())

    return run


def _serve(contender: str, folder: str) -> None:
    """For each case read from stdin the seconds, as a JSON line; ``tokens BATCH NEW``: the tokens."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a contender prints goes to stderr.
    if contender == "dsjax":
        run = _dsjax(folder)
    else:
        from benchmarks.torch_generate import make

        run = make(next(cache for cache, name in HUGGING_FACE.items() if name == contender), folder)
    for line in sys.stdin:
        *case, new = line.split()
        if case[0] == "tokens":
            answer: Any = run("decode", int(case[1]), PROMPT, int(new))[1]
        elif case[0] == "prefill":
            answer = run("prefill", 1, LONG, 1)[0]
        else:
            answer = run("decode", int(case[1]), PROMPT, int(new))[0]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", contender]:
            _serve(*contender.split("@", 1))
        case _:
            sys.exit(__doc__)
