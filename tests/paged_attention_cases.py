"""Paged attention: cases, the definition written out, and variants of the implementations that are checked by them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from planting import Change, altered, no_races

import pallas_kernels.paged_attention
from pallas_kernels.paged_attention import ALWAYS, NEVER

# Errors allowed, as a share of the largest expected value or of 1, whichever is more. float32: scores of about 4 carry
# a few times 2 ** -24 each, and sums of up to 200 terms come in another order. bfloat16: inputs are exact, but the
# weights of the softmax are rounded to 2 ** -9. A fault changes 1e-2 and more.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2**-7}


@dataclasses.dataclass(frozen=True)
class Case:
    """``used``: pages of each row; ``holes``: share of those that are missing; ``always``, ``never``: of the slots.

    ``shared``: keys begin with the values, and no values are given.
    """

    used: tuple[int, ...] = (5, 2)
    T: int = 1
    K: int = 1
    G: int = 1
    H: int = 8
    U: int = 8
    P: int = 16
    holes: float = 0.0
    always: float = 0.0
    never: float = 0.1
    dtype: str = "float32"
    seed: int = 0
    loud: float = 1.0
    shared: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"value_width": self.U} if self.shared else {}

    def inputs(self) -> tuple[Any, ...]:
        """q, k, v, pages, positions, first; the pages of no row, and slots that hold nothing, are loud."""
        rng = np.random.default_rng(self.seed)
        B, J = len(self.used), max(self.used) + 1
        M = B * J + 2
        q = self.loud * rng.normal(size=(B, self.T, self.K * self.G, self.H))
        k, v = (rng.normal(size=(M, self.K, self.P, n)) for n in (self.H, self.U))
        pages = rng.permutation(M)[: B * J].reshape(B, J)
        missing = (np.arange(J) >= np.array(self.used)[:, None]) | (rng.random((B, J)) < self.holes)
        for page in set(range(M)) - set(pages[~missing].tolist()):
            k[page], v[page] = 100.0, 100.0
        positions = rng.integers(0, 60, (B, J, self.P))
        drawn = rng.random((B, J, self.P))
        positions = np.where(drawn < self.always, ALWAYS, np.where(drawn > 1 - self.never, NEVER, positions))
        first = rng.integers(0, 70, (B, self.T))
        arrays = [jnp.asarray(x, self.dtype) for x in (q, k, v)]
        whole = [np.where(missing, -1, pages), positions, first]
        if self.shared:
            arrays[2] = None
        return (*arrays, *(jnp.asarray(x, jnp.int32) for x in whole))


@functools.cache
def dense(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Output and logarithm, query by query and key by key, float64."""
    q, k, v, pages, positions, first = (None if x is None else np.asarray(x) for x in case.inputs())
    q, k, v = (x.astype(np.float64) for x in (q, k, k[..., : case.U] if v is None else v))
    B, T, N, H = q.shape
    out, log = np.zeros((B, T, N, case.U)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        seen = [
            (page, slot)
            for j, page in enumerate(pages[b])
            for slot in range(case.P)
            if page >= 0 and positions[b, j, slot] >= first[b, t]
        ]
        if seen:
            keys, values = (np.array([x[page, n // case.G, slot] for page, slot in seen]) for x in (k, v))
            scores = keys @ q[b, t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ values / weights.sum()
            log[b, t, n] = np.log(weights.sum()) + scores.max()
    return out, log


# ---------------------------------------------------------------- variants

SIMULATION = "from jax.experimental.pallas import tpu as pltpu\nSIMULATION = pltpu.InterpretParams(detect_races=True, "
SIMULATION += 'uninitialized_memory="nan", out_of_bounds_reads="raise")\n'
FUTURE = "from __future__ import annotations\n"
TPU_PIECES: tuple[Change, ...] = (
    ("tpu.py", "QUERIES = 512", "QUERIES = 8"),
    ("tpu.py", "SLOTS = 512", "SLOTS = 32"),
)
VARIANTS: dict[str, tuple[str, tuple[Change, ...]]] = {
    "reference": ("reference", ()),
    "xla": ("xla", ()),
    "xla, small": ("xla", (("xla.py", "(512, 1 << 22), (128, 1 << 19)", "(32, 1 << 22), (32, 1 << 19)"),)),
    "tpu": ("tpu", ()),
    "tpu, small": ("tpu", TPU_PIECES),
    "tpu, simulated": (
        "tpu",
        (
            *TPU_PIECES,
            ("attend.py", FUTURE, FUTURE + SIMULATION),
            (
                "attend.py",
                "default=functools.partial(kernel, interpret=True)",
                "default=functools.partial(kernel, interpret=SIMULATION)",
            ),
        ),
    ),
}


def check(case: Case, variant: str, folder: pathlib.Path, *faults: Change) -> None:
    """The definition against a variant, in which faults may be planted."""
    implementation, changes = VARIANTS[variant]
    simulated = any("SIMULATION" in new for _, _, new in changes)
    with altered(pallas_kernels.paged_attention, folder, *changes, *faults) as package:
        run = functools.partial(package.paged_attention, implementation=implementation, **case.options)
        with no_races() if simulated else contextlib.nullcontext():
            assert_close(case, jax.jit(run)(*case.inputs()))


def assert_close(case: Case, got: Any) -> None:
    """Output and logarithm as the definition has them."""
    for name, g, w in zip(("out", "log"), got, dense(case), strict=True):
        assert g.dtype == jnp.float32, f"{name} is {g.dtype}"
        limit = TOLERANCE[case.dtype] * max(1.0, case.loud) * max(1.0, float(np.abs(np.where(np.isinf(w), 0, w)).max()))
        np.testing.assert_allclose(np.asarray(g), w, atol=limit, rtol=0, err_msg=f"{name} of {case}")


CASES = {
    "one page": Case(used=(1,)),
    "rows of several lengths": Case(used=(7, 1, 0, 4), T=3, K=2, G=3),
    "nothing at all": Case(used=(0, 0)),
    "all seen": Case(used=(3, 5), always=1.0, never=0.0),
    "holes": Case(used=(7, 6), holes=0.4, T=2, K=2),
    "tails": Case(used=(6,), T=5, always=0.4, G=2),
    "many queries": Case(used=(3, 4), T=11, K=2, G=2, U=12),
    "values of another width": Case(H=12, U=4, T=2, K=2, G=2),
    "keys that begin with values": Case(H=12, U=8, T=3, G=4, used=(7, 0, 6), holes=0.4, shared=True),
    "large scores": Case(loud=50.0, T=3, K=2),
    "bfloat16": Case(dtype="bfloat16", used=(6, 3), T=3, K=2, G=2),
    "bfloat16, holes": Case(dtype="bfloat16", used=(6, 3), holes=0.5, T=2, G=4),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Calls of every kind."""
    shared = draw(st.booleans())
    return Case(
        shared=shared,
        used=tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))),
        T=draw(st.integers(1, 9)),
        K=draw(st.integers(1, 3)),
        G=draw(st.integers(1, 3)),
        U=draw(st.sampled_from([4, 8] if shared else [4, 8, 12])),
        holes=draw(st.sampled_from([0.0, 0.3])),
        always=draw(st.sampled_from([0.0, 0.5])),
        never=draw(st.sampled_from([0.0, 0.5])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        seed=draw(st.integers(0, 99)),
    )
