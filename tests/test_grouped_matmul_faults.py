"""Faults planted in grouped matmul, one at a time: the check of tests/grouped_matmul_cases.py catches each.

A fault is a snippet of a file, which must stand there exactly once, and what stands there instead. Where the code moves
on, its faults move with it.
"""

from __future__ import annotations

import pathlib

import pytest
from gpu_simulator import compile_once  # noqa: F401
from grouped_matmul_cases import CASES, check_variant
from grouped_matmul_gpu_faults import GPU_FAULTS
from grouped_matmul_tpu_faults import TPU_FAULTS
from planting import Fault

SHARED = (
    Fault(
        "rows of no group are multiplied as well",
        "reference.py",
        "yield (row_R >= ends_E[e] - sizes_E[e]) & (row_R < ends_E[e])",
        "yield row_R >= ends_E[e] - sizes_E[e]",
        "matmul",
        "reference",
    ),
    Fault(
        "the reference lets NaN through to the gradient",
        "reference.py",
        "x_e = jnp.where(inside_R, x_RD, 0)",
        "x_e = x_RD",
        "swiglu",
        "reference",
    ),
    Fault(
        "the first layer's matrices",
        "multiply.py",
        "layer * w.shape[1]",
        "0 * layer",
        "matmul of a layer",
    ),
    Fault(
        "the gradient goes to the first layer",
        "multiply.py",
        "dw_E.dtype), dw_E, first, axis=0)",
        "dw_E.dtype), dw_E, 0, axis=0)",
        "swiglu of a layer",
    ),
    Fault(
        "the gradient of rows forgets scales",
        "multiply.py",
        "w_GDF = (w_GDF * scales_GF[:, None]).astype(x_RD.dtype)",
        "w_GDF = w_GDF.astype(x_RD.dtype)",
        "matmul, int8",
    ),
    Fault(
        "a token has the gradient of one of its rows alone",
        "multiply.py",
        "dx_TD = dx_RD if plan is None else sum_rows(dx_RD, plan)",
        "dx_TD = dx_RD if plan is None else jnp.zeros_like(arrays[0]).at[plan.token_R].set(dx_RD)",
        "experts, all of them",
    ),
    Fault(
        "rows are not gathered",
        "xla.py",
        "[(x_TD, token_R)], R,",
        "[(x_TD, token_R * 0 + jnp.arange(len(token_R)) % len(x_TD))], R,",
        "experts",
    ),
    Fault("gate and up are exchanged", "xla.py", "gate, up = (_dot(", "up, gate = (_dot(", "swiglu"),
    Fault(
        "the gradient of silu lacks a term",
        "xla.py",
        "dh * up * (s + act * (1 - s))",
        "dh * up * s",
        "swiglu",
    ),
    Fault(
        "rows have a gradient through the gate alone",
        "xla.py",
        'dx_bRD = _dot("brf,bdf->brd", dgate, w_gate) + _dot("brf,bdf->brd", dup, w_up)',
        'dx_bRD = _dot("brf,bdf->brd", dgate, w_gate)',
        "swiglu",
    ),
    Fault("scales are left out", "xla.py", "y_bRF * scales_bF[:, None]", "y_bRF", "matmul, int8"),
    Fault(
        "the last product's gradient leaves out the activation",
        "xla.py",
        "outers = ((x_bRD, dgate), (x_bRD, dup), (h, dy_bRD))",
        "outers = ((x_bRD, dgate), (x_bRD, dup), (up, dy_bRD))",
        "swiglu",
    ),
)

BLOCKS = tuple(
    Fault(what, "blocks.py", old, new, case, "xla, small")
    for what, old, new, case in (
        (
            "a block takes rows of the next group",
            "(row_r1 < self.ends_E[group + i])",
            "(row_r1 >= 0)",
            "swiglu, even",
        ),
        (
            "a block at the end takes rows of the group before",
            "(row_r1 >= start) & ",
            "",
            "swiglu, all in the last",
        ),
        (
            "a block overwrites what stands beside its rows",
            "kept = jnp.where(inside, y, jax.lax.dynamic_slice_in_dim(out, at, len(y)))",
            "kept = y",
            "swiglu, even",
        ),
        (
            "neighbours have the same weights",
            "self.first + group, len(starts), axis=0)",
            "self.first + group + jnp.arange(len(starts))[0] * 0 - (len(starts) > 1), len(starts), axis=0)",
            "swiglu, even",
        ),
        (
            "first blocks count twice",
            "done_E = jnp.where(well_filled, most_E, 0)",
            "done_E = jnp.zeros_like(most_E)",
            "swiglu, even",
        ),
        (
            "first blocks count though there were none",
            "done_E = jnp.where(well_filled, most_E, 0)",
            "done_E = most_E",
            "swiglu, all in the first",
        ),
        (
            "a further block replaces a group's sum",
            "s.at[group].add(m[0])",
            "s.at[group].set(m[0])",
            "swiglu, even",
        ),
        (
            "the last block of a group is left out where it is not whole",
            "self.starts_E - done_E + size - 1) // size",
            "self.starts_E - done_E) // size",
            "swiglu, even",
        ),
        (
            "further blocks begin where the first one does",
            "self.starts_E[group] + done_E[group] + ",
            "self.starts_E[group] + ",
            "swiglu, even",
        ),
        (
            "rows by their numbers are read one on",
            "dynamic_slice_in_dim(number_R, at, size)]",
            "dynamic_slice_in_dim(jnp.roll(number_R, 1), at, size)]",
            "experts, even",
        ),
    )
)

RAGGED = tuple(
    Fault(what, "xla.py", old, new, case, "xla, ragged")
    for what, old, new, case in (
        (
            "sizes stand at the first layer",
            "sizes_E, first, axis=0)",
            "sizes_E, 0 * first, axis=0)",
            "matmul of a layer",
        ),
        (
            "the matrices are the wrong way round",
            "contracted = ((1,), (2 if transposed else 1,))",
            "contracted = ((1,), (1,))\n    w_GDF = w_GDF.reshape(-1, *w_GDF.shape[:0:-1]) if transposed else w_GDF",
            "matmul",
        ),
        (
            "gate and up are exchanged on the way back",
            "gate, up = (a[: len(x_RD)] for a in saved)",
            "up, gate = (a[: len(x_RD)] for a in saved)",
            "swiglu, even",
        ),
        (
            "scales of the group before",
            'first + jnp.searchsorted(ends_E, row_R, side="right")',
            'first + jnp.searchsorted(ends_E, row_R, side="right") - 1',
            "matmul, int8, of a layer",
        ),
        (
            "rows behind the last group keep what was computed",
            "jnp.where(row_R[:, None] < ends_E[-1], y_RF, 0)",
            "jnp.where(row_R[:, None] < ends_E[-1], y_RF, 1)",
            "matmul",
        ),
    )
)

FAULTS = SHARED + BLOCKS + RAGGED + TPU_FAULTS + GPU_FAULTS
SLOW = {"tpu: experts", "tpu: experts, bfloat16", "matmul, kernel sizes", "swiglu, kernel sizes"}  # interpreted


def marked(*values: object, case: str) -> object:
    return pytest.param(*values, marks=[pytest.mark.slow] if case in SLOW else [])


@pytest.mark.parametrize(
    "fault", [marked(f, case=f.case) for f in FAULTS], ids=lambda fault: f"{fault.file}: {fault.what}"
)
def test_a_planted_fault_is_caught(fault: Fault, tmp_path: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match=r"Not equal to tolerance|a race"):
        check_variant(CASES[fault.case], fault.variant, tmp_path, (fault.file, fault.old, fault.new))


@pytest.mark.parametrize(
    ("variant", "case"),
    [marked(variant, case, case=case) for variant, case in {fault.variant: fault.case for fault in FAULTS}.items()],
)
def test_without_a_fault_the_same_check_passes(variant: str, case: str, tmp_path: pathlib.Path) -> None:
    """What catches a fault is the fault, not the copy."""
    check_variant(CASES[case], variant, tmp_path)
