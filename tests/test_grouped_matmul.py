"""The reference and the XLA forms of grouped matmul against the definition; what they compute, and what they refuse."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_matmul_cases import CASES, Case, cases, check, check_variant
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import altered

import pallas_kernels.grouped_matmul
from dsjax.plan.flops import count_flops
from pallas_kernels.expert_dispatch import plan_dispatch
from pallas_kernels.grouped_matmul import blocks, grouped_matmul, grouped_swiglu, xla

BY_BLOCKS = [name for name in CASES if "even" in name or "swiglu" in name or "int8" in name]
RAGGED = (
    "matmul",
    "matmul, no row in any group",
    "matmul, int8, of a layer",
    "matmul, bfloat16",
    "swiglu of a layer",
    "swiglu, all in the last",
    "experts of a layer",
    "experts, bfloat16",
)


@pytest.mark.parametrize("variant", ["reference", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_definition(name: str, variant: str, tmp_path: pathlib.Path) -> None:
    check_variant(CASES[name], variant, tmp_path)


@pytest.mark.parametrize(
    ("name", "variant"), [(n, "xla, small") for n in BY_BLOCKS] + [(n, "xla, ragged") for n in RAGGED]
)
def test_other_forms_are_the_definition(name: str, variant: str, tmp_path: pathlib.Path) -> None:
    check_variant(CASES[name], variant, tmp_path)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(cases())
def test_any_call_is_the_definition(case: Case) -> None:
    check(case, "xla")


@pytest.mark.parametrize("name", ["matmul, int8, bfloat16", "experts"])
def test_the_best_for_a_cpu_is_the_definition(name: str) -> None:
    check(CASES[name], None)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0, 1, 30, 60, 70, 400]), min_size=1, max_size=8), st.sampled_from([0, 5, 3000]))
def test_few_rows_are_computed_in_vain(sizes: list[int], spare: int) -> None:
    """At most as many as there are, and less than a block for each group."""
    E, R = len(sizes), sum(sizes) + spare

    def count(_, x_br1):
        return (), (jnp.full((len(x_br1), 1, 1), x_br1.shape[1], jnp.float32),)

    rows = [(jnp.ones((R, 1), jnp.float32), None)]
    (computed_E,) = blocks.over_groups(count, (), rows, R, jnp.array(sizes, jnp.int32), 0, spare=())[1]
    assert sum(sizes) <= computed_E.sum() <= 2 * sum(sizes) + E * blocks.SMALLER_BLOCK
    assert not sum(sizes) or computed_E.sum() > 0


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_flops_are_those_of_the_rows(platform: str) -> None:
    R, E, D, F = 64, 4, 8, 16
    x, w, back = jnp.ones((R, D)), jnp.ones((E, D, F)), jnp.ones((E, F, D))
    sizes_E = jnp.array([10, 0, 40, 14])
    matmul = jax.make_jaxpr(lambda x, w: grouped_matmul(x, w, sizes_E, implementation="xla"))(x, w)
    assert count_flops(matmul, platform=platform).model == 2 * R * D * F

    def loss(x, *weights):
        return jnp.sum(grouped_swiglu(x, *weights, sizes_E, implementation="xla"))

    found = count_flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, w, w, back), platform=platform)
    assert (found.model, found.executed, found.unknown_loops) == (9 * 2 * R * D * F, 9 * 2 * R * D * F, ())


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_no_layer_is_cut_out_of_a_stack(platform: str) -> None:
    """Other platforms than the CPU get programs that slice no matrix."""
    w, back = jnp.ones((12, 8, 16)), jnp.ones((12, 16, 8))

    def run(x, w, back, sizes_E, first):
        return xla.swiglu(x, None, w, w, back, sizes_E, first, keep=False)[0]

    def sliced(platform: str) -> int:
        exported = jax.export.export(jax.jit(run), platforms=[platform], disabled_checks=[])(
            jnp.ones((64, 8)), w, back, jnp.ones(4, jnp.int32), jnp.int32(4)
        )
        return sum("dynamic_slice" in line and "12x" in line for line in exported.mlir_module().splitlines())

    assert sliced("cpu") > 0  # so it is seen where it happens
    assert sliced(platform) == 0


X, W, BACK, SIZES = jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.ones((3, 5, 4)), jnp.array([1, 2, 3])
INT8 = W.astype(jnp.int8)
PLAN = plan_dispatch(jnp.zeros((6, 1), jnp.int32), 3)


@pytest.mark.parametrize(
    ("function", "arguments", "more", "message"),
    [
        ("grouped_matmul", (X, BACK, SIZES), {}, r"shapes do not go together: .*\(6, 4\), \(3, 5, 4\), \(3,\)"),
        ("grouped_matmul", (X, W, SIZES[:2]), {}, "shapes do not go together"),
        ("grouped_matmul", (X, W[None], SIZES), {}, "shapes do not go together"),
        ("grouped_matmul", (X, W, SIZES), {"layer": jnp.int32(0)}, "behind one dimension of layers"),
        ("grouped_matmul", (X, W.astype(jnp.int8), SIZES), {}, "w is int8 and scales are not given"),
        ("grouped_matmul", (X, W, SIZES), {"scales_EF": jnp.ones((3, 5))}, "w is float32 and scales are given"),
        ("grouped_matmul", (X, INT8, SIZES), {"scales_EF": jnp.ones(5)}, r"scales are \(5,\); of w .* are \(3, 5\)"),
        ("grouped_matmul", (X, INT8, SIZES), {"scales_EF": jnp.ones((2, 5))}, r"scales are \(2, 5\)"),
        ("grouped_matmul", (X, INT8, SIZES), {"scales_EF": jnp.ones((3, 1))}, r"scales are \(3, 1\)"),
        ("grouped_matmul", (X, INT8, SIZES), {"scales_EF": jnp.ones((3, 4))}, r"scales are \(3, 4\)"),
        (
            "grouped_matmul",
            (X, jnp.stack([INT8, INT8]), SIZES),
            {"scales_EF": jnp.ones((3, 5)), "layer": 1},
            r"scales are \(3, 5\); of w \(2, 3, 4, 5\) they are \(2, 3, 5\)",
        ),
        ("grouped_matmul", (X, W[:0], SIZES[:0]), {}, "of at least one group"),
        ("grouped_matmul", (X, W, jnp.ones(3)), {}, "group sizes: the dtype is float32"),
        ("grouped_swiglu", (X, W[None], W[None], BACK[None], SIZES), {"layer": 0.0}, "layer: the dtype is float32"),
        ("grouped_matmul", (X, W.astype(jnp.bfloat16), SIZES), {}, "w is bfloat16 and .*; w is float32 as the rows"),
        ("grouped_matmul", (X, W, SIZES), {"implementation": "no"}, "implementation is 'no'; it is one of None, 'ref"),
        ("grouped_swiglu", (X, W, W, W, SIZES), {}, r"weights are \(E, D, F\), \(E, D, F\), \(E, F, D\)"),
        ("grouped_swiglu", (X, W, W, BACK.astype(jnp.bfloat16), SIZES), {}, "they must be the same"),
        ("expert_swiglu", (X, W, W[:2], BACK, PLAN), {}, "shapes do not go together"),
    ],
)
def test_what_does_not_go_together_is_an_error(
    function: str, arguments: tuple, more: dict, message: str, tmp_path: pathlib.Path
) -> None:
    """Of a copy, whose calls the shape checker of these tests does not see first."""
    with altered(pallas_kernels.grouped_matmul, tmp_path) as package, pytest.raises(ValueError, match=message):
        getattr(package, function)(*arguments, **more)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_sizes_and_a_layer_may_be_plain_numbers(implementation: str) -> None:
    weights = [jnp.stack([w, 2 * w]) for w in (W, W, BACK)]
    for f, arrays in ((grouped_matmul, weights[:1]), (grouped_swiglu, weights)):
        want = f(X, *arrays, SIZES, layer=jnp.int32(1), implementation=implementation)
        np.testing.assert_array_equal(f(X, *arrays, [1, 2, 3], layer=1, implementation=implementation), want)


def test_no_rows_at_all() -> None:
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, 0 * SIZES), X[:0], W)
    dx, dw = vjp(y)
    assert y.shape == (0, 5)
    assert dx.shape == (0, 4)
    np.testing.assert_array_equal(dw, 0 * W)
