"""What every implementation of segmented attention is held against: cases, expected values, tolerances, one check.

Expected values are the definition written out in numpy, position by position, float64 (:func:`dense`): the reference
is the first implementation that is held against it. Numpy compiles nothing, so that a case costs one compilation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels.segmented_attention
from pallas_kernels.segmented_attention import Segments, segmented_attention, segmented_attention_loop

PACKAGE = pathlib.Path(pallas_kernels.segmented_attention.__file__).parent
NUMBERS = itertools.count()
NAMES = ("out", "dq", "dk", "dv")

# Errors allowed, as a share of the largest expected value or of 1, whichever is more.
# float32: scores of about 4 carry a few times 2 ** -24 each, and so do probabilities; sums of up to 300 terms in
# another order. 8e-7 is the most that was seen. Errors of scores grow with the scores: hence times ``loud``.
# bfloat16: inputs are exact; probabilities, their gradients and the output that a gradient is made of are rounded to
# 2 ** -9 each, and averaging leaves less of it. 5e-3 is the most that was seen.
# What a fault changes is 1e-2 and more in float32, in which nearly all cases are.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2**-6}

# Reasons of ``why_not`` that a case may be left out for. Everything else must be computed.
ACCEPTABLE: dict[str, tuple[str, ...]] = {
    "gpu": (
        r"rows of chosen segments .* XLA computes them",
        r"q, k and v are .*; the kernel takes bfloat16 .*",
        r"heads are \d+ and \d+ wide; the kernel takes .*",
        r"segment_size is \d+; the kernel takes multiples of 128",
    )
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call; ``documents`` holds, for each row, runs of (id, positions). ``loud`` multiplies q."""

    T: int
    segment_size: int
    window: int | None = None
    shift: int = 0
    top_segments: int | None = None
    B: int = 1
    K: int = 1
    G: int = 1
    H: int = 8
    U: int = 8
    documents: tuple[tuple[tuple[int, int], ...], ...] | None = None
    dtype: str = "float32"
    scale: float | None = None
    loud: float = 1.0
    seed: int = 0

    @property
    def segments(self) -> Segments:
        window = self.segment_size // 2 if self.window is None else self.window
        return Segments(self.segment_size, window, self.shift % self.segment_size, self.top_segments)

    @property
    def ids_BT(self) -> np.ndarray | None:
        if self.documents is None:
            return None
        ids = np.array([np.repeat(*np.array(row, np.int32).T) for row in self.documents], np.int32)
        assert ids.shape == (self.B, self.T)
        return ids

    def inputs(self) -> tuple[jax.Array, ...]:
        """q, k, v and the gradient of the output; at padded positions too they hold numbers."""
        rng = np.random.default_rng(self.seed)
        B, T, K, N = self.B, self.T, self.K, self.K * self.G
        shapes = ((B, T, N, self.H), (B, T, K, self.H), (B, T, K, self.U), (B, T, N, self.U))
        q, k, v, dout = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
        return tuple(jnp.asarray(x, self.dtype) for x in (self.loud * q, k, v, dout))

    def call(self, implementation: str, attention: Callable[..., Any] = segmented_attention) -> Callable[..., Any]:
        """A function of q, k and v; skips the test where the implementation gives an accepted reason why not."""
        ids = self.ids_BT
        documents = None if ids is None else jnp.asarray(ids)
        fields = ("segment_size", "window", "shift", "top_segments", "scale")
        described = {field: getattr(self, field) for field in fields}

        def call(q, k, v):
            try:
                return attention(q, k, v, **described, documents=documents, implementation=implementation)
            except ValueError as error:
                refused = re.fullmatch(rf"implementation '{implementation}': (.*)", str(error), re.DOTALL)
                if refused is None or not acceptable(implementation, refused[1]):
                    raise
                return pytest.skip(refused[1])

        return call


def acceptable(implementation: str, reason: str) -> bool:
    return any(re.fullmatch(pattern, reason) for pattern in ACCEPTABLE.get(implementation, ()))


def outcome(case: Case, f: Callable[..., Any]) -> tuple[np.ndarray, ...]:
    """The output and the gradients of q, k and v, as numpy arrays."""

    @jax.jit
    def both(q, k, v, dout):
        out, vjp = jax.vjp(f, q, k, v)
        return out, *vjp(dout.astype(out.dtype))

    return tuple(np.asarray(x) for x in both(*case.inputs()))


def by_loop(q, k, v, *, segment_size, window, shift, top_segments, documents, scale, implementation):
    """``segmented_attention_loop``, called as ``segmented_attention`` is."""
    assert implementation == "loop"
    segments = Segments(
        segment_size, segment_size // 2 if window is None else window, shift % segment_size, top_segments
    )
    ids_BT = jnp.ones(q.shape[:2], jnp.int32) if documents is None else documents
    return segmented_attention_loop(q, k, v, ids_BT, segments, q.shape[-1] ** -0.5 if scale is None else scale)


Change = tuple[str, str, str]
SIMULATION = """
from jax.experimental.pallas import tpu as pltpu
SIMULATION = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
"""

BLOCKS = """

_each = _each_head


def _each_head(f, tiles, *arrays):
    return _each(f, tiles or Tiles(rows=16, keys=16, head_by_head=HEAD_BY_HEAD), *arrays)
"""
SMALL_BLOCKS = ("xla.py", "", BLOCKS.replace("HEAD_BY_HEAD", "True"))
ALL_HEADS_AT_ONCE = ("xla.py", "", BLOCKS.replace("HEAD_BY_HEAD", "False"))
TILES = """

assert callable(tiles_for)


def tiles_for(*_, **__):
    return Tiles(queries=32, keys=32, part=16, span=64)
"""
SMALL_TILES = ("tiles.py", "", TILES)
FEW_ROWS = ("far.py", "ROWS_IN_A_BLOCK = 128", "ROWS_IN_A_BLOCK = 16")

# What is tested: the implementation that a call names, and what is altered. Small pieces make short sequences have
# several of each. The simulation is of a chip's memory, its copies and semaphores; it looks for races.
VARIANTS: dict[str, tuple[str, tuple[Change, ...]]] = {
    "reference": ("reference", ()),
    "xla": ("xla", ()),
    "xla, small": ("xla", (SMALL_BLOCKS, FEW_ROWS)),
    "xla, all heads at once": ("xla", (ALL_HEADS_AT_ONCE, FEW_ROWS)),
    "tpu": ("tpu", ()),
    "tpu, small": ("tpu", (SMALL_TILES, FEW_ROWS)),
    "tpu, simulated": (
        "tpu",
        (
            SMALL_TILES,
            FEW_ROWS,
            ("attend.py", "from __future__ import annotations\n", "from __future__ import annotations\n" + SIMULATION),
            ("attend.py", "default=of(backend, interpret=True)", "default=of(backend, interpret=SIMULATION)"),
        ),
    ),
    "gpu": ("gpu", ()),
}


def check_variant(case: Case, variant: str, folder: pathlib.Path, *faults: Change) -> None:
    """The check, of a variant in which faults are planted."""
    implementation, changes = VARIANTS[variant]
    with altered(folder, *changes, *faults) as package:
        if SIMULATION in "".join(new for _, _, new in changes):
            check_simulated(case, implementation, package.segmented_attention)
        else:
            check(case, implementation, package.segmented_attention)


def check_simulated(case: Case, implementation: str, attention: Callable[..., Any]) -> None:
    """The check, and that no race was seen: the simulation only prints them."""
    pltpu.reset_tpu_interpret_mode_state()
    try:
        check(case, implementation, attention)
        assert interpret_pallas_call.races is not None
        assert not interpret_pallas_call.races.races_found, "a race"
    finally:
        pltpu.reset_tpu_interpret_mode_state()  # an error leaves it unusable


@contextlib.contextmanager
def altered(folder: pathlib.Path, *changes: Change) -> Iterator[ModuleType]:
    """A copy of the package, imported anew, in which (file, old, new) snippets are replaced; each stands there once.

    Where ``old`` is empty, ``new`` is added to the end of the file.
    """
    name = f"altered_{next(NUMBERS)}"
    shutil.copytree(PACKAGE, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in changes:
        source = (folder / name / file).read_text(encoding="utf-8")
        assert not old or source.count(old) == 1, f"{file} has {source.count(old)} times: {old}"
        (folder / name / file).write_text(source.replace(old, new) if old else source + new, encoding="utf-8")
    for path in (folder / name).rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        path.write_text(source.replace("pallas_kernels.segmented_attention", name), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, folder / name / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[loaded]


def assert_close(case: Case, got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...]) -> None:
    for name, g, w in zip(NAMES[: len(want)], got, want, strict=True):
        assert g.dtype == case.dtype, f"{name} is {g.dtype}"
        limit = TOLERANCE[case.dtype] * max(1.0, case.loud) * max(1.0, float(np.abs(w).max()))
        np.testing.assert_allclose(g.astype(np.float32), w, atol=limit, rtol=0, err_msg=f"{name} of {case}")


def check(case: Case, implementation: str, attention: Callable[..., Any] = segmented_attention) -> None:
    """The check: forward and gradients against the definition."""
    assert_close(case, outcome(case, case.call(implementation, attention)), dense(case))


# ---------------------------------------------------------------- the definition, written out


def chosen_slowly(case: Case, q: np.ndarray, k: np.ndarray, b: int, t: int, head: int) -> list[int]:
    """The docstring of ``selection.choose``, for one position and key/value head; documents are runs."""
    segments, ids = case.segments, np.ones((case.B, case.T), int) if case.ids_BT is None else case.ids_BT
    query = q[b, t, head * case.G : (head + 1) * case.G].mean(axis=0)
    score = {}
    for j in range(segments.of(t)):
        tail = [p for p in range(case.T) if segments.of(p) == j and segments.in_tail(p) and ids[b, p] == ids[b, t]]
        if tail and ids[b, t] > 0:
            score[j] = query @ k[b, tail, head].mean(axis=0)
    always = {min(score), *({segments.of(t) - 1} & set(score))} if score else set()
    others = sorted(set(score) - always, key=lambda j: -score[j])
    return sorted([*always, *others[: segments.top]])


def sees_slowly(case: Case, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """(B, K, T, T): whether a query (third) sees a key (last), by the definition."""
    segments, ids = case.segments, np.ones((case.B, case.T), int) if case.ids_BT is None else case.ids_BT
    sees = np.zeros((case.B, case.K, case.T, case.T), bool)
    for b, head, t in np.ndindex(*sees.shape[:3]):
        looks_at = None if segments.top is None else chosen_slowly(case, q, k, b, t, head)
        for j in range(t + 1):
            own = segments.of(j) == segments.of(t)
            tail = segments.in_tail(j) and (looks_at is None or segments.of(j) in looks_at)
            sees[b, head, t, j] = (own or tail) and ids[b, j] == ids[b, t] > 0
    return sees


@functools.cache
def dense(case: Case) -> tuple[np.ndarray, ...]:
    """The output and the gradients of q, k and v, by the textbook, float64."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in case.inputs())
    sees = np.repeat(sees_slowly(case, q, k), case.G, axis=1)
    scale = case.H**-0.5 if case.scale is None else case.scale
    keys, values = np.repeat(k, case.G, axis=2), np.repeat(v, case.G, axis=2)
    scores = np.where(sees, scale * np.einsum("btnh,bsnh->bnts", q, keys), -np.inf)
    top = np.where(sees.any(-1), scores.max(-1), 0)[..., None]
    weights = np.exp(scores - top)
    p = weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(float).tiny)
    out = np.einsum("bnts,bsnu->btnu", p, values)
    dp = np.einsum("btnu,bsnu->bnts", dout, values)
    ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))

    def by_kv_head(x: np.ndarray) -> np.ndarray:
        return x.reshape(case.B, case.T, case.K, case.G, -1).sum(axis=3)

    dq = np.einsum("bnts,bsnh->btnh", ds, keys)
    dk = by_kv_head(np.einsum("bnts,btnh->bsnh", ds, q))
    dv = by_kv_head(np.einsum("bnts,btnu->bsnu", p, dout))
    return out, dq, dk, dv


# ---------------------------------------------------------------- cases

PACKED = (((0, 2), (1, 15), (2, 1), (0, 3), (3, 16), (0, 4)), ((7, 18), (0, 1), (9, 22)))
EMPTY_ROW = (((0, 41),), ((1, 30), (0, 11)))
SCATTERED = (((1, 5), (2, 6), (1, 7), (3, 3), (0, 3), (2, 9), (1, 8)), ((2, 20), (1, 1), (2, 20)))
CASES = {
    "one position": Case(T=1, segment_size=4),
    "no multiples": Case(T=37, segment_size=8, window=3, shift=5),
    "shift less than the window": Case(T=37, segment_size=8, window=5, shift=2),
    "first segment shorter than a tail": Case(T=30, segment_size=8, window=6, shift=4),
    "one more than whole segments": Case(T=33, segment_size=8, shift=0),
    "segments of one": Case(T=9, segment_size=1, window=1),
    "no tails": Case(T=29, segment_size=8, window=0, shift=3),
    "whole tails": Case(T=29, segment_size=8, window=8, shift=3),
    "one segment": Case(T=20, segment_size=64, shift=7),
    "groups of heads": Case(T=26, segment_size=8, K=2, G=3, U=12, B=2),
    "many segments": Case(T=150, segment_size=8, shift=4, H=4, U=4),
    "long segments": Case(T=300, segment_size=128, window=50, shift=50, G=2),
    "own scale": Case(T=26, segment_size=8, scale=0.7),
    "large scores": Case(T=40, segment_size=8, loud=50.0),
    "packed": Case(T=41, segment_size=8, shift=4, documents=PACKED, B=2, K=2, G=2),
    "packed, long segments": Case(T=41, segment_size=32, window=10, documents=PACKED, B=2),
    "a row of padding": Case(T=41, segment_size=8, documents=EMPTY_ROW, B=2),
    "scattered ids": Case(T=41, segment_size=8, window=5, shift=3, documents=SCATTERED, B=2),
    "top 1 of four": Case(T=37, segment_size=8, top_segments=1),
    "top 0, packed": Case(T=41, segment_size=4, top_segments=0, documents=PACKED, B=2),
    "top 0": Case(T=61, segment_size=8, shift=4, top_segments=0, K=2, G=2),
    "top 2": Case(T=61, segment_size=8, window=3, top_segments=2, B=2, K=2, G=2, U=12),
    "top 1, packed": Case(T=41, segment_size=4, shift=2, top_segments=1, documents=PACKED, B=2, K=2),
    "top 1, a row of padding": Case(T=41, segment_size=4, window=1, top_segments=1, documents=EMPTY_ROW, B=2),
    "top 1, large scores": Case(T=61, segment_size=8, top_segments=1, loud=50.0),
    "bfloat16": Case(T=61, segment_size=16, shift=8, dtype="bfloat16", K=2, G=2, documents=None),
    "bfloat16, packed": Case(T=41, segment_size=8, shift=4, dtype="bfloat16", documents=PACKED, B=2),
    "bfloat16, top 1": Case(T=61, segment_size=8, shift=4, dtype="bfloat16", top_segments=1, G=2),
}


@st.composite
def runs(draw: st.DrawFn, T: int, contiguous: bool) -> tuple[tuple[int, int], ...]:
    """Documents of one row: padding wherever it falls; an id comes back only if not ``contiguous``."""
    row: list[tuple[int, int]] = []
    left, next_id = T, draw(st.integers(1, 3))
    while left:
        length = draw(st.integers(1, left))
        if draw(st.integers(0, 3)) == 0:
            row.append((0, length))
        elif contiguous or not row:
            row.append((next_id, length))
            next_id += draw(st.integers(1, 2))
        else:
            row.append((draw(st.integers(1, 3)), length))
        left -= length
    return tuple(row)


@st.composite
def cases(
    draw: st.DrawFn,
    top: bool | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    min_T: int = 1,
    max_T: int = 48,
    **fixed: Any,
) -> Case:
    """Calls of every kind; ``top``: with (True) or without (False) top segments, or either; ``fixed`` fields stay."""
    T = draw(st.integers(min_T, max_T))
    W = draw(st.integers(1, 20))
    w = draw(st.none() | st.integers(0, W))
    top = draw(st.booleans()) if top is None else top
    top_segments = draw(st.integers(0, 4)) if top else None
    B = draw(st.integers(1, 2))
    documents = None
    if draw(st.booleans()):
        contiguous = top or draw(st.booleans())
        documents = tuple(draw(runs(T, contiguous)) for _ in range(B))
    drawn = {
        "T": T,
        "segment_size": W,
        "window": w,
        "shift": draw(st.integers(-W, 2 * W)),
        "top_segments": top_segments,
        "B": B,
        "K": draw(st.integers(1, 2)),
        "G": draw(st.integers(1, 3)),
        "H": draw(st.sampled_from([4, 8])),
        "U": draw(st.sampled_from([4, 8, 12])),
        "documents": documents,
        "dtype": draw(st.sampled_from(dtypes)),
        "seed": draw(st.integers(0, 99)),
    }
    return Case(**{**drawn, **fixed})
