"""What every implementation of grouped matmul is held against: cases, expected values, tolerances, one check.

Expected values are a loop over groups in numpy, float64 (:func:`expected`): the reference is the first implementation
that is held against it. Rows behind the last group hold NaN, in the inputs and in the gradient of the output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from planting import Change, altered, no_races, simulated

import pallas_kernels.grouped_matmul
from pallas_kernels.expert_dispatch import Plan, plan_dispatch

# Errors allowed, as a share of the largest expected value or of 1, whichever is more: inputs and results are about 1.
# float32: sums of up to 300 products of numbers near 1, in another order; a SwiGLU stacks three of them. 4.4e-7 is the
# most that was seen of the reference and of XLA.
# bfloat16: inputs are exact; the products before the activation, their gradients, what goes into the last product and
# the result are rounded to 2 ** -9 each, and a sum over rows averages some of it out. 8e-3 is the most that was seen.
# What a fault changes is 1e-2 and more in float32, in which most cases are.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2**-6}

# Reasons of ``why_not`` that a case may be left out for. Everything else must be computed.
ACCEPTABLE: dict[str, tuple[str, ...]] = {}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of ``grouped_matmul``, ``grouped_swiglu`` or ``expert_swiglu``.

    Attributes:
        sizes: rows of each group.
        spare: rows behind the last group.
        layers: the matrices are in a stack of so many layers, of which number 1 (or the only one) is meant.
        tokens: of ``expert_swiglu``: T. Each has as many experts as it takes to fill the groups.
    """

    sizes: tuple[int, ...]
    spare: int = 3
    function: str = "swiglu"
    D: int = 12
    F: int = 20
    dtype: str = "float32"
    layers: int = 0
    int8: bool = False
    tokens: int = 0
    seed: int = 0

    @property
    def R(self) -> int:
        return sum(self.sizes) + self.spare

    @property
    def layer(self) -> int | None:
        return min(self.layers - 1, 1) if self.layers else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of what :func:`outcome` gives."""
        if self.function == "matmul":
            return ("y", "dx") if self.int8 else ("y", "dx", "dw")
        return "y", "dx", "dw_gate", "dw_up", "dw_down"

    @functools.cached_property
    def experts_TX(self) -> np.ndarray:
        """Experts by which the groups become as large as ``sizes`` says; E: none.

        Pairs are dealt out in turn. Where there are spare rows the first token gets none: as the first pair's token it
        is what stands in rows that no pair has.
        """
        E, P, first = len(self.sizes), sum(self.sizes), int(self.spare > 0)
        deals = max(1, -(-P // max(self.tokens - first, 1)))
        experts = np.full((self.tokens, min(deals + 1, E)), E, np.int32)
        order = np.random.default_rng(self.seed).permutation(np.arange(first, self.tokens))
        for pair, expert in enumerate(np.repeat(np.arange(E), self.sizes)):
            experts[order[pair % len(order)], pair // len(order)] = expert
        return experts

    @functools.cached_property
    def plan(self) -> Plan | None:
        if self.function != "experts":
            return None
        plan = plan_dispatch(jnp.asarray(self.experts_TX), len(self.sizes), num_rows=self.R)
        assert tuple(plan.sizes_E.tolist()) == self.sizes
        return plan

    @functools.cached_property
    def token_R(self) -> np.ndarray:
        """Which row of x each row is."""
        return np.arange(self.R) if self.plan is None else np.asarray(self.plan.token_R)

    def inputs(self) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array | None]:
        """``(x, *weights)``, the gradient of the output, and the scales of int8 weights."""
        rng, (D, F), E = np.random.default_rng(self.seed), (self.D, self.F), len(self.sizes)
        x = rng.normal(size=(self.tokens if self.function == "experts" else self.R, D))
        if self.spare:
            x[0 if self.function == "experts" else slice(self.R - self.spare, None)] = np.nan
        shapes = ((D, F),) if self.function == "matmul" else ((D, F), (D, F), (F, D))
        stack = (self.layers, E) if self.layers else (E,)
        weights = [rng.normal(size=(*stack, *shape)) * shape[0] ** -0.5 for shape in shapes]
        dy = rng.normal(size=(self.R, shapes[-1][1]))
        dy[self.R - self.spare :] = np.nan
        scales = None
        if self.int8:
            scales = jnp.asarray(np.abs(weights[0]).max(axis=-2) / 127, jnp.float32)
            weights = [np.round(weights[0] / np.asarray(scales)[..., None, :])]
        as_dtype = [jnp.asarray(w, jnp.int8 if self.int8 else self.dtype) for w in weights]
        return (jnp.asarray(x, self.dtype), *as_dtype), jnp.asarray(dy, self.dtype), scales

    def call(self, implementation: str | None, package: ModuleType) -> Callable[..., Any]:
        """A function of x and the weights."""
        sizes_E = jnp.asarray(self.sizes, jnp.int32)
        more: dict[str, Any] = {"implementation": implementation}
        if self.layer is not None:
            more["layer"] = jnp.int32(self.layer)
        if self.function == "matmul":
            more["scales_EF"] = self.inputs()[2]
            return lambda *a: package.grouped_matmul(*a, sizes_E, **more)
        if self.function == "experts":
            plan = self.plan
            return lambda *a: package.expert_swiglu(*a, plan, **more)
        return lambda *a: package.grouped_swiglu(*a, sizes_E, **more)


def outcome(case: Case, implementation: str | None, package: ModuleType) -> tuple[np.ndarray, ...]:
    """The output and the gradients, as numpy arrays; skips a test for an accepted reason why not."""
    (x, *weights), dy, _ = case.inputs()
    call = case.call(implementation, package)
    if case.int8:  # such weights have no gradient
        arguments, constants = (x,), weights
    else:
        arguments, constants = (x, *weights), []

    @jax.jit
    def both(arguments, dy):
        y, vjp = jax.vjp(lambda *a: call(*a, *constants), *arguments)
        return y, *vjp(dy)

    try:
        return tuple(np.asarray(a) for a in both(arguments, dy))
    except ValueError as error:
        refused = re.fullmatch(rf"implementation '{implementation}': (.*)", str(error), re.DOTALL)
        reasons = ACCEPTABLE.get(str(implementation), ())
        if refused is None or not any(re.fullmatch(reason, refused[1]) for reason in reasons):
            raise
        return pytest.skip(refused[1])


def check(case: Case, implementation: str | None, package: ModuleType = pallas_kernels.grouped_matmul) -> None:
    """The check: forward and gradients against the definition."""
    for name, g, w in zip(case.names, outcome(case, implementation, package), expected(case), strict=True):
        assert g.dtype == case.dtype, f"{name} is {g.dtype}"
        limit = TOLERANCE[case.dtype] * max(1.0, float(np.abs(w).max(initial=0)))
        np.testing.assert_allclose(g.astype(np.float64), w, atol=limit, rtol=0, err_msg=f"{name} of {case}")


SMALL_BLOCKS = (
    ("blocks.py", "ROWS_AT_ONCE = 640", "ROWS_AT_ONCE = 40"),
    ("blocks.py", "SMALLER_BLOCK = 128", "SMALLER_BLOCK = 4"),
    ("blocks.py", "FEWEST_ON_AVERAGE = 16", "FEWEST_ON_AVERAGE = 1"),
)
# What is tested: the implementation that a call names, and what is altered. Small pieces make short groups have several
# of each.
VARIANTS: dict[str, tuple[str, tuple[Change, ...]]] = {
    "reference": ("reference", ()),
    "xla": ("xla", ()),
    "xla, small": ("xla", SMALL_BLOCKS),
    "xla, ragged": ("xla", (("xla.py", '"cpu": functools.partial(blocks,', '"cpu": functools.partial(ragged,'),)),
    "tpu": ("tpu", ()),
    "tpu, simulated": ("tpu", simulated("multiply.py")),
    "gpu": ("gpu", ()),
    "gpu, two blocks": ("gpu", (("gpu_tiles.py", "PROGRAMS = 132", "PROGRAMS = 2"),)),
}


def check_variant(case: Case, variant: str, folder: pathlib.Path, *faults: Change) -> None:
    """The check, of a variant in which faults are planted; simulated, also that there was no race."""
    implementation, changes = VARIANTS[variant]
    watched = no_races() if "simulated" in variant else contextlib.nullcontext()
    with altered(pallas_kernels.grouped_matmul, folder, *changes, *faults) as package, watched:
        check(case, implementation, package)


# ---------------------------------------------------------------- the definition, written out


@functools.cache
def expected(case: Case) -> tuple[np.ndarray, ...]:
    """The output and the gradients: each group's rows times its matrices."""
    (x, *weights), dy, scales = case.inputs()
    x, dy, *weights = (np.asarray(a, np.float64) for a in (x, dy, *weights))
    if scales is not None:
        weights = [weights[0] * np.asarray(scales, np.float64)[..., None, :]]
    dx, dw, y = np.zeros_like(x), [np.zeros_like(w) for w in weights], np.zeros_like(dy)
    gradients = _matmul if case.function == "matmul" else _swiglu
    start = 0
    for e, size in enumerate(case.sizes):
        rows, matrix = np.arange(start, start + size), (e if case.layer is None else (case.layer, e))
        tokens, start = case.token_R[rows], start + size
        y[rows], dx_rows, *dw_e = gradients(x[tokens], *(w[matrix] for w in weights), dy[rows])
        np.add.at(dx, tokens, dx_rows)
        for d, d_e in zip(dw, dw_e, strict=True):
            d[matrix] = d_e
    return (y, dx) if case.int8 else (y, dx, *dw)


def _matmul(x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, ...]:
    return x @ w, dy @ w.T, x.T @ dy


def _swiglu(
    x: np.ndarray, w_gate: np.ndarray, w_up: np.ndarray, w_down: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, ...]:
    gate, up, dh = x @ w_gate, x @ w_up, dy @ w_down.T
    s = 1 / (1 + np.exp(-gate))
    h = gate * s * up
    dgate, dup = dh * up * (s + gate * s * (1 - s)), dh * gate * s
    return h @ w_down, dgate @ w_gate.T + dup @ w_up.T, x.T @ dgate, x.T @ dup, h.T @ dy


# ---------------------------------------------------------------- cases

SKEWED = (3, 0, 40, 1, 0, 9)
CASES = {
    "matmul": Case(SKEWED, function="matmul"),
    "matmul, wide to narrow": Case(SKEWED, function="matmul", D=20, F=12),
    "matmul, no row in any group": Case((0, 0, 0), function="matmul"),
    "matmul, no spare row": Case((7, 8, 9), spare=0, function="matmul"),
    "matmul, more spare rows than others": Case((5, 2), spare=60, function="matmul"),
    "matmul of a layer": Case(SKEWED, function="matmul", layers=3),
    "matmul, int8": Case(SKEWED, function="matmul", int8=True),
    "matmul, int8, of a layer": Case(SKEWED, function="matmul", int8=True, layers=3),
    "matmul, bfloat16": Case(SKEWED, function="matmul", dtype="bfloat16"),
    "matmul, int8, bfloat16": Case(SKEWED, function="matmul", dtype="bfloat16", int8=True),
    "matmul, kernel sizes": Case((70, 0, 130, 1, 55), function="matmul", D=128, F=256, dtype="bfloat16"),
    "matmul, int8, of a layer, kernel sizes": Case(
        (70, 0, 130, 1, 55), function="matmul", D=128, F=256, dtype="bfloat16", int8=True, layers=3
    ),
    "matmul, past kernel sizes": Case((70, 0, 130, 1, 55), function="matmul", D=136, F=260),
    "swiglu": Case(SKEWED),
    "swiglu, wide to narrow": Case(SKEWED, D=20, F=12),
    "swiglu, all in the first": Case((50, 0, 0)),
    "swiglu, all in the last": Case((0, 0, 50), spare=0),
    "swiglu, no row in any group": Case((0, 0, 0)),
    "swiglu, one row each": Case((1,) * 17),
    "swiglu, one group": Case((29,)),
    "swiglu, giant": Case((3, 290, 0, 2), D=8, F=8),
    "swiglu of a layer": Case(SKEWED, layers=3),
    "swiglu of the only layer": Case(SKEWED, layers=1),
    "swiglu, bfloat16": Case(SKEWED, dtype="bfloat16"),
    "swiglu, giant, bfloat16": Case((3, 290, 0, 2), dtype="bfloat16"),
    "swiglu, kernel sizes": Case((70, 0, 130, 1, 55), D=128, F=256, dtype="bfloat16"),
    "swiglu, even": Case((9, 12, 10, 17, 9, 11)),
    "experts, even": Case((9, 12, 0, 17, 9, 11), function="experts", tokens=40, layers=3),
    "experts": Case(SKEWED, function="experts", tokens=43),
    "experts, one each": Case((5, 0, 9, 1), spare=0, function="experts", tokens=15),
    "experts, all of them": Case((9, 9, 9), spare=0, function="experts", tokens=9),
    "experts, none": Case((0, 0), function="experts", tokens=5),
    "experts of a layer": Case(SKEWED, function="experts", tokens=43, layers=3),
    "experts, bfloat16": Case(SKEWED, function="experts", tokens=43, dtype="bfloat16"),
    "experts, kernel sizes": Case(
        (70, 0, 130, 1, 55), function="experts", tokens=140, D=128, F=256, dtype="bfloat16"
    ),
}  # fmt: skip


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32", "bfloat16"), most: int = 40, **fixed: Any) -> Case:
    """Calls of every kind; ``most`` rows in a group; ``fixed`` fields stay."""
    sizes = tuple(draw(st.lists(st.integers(0, draw(st.sampled_from([1, 5, most]))), min_size=1, max_size=6)))
    function = draw(st.sampled_from(["matmul", "swiglu", "experts"]))
    drawn = {
        "sizes": sizes,
        "spare": draw(st.sampled_from([0, 1, 20])),
        "function": function,
        "D": draw(st.integers(1, 20)),
        "F": draw(st.integers(1, 20)),
        "dtype": draw(st.sampled_from(dtypes)),
        "layers": draw(st.sampled_from([0, 0, 1, 3])),
        "int8": function == "matmul" and draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }
    case = Case(**{**drawn, **fixed})
    return dataclasses.replace(case, tokens=max(case.sizes) + 1 + draw(st.integers(0, 9)))
