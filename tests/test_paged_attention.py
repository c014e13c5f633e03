"""Paged attention against its definition: the reference, XLA, and the TPU kernel interpreted and simulated."""

from __future__ import annotations

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from paged_attention_cases import CASES, Case, assert_close, cases, check
from planting import Fault, altered

import pallas_kernels.paged_attention
from pallas_kernels.paged_attention import paged_attention, tpu


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_as_defined(name: str, implementation: str) -> None:
    case = CASES[name]
    run = functools.partial(paged_attention, implementation=implementation, **case.options)
    assert_close(case, jax.jit(run)(*case.inputs()))


@pytest.mark.parametrize("variant", ["xla, small", "tpu, small", "tpu, simulated"])
@pytest.mark.parametrize(
    "name", ["rows of several lengths", "holes", "many queries", "bfloat16, holes", "keys that begin with values"]
)
def test_small_pieces_and_a_simulated_chip_give_the_same(name: str, variant: str, tmp_path: pathlib.Path) -> None:
    check(CASES[name], variant, tmp_path)


@settings(max_examples=4, deadline=None)
@given(cases())
def test_any_call_is_as_defined(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for variant in ("xla, small", "tpu, small"):
            check(case, variant, pathlib.Path(folder))


FAULTS = (
    Fault(
        "values are the end of the key",
        "xla.py",
        "kv[-1][..., :U]",
        "kv[-1][..., -U:]",
        "keys that begin with values",
    ),
    Fault(
        "values that keys begin with are not cleared where there is no page",
        "tpu.py",
        "jnp.zeros_like(v_ref[half, :, slots])",
        "v_ref[half, :, slots]",
        "keys that begin with values",
        "tpu, simulated",
    ),
    Fault("keys are scaled by 1 / H", "attend.py", "H**-0.5 if scale", "H**-1.0 if scale", "all seen"),
    Fault(
        "a missing page counts as page 0",
        "xla.py",
        "(pages_BJ >= 0)[..., None], positions_BJP, -1",
        "(pages_BJ >= -1)[..., None], positions_BJP, -1",
        "holes",
    ),
    Fault(
        "the last block is left out",
        "xla.py",
        "-(-used // C), block",
        "used // C, block",
        "rows of several lengths",
        "xla, small",
    ),
    Fault(
        "sums are not scaled to a new maximum",
        "xla.py",
        "out_BKRU * kept_BKR[..., None] + more",
        "out_BKRU + more",
        "rows of several lengths",
        "xla, small",
    ),
    Fault(
        "a query sees the position before its first",
        "xla.py",
        "position_BS[:, None] >= first_BR[..., None]",
        "position_BS[:, None] + 1 >= first_BR[..., None]",
        "many queries",
    ),
    Fault(
        "heads go to the wrong key/value head",
        "xla.py",
        "* K + jnp.arange(K)[:, None]",
        "* K + jnp.arange(K)[::-1, None]",
        "many queries",
    ),
    Fault(
        "queries take each other's first position",
        "xla.py",
        "jnp.repeat(first_BT, N // K, axis=1)",
        "jnp.tile(first_BT, (1, N // K))",
        "many queries",
    ),
    Fault(
        "the first position itself is not seen",
        "tpu.py",
        "seen = position >= jnp.tile",
        "seen = position > jnp.tile",
        "many queries",
        "tpu, small",
    ),
    Fault(
        "sums are not scaled to a new maximum",
        "tpu.py",
        "out_ref[0, k] * shrink[:, :1]",
        "out_ref[0, k]",
        "rows of several lengths",
        "tpu, small",
    ),
    Fault(
        "the last chunk is left out",
        "tpu.py",
        "jnp.arange(chunks * C) // C + 1",
        "jnp.arange(chunks * C) // C",
        "rows of several lengths",
        "tpu, small",
    ),
    Fault(
        "a page lands in its neighbour's place",
        "tpu.py",
        "pl.ds(pl.multiple_of(i * P, P), P)",
        "pl.ds(pl.multiple_of((C - 1 - i) * P, P), P)",
        "rows of several lengths",
        "tpu, small",
    ),
    Fault(
        "a copy is not waited for",
        "tpu.py",
        "                copy.wait()\n",
        "                pass\n",
        "rows of several lengths",
        "tpu, simulated",
    ),
    Fault(
        "two chunks share a buffer",
        "tpu.py",
        "do(page, jax.lax.rem(c, 2), slots)",
        "do(page, 0, slots)",
        "rows of several lengths",
        "tpu, simulated",
    ),
    Fault(
        "values of no page keep what was in memory",
        "tpu.py",
        "jnp.zeros_like(v_ref[half, :, slots])",
        "v_ref[half, :, slots]",
        "holes",
        "tpu, simulated",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.what}")
def test_a_planted_fault_is_caught(fault: Fault, tmp_path: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match=r"Not equal to tolerance|a race"):
        check(CASES[fault.case], fault.variant, tmp_path, (fault.file, fault.old, fault.new))


# ---------------------------------------------------------------- what it says, and what it reads


def test_odd_calls_are_refused(tmp_path: pathlib.Path) -> None:
    q, k, v, pages, positions, first = Case().inputs()
    twice = [jnp.tile(x, (1, 2, 1, 1)) for x in (k, v)]
    with altered(pallas_kernels.paged_attention, tmp_path) as package:  # a copy: without the tests' checks of shapes
        for arrays, sentence in (
            ((q, k, v, pages[0], positions, first), "q, k and v have 4 dimensions, pages 2, positions 3, first 2"),
            ((q, k, v, pages, positions[:, :, 1:], first), "shapes do not go together: q"),
            ((q, k[..., 1:], v, pages, positions, first), "shapes do not go together: q"),
            ((q, *twice, pages, positions, first), "the second must divide"),
        ):
            with pytest.raises(ValueError, match=sentence):
                package.paged_attention(*arrays)
        with pytest.raises(ValueError, match="implementation is 'cuda'"):
            package.paged_attention(q, k, v, pages, positions, first, implementation="cuda")
    with pytest.raises(ValueError, match="implementation 'tpu': pages have 12 slots; the kernel takes multiples of 8"):
        paged_attention(*Case(P=12).inputs(), implementation="tpu")
    halves = [x.astype(jnp.bfloat16) for x in (k, v)]
    assert "all bfloat16 or all float32" in str(tpu.why_not(q, *halves, pages, positions, first, value_width=8))
    assert "up to 256" in str(tpu.why_not(*Case(H=300).inputs(), value_width=8))
    assert "up to 640" in str(tpu.why_not(*Case(H=700, shared=True).inputs(), value_width=8))
    for options in ({}, {"value_width": 9}, {"value_width": -1}):
        with pytest.raises(ValueError, match="value_width"):
            paged_attention(q, k, None, pages, positions, first, **options)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_pages_of_others_can_hold_anything(implementation: str) -> None:
    """What a row does not have is not read: NaN in it changes nothing."""
    q, k, v, pages, positions, first = Case(used=(3, 1), T=2).inputs()
    own = np.isin(np.arange(len(k)), np.asarray(pages))[:, None, None, None]
    want = paged_attention(q, k, v, pages, positions, first, implementation="reference")
    k, v = (jnp.where(own, x, jnp.nan) for x in (k, v))
    for got, w in zip(
        paged_attention(q, k, v, pages, positions, first, implementation=implementation), want, strict=True
    ):
        np.testing.assert_allclose(got, w, atol=5e-6)
