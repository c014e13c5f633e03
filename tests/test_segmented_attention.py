"""Segmented attention: every implementation is the definition, forward and backward; what the definition promises."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    CASES,
    PACKED,
    VARIANTS,
    Case,
    altered,
    assert_close,
    by_loop,
    cases,
    check,
    check_simulated,
    chosen_slowly,
    dense,
    outcome,
    sees_slowly,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.causal_attention import causal_attention_reference
from pallas_kernels.segmented_attention import Segments, segmented_attention
from pallas_kernels.segmented_attention.selection import choose, gather_rows

KERNELS = ("xla, small", "tpu, small")
FEW = ("shift less than the window", "packed, long segments", "top 1, packed", "bfloat16", "long segments")
SIMULATED = ("no multiples", "packed", "top 1 of four")
few = functools.partial(settings, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Callable]]:
    """``segmented_attention`` of a variant, and its implementation's name filled in."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def of(variant: str) -> Callable:
            changes = VARIANTS[variant][1]
            if not changes:
                return segmented_attention
            return stack.enter_context(altered(tmp_path_factory.mktemp("altered"), *changes)).segmented_attention

        yield of


# ---------------------------------------------------------------- every implementation is the definition


def variants_and_cases() -> Iterator:
    """All cases of what compiles fast, some of the rest; all of that too with --slow."""
    fast = [name for name in CASES if not name.startswith("top") or name in FEW]
    some = {"xla, small": fast, "xla, all heads at once": FEW, "tpu, small": FEW, "tpu, simulated": SIMULATED}
    for variant in ("reference", *some):
        for name in CASES:
            slow = name not in some.get(variant, CASES)
            yield pytest.param(variant, name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("variant", "name"), list(variants_and_cases()))
def test_forward_and_gradients(attention: Callable, variant: str, name: str) -> None:
    run = check_simulated if variant == "tpu, simulated" else check
    run(CASES[name], VARIANTS[variant][0], attention(variant))


@few(max_examples=6)
@given(cases(max_T=24))
def test_the_loop_over_segments_is_the_definition(case: Case) -> None:
    out = jax.jit(case.call("loop", by_loop))(*case.inputs()[:3])
    assert_close(case, (np.asarray(out),), dense(case)[:1])


@few(max_examples=6)
@given(cases())
def test_the_reference_on_any_case(case: Case) -> None:
    check(case, "reference")


@few(max_examples=6)
@given(cases(top=False))
def test_xla_on_any_case(case: Case) -> None:
    check(case, "xla")


@few(max_examples=3)
@given(cases(top=True))
def test_xla_on_any_case_with_top_segments(case: Case) -> None:
    check(case, "xla")


@few(max_examples=3)
@given(cases(max_T=90))
def test_tpu_on_any_case(case: Case) -> None:
    check(case, "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["xla, small", "xla, all heads at once", "tpu, small"])
@given(data=st.data())
@few(max_examples=80)
def test_many_cases(attention: Callable, variant: str, data: st.DataObject) -> None:
    check(data.draw(cases(max_T=150)), VARIANTS[variant][0], attention(variant))


def test_many_spans_of_positions(tmp_path: pathlib.Path) -> None:
    """What is cut at thousands of positions, cut at a few."""
    case = Case(T=75, segment_size=6, shift=2, top_segments=2, K=2, G=2, B=2)
    smaller = (
        ("far.py", "POSITIONS_AT_A_TIME = 8192", "POSITIONS_AT_A_TIME = 20"),
        ("far.py", "ROWS_IN_A_BLOCK = 128", "ROWS_IN_A_BLOCK = 4"),
        ("selection.py", "QUERIES_AT_A_TIME = 256", "QUERIES_AT_A_TIME = 16"),
    )
    with altered(tmp_path, *smaller) as package:
        check(case, "xla", package.segmented_attention)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "the kernel takes bfloat16"),
        ({"H": 8}, "heads are 8 and 64 wide"),
        ({"segment_size": 64}, "segment_size is 64"),
        ({"top_segments": 0}, "rows of chosen segments"),
    ],
    ids=str,
)
def test_what_the_gpu_kernels_leave_out(changes: dict, reason: str) -> None:
    """Their cases are in tests/test_segmented_attention_gpu.py, for they take none of those here."""
    case = Case(**{"T": 600, "segment_size": 128, "H": 64, "U": 64, "dtype": "bfloat16", **changes})
    with pytest.raises(pytest.skip.Exception, match=reason):
        jax.eval_shape(case.call("gpu"), *case.inputs()[:3])


# ---------------------------------------------------------------- what the definition promises

PLAIN = Case(T=40, segment_size=8, shift=4, K=2, G=2)
PACKED_ROWS = dataclasses.replace(CASES["packed"], G=1)
TOP = Case(T=41, segment_size=4, shift=2, top_segments=1, documents=PACKED, B=2, K=2)


@pytest.mark.parametrize("case", [PLAIN, PACKED_ROWS, TOP], ids=["plain", "packed", "top"])
@pytest.mark.parametrize("variant", KERNELS)
def test_nothing_later_changes_what_is_before(attention: Callable, variant: str, case: Case) -> None:
    q, k, v, _ = case.inputs()
    f = jax.jit(case.call(VARIANTS[variant][0], attention(variant)))
    before = np.asarray(f(q, k, v))
    # With top segments, rows that positions gather stand elsewhere: sums may differ in their order.
    limit = 0 if case.top_segments is None else 1e-6
    for t in range(0, case.T - 1, 3):
        louder = [x.at[:, t + 1 :].multiply(-30.0) for x in (q, k, v)]
        after = np.asarray(f(*louder))
        np.testing.assert_allclose(after[:, : t + 1], before[:, : t + 1], atol=limit, rtol=0)
        if case.ids_BT is None:
            assert np.abs(after[:, t + 1 :] - before[:, t + 1 :]).max() > 1e-2


@few(max_examples=6)
@given(cases(top=True, dtypes=("float32",), min_T=30, max_T=30), st.integers(0, 28))
def test_nothing_later_changes_a_choice(case: Case, t: int) -> None:
    q, k, _, _ = case.inputs()
    ids = jnp.ones((case.B, case.T), jnp.int32) if case.ids_BT is None else jnp.asarray(case.ids_BT)
    f = jax.jit(lambda q, k, ids: choose(q, k, ids, case.segments))
    before = f(q, k, ids)
    after = f(q.at[:, t + 1 :].multiply(-30), k.at[:, t + 1 :].multiply(-30), ids)
    np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])
    # Nor does where the next document begins, or that padding follows.
    after = f(q, k, ids.at[:, t + 1 :].set(0))
    np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])


@pytest.mark.parametrize("case", [PACKED_ROWS, TOP], ids=["packed", "top"])
@pytest.mark.parametrize("variant", KERNELS)
def test_documents_never_see_each_other(attention: Callable, variant: str, case: Case) -> None:
    q, k, v, _ = case.inputs()
    f = jax.jit(case.call(VARIANTS[variant][0], attention(variant)))
    before, ids = np.asarray(f(q, k, v)), case.ids_BT
    assert ids is not None
    limit = 0 if case.top_segments is None else 1e-6  # as above
    for document in np.unique(ids):
        other = jnp.where(jnp.asarray(ids == document)[..., None, None], -30.0, 1.0)
        after = np.asarray(f(q * other, k * other, v * other))
        np.testing.assert_allclose(after[ids != document], before[ids != document], atol=limit, rtol=0)


@pytest.mark.parametrize("top_segments", [None, 1])
def test_a_document_in_a_row_is_the_document_alone_cut_at_the_same_places(top_segments: int | None) -> None:
    case = dataclasses.replace(TOP, top_segments=top_segments)
    q, k, v, _ = case.inputs()
    packed = jax.jit(case.call("xla"))(q, k, v)
    start = 0
    for document, length in PACKED[0]:
        here = slice(start, start + length)
        if document:
            alone = dataclasses.replace(case, T=length, documents=None, shift=case.shift + start, B=1)
            got = jax.jit(alone.call("xla"))(q[:1, here], k[:1, here], v[:1, here])
            np.testing.assert_allclose(got[0], packed[0, here], atol=2e-6)  # a few roundings of values near 3
        start += length


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("reference", "packed"),
        ("xla, small", "packed"),
        ("xla, small", "top 1, a row of padding"),
        ("tpu, small", "a row of padding"),
    ],
)
def test_padding_gives_zero_and_takes_no_gradient(attention: Callable, variant: str, name: str) -> None:
    case = CASES[name]
    q, k, v, dout = case.inputs()
    assert case.ids_BT is not None
    padding = case.ids_BT == 0
    noisy = jnp.where(jnp.asarray(padding)[..., None, None], 30.0, 1.0)

    @jax.jit
    def both(q, k, v, dout):
        out, vjp = jax.vjp(case.call(VARIANTS[variant][0], attention(variant)), q, k, v)
        return out, *vjp(dout)

    quiet = both(q, k, v, dout)
    for x, same in zip(both(q * noisy, k * noisy, v * noisy, dout * noisy), quiet, strict=True):
        assert not np.asarray(x)[padding].any()
        if case.top_segments is None:
            np.testing.assert_array_equal(x, same)
        else:
            np.testing.assert_allclose(x, same, atol=2e-6)


def test_whole_tails_and_long_segments_are_causal_attention() -> None:
    for case in (
        Case(T=37, segment_size=8, window=8, shift=3, documents=PACKED_37, K=2, G=2),
        Case(T=37, segment_size=100, window=10, shift=20, documents=PACKED_37, K=2, G=2),
    ):
        ids_BT = jnp.asarray(case.ids_BT)

        def causal(q, k, v, ids_BT=ids_BT):
            return jnp.where((ids_BT > 0)[..., None, None], causal_attention_reference(q, k, v, ids_BT), 0)

        assert_close(case, outcome(case, case.call("xla")), outcome(case, causal))


PACKED_37 = (((1, 20), (0, 2), (2, 15)),)


def test_without_tails_each_segment_is_alone() -> None:
    case = Case(T=29, segment_size=8, window=0, shift=3)
    q, k, v, _ = case.inputs()
    got = jax.jit(case.call("xla"))(q, k, v)
    ones = jnp.ones((1, 8), jnp.int32)
    for here in (slice(0, 5), slice(5, 13), slice(13, 21), slice(21, 29)):
        alone = causal_attention_reference(q[:, here], k[:, here], v[:, here], ones[:, : here.stop - here.start])
        np.testing.assert_allclose(got[:, here], alone, atol=2e-6)  # a few roundings of values near 3


def test_a_shift_counts_modulo_the_segment() -> None:
    for shift in (0, 4):
        outs = []
        for laps in (0, -1, 2):
            case = dataclasses.replace(PLAIN, shift=shift + laps * PLAIN.segment_size)
            outs.append(np.asarray(jax.jit(case.call("xla"))(*case.inputs()[:3])))
        np.testing.assert_array_equal(outs[1], outs[0])
        np.testing.assert_array_equal(outs[2], outs[0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_as_many_top_segments_as_there_are_is_all(implementation: str) -> None:
    # Six segments: of the five before the last, the first and the previous are always seen.
    case = Case(T=44, segment_size=8)
    q, k, v, _ = case.inputs()

    def out(top_segments: int | None) -> np.ndarray:
        return np.asarray(jax.jit(dataclasses.replace(case, top_segments=top_segments).call(implementation))(q, k, v))

    np.testing.assert_allclose(out(3), out(None), atol=2e-6)  # a few roundings of values near 3
    np.testing.assert_allclose(out(9), out(None), atol=2e-6)
    assert np.abs(out(2) - out(None)).max() > 1e-2


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_where_top_segments_are_all_they_are_seen_whatever_the_documents(implementation: str) -> None:
    """Padding inside a document, or an id that comes back, is at the end of a tail."""
    documents = (((1, 7), (0, 1), (1, 12)), ((1, 6), (2, 2), (1, 12)))
    check(Case(T=20, segment_size=4, top_segments=9, documents=documents, B=2), implementation)


@pytest.mark.parametrize("shift", [0, -1])
@pytest.mark.parametrize("implementation", [None, "reference", "xla", "tpu"])
def test_a_segment_may_be_far_longer_than_the_row(implementation: str | None, shift: int) -> None:
    check(Case(T=9, segment_size=2**31 - 1, shift=shift), implementation)


@pytest.mark.parametrize("changes", [{"B": 0}, {"T": 0}, {"G": 0}, {"U": 0}, {"B": 0, "top_segments": 0}], ids=str)
@pytest.mark.parametrize("implementation", [None, "reference", "xla", "tpu", "gpu"])
def test_of_nothing_comes_nothing(implementation: str | None, changes: dict) -> None:
    case = dataclasses.replace(PLAIN, **changes)
    q, k, v, _ = case.inputs()
    assert case.call(implementation)(q, k, v).shape == (*q.shape[:3], case.U)


@pytest.mark.parametrize("implementation", [None, "xla", "tpu"])
@pytest.mark.parametrize("of", [0, 1, 2], ids="qkv")
def test_a_second_derivative_is_refused(implementation: str | None, of: int) -> None:
    *arrays, _ = PLAIN.inputs()
    call = PLAIN.call(implementation)
    slope = jax.grad(lambda *arrays: jnp.sum(jnp.sin(call(*arrays))), of)
    with pytest.raises(NotImplementedError, match="has a first derivative in reverse mode, and no other"):
        jax.grad(lambda *arrays: jnp.sum(slope(*arrays) ** 2), of)(*arrays)


# ---------------------------------------------------------------- the mask, and what is counted of it


def mask(length: int, segments: Segments) -> np.ndarray:
    case = Case(length, segments.size, segments.window, segments.shift, segments.top)
    q, k, _, _ = case.inputs()
    return sees_slowly(case, np.asarray(q), np.asarray(k))[0, 0]


@st.composite
def segmentations(draw: st.DrawFn, top: bool = False) -> Segments:
    W = draw(st.integers(1, 20))
    return Segments(W, draw(st.integers(0, W)), draw(st.integers(0, W - 1)), draw(st.integers(0, 4)) if top else None)


@few(max_examples=60)
@given(segmentations() | segmentations(top=True), st.integers(1, 60))
def test_visible_pairs_are_those_of_the_mask(segments: Segments, length: int) -> None:
    assert segments.visible_pairs(length) == mask(length, segments).sum()


@few(max_examples=60)
@given(segmentations() | segmentations(top=True), st.integers(1, 30), st.integers(0, 9))
def test_segments_within_a_length_mean_the_same(segments: Segments, length: int, more: int) -> None:
    within = segments.within(length + more)
    assert within.size <= length + more
    assert (mask(length, within) == mask(length, segments)).all()


@few(max_examples=40)
@given(st.integers(1, 20), st.integers(1, 60))
def test_two_layers_with_and_without_the_shift_see_every_position(W: int, length: int) -> None:
    causal = np.tri(length, dtype=bool)
    for w in range(W + 1):
        both = mask(length, Segments(W, w)) | mask(length, Segments(W, w, w % W))
        assert not (both & ~causal).any()
        if 2 * w >= W:
            assert (both == causal).all()
        elif length > 2 * W:
            assert (both != causal).any()


# ---------------------------------------------------------------- choices and rows


@few(max_examples=12)
@given(cases(top=True))
def test_choices_are_those_of_the_definition(case: Case) -> None:
    q, k, _, _ = case.inputs()
    ids = jnp.ones((case.B, case.T), jnp.int32) if case.ids_BT is None else jnp.asarray(case.ids_BT)
    chosen = np.asarray(jax.jit(lambda q, k, ids: choose(q, k, ids, case.segments))(q, k, ids))
    assert chosen.shape[-1] <= case.segments.top + 2
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    for b, t, head in np.ndindex(*chosen.shape[:3]):
        got = [int(j) for j in chosen[b, t, head] if j >= 0]
        assert sorted(got) == chosen_slowly(case, q, k, b, t, head)


def test_of_equal_tails_the_earlier_ones_are_chosen() -> None:
    case = Case(T=48, segment_size=8, top_segments=1)
    q, k, _, _ = case.inputs()
    chosen = choose(q, jnp.ones_like(k), jnp.ones((1, 48), jnp.int32), case.segments)
    assert sorted(chosen[0, 47, 0].tolist()) == [0, 1, 4]


def test_choices_take_no_gradient() -> None:
    q, k, _, _ = TOP.inputs()
    ids = jnp.asarray(TOP.ids_BT)
    f = lambda q, k: choose(q, k, ids, TOP.segments)  # noqa: E731
    tangents = jax.jvp(f, (q, k), (q, k))[1]
    assert tangents.dtype == jax.dtypes.float0


@few(max_examples=10)
@given(st.data())
def test_rows_are_gathered_by_segment(data: st.DataObject) -> None:
    B, T, K, X, J, block = 2, data.draw(st.integers(1, 12)), 2, data.draw(st.integers(1, 3)), 5, 4
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    chosen = np.stack([rng.permutation(J)[:X] for _ in range(B * T * K)]).reshape(B, T, K, X)
    chosen = np.where(rng.random(chosen.shape) < data.draw(st.sampled_from([0, 0.3, 1])), -1, chosen)
    rows = jax.jit(lambda c: gather_rows(c, J, block))(jnp.asarray(chosen, jnp.int32))
    position, segment, row = (np.asarray(x) for x in (rows.position_BKR, rows.segment_BKI, rows.row_BTKX))
    for b, head in np.ndindex(B, K):
        used = []
        for t, x in np.ndindex(T, X):
            at, wanted = row[b, t, head, x], chosen[b, t, head, x]
            assert (at == -1) == (wanted == -1)
            if at >= 0:
                assert position[b, head, at] == t
                assert segment[b, head, at // block] == wanted
                used.append(at)
        assert len(used) == len(set(used)) == (position[b, head] >= 0).sum()
        blocks = [i for i, j in enumerate(segment[b, head]) if j >= 0]
        assert blocks == list(range(len(blocks)))  # those that hold nothing come last
        assert {at // block for at in used} == set(blocks)


# ---------------------------------------------------------------- what can not be done


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segment_size": 0}, "segment_size is 0; it must be at least 1"),
        ({"segment_size": -4}, "segment_size is -4"),
        ({"window": 9}, "window is 9; it must be 0 ... segment_size, 8"),
        ({"window": -1}, "window is -1"),
        ({"top_segments": -1}, "top_segments is -1; it must be None or at least 0"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; it is None, 'reference', 'xla', 'tpu' or 'gpu'"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_said(changes: dict, said: str) -> None:
    q, k, v, _ = Case(T=20, segment_size=8).inputs()
    # Without the run-time types of the tests, which would refuse an unknown implementation in their own words.
    plain = getattr(segmented_attention, "__wrapped__", segmented_attention)
    with pytest.raises(ValueError, match=said):
        plain(q, k, v, **{"segment_size": 8, **changes})


@pytest.mark.parametrize("wrong", ["batch", "length", "heads", "width", "documents", "no rows", "one document"])
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_shapes_that_do_not_go_together_are_said(implementation: str | None, wrong: str) -> None:
    q, k, v, _ = Case(T=20, segment_size=8, B=2, K=2).inputs()
    changed = {
        "batch": (q, k[:1], v[:1], None),
        "length": (q, k, v[:, :-1], None),
        "heads": (q, k, v[:, :, :1], None),
        "width": (q, k[..., :4], v, None),
        "documents": (q, k, v, jnp.ones((1, 20), jnp.int32)),
        "no rows": (q[0], k[0], v[0], None),
        "one document": (q, k, v, jnp.ones(20, jnp.int32)),
    }
    *arrays, documents = changed[wrong]
    plain = getattr(segmented_attention, "__wrapped__", segmented_attention)  # as above
    with pytest.raises(ValueError, match=r"do not go together|have 4 dimensions"):
        plain(*arrays, segment_size=8, documents=documents, implementation=implementation)


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("q_BTNH", jnp.ones((1, 20, 1, 8), jnp.int32), "q is int32; it must be floating point"),
        ("v_BTKU", jnp.ones((1, 20, 1, 8), bool), "v is bool; it must be floating point"),
        ("documents", jnp.ones((1, 20)), "documents are float32; they must be whole numbers"),
        ("documents", [[1] * 20], "documents is a list; it must be an array"),
    ],
)
def test_what_is_no_array_of_the_right_kind_is_said(name: str, wrong: object, said: str) -> None:
    arrays = zip(("q_BTNH", "k_BTKH", "v_BTKU"), Case(T=20, segment_size=8).inputs(), strict=False)
    plain = getattr(segmented_attention, "__wrapped__", segmented_attention)  # as above
    with pytest.raises(ValueError, match=said):
        plain(**{**dict(arrays), name: wrong}, segment_size=8)


def test_heads_that_do_not_divide_are_said() -> None:
    q, k, v, _ = Case(T=20, segment_size=8, K=3).inputs()
    with pytest.raises(ValueError, match="q has 2 heads, k and v 3"):
        segmented_attention(q[:, :, :2], k, v, segment_size=8)
    with pytest.raises(ValueError, match="q has 3 heads, k and v 0"):
        segmented_attention(q, k[:, :, :0], v[:, :, :0], segment_size=8)


def test_sizes_are_any_whole_numbers() -> None:
    q, k, v, _ = Case(T=20, segment_size=8).inputs()
    sizes = {"segment_size": np.int64(8), "window": np.int32(3), "shift": np.int64(2), "top_segments": np.int64(0)}
    plain = getattr(segmented_attention, "__wrapped__", segmented_attention)  # as above
    for implementation in ("xla", "tpu"):
        assert plain(q, k, v, **sizes, implementation=implementation).shape == q.shape
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        plain(q, k, v, segment_size=8.0)


@pytest.mark.parametrize(("size", "window", "shift"), [(0, 0, 0), (8, 9, 0), (8, 4, 8), (8, 4, -1)])
def test_segments_out_of_range_are_said(size: int, window: int, shift: int) -> None:
    with pytest.raises(ValueError, match=r"it must be"):
        Segments(size, window, shift)
