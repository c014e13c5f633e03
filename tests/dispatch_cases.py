"""What every implementation of expert dispatch is held against: cases, expected values, tolerances, one check.

Expected values are loops in numpy: over tokens for the choice (:func:`chosen_by_loops`), over the sorted pairs for what
moves. The reference is the first implementation that is held against them. A program is compiled once for a
:class:`Shape`, and run with many cases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import re
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from planting import Change, altered, no_races, simulated

import pallas_kernels.expert_dispatch

# Errors allowed, as a share of the largest expected value or of 1, whichever is more. float32: sums of up to 8 rows,
# and dots of up to 300 numbers, in another order. bfloat16: weights, their products with rows and sums are rounded to
# 2 ** -9 each. What moves without a sum, and all that is counted, is exact.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2**-7}
EXACT = ("experts_TX", "scores_TX", "position_TX", "counts_E", "dscores_TE", "row_TX", "pair_R", "sizes_E", "rows_RD")

# Reasons of ``why_not`` that a case may be left out for. Everything else must be computed.
ACCEPTABLE: dict[str, tuple[str, ...]] = {"gpu": (r"XLA .*", r".*; XLA .*")}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a program is compiled for.

    Attributes:
        T, E, X, num_groups, top_groups, group_score: of the choice.
        bias, counted, limited: whether these are given.
        first, local: the experts that pairs go to; others' pairs go nowhere. None: all from ``first`` on.
        num_rows: None, or rows for all pairs and so many more.
        D, dtype: of the rows.
    """

    T: int = 20
    E: int = 6
    X: int = 2
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    bias: bool = False
    counted: bool = False
    limited: bool = False
    first: int = 0
    local: int | None = None
    num_rows: int | None = None
    D: int = 8
    dtype: str = "float32"

    @property
    def here(self) -> int:
        return self.E - self.first if self.local is None else self.local

    @property
    def R(self) -> int:
        return self.T * min(self.X, self.here) if self.num_rows is None else self.T * self.X + self.num_rows

    @property
    def groups(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_groups", "top_groups", "group_score")}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: ``scores`` names one of SCORES; ``off``: experts whose bias is -inf; ``padded``: share of the tokens."""

    shape: Shape
    scores: str = "normal"
    off: int = 0
    padded: float = 0.3
    seed: int = 0

    def choice(self) -> dict[str, np.ndarray | None]:
        """What the choice is made of."""
        s, rng = self.shape, np.random.default_rng(self.seed)
        bias_E = rng.normal(size=s.E).astype(np.float32)
        bias_E[rng.permutation(s.E)[: self.off]] = -np.inf
        return {
            "scores_TE": SCORES[self.scores](rng, (s.T, s.E)).astype(np.float32),
            "bias_E": bias_E if s.bias else None,
            "counted_T": rng.random(s.T) >= self.padded if s.counted else None,
            "limit_E": rng.integers(-1, 2 * s.T * s.X // s.E + 2, s.here).astype(np.int32) if s.limited else None,
        }

    def rows(self, goes_TX: np.ndarray, filled_R: np.ndarray) -> dict[str, np.ndarray]:
        """Numbers that move; where nothing may be read, NaN."""
        s, rng = self.shape, np.random.default_rng(self.seed + 1)

        def numbers(*shape: int, read: np.ndarray | None = None, dtype: str = s.dtype) -> np.ndarray:
            x = rng.normal(size=shape)
            x = x if read is None else np.where(read.reshape(read.shape + (1,) * (x.ndim - read.ndim)), x, np.nan)
            return np.asarray(jnp.asarray(x, dtype))

        return {
            "x_TD": numbers(s.T, s.D),
            "weights_TX": numbers(s.T, s.X, read=goes_TX),
            "y_RD": numbers(s.R, s.D, read=filled_R),
            "dscores_TX": numbers(s.T, s.X, dtype="float32"),
            "drows_RD": numbers(s.R, s.D, read=filled_R),
            "dout_TD": numbers(s.T, s.D),
        }


def _special(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    largest = np.finfo(np.float32).max
    return rng.choice([np.inf, -np.inf, np.nan, largest, -largest, 1.0, 0.0, -0.0], shape)


SCORES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "ties": lambda rng, shape: rng.integers(0, 3, shape) / 4,
    "zeros of both signs": lambda rng, shape: rng.choice([0.0, -0.0], shape),
    "skewed": lambda rng, shape: rng.normal(size=shape) - np.arange(shape[1]),
    "all to one": lambda rng, shape: rng.normal(size=shape) + 99 * (np.arange(shape[1]) == shape[1] // 2),
    "-inf": lambda rng, shape: np.full(shape, -np.inf),
    "NaN": lambda rng, shape: np.full(shape, np.nan),
    "special": _special,
}


# ---------------------------------------------------------------- the definition, written out


@np.errstate(invalid="ignore", over="ignore")  # of infinities
def chosen_by_loops(
    scores_TE: np.ndarray,
    top_k: int,
    *,
    bias_E: np.ndarray | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    counted_T: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Experts, scores, positions and counts of :class:`pallas_kernels.expert_dispatch.Choice`, token by token."""
    T, E = scores_TE.shape
    experts, scores = np.full((T, top_k), E), np.zeros((T, top_k), scores_TE.dtype)
    position, counts = np.zeros((T, top_k), int), np.zeros(E, int)
    for t in range(T):
        if counted_T is not None and not counted_T[t]:
            continue
        choice = scores_TE[t] if bias_E is None else scores_TE[t] + bias_E
        choice = np.where(np.isnan(choice), -np.inf, choice)
        groups = np.split(choice, num_groups)
        judged = np.array([np.sort(g)[::-1][: 2 if group_score == "top2" else 1].sum() for g in groups])
        kept = np.argsort(-np.where(np.isnan(judged), -np.inf, judged), kind="stable")[:top_groups]
        allowed = [e for e in range(E) if e // (E // num_groups) in kept]
        for x, e in enumerate(sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]):
            experts[t, x], scores[t, x], position[t, x] = e, scores_TE[t, e], counts[e]
            counts[e] += 1
    return experts, scores, position, counts


@functools.cache
def expected(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All inputs and all results."""
    s, given = case.shape, case.choice()
    limit_E = given.pop("limit_E")
    experts, scores, position, counts = chosen_by_loops(
        given["scores_TE"], s.X, bias_E=given["bias_E"], counted_T=given["counted_T"], **s.groups
    )
    pairs = sorted(
        (e - s.first, t, x)
        for (t, x), e in np.ndenumerate(experts)
        if s.first <= e < s.first + s.here and (limit_E is None or position[t, x] < limit_E[e - s.first])
    )
    row, pair, sizes = np.full((s.T, s.X), s.R), np.zeros(s.R, int), np.zeros(s.here, int)
    for r, (e, t, x) in enumerate(pairs):
        row[t, x], pair[r] = r, t * s.X + x
        sizes[e] += 1
    moved = case.rows(row < s.R, np.arange(s.R) < len(pairs))
    x, y, weights, drows, dout, dscores = (
        np.asarray(moved[name], np.float64)
        for name in ("x_TD", "y_RD", "weights_TX", "drows_RD", "dout_TD", "dscores_TX")
    )
    out, dx, dy = np.zeros((s.T, s.D)), np.zeros((s.T, s.D)), np.zeros((s.R, s.D))
    dweights, d_TE = np.zeros((s.T, s.X)), np.zeros((s.T, s.E))
    for r, (_, t, k) in enumerate(pairs):
        out[t] += weights[t, k] * y[r]
        dx[t] += drows[r]
        dy[r] = weights[t, k] * dout[t]
        dweights[t, k] = y[r] @ dout[t]
    for (t, k), e in np.ndenumerate(experts):
        if e < s.E:
            d_TE[t, e] = dscores[t, k]
    results = {
        "experts_TX": experts,
        "scores_TX": scores,
        "position_TX": position,
        "counts_E": counts,
        "dscores_TE": d_TE,
        "row_TX": row,
        "pair_R": pair,
        "sizes_E": sizes,
        "rows_RD": x[[t for _, t, _ in pairs]].reshape(-1, s.D),
        "out_TD": out,
        "dx_TD": dx,
        "dy_RD": dy,
        "dweights_TX": dweights,
    }
    return {**given, "limit_E": limit_E, **moved}, results


# ---------------------------------------------------------------- the check


def functions(shape: Shape, implementation: str | None, package: ModuleType) -> tuple[Any, Any]:
    """Choice and plan, and what moves by a plan: functions of the inputs of :func:`expected`."""
    s, use = shape, {"implementation": implementation}

    def choose(*, scores_TE, bias_E, counted_T, limit_E, dscores_TX):
        def route(scores_TE):
            choice = package.top_k_route(scores_TE, s.X, bias_E=bias_E, counted_T=counted_T, **s.groups, **use)
            return choice.scores_TX, choice

        _, pull, choice = jax.vjp(route, scores_TE, has_aux=True)
        known = {"position_TX": choice.position_TX, "counts_E": choice.counts_E} if s.here == s.E else {}
        num_rows = None if s.num_rows is None else s.R
        plan = package.plan_dispatch(choice.experts_TX - s.first, s.here, limit_E=limit_E, num_rows=num_rows, **known)
        found = {name: getattr(choice, name) for name in ("experts_TX", "scores_TX", "position_TX", "counts_E")}
        found |= {name: getattr(plan, name) for name in ("row_TX", "pair_R", "sizes_E")}
        return plan, found | {"dscores_TE": pull(dscores_TX)[0]}

    def move(plan, *, x_TD, weights_TX, y_RD, drows_RD, dout_TD):
        rows, pull_rows = jax.vjp(lambda x: package.dispatch(x, plan, **use), x_TD)
        out, pull_out = jax.vjp(lambda y, w: package.combine(y, w, plan, **use), y_RD, weights_TX)
        dy, dweights = pull_out(dout_TD)
        return {"rows_RD": rows, "out_TD": out, "dx_TD": pull_rows(drows_RD)[0], "dy_RD": dy, "dweights_TX": dweights}

    return choose, move


@functools.cache
def compiled(shape: Shape, implementation: str | None, package: ModuleType) -> tuple[Any, Any]:
    """Of the functions each by itself: where the choice is wrong, the rest need not be compiled."""
    choose, move = functions(shape, implementation, package)
    return jax.jit(choose), jax.jit(move)


def program(shape: Shape, implementation: str | None, package: ModuleType) -> Any:
    """Both in one program."""
    choose, move = functions(shape, implementation, package)

    @jax.jit
    def run(*, scores_TE, bias_E, counted_T, limit_E, dscores_TX, **moved):
        plan, found = choose(
            scores_TE=scores_TE, bias_E=bias_E, counted_T=counted_T, limit_E=limit_E, dscores_TX=dscores_TX
        )
        return found | move(plan, **moved)

    return run


def check(case: Case, implementation: str | None, package: ModuleType = pallas_kernels.expert_dispatch) -> None:
    """The check: choice, plan, and rows that move, forward and backward, are the definition's."""
    given, want = expected(case)
    choose, move = compiled(case.shape, implementation, package)
    moved = {name: given[name] for name in ("x_TD", "weights_TX", "y_RD", "drows_RD", "dout_TD")}
    plan, found = choose(**{name: x for name, x in given.items() if name not in moved})
    assert_equal(case, found, want)
    nowhere = int((found["row_TX"] == case.shape.R).sum())
    assert int(found["sizes_E"].sum()) + nowhere == case.shape.T * case.shape.X  # no pair is lost, none comes twice
    results = dict(move(plan, **moved))
    results["rows_RD"] = results["rows_RD"][: len(want["rows_RD"])]  # behind the last group stands any token's row
    assert_equal(case, results, want)
    assert {*found, *results} == set(want)


def assert_equal(case: Case, got: dict[str, jax.Array], want: dict[str, np.ndarray]) -> None:
    """Of what was got, all is as wanted: exactly, or but for rounding."""
    for name, found in got.items():
        g, w, message = np.asarray(found), want[name], f"{name} of {case}"
        if name in EXACT:
            np.testing.assert_allclose(g.astype(w.dtype), w, rtol=0, atol=0, err_msg=message)
        else:
            assert g.dtype == case.shape.dtype, f"{name} is {g.dtype}"
            limit = TOLERANCE[case.shape.dtype] * max(1.0, float(np.abs(w).max(initial=0)))
            np.testing.assert_allclose(g.astype(np.float64), w, rtol=0, atol=limit, err_msg=message)


def check_or_skip(case: Case, implementation: str, package: ModuleType = pallas_kernels.expert_dispatch) -> None:
    """The check; skips the test where the implementation gives an accepted reason why not."""
    try:
        check(case, implementation, package)
    except ValueError as error:
        refused = re.fullmatch(rf"implementation '{implementation}': (.*)", str(error), re.DOTALL)
        reasons = ACCEPTABLE.get(implementation, ())
        if refused is None or not any(re.fullmatch(reason, refused[1]) for reason in reasons):
            raise
        pytest.skip(refused[1])


# What is tested: the implementation that a call names, and what is altered.
VARIANTS: dict[str, tuple[str, tuple[Change, ...]]] = {
    "reference": ("reference", ()),
    "xla": ("xla", ()),
    "tpu": ("tpu", ()),
    "tpu, unrolled": ("tpu", (("tpu_rows.py", "unrolled=not interpret", "unrolled=True"),)),  # as when compiled
    "tpu, simulated": ("tpu", simulated("backends.py")),
    "gpu": ("gpu", ()),
}


def check_variant(case: Case, variant: str, folder: pathlib.Path, *faults: Change) -> None:
    """The check, of a variant in which faults are planted; simulated, also that there was no race."""
    implementation, changes = VARIANTS[variant]
    watched = no_races() if "simulated" in variant else contextlib.nullcontext()
    with altered(pallas_kernels.expert_dispatch, folder, *changes, *faults) as package, watched:
        check_or_skip(case, implementation, package)


# ---------------------------------------------------------------- cases

GROUPED = Shape(T=24, E=16, X=3, num_groups=4, top_groups=2)
CASES = {
    "no multiples": Case(Shape(T=37, E=5, X=2, D=9)),
    "one token": Case(Shape(T=1, E=4, X=1)),
    "no token": Case(Shape(T=0, counted=True, limited=True)),
    "no token, some rows": Case(Shape(T=0, num_rows=3)),
    "one expert": Case(Shape(E=1, X=1)),
    "all experts": Case(Shape(E=4, X=4), "ties"),
    "many experts": Case(Shape(T=70, E=64, X=8)),
    "ties": Case(Shape(E=9, X=4), "ties"),
    "zeros of both signs": Case(Shape(E=9, X=4), "zeros of both signs"),
    "all to one": Case(Shape(T=40, E=5), "all to one"),
    "skewed": Case(Shape(T=40, E=8), "skewed"),
    "-inf": Case(Shape(E=9, X=3), "-inf"),
    "NaN": Case(Shape(), "NaN"),
    "special": Case(Shape(T=64, E=12, X=5), "special"),
    "bias": Case(Shape(bias=True, E=8, X=3), off=6),
    "padded": Case(Shape(counted=True), padded=0.5),
    "all padded": Case(Shape(counted=True), padded=1.0),
    "groups": Case(GROUPED),
    "groups, top 2": Case(dataclasses.replace(GROUPED, group_score="top2", bias=True), off=9),
    "groups, special": Case(dataclasses.replace(GROUPED, group_score="top2"), "special"),
    "groups of two, special": Case(Shape(T=64, E=8, num_groups=4, top_groups=2, group_score="top2"), "special"),
    "groups, ties": Case(dataclasses.replace(GROUPED, top_groups=3, X=8), "ties"),
    "groups, -inf": Case(dataclasses.replace(GROUPED, group_score="top2", X=8), "-inf"),
    "groups of one": Case(Shape(E=6, X=2, num_groups=6, top_groups=3, group_score="top2")),
    "limited": Case(Shape(T=50, E=4, limited=True), "skewed"),
    "limited, padded, more rows": Case(Shape(T=50, limited=True, counted=True, num_rows=7)),
    "some experts are elsewhere": Case(Shape(E=8, X=3, first=2, local=3)),
    "some experts are elsewhere, limited": Case(Shape(E=8, X=3, first=4, limited=True, bias=True)),
    "several blocks": Case(Shape(T=600, E=5, X=2, D=4)),
    "wide": Case(Shape(T=33, E=4, D=256)),
    "bfloat16": Case(Shape(T=33, E=4, X=3, D=256, dtype="bfloat16")),
    "bfloat16, no multiples": Case(Shape(T=37, E=5, D=9, dtype="bfloat16", counted=True)),
}

# Few shapes, each of which is compiled once, for many cases.
DRAWN = (
    Shape(T=17, E=5, X=2),
    Shape(T=12, E=7, X=7, bias=True),
    Shape(T=33, E=12, X=3, counted=True, limited=True),
    Shape(T=9, E=8, X=3, bias=True, limited=True, num_rows=5),
    Shape(T=21, E=16, X=4, num_groups=4, top_groups=2, group_score="top2", bias=True, counted=True),
    Shape(T=16, E=12, X=2, num_groups=3, top_groups=1, bias=True),
    Shape(T=19, E=6, X=3, num_groups=6, top_groups=4, group_score="top2", counted=True),
    Shape(T=25, E=8, X=2, first=3, local=2, limited=True, counted=True),
)


@st.composite
def cases(draw: st.DrawFn, shapes: tuple[Shape, ...] = DRAWN) -> Case:
    """Cases of every kind, of a few shapes."""
    shape = draw(st.sampled_from(shapes))
    return Case(
        shape,
        draw(st.sampled_from(list(SCORES))),
        off=draw(st.integers(0, shape.E)) if shape.bias else 0,
        padded=draw(st.sampled_from([0.0, 0.3, 1.0])) if shape.counted else 0.0,
        seed=draw(st.integers(0, 10**6)),
    )
