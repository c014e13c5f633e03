"""The Mosaic GPU kernels of grouped matmul: simulated on CPU, lowered for CUDA; no GPU is needed.

Two thread blocks take all tiles in turn. The simulator looks for races of copies with reads; a warpgroup is one thread
there, so that races within it are not seen.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_simulator import compile_once, no_gpu_races  # noqa: F401
from grouped_matmul_cases import CASES, Case, check
from hypothesis import given, settings
from hypothesis import strategies as st
from planting import altered

import pallas_kernels.grouped_matmul
from pallas_kernels import hopper
from pallas_kernels.expert_dispatch import Plan
from pallas_kernels.grouped_matmul import expert_swiglu, gpu, grouped_matmul, grouped_swiglu

TWO_BLOCKS = ("gpu_tiles.py", "PROGRAMS = 132", "PROGRAMS = 2")
LOOK_FOR_RACES = ("gpu.py", "InterpretGPUParams(out_of", "InterpretGPUParams(detect_races=True, out_of")
SIZES = (70, 0, 130, 1, 55)  # 259 rows with 3 spare ones: padded to whole tiles of 8
GPU_CASES = {
    "matmul": CASES["matmul, kernel sizes"],
    "swiglu of rows that are gathered": CASES["experts, kernel sizes"],
    "matmul, int8": CASES["matmul, int8, of a layer, kernel sizes"],
    "more depth than buffers, layers": Case(
        (64, 72, 0, 200), spare=0, function="matmul", D=512, F=128, layers=3, dtype="bfloat16"
    ),
    "tiles reach over the last column": Case((70, 0, 9, 60), D=192, F=320, dtype="bfloat16"),
    "tiles reach over the last column, int8": Case(
        (70, 0, 9), function="matmul", D=64, F=320, dtype="bfloat16", int8=True
    ),
    "no row in any group": Case((0, 0), spare=140, D=128, F=128, dtype="bfloat16"),
    "a row each": Case((1,) * 17, D=128, F=128, dtype="bfloat16"),
    "giant": Case((3, 490, 0, 2), spare=17, D=128, F=256, dtype="bfloat16"),
}  # fmt: skip
SLOW = tuple(GPU_CASES)[3:]


def simulate(case: Case, folder: pathlib.Path, *faults: tuple[str, str, str]) -> None:
    with altered(pallas_kernels.grouped_matmul, folder, TWO_BLOCKS, LOOK_FOR_RACES, *faults) as package, no_gpu_races():
        check(case, "gpu", package)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in GPU_CASES])
def test_simulated_kernels_compute_the_definition_without_a_race(name: str, tmp_path: pathlib.Path) -> None:
    simulate(GPU_CASES[name], tmp_path)


ARRIVE = "        plgpu.barrier_arrive(self.done.at[self.slot(step)])\n"
RELEASE = "    def release(self, step: Any) -> None:\n"
RELEASED_EARLY = (
    ("gpu_tiles.py", "        return self.slot(step)\n", ARRIVE + "        return self.slot(step)\n"),
    ("gpu_tiles.py", RELEASE + ARRIVE, RELEASE + "        pass\n"),
)
# The simulator calls it an error if a barrier is met again before anybody has seen it: without a wait, one block each.
ONE_BLOCK = Case((30,), spare=0, function="matmul", D=64, F=64, dtype="bfloat16")
MANY_BLOCKS = GPU_CASES["more depth than buffers, layers"]
RACES = {
    "blocks are read before they are here": (
        ONE_BLOCK,
        (("gpu_tiles.py", "        plgpu.barrier_wait(self.here.at[self.slot(step)])\n", ""),),
    ),
    "blocks are given back before they are read": (MANY_BLOCKS, RELEASED_EARLY),
    "a warpgroup does not wait for the zeros of the other": (
        GPU_CASES["matmul"],
        (("gpu_outer.py", "    plgpu.barrier_arrive(masked)\n    plgpu.barrier_wait(masked)\n", ""),),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", RACES)
def test_a_planted_fault_is_a_race(fault: str, tmp_path: pathlib.Path) -> None:
    case, changes = RACES[fault]
    with pytest.raises(AssertionError, match=r"a race|Not equal to tolerance"):
        simulate(case, tmp_path, *changes)


# ---------------------------------------------------------------- which tiles are visited


visits_of = jax.jit(gpu.visits_of, static_argnums=2)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_rows=st.sampled_from([1, 130, 700]), first=st.integers(0, 9))
def test_each_row_is_in_one_tile_of_its_group(data: st.DataObject, num_rows: int, first: int) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, num_rows), min_size=6, max_size=6)))
    sizes, spare = np.diff(ends, prepend=0), num_rows - ends[-1]
    visits = np.asarray(visits_of(jnp.asarray(sizes, jnp.int32), jnp.int32(first), num_rows))
    count = visits[0, gpu.COUNT]
    assert count <= len(visits)
    found = np.full(num_rows, -2)
    for row, begin, end, matrix, _ in visits[:count]:
        assert row % gpu.ALIGNED == 0  # copies are by tiles of 8 rows: elsewhere, they would take other rows
        mine = np.arange(max(row, begin), min(row + gpu.TILE, end))
        assert len(mine)
        assert (found[mine] == -2).all()
        found[mine] = matrix
    want = np.repeat([*(first + np.arange(len(sizes))), -1], [*sizes, spare])
    np.testing.assert_array_equal(found, want)


# ---------------------------------------------------------------- what can not be done, and other platforms


def arrays(case: Case) -> tuple[Any, ...]:
    (x, *weights), _, scales = case.inputs()
    return jnp.asarray(case.sizes, jnp.int32), scales, x, *weights


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(SIZES, function="matmul", D=128, F=128), "dtypes are float32, float32"),
        (Case(SIZES, function="matmul", D=128, F=96, dtype="bfloat16"), "rows are 96 and 128 wide"),
        (Case(SIZES, function="matmul", D=128, F=128, int8=True), "dtypes are float32;"),
    ],
)
def test_a_named_kernel_says_what_it_can_not_do(case: Case, reason: str) -> None:
    sizes_E, scales_EF, *inputs = arrays(case)

    def call(implementation: Any) -> Any:
        return lambda *a: grouped_matmul(*a, sizes_E, scales_EF=scales_EF, implementation=implementation)

    with pytest.raises(ValueError, match=f"implementation 'gpu': .*{reason}"):
        jax.eval_shape(call("gpu"), *inputs)
    assert jax.eval_shape(call(None), *inputs).shape == (case.R, case.F)  # unnamed, something else computes it


def test_float32_of_a_swiglu_and_no_rows_are_left_to_others() -> None:
    sizes_E, _, *inputs = arrays(Case(SIZES, D=128, F=128))
    with pytest.raises(ValueError, match="implementation 'gpu': dtypes are float32"):
        jax.eval_shape(lambda *a: grouped_swiglu(*a, sizes_E, implementation="gpu"), *inputs)
    sizes_E, _, *inputs = arrays(Case((0,), spare=0, function="matmul", D=128, F=128, dtype="bfloat16"))
    with pytest.raises(ValueError, match="implementation 'gpu': there are no rows"):
        jax.eval_shape(lambda *a: grouped_matmul(*a, sizes_E, implementation="gpu"), *inputs)


def gradients_of(case: Case) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    """Loss and gradients of a whole SwiGLU as a function of sizes, a token for each row, x and the weights."""

    row_TX = None if case.plan is None else case.plan.row_TX

    def loss(sizes_E, pair_R, x, *weights):
        if case.function == "experts":
            return expert_swiglu(x, *weights, Plan(row_TX, pair_R, sizes_E)).astype(jnp.float32).sum()
        if case.function == "swiglu":
            return grouped_swiglu(x, *weights, sizes_E).astype(jnp.float32).sum()
        return grouped_matmul(x, *weights, sizes_E).astype(jnp.float32).sum()

    sizes_E, _, *inputs = arrays(case)
    every = (sizes_E, jnp.zeros(case.R, jnp.int32), *inputs)
    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in every)
    return jax.value_and_grad(loss, argnums=tuple(range(2, len(every)))), shapes


HIDDEN = ("grouped_swiglu_hidden", "grouped_swiglu_down")
KERNELS = {
    "matmul": ("grouped_matmul", "grouped_matmul_transposed", "grouped_outer"),
    "experts": (*HIDDEN, "grouped_swiglu_dhidden", "grouped_swiglu_dx", *["grouped_outer"] * 3),
}


@pytest.mark.parametrize("function", KERNELS)
def test_exported_for_cuda_it_is_these_kernels(function: str) -> None:
    f, shapes = gradients_of(CASES[f"{function}, kernel sizes"])
    text = jax.export.export(jax.jit(f), platforms=["cuda"])(*shapes).mlir_module()
    found = re.findall(r"\\00(grouped_[a-z_]+)_mosaic_gpu", text)
    assert text.count("custom_call @mosaic_gpu") == len(KERNELS[function])
    assert sorted(found) == sorted(KERNELS[function])


def test_compiled_for_another_platform_nothing_of_it_is_left() -> None:
    f, shapes = gradients_of(CASES["swiglu, kernel sizes"])
    assert "mosaic_gpu" not in jax.jit(f).lower(*shapes).as_text()


def test_each_kernel_states_the_flops_that_the_definition_asks_for() -> None:
    case = CASES["swiglu, kernel sizes"]
    f, shapes = gradients_of(case)
    stated = re.findall(r"kernel_flops=(\d+)[^\n]*\n", jax.make_jaxpr(f)(*shapes).pretty_print(name_stack=True))
    one = 2 * case.R * case.D * case.F
    # Two products, one, and backward one, two, and three outer products: nine.
    assert {int(flops) for flops in stated} == {one, 2 * one}


def test_programs_without_it_do_not_load_mosaic_gpu() -> None:
    program = """
import sys, jax, jax.numpy as jnp
from pallas_kernels.grouped_matmul import grouped_matmul
x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 128), (2, 128, 128)))
jax.eval_shape(lambda x, w: grouped_matmul(x, w, jnp.array([3, 4])), x, w)
print([m for m in sys.modules if m == "jax.experimental.mosaic.gpu" or "grouped_matmul.gpu_" in m])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_simulation_that_would_hang_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "SIMULATOR_THREADS", 10**6)
    sizes_E, _, *inputs = arrays(CASES["matmul, kernel sizes"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_force_host_platform_device_count"):
        jax.block_until_ready(grouped_matmul(*inputs, sizes_E, implementation="gpu"))
