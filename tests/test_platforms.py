"""Only the form for the platform that is compiled for is traced."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from dsjax.sharding import MeshConfig, make_mesh, use_mesh
from pallas_kernels.expert_dispatch import combine, dispatch, plan_dispatch
from pallas_kernels.grouped_matmul import expert_swiglu
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.platforms import ANY, by_platform, compiled_for
from pallas_kernels.segmented_attention import segmented_attention


def traced(platform: str | None) -> tuple[set[str], str]:
    """Which forms are called while a function is traced, and what the program for the CPU adds."""
    called = set()

    def form(name: str, number: float):
        def run(x):
            called.add(name)
            return x + number

        return run

    @jax.jit
    def f(x):
        return by_platform(x, default=form("default", 1.5), tpu=form("tpu", 2.5), cpu=form("cpu", 3.5))

    with compiled_for(platform):
        return called, f.trace(jnp.ones(3)).lower().as_text()


@pytest.mark.parametrize(("platform", "form"), [("cpu", "cpu"), ("tpu", "tpu"), ("cuda", "default")])
def test_the_forms_of_other_platforms_are_not_called(platform: str, form: str) -> None:
    assert traced(platform)[0] == {form}


def test_without_a_platform_all_are_there_and_the_right_one_is_lowered() -> None:
    assert traced(ANY)[0] == {"default", "tpu", "cpu"}
    called, text = traced(None)
    assert called == {"default", "tpu", "cpu"}
    assert "3.5" in text
    assert "2.5" not in text


def test_a_function_that_was_traced_for_one_platform_is_traced_again_for_another() -> None:
    @jax.jit
    def inner(x):
        return by_platform(x, default=lambda x: x + 1, tpu=lambda x: x * 0)

    @jax.jit
    def f(x):
        return inner(x)

    results = []
    for platform in ("cpu", "tpu", "cpu", None):
        with compiled_for(platform):
            results.append(float(f(jnp.float32(1))))
    assert results == [2, 0, 2, 2]


def test_the_mesh_says_what_is_compiled_for() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert compiled_for.value is None
    with use_mesh(mesh):
        assert compiled_for.value == "cpu"
        with use_mesh(None):
            assert compiled_for.value == "cpu"
    with compiled_for(ANY), use_mesh(mesh):
        assert compiled_for.value == ANY
    assert compiled_for.value is None


def attention_of(top: int | None, *arrays: jax.Array) -> jax.Array:
    return segmented_attention(*arrays, segment_size=4, top_segments=top, documents=jnp.ones((1, 32), int))


def experts_of(rows: jax.Array, weights: jax.Array, *matrices: jax.Array) -> jax.Array:
    plan = plan_dispatch(jnp.asarray([[0, 1], [2, 1]] * 4), 3)
    moved = dispatch(rows, plan) + expert_swiglu(rows, *matrices, plan)
    return combine(moved, weights, plan)


def pages_of(*arrays: jax.Array) -> jax.Array:
    return paged_attention(*arrays, jnp.zeros((2, 3), int), jnp.zeros((2, 3, 8), int), jnp.zeros((2, 1), int))[0]


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (functools.partial(attention_of, None), [(1, 32, 2, 4)] * 3),
        (functools.partial(attention_of, 1), [(1, 32, 2, 4)] * 3),
        (experts_of, [(8, 16), (8, 2), (3, 16, 8), (3, 16, 8), (3, 8, 16)]),
        (pages_of, [(2, 1, 2, 8), (5, 1, 8, 8), (5, 1, 8, 8)]),
    ],
    ids=["segments", "top segments", "experts", "pages"],
)
def test_kernels_are_called_with_64_bit_numbers_switched_on(call: Callable, shapes: list) -> None:
    """What can not be traced then leaves its place to XLA; whoever asks for it gets the reason."""
    differentiable = call is not pages_of
    with jax.enable_x64(True):
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        out = jax.eval_shape(call, *arrays)
        assert out.dtype == jnp.float32
        if differentiable:
            slopes = jax.eval_shape(jax.grad(lambda *x: call(*x).sum(), range(len(arrays))), *arrays)
            assert {slope.dtype for slope in slopes} == {jnp.dtype("float32")}


def test_64_bit_numbers_are_refused() -> None:
    x = jnp.ones((1, 8, 1, 8))
    with jax.enable_x64(True):
        with pytest.raises(
            ValueError, match="implementation 'tpu': jax_enable_x64 is set; the kernel counts in 32 bits"
        ):
            segmented_attention(x, x, x, segment_size=4, implementation="tpu")
        with pytest.raises(ValueError, match="q is float64; it must be floating point, as bfloat16 or float32"):
            segmented_attention(x.astype(jnp.float64), x, x, segment_size=4)
