"""The Mosaic GPU kernels of segmented attention: simulated on CPU, lowered for CUDA; no GPU is needed.

The simulator runs the warpgroups of a thread block as threads, with shared memory (NaN until written), copies and
barriers; only what one wgmma instruction computes is left to XLA.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, altered, assert_close, check, dense
from gpu_simulator import compile_once  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races, reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from pallas_kernels import hopper
from pallas_kernels.segmented_attention import Segments, gpu, gpu_tiles, segmented_attention

GPU_CASES = {
    "remainders": Case(T=300, segment_size=128, window=48, shift=32, H=64, U=64, dtype="bfloat16"),
    "groups of heads, packed": Case(
        T=300,
        segment_size=256,
        window=100,
        G=2,
        H=64,
        U=64,
        dtype="bfloat16",
        documents=(((1, 70), (2, 100), (0, 3), (3, 117), (0, 10)),),
    ),
    "heads of 192 and 128": Case(T=250, segment_size=128, window=64, shift=20, H=192, U=128, dtype="bfloat16"),
    "no tails": Case(T=200, segment_size=128, window=0, H=64, U=128, dtype="bfloat16"),
    "whole tails": Case(T=250, segment_size=128, window=128, H=64, U=64, dtype="bfloat16", scale=0.7),
    "large scores": Case(T=250, segment_size=128, window=64, H=64, U=64, dtype="bfloat16", loud=50.0),
    "scattered ids": Case(
        T=256,
        segment_size=128,
        window=30,
        H=64,
        U=64,
        dtype="bfloat16",
        documents=(((1, 50), (2, 60), (1, 70), (0, 26), (2, 50)),),
    ),
    "rows and heads": Case(
        T=384,
        segment_size=128,
        window=64,
        shift=64,
        B=2,
        K=2,
        G=2,
        H=64,
        U=64,
        dtype="bfloat16",
        documents=(((1, 384),), ((0, 200), (5, 184))),
    ),
}
SLOW = ("no tails", "whole tails", "large scores", "scattered ids", "rows and heads")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in GPU_CASES])
def test_simulated_kernels_compute_the_definition(name: str) -> None:
    check(GPU_CASES[name], "gpu")


# ---------------------------------------------------------------- faults, and races

PLAIN = Case(T=300, segment_size=128, window=48, H=64, U=64, dtype="bfloat16")
PACKED = Case(T=250, segment_size=256, window=48, G=2, H=64, U=64, dtype="bfloat16", documents=(((1, 30), (2, 220)),))
MANY_BLOCKS = Case(T=500, segment_size=256, window=256, H=64, U=64, dtype="bfloat16")  # more than there are buffers
SIMULATION = InterpretGPUParams(detect_races=True)
PRODUCT = "        (scores,) = setting.products(product, meanwhile=take_turn)\n"
GIVEN_BACK = "        plgpu.barrier_arrive(k_done.at[slot])\n"
TABLE = "np.where(first_I + TILE > tail_I, count * TILE, end_I)"
VALUES = {
    "no rescaling": (PLAIN, "gpu_forward.py", "out * across(shrink, out.shape)", "out"),
    "one tail key more": (PLAIN, "gpu_tiles.py", "self.behind - 1, first_query", "self.behind, first_query"),
    "a query sees the next key": (PLAIN, "gpu_tiles.py", "<= row * jnp", "<= (row + 1) * jnp"),
    "later segments give no gradient": (PLAIN, "gpu_tiles.py", TABLE, "end_I"),
    "the rest of a softmax's gradient is forgotten": (PLAIN, "gpu.py", "-along_BTN)", "0 * along_BTN)"),
    "documents are not told apart": (PACKED, "gpu_tiles.py", "mixed = ~alike &", "mixed = ~meets &"),
    "the gradient of one head alone": (PACKED, "gpu_backward.py", "heads + jax.lax.div(step, self.blocks)", "heads"),
}
RACES = {
    "keys are read before they are here": (
        PLAIN,
        "gpu_forward.py",
        "        plgpu.barrier_wait(k_here.at[slot])\n",
        "",
    ),
    "keys are given back before they are read": (
        MANY_BLOCKS,
        "gpu_forward.py",
        PRODUCT + GIVEN_BACK,
        GIVEN_BACK + PRODUCT,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", VALUES)
def test_a_planted_fault_gives_a_wrong_value(fault: str, tmp_path: Any) -> None:
    case, *change = VALUES[fault]
    with altered(tmp_path, tuple(change)) as package, pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(case, "gpu", package.segmented_attention)


def forward_races(case: Case, module: Any) -> bool:
    """Whether the simulator sees a read of shared memory that a copy may overtake, or be overtaken by."""
    reset_gpu_interpret_mode_state()
    q, k, v, _ = case.inputs()
    forward = functools.partial(module.forward, segments=case.segments, scale=0.125, interpret=SIMULATION)
    jax.block_until_ready(jax.jit(lambda q, k, v: forward(q, k, v, None))(q, k, v))
    return get_races().races_found


@pytest.mark.slow
@pytest.mark.parametrize("fault", RACES)
def test_a_planted_fault_is_a_race(fault: str, tmp_path: Any) -> None:
    case, *change = RACES[fault]
    with altered(tmp_path, tuple(change)) as package:
        assert forward_races(case, importlib.import_module(f"{package.__name__}.gpu"))


@pytest.mark.slow
def test_the_forward_kernel_has_no_race() -> None:
    assert not forward_races(MANY_BLOCKS, gpu)


def test_the_backward_kernels_have_no_race() -> None:
    reset_gpu_interpret_mode_state()
    case = dataclasses.replace(PACKED, G=1)
    ids = jnp.asarray(case.ids_BT)
    static = {"segments": case.segments, "scale": 0.125, "interpret": SIMULATION}

    @jax.jit
    def both(q, k, v, dout):
        out, log = gpu.forward(q, k, v, ids, **static)
        return out, *gpu.backward(q, k, v, ids, out, log, dout, **static)

    found = both(*case.inputs())
    assert not get_races().races_found
    assert_close(case, tuple(np.asarray(x) for x in found), dense(case))


# ---------------------------------------------------------------- which blocks are visited


@st.composite
def rows_of_ids(draw: st.DrawFn, length: int) -> np.ndarray:
    """Ids of one row, and whether they follow each other."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    ids = np.searchsorted(cuts, np.arange(length), side="right")
    names = draw(st.lists(st.integers(-1, 9), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    return np.array(sorted(names) if draw(st.booleans()) else names, np.int32)[ids]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_that_are_left_out_hold_nothing_and_blocks_without_a_mask_hold_all(data: st.DataObject) -> None:
    length, size = 768, data.draw(st.sampled_from([128, 256, 384]))
    segments = Segments(size, data.draw(st.integers(0, size)))
    num, block = length // size, data.draw(st.sampled_from([32, 64, 128]))
    ids = data.draw(st.none() | rows_of_ids(length))
    position = np.arange(length)
    tail = position[segments.in_tail(position) & (segments.of(position) < num - 1)]
    seen_tail = segments.of(position)[:, None] > segments.of(tail)
    order = position[:, None] >= position
    seen_own = order & (segments.of(position)[:, None] == segments.of(position))
    seen = seen_own | (order & segments.in_tail(position))
    tail_ids = None
    if ids is not None:
        seen_tail &= ids[:, None] == ids[tail]
        seen_own &= ids[:, None] == ids
        seen &= ids[:, None] == ids
        tail_ids = np.pad(ids[tail], (0, length - len(tail)), constant_values=-1)[None]
    whole = (None, None) if ids is None else (jnp.asarray(ids[None]), jnp.asarray(tail_ids))
    tiles = length // 128
    keys = np.asarray(gpu_tiles.key_spans(segments, *whole, tiles, block, 1))[0]
    queries = np.asarray(gpu_tiles.query_spans(segments, whole[0], tiles, block, 1))[0]
    in_order = ids is not None and bool((np.diff(ids) >= 0).all())
    for spans, pairs, ids_of_blocks in (
        (keys[:, :4], seen_tail, None if ids is None else ids[tail]),
        (keys[:, 4:], seen_own, ids),
        (queries, seen.T, ids),
    ):
        for tile, (first, unmasked, masked, end) in enumerate(spans):
            rows = slice(tile * 128, (tile + 1) * 128)
            for j, start in enumerate(range(0, pairs.shape[1], block)):
                of_block = pairs[rows, start : start + block]
                assert first <= j < end or not of_block.any()
                assert not unmasked <= j < masked or of_block.all()
                if ids is None:
                    assert not first <= j < end or of_block.any()
                elif in_order:  # what holds another document alone is not visited
                    assert not first <= j < end or np.isin(ids[rows], ids_of_blocks[start : start + block]).any()


# ---------------------------------------------------------------- what can not be done, and other platforms


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"H": 256}, "heads are 256 and 64 wide"),
        ({"U": 32}, "heads are 64 and 32 wide"),
        ({"segment_size": 192}, "segment_size is 192"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"top_segments": 0}, "top_segments"),
    ],
)
def test_a_named_kernel_says_what_it_can_not_do(changes: dict[str, Any], reason: str) -> None:
    case = dataclasses.replace(Case(T=600, segment_size=128, H=64, U=64, dtype="bfloat16"), **changes)
    q, k, v, _ = case.inputs()
    call = {"segment_size": case.segment_size, "top_segments": case.top_segments, "scale": case.scale}
    with pytest.raises(ValueError, match=f"implementation 'gpu': .*{reason}"):
        jax.eval_shape(lambda *x: segmented_attention(*x, **call, implementation="gpu"), q, k, v)
    out = jax.eval_shape(lambda *x: segmented_attention(*x, **call), q, k, v)  # unnamed, something else computes it
    assert out.shape == (1, 600, 1, case.U)


def loss_and_gradients(case: Case) -> Any:
    def loss(q, k, v):
        documents = None if case.ids_BT is None else jnp.asarray(case.ids_BT)
        out = segmented_attention(q, k, v, segment_size=case.segment_size, shift=case.shift, documents=documents)
        return out.astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


KERNELS = ("segmented_attention_forward", "segmented_attention_dq", "segmented_attention_dkv")


@pytest.mark.parametrize("name", ["remainders", "groups of heads, packed", "heads of 192 and 128"])
def test_exported_for_cuda_it_is_the_three_kernels(name: str) -> None:
    case = GPU_CASES[name]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.inputs()[:3]]
    exported = jax.export.export(jax.jit(loss_and_gradients(case)), platforms=["cuda"])(*shapes)
    text = exported.mlir_module()
    assert text.count("custom_call @mosaic_gpu") == 3
    assert all(kernel in text for kernel in KERNELS)


def test_compiled_for_another_platform_nothing_of_it_is_left() -> None:
    case = GPU_CASES["remainders"]
    lowered = jax.jit(loss_and_gradients(case)).lower(*case.inputs()[:3])
    assert "mosaic_gpu" not in lowered.as_text()


def test_each_kernel_states_the_flops_that_the_definition_asks_for() -> None:
    case = GPU_CASES["groups of heads, packed"]
    program = jax.make_jaxpr(loss_and_gradients(dataclasses.replace(case, window=128)))(*case.inputs()[:3])
    stated = re.findall(r"kernel_flops=(\d+)[^\n]*\n", program.pretty_print(name_stack=True))
    # Each has one product of either width over all visible pairs that is not there before: 2 heads, 64 and 64 wide.
    pairs = Segments(256, 128).visible_pairs(300)
    assert set(stated) == {str(2 * pairs * 2 * (64 + 64))}


def test_over_a_mapped_axis() -> None:
    case = GPU_CASES["remainders"]
    shapes = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in case.inputs()[:3]]
    text = jax.jit(jax.vmap(loss_and_gradients(case))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


def test_programs_without_it_do_not_load_mosaic_gpu() -> None:
    program = """
import sys, jax, jax.numpy as jnp
from pallas_kernels.segmented_attention import segmented_attention
x = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.float32)
jax.eval_shape(lambda q: segmented_attention(q, q, q, segment_size=128), x)
print([m for m in sys.modules if m == "jax.experimental.mosaic.gpu" or "segmented_attention.gpu_" in m])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_simulation_that_would_hang_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "SIMULATOR_THREADS", 10**6)
    q, k, v, _ = GPU_CASES["remainders"].inputs()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_force_host_platform_device_count"):
        jax.block_until_ready(segmented_attention(q, k, v, segment_size=128, implementation="gpu"))
