"""One MoE layer on a CPU: router, dispatch, experts and combine, beside the usual form in JAX and Hugging Face's.

As in :mod:`benchmarks.timing` each contender is a process of its own, warmed up, and takes its turn while the others
wait. All have the same weights and the same inputs, so the same routing, and drop no token; their outputs and the
gradients of the inputs are compared first. Routing is balanced as far as a random router is, or skewed: half of the
tokens have one expert among theirs, which hardly any of the others has.

    python -m benchmarks.moe serve dsjax      # a worker: a case a line, seconds back
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.turns import Worker, by_turns, ratio, spread

TOKENS, D_MODEL, D_FF, EXPERTS, TOP_K = 2048, 256, 512, 16, 2
CASES = {
    f"{what}, {routing}": (routing, gradients)
    for routing in ("balanced", "skewed")
    for what, gradients in (("forward", False), ("forward + backward", True))
}
# Its third one, ``batched_mm``, copies an expert's weights for each pair: 9 s forward and 26 s with backward.
HUGGING_FACE = {name: f"hf_{name}" for name in ("eager", "grouped_mm")}
TOLERANCE = 1e-4  # of the largest value: sums of 512 float32 products in another order, three times over


def compare(*, rounds: int = 15, torch_python: str = "") -> dict[str, Any]:
    """All figures; seconds are medians with the least and the most, ratios those of rounds, with an interval of 95 %.

    Args:
        rounds: turns of each contender in each case; the order is reversed every other round.
        torch_python: an interpreter with PyTorch and transformers; empty: without them.
    """
    pythons = {"dsjax": sys.executable, "ragged_dot": sys.executable}
    if torch_python:
        pythons |= dict.fromkeys(HUGGING_FACE.values(), torch_python)
    shape = {"tokens": TOKENS, "d_model": D_MODEL, "d_ff": D_FF, "experts": EXPERTS, "top_k": TOP_K}
    figures: dict[str, Any] = {"shape": shape, "dtype": "float32", "rounds": rounds}
    workers = {name: Worker(name, python, "benchmarks.moe") for name, python in pythons.items()}
    try:
        figures["loads"] = {routing: loads(routing).tolist() for routing in ("balanced", "skewed")}
        figures["largest_difference"] = _differences(workers)
        for case in CASES:
            figures[case] = _turns(workers, case, rounds)
    finally:
        for worker in workers.values():
            worker.close()
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [f"{'case':30} {'contender':15} {'median ms':>9} {'least':>8} {'most':>8}  {'dsjax takes, of it':>18}"]
    for case in CASES:
        for name, t in figures[case].items():
            if not isinstance(t, dict):
                continue
            spread = f"{1e3 * t['median_s']:9.1f} {1e3 * t['least_s']:8.1f} {1e3 * t['most_s']:8.1f}"
            ratio = f"{t['ratio']:.3f} ({t['interval'][0]:.3f} to {t['interval'][1]:.3f})" if "ratio" in t else ""
            lines.append(f"{case:30} {name:15} {spread}  {ratio:>18}")
        if "fastest_hugging_face" in figures[case]:
            lines.append(f"{case:30} Hugging Face's fastest: {figures[case]['fastest_hugging_face']}")
    return "\n".join(lines)


def _differences(workers: dict[str, Worker]) -> dict[str, float]:
    """How far outputs and gradients are from dsjax's, as a share of the largest value; raises if they are not equal."""
    largest: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for routing in ("balanced", "skewed"):
            for name, worker in workers.items():
                worker.ask(f"save {routing} {folder}/{name}.npz")
            want = np.load(f"{folder}/dsjax.npz")
            for name in workers:
                got = np.load(f"{folder}/{name}.npz")
                found = max(float(np.abs(got[k] - want[k]).max() / np.abs(want[k]).max()) for k in want)
                largest[name] = max(largest.get(name, 0.0), found)
                if not found <= TOLERANCE:
                    raise RuntimeError(f"{name}, {routing}: differs from dsjax by {found:.2g} of the largest value")
    return largest


def _turns(workers: dict[str, Worker], case: str, rounds: int) -> dict[str, Any]:
    seconds = by_turns({name: functools.partial(worker.ask, case) for name, worker in workers.items()}, rounds)
    found: dict[str, Any] = {name: spread(s) for name, s in seconds.items()}
    for name in workers:
        if name != "dsjax":
            found[name] |= dict(zip(("ratio", "interval"), ratio(seconds["dsjax"], seconds[name]), strict=True))
    if theirs := [name for name in HUGGING_FACE.values() if name in workers]:
        found["fastest_hugging_face"] = min(theirs, key=lambda name: found[name]["median_s"])
    return found


# ---------------------------------------------------------------- what is computed


def problem(routing: str) -> dict[str, np.ndarray]:
    """Inputs, weights and the gradient of the output; by the first coordinate of its input a token likes expert 0."""
    rng = np.random.default_rng(0)
    T, D, F, E = TOKENS, D_MODEL, D_FF, EXPERTS
    shapes = {"x": (T, D), "router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "dy": (T, D)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("router", "gate", "up", "down"):
        arrays[name] *= shapes[name][-2] ** -0.5
    if routing == "skewed":
        arrays["x"][:, 0] = np.where(np.arange(T) % 2, 1, -1)
        arrays["router"][0] = 8 * (np.arange(E) == 0)
    return arrays


def loads(routing: str) -> np.ndarray:
    """How many tokens choose each expert."""
    arrays = problem(routing)
    best = np.argsort(-(arrays["x"] @ arrays["router"]), axis=1)[:, :TOP_K]
    return np.bincount(best.reshape(-1), minlength=EXPERTS)


def _dsjax(routing: str, gradients: bool) -> Callable[[], tuple[Any, ...]]:
    """The model's own layer."""
    import jax.numpy as jnp
    from flax import nnx

    from dsjax.nn.moe import MoE, MoEConfig

    cfg = MoEConfig(num_experts=EXPERTS, top_k=TOP_K, d_ff=D_FF)
    model, state = nnx.split(MoE(cfg, D_MODEL, rngs=nnx.Rngs(0)))
    arrays = problem(routing)
    for name in ("router", "gate", "up", "down"):
        state[f"w_{name}"][...] = jnp.asarray(arrays[name])
    counted_BT = jnp.ones((1, TOKENS))
    return _jax(lambda x_TD, state: nnx.merge(model, state)(x_TD[None], counted_BT)[0][0], arrays, state, gradients)


def _ragged_dot(routing: str, gradients: bool) -> Callable[[], tuple[Any, ...]]:
    """The usual form in JAX: pairs sorted by expert, `jax.lax.ragged_dot`, a scatter back; JAX's own gradients."""
    import jax
    import jax.numpy as jnp

    def layer(x_TD, weights):
        w_router, w_gate, w_up, w_down = weights
        weights_TX, experts_TX = jax.lax.top_k(jax.nn.softmax(x_TD @ w_router), TOP_K)
        weights_TX = weights_TX / jnp.sum(weights_TX, axis=-1, keepdims=True)
        order_R = jnp.argsort(experts_TX.reshape(-1))
        sizes_E = jnp.bincount(experts_TX.reshape(-1), length=EXPERTS)
        x_RD = x_TD[order_R // TOP_K]
        h_RF = jax.nn.silu(jax.lax.ragged_dot(x_RD, w_gate, sizes_E)) * jax.lax.ragged_dot(x_RD, w_up, sizes_E)
        y_RD = jax.lax.ragged_dot(h_RF, w_down, sizes_E) * weights_TX.reshape(-1)[order_R, None]
        return jnp.zeros_like(x_TD).at[order_R // TOP_K].add(y_RD)

    arrays = problem(routing)
    weights = tuple(jnp.asarray(arrays[name]) for name in ("router", "gate", "up", "down"))
    return _jax(layer, arrays, weights, gradients)


def _jax(layer: Callable[..., Any], arrays: dict, weights: Any, gradients: bool) -> Callable[[], tuple[Any, ...]]:
    """One call: the output, and with ``gradients`` those of the inputs and of all weights."""
    import jax
    import jax.numpy as jnp

    x_TD, dy_TD = jnp.asarray(arrays["x"]), jnp.asarray(arrays["dy"])

    @jax.jit
    def run(x_TD, weights, dy_TD):
        if not gradients:
            return (layer(x_TD, weights),)
        y_TD, vjp = jax.vjp(layer, x_TD, weights)
        return y_TD, *vjp(dy_TD)

    return lambda: jax.block_until_ready(run(x_TD, weights, dy_TD))


# ---------------------------------------------------------------- within a worker


def _serve(contender: str) -> None:
    """Seconds of one call for each case read from stdin; ``save ROUTING FILE`` writes outputs and dx."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a contender prints goes to stderr.
    if contender in HUGGING_FACE.values():
        from benchmarks.torch_moe import make
    else:
        own = {"dsjax": _dsjax, "ragged_dot": _ragged_dot}[contender]

        def make(contender: str, routing: str, gradients: bool) -> Callable[[], tuple[Any, ...]]:
            return own(routing, gradients)

    made = functools.cache(functools.partial(make, contender))
    for line in sys.stdin:
        if line.startswith("save "):
            _, routing, file = line.split()
            y, dx = (np.asarray(a) for a in made(routing, True)()[:2])
            np.savez(file, y=y, dx=dx)
            print(json.dumps(file), file=answers, flush=True)
            continue
        call = made(*CASES[line.strip()])
        start = time.perf_counter()
        call()
        print(json.dumps(time.perf_counter() - start), file=answers, flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", contender]:
            _serve(contender)
        case _:
            sys.exit(__doc__)
