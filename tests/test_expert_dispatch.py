"""Expert dispatch: every implementation is the definition, forward and backward; what the definition promises."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dispatch_cases import CASES, Case, Shape, cases, check, check_variant, chosen_by_loops
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import altered

import pallas_kernels.expert_dispatch
from pallas_kernels.expert_dispatch import (
    Choice,
    combine,
    dispatch,
    plan_dispatch,
    top_k_route,
    tpu,
)
from pallas_kernels.expert_dispatch.plan import _by_scattering, _by_sorting
from pallas_kernels.expert_dispatch.route import TopK

few = functools.partial(settings, deadline=None, derandomize=True)
# Of what takes seconds to compile for the interpreter, a part; all of it with --slow.
FEW = ("several blocks", "special", "groups, top 2", "limited, padded, more rows", "bfloat16, no multiples", "no token")
UNROLLED = ("wide",)
SIMULATED = ("limited", "bfloat16, no multiples")


# ---------------------------------------------------------------- every implementation is the definition


def variants_and_cases() -> Iterator:
    some = {
        "reference": (*FEW, "groups, ties", "groups, -inf"),
        "xla": tuple(CASES),
        "tpu": FEW,
        "tpu, unrolled": UNROLLED,
        "tpu, simulated": SIMULATED,
    }
    for variant, default in some.items():
        for name in CASES:
            yield pytest.param(variant, name, marks=[pytest.mark.slow] if name not in default else [])


@pytest.mark.parametrize(("variant", "name"), list(variants_and_cases()))
def test_forward_and_gradients(variant: str, name: str, tmp_path: pathlib.Path) -> None:
    if variant in ("reference", "xla", "tpu"):
        check(CASES[name], variant)
    else:
        check_variant(CASES[name], variant, tmp_path)


@few(max_examples=1000)
@given(cases())
def test_a_thousand_cases_of_routing(case: Case) -> None:
    check(case, "xla")


@few(max_examples=20)
@given(cases((Shape(T=21, E=12, X=3, num_groups=4, top_groups=3, group_score="top2", bias=True, counted=True),)))
def test_tpu_on_any_case(case: Case) -> None:
    check(case, "tpu")


@pytest.mark.slow
@few(max_examples=300)
@given(cases())
def test_tpu_on_many_cases(case: Case) -> None:
    check(case, "tpu")


# ---------------------------------------------------------------- what the definition promises


def test_the_definition_by_hand() -> None:
    scores = np.array(
        [[0.1, 0.9, 0.9, -np.inf], [np.nan, -np.inf, -np.inf, -1], [5, 5, 5, 5], [0, 3, 2, 1]], np.float32
    )
    counted = np.array([True, True, False, True])
    experts, own, position, counts = chosen_by_loops(scores, 2, counted_T=counted)
    assert experts.tolist() == [[1, 2], [3, 0], [4, 4], [1, 2]]
    np.testing.assert_array_equal(own, np.array([[0.9, 0.9], [-1, np.nan], [0, 0], [3, 2]], np.float32))
    assert position.tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]
    assert counts.tolist() == [1, 2, 2, 1]
    grouped = np.array([[4, -9, 2, 3], [np.inf, -np.inf, 0, 0]], np.float32)
    best = {"num_groups": 2, "top_groups": 1}
    assert chosen_by_loops(grouped, 2, **best)[0].tolist() == [[0, 1], [0, 1]]
    assert chosen_by_loops(grouped, 2, **best, group_score="top2")[0].tolist() == [[3, 2], [2, 3]]


def test_gradients_of_a_layer_are_those_of_a_loop_over_experts() -> None:
    """Scores, rows and the experts' weights, through choice, dispatch and combine; a limit drops some pairs."""
    T, E, X, D, limit = 23, 4, 2, 5, 9
    rng = np.random.default_rng(0)
    scores, x, w, dout = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((T, E), (T, D), (E, D, D), (T, D)))

    def experts_of(choice: Choice) -> jax.Array:
        """(T, E): what an expert counts for a token."""
        kept = choice.position_TX < limit
        one = choice.experts_TX[..., None] == jnp.arange(E)
        return jnp.sum(jnp.where(one & kept[..., None], choice.scores_TX[..., None], 0), axis=1)

    def ours(scores, x, w):
        choice = top_k_route(scores, X)
        plan = plan_dispatch(
            choice.experts_TX,
            E,
            position_TX=choice.position_TX,
            counts_E=choice.counts_E,
            limit_E=jnp.full(E, limit),
        )
        expert_R = jnp.searchsorted(jnp.cumsum(plan.sizes_E), jnp.arange(T * X), side="right")
        y = jnp.einsum("RD,RDF->RF", dispatch(x, plan), w[jnp.minimum(expert_R, E - 1)], precision="highest")
        return jnp.sum(combine(jnp.sin(y), choice.scores_TX, plan) * dout)

    def loop(scores, x, w):
        weights = experts_of(top_k_route(scores, X))
        y = sum(weights[:, e, None] * jnp.sin(jnp.matmul(x, w[e], precision="highest")) for e in range(E))
        return jnp.sum(y * dout)

    assert int(top_k_route(scores, X).counts_E.max()) > limit
    # Sums of at most 23 float32 products of about 1, in another order.
    got, want = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(scores, x, w) for f in (ours, loop))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


@few(max_examples=30)
@given(st.sampled_from([1, 40]), st.sampled_from([1, 8, 30]), st.integers(0, 99))
def test_numbers_sorted_by_row_stand_where_they_would_be_scattered_to(pairs: int, rows: int, seed: int) -> None:
    """What a TPU does, and what the others do."""
    rng = np.random.default_rng(seed)
    filled = rng.integers(0, min(pairs, rows) + 1)
    row = rng.permutation(np.concatenate([np.arange(filled), np.full(pairs - filled, rows)])).reshape(-1, 1)
    of = jnp.asarray(rng.integers(1, 99, row.shape), jnp.float32)
    both = [f(of, jnp.asarray(row, jnp.int32), rows) for f in (_by_sorting, _by_scattering)]
    np.testing.assert_array_equal(*both)
    assert int((both[0] > 0).sum()) == filled


def test_reasons_of_the_tpu_kernels() -> None:
    def why(function: str, *shapes: tuple[int, ...], dtype: str = "bfloat16", **static: TopK) -> str | None:
        return tpu.why_not(function, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), **static)

    assert why("select", (9, 512), spec=TopK(16)) is None
    assert "up to 16 of 512" in str(why("select", (9, 513), spec=TopK(2)))
    assert "up to 16 of 512" in str(why("select", (9, 64), spec=TopK(17)))
    assert why("gather_sum", (99, 7168), (9, 8)) is None
    assert why("gather", (99, 16384), (9,), dtype="float32") is None
    assert "room" in str(why("gather_sum", (99, 16384), (9, 16)))
    assert "float16" in str(why("gather_dot", (99, 128), (9, 2), dtype="float16"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 4}, "must divide 6 experts"),
        ({"num_groups": 0}, "num_groups is 0 and top_groups 1; the first must divide 6 experts"),
        ({"num_groups": 2, "group_score": "sum"}, "group_score is 'sum'; it is one of 'max', 'top2'"),
        ({"bias_E": jnp.zeros(1)}, r"bias is \(1,\); with scores \(3, 6\) it is \(6,\)"),
        ({"bias_E": jnp.zeros((3, 6))}, r"bias is \(3, 6\); with scores \(3, 6\) it is \(6,\)"),
        ({"counted_T": jnp.zeros(1, bool)}, r"counted is \(1,\); with scores \(3, 6\) it is \(3,\)"),
        ({"scores_TE": jnp.zeros((1, 3, 6))}, r"scores are \(1, 3, 6\); they are \(T, E\)"),
        ({"num_groups": 3, "top_groups": 4}, "top_groups 4"),
        ({"top_k": 0}, "between 1 and the 6"),
        ({"top_k": 3, "num_groups": 3, "top_groups": 1}, "between 1 and the 2"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; it is one of None, 'reference', 'xla', 'tpu', 'gpu'"),
    ],
)
def test_what_can_not_be_asked_for(changes: dict, message: str, tmp_path: pathlib.Path) -> None:
    """Of a copy, whose calls the shape checker of these tests does not see first."""
    with altered(pallas_kernels.expert_dispatch, tmp_path) as package, pytest.raises(ValueError, match=message):
        package.top_k_route(**{"scores_TE": jnp.zeros((3, 6)), "top_k": 2, **changes})
