"""Expert dispatch on GPUs: a named kernel says why there is none; unnamed, XLA computes all of it."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from dispatch_cases import ACCEPTABLE, CASES, check_or_skip, expected, program

import pallas_kernels.expert_dispatch
from pallas_kernels.expert_dispatch import gpu
from pallas_kernels.expert_dispatch.backends import run
from pallas_kernels.expert_dispatch.route import TopK

rows, scores = jnp.zeros((6, 128), jnp.bfloat16), jnp.zeros((3, 4))
tokens, row_TX = jnp.zeros(6, jnp.int32), jnp.zeros((3, 2), jnp.int32)
CALLS = {
    "select": ((scores, None), {"spec": TopK(2)}),
    "gather": ((rows, tokens, None), {}),
    "gather_sum": ((rows, row_TX, None), {}),
    "gather_dot": ((rows, row_TX, rows[:3]), {}),
}


@pytest.mark.parametrize("function", CALLS)
def test_a_named_kernel_says_why_there_is_none(function: str) -> None:
    arrays, static = CALLS[function]
    with pytest.raises(ValueError, match=rf"implementation 'gpu': {gpu.REASONS[function]}; there is no kernel"):
        run("gpu", function, *arrays, **static)


def test_the_shared_check_accepts_the_reason() -> None:
    assert "gpu" in ACCEPTABLE
    with pytest.raises(pytest.skip.Exception, match="XLA"):
        check_or_skip(CASES["bfloat16"], "gpu")


def test_compiled_for_cuda_it_is_plain_xla() -> None:
    case = CASES["bfloat16"]
    given, _ = expected(case)
    f = program(case.shape, None, pallas_kernels.expert_dispatch)
    text = f.trace(**given).lower(lowering_platforms=("cuda",)).as_text()
    assert "gather" in text
    assert "mosaic" not in text
    assert "tpu_custom_call" not in text
