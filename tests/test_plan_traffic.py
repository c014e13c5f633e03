"""What a compiled program moves: collectives by mesh axis, bytes to and from HBM. Expected values by arithmetic."""

from __future__ import annotations

import itertools
import math
import os

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_plan_hlo import program

from dsjax.plan.hlo import executions, parse
from dsjax.plan.traffic import (
    Collective,
    bytes_by_axis,
    collectives,
    device_groups,
    hbm_bytes,
    loops_of_unknown_length,
    stacked_bytes,
)

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
MESH = {"x": 4, "y": 2}


def only(module, mesh=MESH) -> Collective:
    (found,) = collectives(module, mesh)
    return found


# Groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("{{0, 2, 4, 6}, {1, 3, 5, 7}}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[4,2]<=[2,2,2]T(1,2,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=4,'b'=1,'c'=2] {'c'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=4,'b'=1,'c'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=8], device_ids=([4,2]T(1,0)) {'a':(1)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b'}", [[0, 2, 4, 6, 1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=4], device_ids=(7,6,5,4,3,2,1,0) {'a'}", [[7, 3], [6, 2], [5, 1], [4, 0]]),
    ],
)
def test_groups_of_devices(text: str, groups: list) -> None:
    assert device_groups(text, 8).tolist() == groups
    module = program(
        "  %a = f32[6] parameter(0)",
        f"  ROOT %r = f32[6] all-reduce(%a), channel_id=1, replica_groups={text}, use_global_device_ids=true",
    )
    found = only(module)
    assert found.groups.tolist() == groups
    assert found.bytes == 2 * (len(groups[0]) - 1) / len(groups[0]) * 24


@pytest.mark.parametrize(
    "text",
    ["{{0,1},{2}}", "{{0,8}}", "{{0,0}}", "[4,4]<=[8]", "[2,4]<=[4,2]T(0,0)", "mesh['a'=16] {'a'}", "mesh['a'=8] {'b'}"]
    + ["mesh['a'=8] {'a':(3)2}", "[1000000,1000000]<=[1000000000000]"],
)
def test_groups_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="replica groups"):
        device_groups(text, 8)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_all_forms_of_the_same_groups_agree(data) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(sizes))))
    chosen = order[: data.draw(st.integers(1, len(sizes)))]
    others = [i for i in range(len(sizes)) if i not in chosen]
    n, size = math.prod(sizes), math.prod(sizes[i] for i in chosen)
    want = np.arange(n).reshape(sizes).transpose(others + chosen).reshape(-1, size)
    dims, axes = ",".join(map(str, sizes)), ",".join(f"'axis_{i}'" for i in chosen)
    named = ",".join(f"'axis_{i}'={s}" for i, s in enumerate(sizes))
    # The same axes as parts of one axis that has them all.
    parts = ",".join(f"'all':({math.prod(sizes[:i])}){sizes[i]}" for i in chosen)
    explicit = "{" + ",".join("{" + ",".join(map(str, row)) + "}" for row in want) + "}"
    transposed = ",".join(map(str, others + chosen))
    for text in (
        explicit,
        f"[{n // size},{size}]<=[{dims}]T({transposed})",
        f"mesh[{named}] {{{axes}}}",
        f"mesh['all'={n}] {{{parts}}}",
        # The devices listed in groups already: the last of two axes spans a group.
        f"mesh['g'={n // size},'m'={size}], device_ids=([{dims}]T({transposed})) {{'m'}}",
        f"mesh['g'={n // size},'m'={size}], device_ids=({','.join(map(str, want.ravel()))}) {{'m'}}",
    ):
        np.testing.assert_array_equal(device_groups(text, n), want, err_msg=text)


# Collectives


@pytest.mark.parametrize("axis", ["x", "y"])
def test_each_collective_over_each_axis_in_a_scan(axis: str) -> None:
    n, length = MESH[axis], 7
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def body(a, _):  # a device holds f32[8,12]: 384 bytes
        gathered = jax.lax.all_gather(jnp.sin(a), axis, tiled=True)  # sends (n-1) of its own
        scattered = jax.lax.psum_scatter(jnp.cos(gathered), axis, tiled=True)  # of n * 384 bytes
        swapped = jax.lax.all_to_all(jnp.sin(scattered), axis, 0, 0, tiled=True)
        moved = jax.lax.ppermute(jnp.cos(swapped), axis, [(i, (i + 1) % n) for i in range(n - 1)])
        return a + jax.lax.psum(jnp.sin(moved), axis), None

    def f(a):
        return jax.lax.scan(body, a, None, length=length)[0]

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("x", "y"), out_specs=P("x", "y"), check_vma=False)
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((32, 24), jnp.float32)).compile().as_text()
    found = collectives(parse(text), MESH)
    assert bytes_by_axis(found) == {
        axis: {
            "all-gather": length * (n - 1) * 384,
            "reduce-scatter": length * (n - 1) * 384,
            "all-to-all": length * (n - 1) / n * 384,
            "collective-permute": length * (n - 1) / n * 384,  # one device in n sends nothing
            "all-reduce": length * 2 * (n - 1) / n * 384,
        }
    }
    positions = np.arange(8).reshape(4, 2)
    rows = positions.T if axis == "x" else positions
    for item in found:
        assert (item.times, item.axes) == (length, (axis,))
        pairs = [pair for row in rows for pair in itertools.pairwise(row)]
        np.testing.assert_array_equal(item.groups, pairs if item.kind == "collective-permute" else rows)


def test_nested_scans_and_both_axes_at_once() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def inner(a, _):
        return a + jax.lax.psum(a, ("x", "y")), None

    def outer(a, _):
        return jax.lax.scan(inner, a, None, length=3)[0] + jax.lax.psum(jnp.sin(a), "y"), None

    def f(a):
        return jax.lax.scan(outer, a, None, length=7)[0]

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("x", "y"), out_specs=P("x", "y"), check_vma=False)
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((16, 8), jnp.float32)).compile().as_text()  # f32[4,4]: 64 bytes
    found = {item.axes: (item.group_size, item.bytes, item.times) for item in collectives(parse(text), MESH)}
    assert found == {("x", "y"): (8, 112.0, 21), ("y",): (2, 64.0, 7)}


def test_sharded_matmul_gathers_its_weight() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("x", None)))
    w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=NamedSharding(mesh, P("x", "y")))
    out = NamedSharding(mesh, P("x", "y"))
    module = parse(jax.jit(lambda x, w: x @ w, out_shardings=out).lower(x, w).compile().as_text())
    assert bytes_by_axis(collectives(module, MESH)) == {"x": {"all-gather": 3 / 4 * 32 * 8 * 4}}


def test_a_group_of_one_moves_nothing() -> None:
    one = "channel_id=1, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}"
    lines = ("  %a = f32[6] parameter(0)", f"  %g = f32[6] all-gather(%a), {one}, dimensions={{0}}")
    permute = "  ROOT %p = f32[6] collective-permute(%g), channel_id=2, source_target_pairs={{0,0},{1,1}}"
    assert collectives(program(*lines, permute), MESH) == []


def test_a_permute_counts_the_devices_that_send_and_the_axes_they_cross() -> None:
    lines = "  %a = bf16[100] parameter(0)", "  ROOT %p = bf16[100] collective-permute(%a), source_target_pairs={pairs}"
    found = only(program(lines[0], lines[1].format(pairs="{{0,2},{2,0},{1,1}}")))
    assert (found.axes, found.bytes, found.groups.tolist()) == (("x",), 200 * 2 / 8, [[0, 2], [2, 0]])
    assert only(program(lines[0], lines[1].format(pairs="{{0,3}}"))).axes == ("x", "y")


def test_a_ragged_exchange_counts_the_smaller_buffer_both_ways() -> None:
    groups = "channel_id=1, replica_groups=[4,2]<=[8]"
    module = program(
        "  %rows = bf16[10,64] parameter(0)",
        "  %space = bf16[40,64] parameter(1)",
        "  %n = s32[2] parameter(2)",
        f"  %there = bf16[40,64] ragged-all-to-all(%rows, %space, %n, %n, %n, %n), {groups}",
        "  %fast = bf16[10,64]{1,0:S(1)} parameter(3)",
        "  %start = ((bf16[40,64], bf16[10,64]{1,0:S(1)}, s32[2], s32[2], s32[2], s32[2]), bf16[10,64]{1,0:S(1)})"
        f" ragged-all-to-all-start(%there, %fast, %n, %n, %n, %n), {groups}",
        "  ROOT %back = bf16[10,64]{1,0:S(1)} ragged-all-to-all-done(%start)",
    )
    assert [(item.bytes, item.axes) for item in collectives(module, MESH)] == [(1280 / 2, ("y",))] * 2
    moved = hbm_bytes(module)
    assert (moved.read, moved.written) == (2 * 1280, 1280)  # what comes back stays in VMEM


def test_pairs_count_once() -> None:
    groups = "channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true"
    before = f"""
%scatter (s: bf16[4,8]) -> bf16[2,8] {{
  %s = bf16[4,8] parameter(0)
  ROOT %rs = bf16[2,8] reduce-scatter(%s), {groups}, dimensions={{0}}
}}"""
    module = program(
        "  %a = bf16[4,8] parameter(0)",
        "  %b = f32[] parameter(1)",
        f"  %g = ((bf16[4,8], f32[]), (bf16[8,8], f32[2])) all-gather-start(%a, %b), {groups}, dimensions={{0}}",
        "  %gd = (bf16[8,8], f32[2]) all-gather-done(%g)",
        f"  %r = f32[] all-reduce-start(%b), {groups}",
        "  %rd = f32[] all-reduce-done(%r)",
        "  %p = (bf16[4,8], bf16[4,8], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a),"
        " source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}",
        "  %pd = bf16[4,8] collective-permute-done(%p)",
        "  %s = ((bf16[4,8]), bf16[2,8], u32[]) async-start(%a), calls=%scatter",
        "  ROOT %sd = bf16[2,8] async-done(%s)",
        before=before,
    )
    found = {item.kind: item.bytes for item in collectives(module, MESH)}
    assert found == {"all-gather": 64 + 4, "all-reduce": 4, "collective-permute": 64, "reduce-scatter": 32}
    assert {item.axes for item in collectives(module, MESH)} == {("y",)}
    # HBM: gather 68 + 136, reduce 4 + 4, permute 64 + 64, scatter 64 + 32
    assert hbm_bytes(module).by_kind == {"collective": 436}


def test_a_fused_all_reduce_of_which_only_slices_stay_is_a_reduce_scatter() -> None:
    before = """
%all-reduce-scatter.2 (p: bf16[8,4], q: bf16[4,8]) -> (bf16[2,4], bf16[4,2]) {
  %p = bf16[8,4] parameter(0)
  %q = bf16[4,8] parameter(1)
  %both = (bf16[8,4], bf16[4,8]) all-reduce(%p, %q), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}
  %first = bf16[8,4] get-tuple-element(%both), index=0
  %second = bf16[4,8] get-tuple-element(%both), index=1
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  %a = bf16[2,4] dynamic-slice(%first, %id, %zero), dynamic_slice_sizes={2,4}
  %b = bf16[4,2] dynamic-slice(%second, %zero, %id), dynamic_slice_sizes={4,2}
  ROOT %out = (bf16[2,4], bf16[4,2]) tuple(%a, %b)
}"""
    lines = (
        "  %x = bf16[8,4] parameter(0)",
        "  %y = bf16[4,8]{1,0:S(1)} parameter(1)",
        "  ROOT %f = (bf16[2,4], bf16[4,2]) fusion(%x, %y), kind=kCustom, calls=%all-reduce-scatter.2",
    )
    module = program(*lines, before=before)
    found = only(module)
    assert (found.kind, found.axes, found.bytes) == ("reduce-scatter", ("x",), 3 / 4 * 128)
    moved = hbm_bytes(module)
    assert (moved.read, moved.written, moved.by_kind) == (64, 32, {"collective": 96})  # %y is in VMEM
    kept = before.replace("tuple(%a, %b)", "tuple(%first, %b)")  # all of the first is used: an all-reduce
    assert only(program(*lines, before=kept)).kind == "all-reduce"


def test_a_collective_spread_over_several_fusions_counts_once() -> None:
    gather = "bf16[32] all-gather({}), channel_id=6, replica_groups=[4,2]<=[8], dimensions={{0}}"
    before = f"""
%starts (p: bf16[16]) -> (bf16[16], bf16[32], u32[]) {{
  %p = bf16[16] parameter(0)
  %g = {gather.format("%p")}
  ROOT %c = (bf16[16], bf16[32], u32[]{{:S(2)}}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}
%beside (p.1: bf16[16], q.1: bf16[32], x.1: f32[100]) -> (f32[100], bf16[16], bf16[32], bf16[32]) {{
  %p.1 = bf16[16] parameter(0)
  %q.1 = bf16[32] parameter(1)
  %x.1 = f32[100] parameter(2)
  %n = f32[100] negate(%x.1)
  %g.1 = {gather.format("%p.1")}
  ROOT %t = (f32[100], bf16[16], bf16[32], bf16[32]) tuple(%n, %p.1, %q.1, %g.1)
}}
%ends (p.2: bf16[16], q.2: bf16[32]) -> bf16[32] {{
  %p.2 = bf16[16] parameter(0)
  %q.2 = bf16[32] parameter(1)
  %g.2 = {gather.format("%p.2")}
  ROOT %c.2 = bf16[32] custom-call(%p.2, %q.2, %g.2), custom_call_target="AsyncCollectiveDone"
}}"""
    module = program(
        "  %w = bf16[16] parameter(0)",
        "  %x = f32[100] parameter(1)",
        "  %s = (bf16[16], bf16[32], u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%starts",
        "  %a = bf16[16] get-tuple-element(%s), index=0",
        "  %b = bf16[32] get-tuple-element(%s), index=1",
        "  %m = (f32[100], bf16[16], bf16[32], bf16[32]) fusion(%a, %b, %x), kind=kOutput, calls=%beside",
        "  %e = bf16[16] get-tuple-element(%m), index=1",
        "  %f = bf16[32] get-tuple-element(%m), index=2",
        "  ROOT %d = bf16[32] fusion(%e, %f), kind=kCustom, calls=%ends",
        before=before,
    )
    found = only(module)
    assert (found.kind, found.axes, found.bytes, found.times) == ("all-gather", ("y",), 32, 1)
    assert hbm_bytes(module).by_kind == {"fusion": 800, "collective": 32 + 64}


# HBM


def test_a_chain_of_matmuls() -> None:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 128), (128, 256), (256, 32))]
    module = parse(jax.jit(lambda a, b, c: jnp.tanh(a @ b) @ c).lower(*shapes).compile().as_text())
    a, b, c, hidden, out = (4 * size for size in (64 * 128, 128 * 256, 256 * 32, 64 * 256, 64 * 32))
    moved = hbm_bytes(module)
    # XLA:CPU without optimizations: one instruction each for product, tanh, product
    assert (moved.read, moved.written) == (a + b + hidden + hidden + c, hidden + hidden + out)


def test_a_scan_reads_and_writes_slices() -> None:
    L, B, D = 5, 64, 256

    def f(ws, x):
        return jax.lax.scan(lambda x, w: (x @ w, x), x, ws)

    shapes = jax.ShapeDtypeStruct((L, D, D), jnp.float32), jax.ShapeDtypeStruct((B, D), jnp.float32)
    module = parse(jax.jit(f).lower(*shapes).compile().as_text())
    w, x = 4 * D * D, 4 * B * D
    moved = hbm_bytes(module)
    # A layer: slice w (read, write), multiply (read w and x, write x), store x (read, write), copies of x. Reading
    # and writing whole stacks would give L times the weights (L * L * w = 6.5 MB) instead.
    least = L * (2 * w + x) + L * x
    assert least <= moved.read <= least + 8 * L * x
    assert L * (w + 2 * x) <= moved.written <= L * (w + 2 * x) + 8 * L * x
    assert stacked_bytes(module, [("f32", (L, D, D))]) == L * x
    assert stacked_bytes(module, []) == L * (x + w)
    assert stacked_bytes(module, [("f32", (L, D, D)), ("f32", (L, B, D))]) == 0


FUSED = """
%takes (p: f32[10,64], i: s32[]) -> bf16[64] {
  %p = f32[10,64] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %half = bf16[10,64] convert(%p)
  %row = bf16[1,64] dynamic-slice(%half, %i, %z), dynamic_slice_sizes={1,64}
  ROOT %b = bf16[64] bitcast(%row)
}
%same (s: f32[10,64]) -> f32[10,64] {
  %s = f32[10,64] parameter(0)
  ROOT %copied = f32[10,64] copy(%s)
}
%puts (p.1: f32[10,64], u.1: f32[1,64], i.1: s32[]) -> f32[10,64] {
  %p.1 = f32[10,64] parameter(0)
  %u.1 = f32[1,64] parameter(1)
  %i.1 = s32[] parameter(2)
  %z.1 = s32[] constant(0)
  %old = f32[10,64] fusion(%p.1), kind=kLoop, calls=%same
  ROOT %new = f32[10,64] dynamic-update-slice(%old, %u.1, %i.1, %z.1)
}
%fills (u.2: f32[1,64], i.2: s32[]) -> f32[10,64] {
  %u.2 = f32[1,64] parameter(0)
  %i.2 = s32[] parameter(1)
  %z.2 = s32[] constant(0)
  %nil = f32[] constant(0)
  %zeros = f32[10,64] broadcast(%nil), dimensions={}
  ROOT %new.2 = f32[10,64] dynamic-update-slice(%zeros, %u.2, %i.2, %z.2)
}
%adds (p.3: f32[10,64], j.3: s32[3], u.3: f32[3,64]) -> f32[10,64] {
  %p.3 = f32[10,64] parameter(0)
  %j.3 = s32[3] parameter(1)
  %u.3 = f32[3,64] parameter(2)
  ROOT %new.3 = f32[10,64] scatter(%p.3, %j.3, %u.3)
}"""


@pytest.mark.parametrize(
    ("lines", "read", "written"),
    [
        (["negate(%t)"], 2560, 2560),
        (["fusion(%t, %i), kind=kLoop, calls=%takes", "bf16[64]"], 64 * 4 + 4, 128),  # reads f32, writes bf16
        (["fusion(%t, %u, %i), kind=kLoop, calls=%puts"], 256 + 4, 256),  # in place
        (["fusion(%u, %i), kind=kLoop, calls=%fills"], 256 + 4, 2560),  # there is no place: all of it is made
        (["fusion(%t, %j, %v), kind=kLoop, calls=%adds"], 768 + 12 + 768, 768),
        (["dynamic-slice(%t, %i, %i), dynamic_slice_sizes={1,64}", "f32[1,64]"], 256 + 8, 256),
        (["dynamic-update-slice(%t, %u, %i, %i)"], 256 + 8, 256),
        (["gather(%t, %j), slice_sizes={1,64}", "f32[3,64]"], 768 + 12, 768),
        (["scatter(%t, %j, %v)"], 768 + 12 + 768, 768),
        (["copy(%fast)"], 0, 2560),
        (["negate(%t)", "f32[10,64]{1,0:T(8,128)S(1)}"], 2560, 0),
        (["copy-start(%t)", "(f32[10,64]{1,0:S(1)}, f32[10,64], u32[]{:S(2)})"], 2560, 0),
        (["copy-start(%fast)", "(f32[10,64], f32[10,64]{1,0:S(1)}, u32[]{:S(2)})"], 0, 2560),
        (["copy-start(%t)", "(f32[10,64]{1,0:S(5)}, f32[10,64], u32[]{:S(2)})"], 2560, 0),  # to the host
        (["slice-start(%t)", "((f32[10,64]), f32[2,64]{1,0:S(1)}, s32[]{:S(2)})"], 512, 0),
        (['custom-call(%t), custom_call_target="AllocateBuffer"'], 0, 0),
        (["bitcast(%t)"], 0, 0),
        (["copy-done(%t)"], 0, 0),
    ],
)
def test_what_an_instruction_moves(lines: list, read: int, written: int) -> None:
    code, shape = (*lines, "f32[10,64]")[:2]
    module = program(
        "  %t = f32[10,64] parameter(0)",
        "  %u = f32[1,64] parameter(1)",
        "  %i = s32[] parameter(2)",
        "  %j = s32[3] parameter(3)",
        "  %v = f32[3,64] parameter(4)",
        "  %fast = f32[10,64]{1,0:T(8,128)S(1)} parameter(5)",
        f"  ROOT %r = {shape} {code}",
        before=FUSED,
    )
    moved = hbm_bytes(module)
    assert (moved.read, moved.written) == (read, written)
    assert sum(moved.by_kind.values()) == read + written


def test_the_caller_may_state_what_a_kernel_moves() -> None:
    kernel = 'custom-call(%a), custom_call_target="tpu_custom_call"'
    module = program("  %a = f32[10] parameter(0)", f"  %k = f32[10] {kernel}", "  ROOT %n = f32[10] negate(%k)")
    assert hbm_bytes(module).by_kind == {"custom-call": 80, "negate": 80}
    stated = hbm_bytes(module, cost_of=lambda item: (7, 0) if item.target == "tpu_custom_call" else None)
    assert (stated.read, stated.written, stated.by_kind) == (47, 40, {"negate": 80, "custom-call": 7})


# TPU


def test_scanned_layers_compiled_for_tpu() -> None:
    from jax.experimental import topologies

    L, B, D, F = 5, 64, 256, 512
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(devices).reshape(4, 2), ("fsdp", "tensor"))
    up, down = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")

    def loss(w_up, w_down, x):
        def layer(x, w):
            return x + jnp.tanh(x @ w[0]) @ w[1], None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, (w_up, w_down))[0].astype(jnp.float32) ** 2)

    def abstract(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    arguments = abstract((L, D, F), up), abstract((L, F, D), down), abstract((B, D), P("fsdp", None))
    outputs = NamedSharding(mesh, up), NamedSharding(mesh, down)
    step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=outputs)
    module = parse(step.lower(*arguments).compile().as_text())

    loops = [item for item, _ in executions(module) if item.opcode == "while"]
    assert [module.trip_count(item) for item in loops] == [L, L]
    assert loops_of_unknown_length(module) == []
    weight = D * (F // 2) * 2  # bytes of one gathered weight: the tensor axis keeps its half
    x = (B // 4) * D * 2
    moved = bytes_by_axis(collectives(module, {"fsdp": 4, "tensor": 2}))
    assert moved == {
        # both weights of each layer forward, and again for the backward pass (jax.checkpoint keeps none of them)
        "fsdp": {"all-gather": 4 * L * 3 / 4 * weight, "reduce-scatter": 2 * L * 3 / 4 * weight},
        # the output of a layer forward, the gradient of its input backward
        "tensor": {"all-reduce": 2 * L * 2 * 1 / 2 * x},
    }
