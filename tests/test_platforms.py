"""Only the form for the platform that is compiled for is traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from dsjax.sharding import MeshConfig, make_mesh, use_mesh
from pallas_kernels.platforms import ANY, by_platform, compiled_for


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
