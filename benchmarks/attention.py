"""Segmented attention on a CPU against full causal attention: of JAX and, if asked for, of PyTorch.

As in :mod:`benchmarks.timing` each contender is a process of its own, warmed up, and takes its turn while the others
wait; each time is that of one call. The contenders compute different things: segmented attention leaves out what lies
behind a query's own segment and outside the tails, which at these lengths is 0.56 and 0.63 of the causal pairs.

    python -m benchmarks.attention serve segmented      # a worker: a case a line, seconds back
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.turns import Worker, by_turns, spread

HEADS, WIDTH, SEGMENT, WINDOW, TOP = 8, 64, 1024, 512, 8
# Of one call: positions, and whether the gradients are computed as well.
AGAINST_FULL = {"forward_8192": (8192, False), "forward_backward_4096": (4096, True)}
TOP_LENGTHS = (16384, 65536)
TOP_CASES = {f"top_segments {TOP}, W = {size}": size for size in (SEGMENT, 256)}  # half of each segment kept
MEMORY_LENGTHS = (8192, 16384, 32768, 65536)


def compare(*, rounds: int = 5, torch_python: str = "") -> dict[str, Any]:
    """All figures; seconds are medians with the least and the most.

    Args:
        rounds: turns of each contender in each case; the order is reversed every other round.
        torch_python: an interpreter with PyTorch; empty: without it.
    """
    pythons = {"segmented": sys.executable, "jax_dense": sys.executable}
    if torch_python:
        pythons["torch"] = torch_python
    workers = {name: Worker(name, python, "benchmarks.attention") for name, python in pythons.items()}
    shape = {"batch": 1, "heads": HEADS, "width": WIDTH, "segment_size": SEGMENT, "window": WINDOW, "dtype": "float32"}
    figures: dict[str, Any] = {"shape": shape, "rounds": rounds}
    try:
        for case in AGAINST_FULL:
            times = _times({name: functools.partial(worker.ask, case) for name, worker in workers.items()}, rounds)
            figures[case] = times
            mine = times["segmented"]["median_s"]
            figures[case]["times_faster"] = {k: v["median_s"] / mine for k, v in times.items() if k != "segmented"}
        ask = workers["segmented"].ask
        for case, size in TOP_CASES.items():
            calls: dict[str, Callable[[], float]] = {
                str(length): functools.partial(ask, f"{length} of {size}") for length in TOP_LENGTHS
            }
            times = figures[case] = _times(calls, rounds)
            few, many = (times[str(length)]["median_s"] for length in TOP_LENGTHS)
            pairs = [_visible_pairs(length, size) for length in TOP_LENGTHS]
            times["ratio"], times["ratio_of_visible_pairs"] = many / few, pairs[1] / pairs[0]
        figures["temporary_bytes"] = ask("memory")
    finally:
        for worker in workers.values():
            worker.close()
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [f"{'case':24} {'contender':12} {'median s':>9} {'least':>9} {'most':>9} {'slower by':>9}"]
    for case in (*AGAINST_FULL, *TOP_CASES):
        times = {
            name: value for name, value in figures[case].items() if isinstance(value, dict) and "median_s" in value
        }
        first = next(iter(times.values()))["median_s"]
        for name, t in times.items():
            seconds = f"{t['median_s']:9.3f} {t['least_s']:9.3f} {t['most_s']:9.3f}"
            lines.append(f"{case:24} {name:12} {seconds} {t['median_s'] / first:9.2f}")
    for case in TOP_CASES:
        ratios = f"{figures[case]['ratio']:.2f} times the time for {figures[case]['ratio_of_visible_pairs']:.2f} times"
        lines.append(f"{case}, {TOP_LENGTHS[0]} -> {TOP_LENGTHS[1]}: {ratios} the visible pairs")
    lines.append(f"{'temporary MiB':24} " + " ".join(f"{length:>9}" for length in MEMORY_LENGTHS))
    for what, by_length in figures["temporary_bytes"].items():
        lines.append(f"{what:24} " + " ".join(f"{size / 2**20:9.1f}" for size in by_length.values()))
    return "\n".join(lines)


def _times(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    return {name: spread(seconds) for name, seconds in by_turns(calls, rounds).items()}


def _visible_pairs(length: int, segment_size: int) -> int:
    from pallas_kernels.segmented_attention import Segments

    return Segments(segment_size, segment_size // 2, top=TOP).visible_pairs(length)


# ---------------------------------------------------------------- within a worker


def _serve(contender: str) -> None:
    """For each case read from stdin the seconds of one call, as a JSON line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a contender prints goes to stderr.
    make = functools.cache(_torch if contender == "torch" else functools.partial(_jax, contender))
    for line in sys.stdin:
        case = line.strip()
        if case == "memory":
            print(json.dumps(_memory()), file=answers, flush=True)
            continue
        call = make(case)
        start = time.perf_counter()
        call()
        print(json.dumps(time.perf_counter() - start), file=answers, flush=True)


def _arrays(length: int) -> list[Any]:
    """q, k, v and the gradient of the output."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.normal(size=(1, length, HEADS, WIDTH)).astype(np.float32) for _ in range(4)]


def _attention(contender: str, top_segments: int | None = None, segment_size: int = SEGMENT) -> Callable:
    import jax

    from pallas_kernels.segmented_attention import segmented_attention

    if contender == "jax_dense":
        return functools.partial(jax.nn.dot_product_attention, is_causal=True)
    return functools.partial(segmented_attention, segment_size=segment_size, top_segments=top_segments)


def _with_gradients(attend: Callable) -> Callable:
    import jax

    def both(q: Any, k: Any, v: Any, dout: Any) -> tuple[Any, Any]:
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(dout)

    return both


def _jax(contender: str, case: str) -> Callable[[], None]:
    import jax

    if case in AGAINST_FULL:
        length, gradients = AGAINST_FULL[case]
        attend = _attention(contender)
    else:
        (length, size), gradients = map(int, case.split(" of ")), False
        attend = _attention(contender, TOP, size)
    arrays = [jax.numpy.asarray(x) for x in _arrays(length)]
    call = jax.jit(_with_gradients(attend)) if gradients else jax.jit(lambda q, k, v, _: attend(q, k, v))
    return lambda: jax.block_until_ready(call(*arrays))


def _memory() -> dict[str, dict[str, int]]:
    """Bytes beside arguments and results, by what is computed and by length; compiled, not run."""
    import jax

    found: dict[str, dict[str, int]] = {}
    for top_segments in (None, TOP):
        attend = _attention("segmented", top_segments)
        call = jax.jit(_with_gradients(attend))
        sizes = found["all tails" if top_segments is None else f"top_segments {TOP}"] = {}
        for length in MEMORY_LENGTHS:
            x = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jax.numpy.float32)
            compiled: Any = call.lower(x, x, x, x).compile()
            sizes[str(length)] = compiled.memory_analysis().temp_size_in_bytes
    return found


def _torch(case: str) -> Callable[[], None]:
    import torch

    length, gradients = AGAINST_FULL[case]
    q, k, v, dout = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in _arrays(length))
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)

    def call() -> None:
        with torch.set_grad_enabled(gradients):
            inputs = [x.detach().requires_grad_(gradients) for x in (q, k, v)]
            out = attend(*inputs)
            if gradients:
                out.backward(dout)

    return call


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", contender]:
            _serve(contender)
        case _:
            sys.exit(__doc__)
