"""Cycles counted in the compiler's schedules: kernels whose loops, predicates and copies are known beforehand."""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from schedule_kernels import BLOCK, SIZE, TRIPS

from dsjax.plan.kernels import MXU_SIZE, matmul_cycles
from dsjax.plan.prefetch import calls_of_each, packed_words, prefetched
from dsjax.plan.schedule import DELAY_SLOTS, Count, Kernel, Region, ScheduleError, count, parse, read_kernels

ROOT = pathlib.Path(__file__).parent.parent
UNITS = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"  # codespell:ignore valu


def kernel_of(*bundles: str, mxu: tuple[int, ...] = ()) -> Kernel:
    """A schedule from its bundles, as libtpu writes them; ``mxu``: addresses of bundles with a matrix product."""
    lines, labels = [], ("LB", "PF")
    for address, text in enumerate(bundles):
        label, _, rest = text.partition(": ") if text[:2] in labels else ("", "", text)
        lines.append(f"{address:#6x} {label + ':' if label else '  :'} > {{ {rest} }}")
    lines[0] = lines[0].replace("0x0", "  0")
    rows = [f"{int(n in mxu)} 0 0 0 0 0 0 0 0 0" for n in range(len(bundles))]
    head = f"== CAPACTIY:\n{UNITS}\n    4     3     4     2     1     3     3     1     1     2\n== UTILIZATION:\n"
    return parse("k", "= control target key start\n" + "\n".join(lines), head + "\n".join(rows))


def executions(counted: Count) -> list[tuple[int, int, int]]:
    return [(region.start, region.end, region.executions) for region in counted.regions]


# ---------------------------------------------------------------- by hand


def loop(*body: str, turns: int) -> list[str]:
    """A loop over s1 = 0 ... turns - 1 around a body, on a chip with one bundle of delay behind a jump."""
    return [
        "%s0_s1 = smov 0 /* a /* comment */ in two */",
        "LB: %s1_s1 = sphi %s0_s1, %s2_s1",
        *body,
        "%s2_s1 = sadd.s32 1, %s1_s1  ;;  %v7_v3 = vld [vmem:[%s1_s1] sm:$0xff]",
        f"%p0_p0 = scmp.lt.s32.totalorder %s2_s1, {turns}",
        "%9 = sbr.rel (%p0_p0) target bundleno = 1 (0x1), region = 2",
        "",
    ]


@given(turns=st.integers(1, 50))
def test_a_loop_runs_as_often_as_its_branch_is_taken(turns: int) -> None:
    counted = count(kernel_of(*loop(turns=turns), "%v9_v9 = vst 0"), "v4")
    assert executions(counted) == [(0, 1, 1), (1, 6, turns), (6, 7, 1)]
    assert counted.cycles == 2 + 5 * turns
    assert counted.turns == turns


def test_a_region_is_skipped_where_its_predicate_says_so() -> None:
    """``pl.when(i % 4 == 2)``, with the flag through a spill, and the last bundle of a jump's delay always run."""
    body = (
        "%s10_s3 = sand.u32 3, %s1_s1",
        "%11 = sst [smem:[#allocation7_spill]] %s10_s3",
        "%s12_s4 = sld [smem:[#allocation7_spill]]",
        "%p1_p1 = scmp.eq.s32.totalorder %s12_s4, 2",
        "%13 = sbr.rel (!%p1_p1) target bundleno = 10 (0xa), region = 3",
        "",
        "%v1_v1 = vmatmul 0",
        "%v2_v1 = vmatmul 0",
        "PF: %s15_s9 = smov 0",
    )
    counted = count(kernel_of(*loop(*body, turns=11), mxu=(8, 9)), "v4")
    # i = 2, 6, 10 of 0 ... 10
    assert executions(counted) == [(0, 1, 1), (1, 8, 11), (8, 10, 3), (10, 15, 11)]
    assert counted.slots["MXU"] == 6
    # Of the turns between the first and the last, 1 ... 9, all but 2 and 6 run no product.
    assert (counted.turns, counted.skipped_turns, counted.skipped_cycles) == (11, 7, 7 * 12)


def test_the_trip_count_of_a_loop_may_be_prefetched() -> None:
    bundles = (
        "%s90_s9 = inlined_call_operand.hbm [shape: s32[3], index: 1, kind: input, shape index: {}] /* operand 1 */",
        "%s91_s9 = smov [#allocation5]",
        "%92 = dma.hbm_to_smem %s90_s9, 16, %s91_s9, [#allocation2]",
        "%s0_s1 = smov 0",
        "%s93_s2 = sld [smem:[#allocation5 + $0x2]]",
        "LB: %s1_s1 = sphi %s0_s1, %s2_s1",
        "%s2_s1 = sadd.s32 1, %s1_s1",
        "%p0_p0 = scmp.lt.s32.totalorder %s2_s1, %s93_s2",
        "%9 = sbr.rel (%p0_p0) target bundleno = 5 (0x5), region = 2",
        "",
    )
    counted = count(kernel_of(*bundles), "v4", {1: [7, 8, 6]})
    assert executions(counted) == [(0, 5, 1), (5, 10, 6)]
    with pytest.raises(ScheduleError, match=r"0x8: .*known at run time only"):
        count(kernel_of(*bundles), "v4")


def test_copies_are_counted_with_their_predicate() -> None:
    body = (
        "%p1_p1 = scmp.ge.s32.totalorder %s1_s1, 3",
        "%20 = dma.hbm_to_vmem [thread:$0]  (!%p1_p1), %s5_s5, 64, %s6_s6, [#allocation4], 4, 4, 4",
        "%21 = dma.vmem_to_hbm [thread:$0]  (%p1_p1), %s5_s5, 8, %s6_s6, [#allocation4], 4, 4, 4",
        "%22 = dma.vmem_to_smem %s5_s5, 1000, %s6_s6, [#allocation4]",
    )
    counted = count(kernel_of(*loop(*body, turns=10)), "v4")
    assert counted.hbm_bytes == 512 * (3 * 64 + 7 * 8)
    unknown = (*body[:1], "%20 = dma.hbm_to_vmem (%p8_p8), %s5_s5, 64, %s6_s6, [#allocation4]")
    assert count(kernel_of(*loop(*unknown, turns=10)), "v4").hbm_bytes is None


@pytest.mark.parametrize(
    ("op", "arguments", "expected"),
    [
        ("sadd.s32", (2147483647, 1), -(2**31)),
        ("sadd.s32", (4294967295, 5), 4),
        ("ssub.s32", (-(2**31), 1), 2**31 - 1),
        ("smul.u32", (65536, 65536), 0),
        ("sshll.u32", (3, 31), -(2**31)),
        ("sshra.s32", (-8, 1), -4),
        ("sshrl.u32", (-8, 1), 2**31 - 4),
        ("smin.u32", (-1, 7), 7),
        ("smin.s32", (-1, 7), -1),
        ("smax.u32", (-1, 7), -1),
        ("sxor.u32", (6, 3), 5),
    ],
)
def test_scalar_arithmetic(op: str, arguments: tuple[int, int], expected: int) -> None:
    """A region that runs only if the result is as expected, and one that runs only if it is not."""
    counted = count(
        kernel_of(
            f"%s1_s1 = {op} {arguments[0]}, {arguments[1]}",
            f"%p1_p1 = scmp.eq.s32.totalorder %s1_s1, {expected % 2**32}",
            "%3 = sbr.rel (!%p1_p1) target bundleno = 5 (0x5), region = 1",
            "",
            "%v1_v1 = vadd 0",
            "",
        ),
        "v4",
    )
    assert [region.executions for region in counted.regions] == [1, 1, 1]


@pytest.mark.parametrize(
    ("bundles", "message"),
    [
        (["", "%3 = sbr.ind (%p0_p0) %s3_s3", "", ""], "0x1: a jump sbr.ind that can not be followed"),
        (["%3 = sbr.rel target bundleno = 0 (0x0), region = 1", ""], "it does not end"),
        (
            [
                "%3 = sbr.rel (%p0_p0) target bundleno = 0 (0x0)",
                "%4 = sbr.rel (%p0_p0) target bundleno = 1 (0x1)",
                "",
                "",
            ],
            "a jump in the 1 bundles behind another",
        ),
    ],
)
def test_what_can_not_be_followed_is_an_error(
    bundles: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsjax.plan.scalar_unit.MAX_TURNS", 1000)
    with pytest.raises(ScheduleError, match=message):
        count(kernel_of(*bundles), "v4")


def test_files_that_do_not_go_together_are_an_error() -> None:
    head = f"== CAPACTIY:\n{UNITS}\n 4 3 4 2 1 3 3 1 1 2\n== UTILIZATION:\n"
    with pytest.raises(ScheduleError, match="2 bundles, but slots of shape"):
        parse("k", "   0 : { }\n 0x1 : { }", head + "0 0 0 0 0 0 0 0 0 0")
    with pytest.raises(ScheduleError, match="bundle 2 stands where bundle 0x1 should"):
        parse("k", "   0 : { }\n 0x2 : { }", head)


def test_no_dump_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ScheduleError, match="no schedule of a Pallas kernel"):
        read_kernels(tmp_path)


@given(rows=st.integers(1, 9), columns=st.integers(1, 300), bits=st.sampled_from([8, 16, 32]), data=st.data())
def test_words_of_scalar_memory_hold_an_array(rows: int, columns: int, bits: int, data: Any) -> None:
    """Where a kernel looks for element (i, j): the address that splash attention's schedule computes."""
    array = np.random.default_rng(rows * columns).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (1, rows, columns))
    words = packed_words(array.astype(f"int{bits}"))
    i, j = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    pack = 32 // bits
    word = words[(i // pack * (-(-columns // 128)) + j // 128) * 128 + j % 128]
    field = (word >> bits * (i % pack)) & (2**bits - 1)
    assert field == array[0, i, j] % 2**bits


# ---------------------------------------------------------------- prefetched scalars


def _kernel(lists: Any, name: str) -> Any:
    """A call that prefetches scalars."""
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(lists),
        grid=(1,),
        in_specs=[pl.BlockSpec((8, 128), lambda *_: (0, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda *_: (0, 0)),
    )

    def copy(*refs: Any) -> None:
        refs[-1][...] = refs[-2][...]

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    return lambda x: pl.pallas_call(copy, grid_spec=grid_spec, out_shape=shape, name=name)(*lists, x)


def test_scalars_of_constants_are_found_wherever_the_kernel_is_called() -> None:
    """Under jit, a custom gradient, and a choice of the platform; what depends on an argument stays unknown."""

    @jax.custom_vjp
    def attend(x: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
        lists = (first * 2 + jnp.arange(3), count)
        on = {"tpu": _kernel(lists, "on_tpu"), "default": _kernel(lists, "elsewhere")}
        return jax.lax.platform_dependent(x, **on)

    attend.defvjp(lambda x, *rest: (attend(x, *rest), None), lambda _, g: (g, None, None))

    def program(x: jax.Array) -> Any:
        count = x[0, :3].astype(jnp.int32)
        return jax.vjp(jax.jit(lambda x: attend(x, jnp.asarray(np.array([3, 1, 4])), count)), x)[0]

    traced = jax.jit(program).trace(jax.ShapeDtypeStruct((8, 128), jnp.float32))
    (found,) = prefetched(traced.jaxpr)
    assert found.name == "on_tpu"
    assert found.words() == {0: [6, 3, 10]}
    assert found.operands[1] is None
    (other,) = prefetched(traced.jaxpr, platform="cpu")
    assert other.name == "elsewhere"


def test_kernels_in_a_loop_are_called_in_each_turn() -> None:
    def program(x: jax.Array) -> Any:
        lists = (jnp.asarray(np.array([3, 1, 4])), jnp.arange(3))
        return jax.lax.map(lambda i: _kernel(lists, "turned")(x * i), jnp.arange(5.0))

    (found,) = prefetched(jax.jit(program).trace(jax.ShapeDtypeStruct((8, 128), jnp.float32)).jaxpr)
    assert found.calls == 5
    assert found.words() == {0: [3, 1, 4], 1: [0, 1, 2]}


def test_equal_calls_are_compiled_once_and_run_each() -> None:
    lists = (jnp.asarray(np.array([3, 1, 4])), jnp.arange(3))

    def program(x: jax.Array, y: jax.Array) -> Any:
        turned = jax.lax.map(lambda i: _kernel(lists, "turned")(x * i), jnp.arange(5.0))
        return turned, _kernel(lists, "alike")(x), _kernel(lists, "alike")(2 * x), _kernel(lists, "alike")(y)

    arrays = [jax.ShapeDtypeStruct((rows, 128), jnp.float32) for rows in (8, 16)]
    called = prefetched(jax.jit(program).trace(*arrays).jaxpr)
    assert calls_of_each(called, ["turned", "alike", "alike", "alike"]) == {"turned": 5, "alike": 1}
    assert calls_of_each(called[:-1], ["alike", "turned"]) == {"turned": 5, "alike": 2}
    for compiled in (["alike"], ["alike", "alike"], ["unheard of"]):  # which of two runs twice is not known
        with pytest.raises(ScheduleError, match=f"kernels called {compiled[0]}: {len(compiled)} are compiled"):
            calls_of_each(called, compiled)


def test_equal_runs_add_up() -> None:
    region = Region(0, 4, "", 3, {"MXU": 2})
    counted = Count("k", 12, 3, 1, 4, None, {"MXU": 2}, (region,)).times(5)
    assert (counted.cycles, counted.turns, counted.skipped_turns, counted.skipped_cycles) == (60, 15, 5, 20)
    assert counted.hbm_bytes is None
    assert counted.slots == {"MXU": 10}
    assert counted.regions[0].cycles == 60


# ---------------------------------------------------------------- compiled


@functools.cache
def compiled(chip: str) -> dict[str, Any]:
    """Counts of tests/schedule_kernels.py, by kernel."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env |= {"PYTHONPATH": str(ROOT)}
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, str(ROOT / "tests" / "schedule_kernels.py"), chip]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


CHIPS = ["v5e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in DELAY_SLOTS if chip != "v5e")]


@pytest.mark.parametrize("chip", CHIPS)
def test_a_matrix_product_takes_what_the_units_can_do_and_little_more(chip: str) -> None:
    pytest.importorskip("libtpu")
    counted = compiled(chip)["matmul"]
    floor = matmul_cycles(chip, SIZE, SIZE, SIZE)
    # What fills and empties the units in each of 16 steps, by libtpu 0.0.42: 3 to 4 %, on v6e 19 % and on tpu7x, which
    # has the copies of blocks in the kernel, 29 %: their units do four times as much in a step.
    assert floor < counted["cycles"] < (1.05 if MXU_SIZE[chip] == 128 else 1.3) * floor
    # A row of A's blocks stays while B's columns pass: A once, B four times, and the result; but the compiler may place
    # a whole operand on the chip before the kernel begins.
    assert counted["hbm_bytes"] == 6 * SIZE * SIZE * 2 or chip == "tpu7x"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("name", "trips"), [("prefetched", sum(TRIPS)), ("by_index", 1 + 2 + 3 + 4)])
def test_loops_and_predicates_of_a_kernel_run_as_its_source_says(name: str, trips: int, chip: str) -> None:
    pytest.importorskip("libtpu")
    counted = compiled(chip)[name]
    products = [r["executions"] for r in counted["regions"] if r["slots"]["MXU"]]
    assert products == [trips]
    exponentials = [r for r in counted["regions"] if r["executions"] == 1 and r["slots"]["EUP"]]
    assert len(exponentials) == 1
    blocks = len(TRIPS) * math.prod(BLOCK) * 4
    assert counted["hbm_bytes"] == 2 * blocks or chip == "tpu7x"
    assert counted["cycles"] == sum(r["cycles"] for r in counted["regions"])
