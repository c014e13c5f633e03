"""The compiled program's text: what is read from it, and how often each part runs. Expected values by hand."""

from __future__ import annotations

import functools
import time

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsjax.plan.hlo import executions, parse
from dsjax.plan.traffic import loops_of_unknown_length


def program(*lines: str, before: str = ""):
    return parse(f"HloModule m, num_partitions=8\n{before}\nENTRY %main () -> f32[] {{\n" + "\n".join(lines) + "\n}\n")


# Reading


def test_an_instruction_tells_shapes_operands_and_attributes() -> None:
    module = program(
        "  %p = (f32[2,3]{1,0:T(8,128)S(1)}, /*index=1*/s4[8,16]{1,0:T(8,128)E(4)}) parameter(0),"
        ' sharding={{maximal "}"}}',
        "  %a = f32[2,3]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=0",
        "  %c = f32[] constant({...})",
        "  ROOT %k = (bf16[<=4,2]{1,0:T(2,128)(2,1)S(5)}, pred[], s4[8,16])"
        " custom-call(%a, /*index=1*/f32[2,3]{1,0} %a),"
        ' custom_call_target="tpu_custom_call", window={size=3 pad=1_1}, metadata={op_name="jit(f)/a{b" id=3},'
        ' backend_config={"body":"}}\\"{{,","n":[1,{"m":[]}]}',
    )
    p, a, _, k = module.computations["main"].instructions.values()
    assert [(s.dtype, s.dims, s.space, s.num_bytes) for s in p.shapes] == [
        ("f32", (2, 3), 1, 24),
        ("s4", (8, 16), 0, 64),
    ]
    assert [(s.dtype, s.dims, s.space, s.num_bytes) for s in k.shapes] == [
        ("bf16", (4, 2), 5, 16),
        ("pred", (), 0, 1),
        ("s4", (8, 16), 0, 128),
    ]
    assert (a.index, k.operands, k.target, k.op_name) == (0, ("a", "a"), "tpu_custom_call", "jit(f)/a{b")
    assert k.attributes["backend_config"] == '{"body":"}}\\"{{,","n":[1,{"m":[]}]}'
    assert module.computations["main"].root is k


def test_operands_without_percent_signs_are_read_too() -> None:
    module = program("  a = f32[2] parameter(0)", "  ROOT b = f32[2] add(f32[2]{0} a, a)")
    assert module.computations["main"].root.operands == ("a", "a")


def test_what_a_kernel_says_of_itself_may_have_lines() -> None:
    module = program(
        '  ROOT k = f32[2] custom-call(), custom_call_target="tpu_custom_call", kernel_metadata={',
        '"mask": "x }"',
        '}, backend_config={"cost_estimate": {',
        "",
        '"flops":2,',
        '"bytes":3',
        '}, "a":1}',
    )
    found = module.computations["main"].root.attributes["backend_config"]
    assert found == '{"cost_estimate": {"flops":2,"bytes":3}, "a":1}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "HloModule m",
        "%c () -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}",  # no entry
        "ENTRY %c () -> f32[] {\n  ROOT %a = f32[] parameter(0)",  # no end
        "ENTRY %c () -> f32[] {\n}",  # empty
        "ENTRY %c () -> f32[] {\n  %a = f32[] parameter(0)\n}",  # no root
        "ENTRY %c () -> f32[] {\n  ROOT %a = f32[] negate(%b)\n}",  # an operand from nowhere
        "ENTRY %c () -> f32[] {\n  ROOT %a = f32[] fusion(), kind=kLoop, calls=%d\n}",  # a computation from nowhere
        "ENTRY %c () -> f32[] {\n  ROOT %a = z7[2] parameter(0)\n}",
        "ENTRY %c () -> f32[] {\n  ROOT %a = f32[2] parameter(zero)\n}",
        "ENTRY %c () -> f32[] {\n  ROOT %a = f32[2] iota(), x={\n}",
    ],
)
def test_a_text_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_time_to_read_does_not_explode() -> None:
    # A million characters each way: one long good line, and quotes and brackets that never close.
    head = "ENTRY %c () -> f32[] {\n  ROOT %a = f32[] iota(), backend_config="
    start = time.process_time()
    parse(head + '{"k":[' + '{"a\\"b":["}"]},' * 70_000 + "{}]}\n}")
    for tail in ('"' + '\\"' * 500_000, '{"\\"\\"' * 160_000, "{[(" * 330_000, "[" * 1_000_000):
        with pytest.raises(ValueError):
            parse(head + tail + "\n}")
    assert time.process_time() - start < 20  # measured: about 1 s; a quadratic search takes minutes


@functools.cache
def scanned_text() -> str:
    """A scan with collectives, compiled for 8 CPU devices."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def body(carry, _):
        return carry + jax.lax.psum(jax.lax.ppermute(carry, "x", [(i, (i + 1) % 4) for i in range(4)]), "y"), None

    def f(a):
        return jax.lax.scan(body, a, None, length=7)[0]

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("x", "y"), out_specs=P("x", "y"), check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((8, 4), jnp.float32)).compile().as_text()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_text_is_read_or_refused(data) -> None:
    text = scanned_text()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 60))
        put = data.draw(
            st.one_of(st.text('{}[]()",=%\\ \n01x', max_size=4), st.just(text[start // 2 : start // 2 + 30]))
        )
        text = text[:start] + put + text[start + length :]
    try:
        module = parse(text)
    except ValueError:
        return
    assert module.entry in module.computations


# Loops


def loop(*, start="constant(0)", step="add(%i, %one)", test="compare(%i, %n), direction=LT", n="constant(6)", extra=""):
    """A while with counter %i; %n is its bound in the condition, %m a number that it carries along."""
    return f"""
%add_fused (p: s32[], q: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
  %q = s32[]{{:T(128)}} parameter(1)
  ROOT %sum = s32[] add(%p, %q)
}}
%less_fused (p.1: s32[], q.1: s32[]) -> pred[] {{
  %p.1 = s32[] parameter(0)
  %q.1 = s32[] parameter(1)
  ROOT %less = pred[] compare(%p.1, %q.1), direction=LT
}}
%body (t: (s32[], s32[], f32[])) -> (s32[], s32[], f32[]) {{
  %t = (s32[], s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %m = s32[] get-tuple-element(%t), index=1
  %x = f32[] get-tuple-element(%t), index=2
  %one = s32[] constant(1)
  %next = s32[] {step}
  %m2 = s32[] copy(%m)
  %y = f32[] negate(%x)
  ROOT %out = (s32[], s32[], f32[]) tuple(%next, %m2, %y)
}}
%cond (t.1: (s32[], s32[], f32[])) -> pred[] {{
  %t.1 = (s32[], s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%t.1), index=0
  %m = s32[] get-tuple-element(%t.1), index=1
  %n = s32[] {n}
  ROOT %go = pred[] {test}
}}
ENTRY %main (a: f32[], b: s32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = s32[] parameter(1)
  %first = s32[] {start}
  %start = s32[] copy(%first)
  %six = s32[] constant(6)
  %init = (s32[], s32[], f32[]) tuple(%start, %six, %a)
  %w = (s32[], s32[], f32[]) while(%init), condition=%cond, body=%body{extra}
  ROOT %r = f32[] get-tuple-element(%w), index=2
}}
"""


@pytest.mark.parametrize(
    ("form", "trips"),
    [
        ({}, 6),
        ({"n": "copy(%m)"}, 6),  # the bound is carried along
        ({"test": "compare(%i, %m), direction=LT"}, 6),
        ({"test": "fusion(%i, %n), kind=kLoop, calls=%less_fused"}, 6),
        ({"step": "fusion(%i, %one), kind=kLoop, calls=%add_fused"}, 6),
        ({"step": "fusion(%one, %i), kind=kLoop, calls=%add_fused", "n": "copy(%m)"}, 6),
        ({"test": "compare(%i, %n), direction=LE"}, 7),
        ({"test": "compare(%i, %n), direction=NE"}, 6),
        ({"test": "compare(%n, %i), direction=GT"}, 6),
        ({"start": "constant(2)"}, 4),
        ({"start": "constant(9)"}, 0),
        ({"start": "constant(-2)", "step": "add(%i, %m)"}, 2),  # -2, 4, 10
        ({"start": "constant(9)", "step": "subtract(%i, %one)", "test": "compare(%i, %n), direction=GT"}, 3),
        ({"start": "constant(9)", "step": "subtract(%i, %one)", "test": "compare(%i, %n), direction=GE"}, 4),
        ({"extra": ', backend_config={"known_trip_count":{"n":"11"},"known_init_step":{"init":"0"}}'}, 11),
        ({"extra": ', backend_config="{\\"known_trip_count\\":{\\"n\\":\\"11\\"}}"'}, 11),
        ({"start": "copy(%b)"}, None),  # starts at an argument
        ({"step": "multiply(%i, %m)"}, None),
        ({"step": "subtract(%i, %one)"}, None),  # runs away from its bound
        ({"test": "compare(%i, %i), direction=LT"}, None),
        ({"test": "custom-call(%i)"}, None),
        ({"start": "constant(1)", "step": "add(%i, %m)", "test": "compare(%i, %n), direction=NE"}, None),
    ],
)
def test_the_length_of_a_loop(form: dict, trips: int | None) -> None:
    module = parse(loop(**form))
    (found,) = [item for item, _ in executions(module) if item.opcode == "while"]
    assert module.trip_count(found) == trips
    assert loops_of_unknown_length(module) == (["w"] if trips is None else [])
    times = {item.name: count for item, count in executions(module) if item.name in ("y", "go")}
    assert (
        times == {"y": 1 if trips is None else trips, "go": 2 if trips is None else trips + 1} if trips else {"go": 1}
    )


def test_a_bound_that_an_outer_loop_hands_in() -> None:
    module = parse("""
%inner_body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %k = s32[] add(%j, %one)
  ROOT %o = (s32[], s32[]) tuple(%k, %n)
}
%inner_cond (q: (s32[], s32[])) -> pred[] {
  %q = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %n = s32[] get-tuple-element(%q), index=1
  ROOT %c = pred[] compare(%j, %n), direction=LT
}
%outer_body (p.1: (s32[], s32[], s32[])) -> (s32[], s32[], s32[]) {
  %p.1 = (s32[], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  %zero = s32[] get-tuple-element(%p.1), index=1
  %n.1 = s32[] get-tuple-element(%p.1), index=2
  %init = (s32[], s32[]) tuple(%zero, %n.1)
  %inner = (s32[], s32[]) while(%init), condition=%inner_cond, body=%inner_body
  %n.2 = s32[] get-tuple-element(%inner), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %o.1 = (s32[], s32[], s32[]) tuple(%next, %zero, %n.2)
}
%outer_cond (q.1: (s32[], s32[], s32[])) -> pred[] {
  %q.1 = (s32[], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%q.1), index=0
  %n.1 = s32[] get-tuple-element(%q.1), index=2
  ROOT %c.1 = pred[] compare(%i, %n.1), direction=LT
}
ENTRY %main () -> s32[] {
  %nil = s32[] constant(0)
  %five = s32[] constant(5)
  %start = (s32[], s32[], s32[]) tuple(%nil, %nil, %five)
  %outer = (s32[], s32[], s32[]) while(%start), condition=%outer_cond, body=%outer_body
  ROOT %r = s32[] get-tuple-element(%outer), index=0
}
""")
    times = {item.name: count for item, count in executions(module)}
    assert (times["inner"], times["k"], times["next"]) == (3, 15, 3)  # 0, 2, 4 of 5; five times each


def test_of_a_conditional_the_heaviest_branch_counts() -> None:
    branch = """
%{name} ({p}: f32[8]) -> f32[8] {{
  %{p} = f32[8] parameter(0)
  ROOT %{r} = f32[{size}] {op}(%{p})
}}"""
    before = branch.format(name="skip", p="p", r="same", size=8, op="copy")
    before += branch.format(name="work", p="q", r="wide", size="64,8", op="broadcast")
    call = "branch_computations={%skip, %work}", "true_computation=%work, false_computation=%skip"
    for branches in call:
        lines = "  %c = s32[] constant(0)", "  %a = f32[8] parameter(0)"
        module = program(*lines, f"  ROOT %r = f32[8] conditional(%c, %a, %a), {branches}", before=before)
        assert "wide" in [item.name for item, _ in executions(module)]
        assert "same" not in [item.name for item, _ in executions(module)]
