"""What is special to the TPU kernels: where keys stand, what is fetched and what is not; that they are right is shown
with all other implementations in test_segmented_attention.py, here at sizes where every path of theirs is taken."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.segmented_attention import Segments, tpu, tpu_backward
from pallas_kernels.segmented_attention.tiles import Tiles
from pallas_kernels.segmented_attention.tpu_documents import document_tables, meeting
from pallas_kernels.segmented_attention.tpu_layout import Layout, lay_out

SMALL = Tiles(queries=16, keys=16, part=8, span=16)
# A block holds several segments; one; a part of one, with keys in front of it; all at once, with spans of two chunks.
SHAPES = {
    "several segments": (50, Segments(5, 2, 4), SMALL),
    "one segment": (45, Segments(16, 11, 15), SMALL),
    "part of a segment": (90, Segments(40, 17, 30), SMALL),
    "chunks that are parts": (70, Segments(24, 24, 3), Tiles(queries=24, keys=8, part=8, span=16)),
    "one long segment": (50, Segments(64, 0, 0), Tiles(queries=16, keys=16, part=8, span=32)),
    "sums in the product": (50, Segments(9, 5, 4), Tiles(queries=16, keys=16, part=8, span=16, ones=1)),
    "no tails": (30, Segments(8, 0, 5), SMALL),
}


def numbers(*shapes: tuple[int, ...], seed: int = 0, dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def visible(T: int, segments: Segments) -> np.ndarray:
    t, j = np.arange(T)[:, None], np.arange(T)
    return (j <= t) & ((segments.of(j) == segments.of(t)) | segments.in_tail(j))


# ---------------------------------------------------------------- the layout


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, Segments, Layout]:
    W = draw(st.integers(1, 70))
    segments = Segments(W, draw(st.integers(0, W)), draw(st.integers(0, W - 1)))
    part = draw(st.sampled_from([8, 16]))
    queries, keys = (part * draw(st.integers(1, 4)) for _ in range(2))
    T = draw(st.integers(1, 120))
    return T, segments, lay_out(T, segments, Tiles(queries, keys, part))


@settings(max_examples=25, deadline=None)
@given(layouts())
def test_what_a_block_sees_is_a_prefix_of_the_tails_the_rows_in_front_and_a_pattern(drawn) -> None:
    T, segments, layout = drawn
    here = jnp.arange(1, T + 1)[None]  # positions, from 1, so that 0 is none
    rows, tail_keys = (np.asarray(x)[0] - 1 for x in (layout.rows(here), layout.tails(here)))
    found = np.zeros((T, T), int)
    for b in range(layout.num_blocks):
        own = rows[b * layout.block : (b + 1) * layout.block]
        pattern = layout.own(*np.ogrid[: layout.block, : layout.block])
        before = rows[b * layout.block - layout.before[b] : b * layout.block]
        assert layout.seen[b] <= layout.num_tail_keys
        assert (before >= 0).all()  # nothing in front of a block needs a mask
        for row, position in enumerate(own):
            if position >= 0:
                seen = np.concatenate([tail_keys[: layout.seen[b]], before, own[pattern[row]]])
                np.add.at(found[position], seen[seen >= 0], 1)
                assert pattern[row, row]  # a sum begins with something
                assert (own[pattern[row]] >= 0).all()
    np.testing.assert_array_equal(found, visible(T, segments))  # each pair once
    assert sum(layout.pairs.values()) == found.sum()


@settings(max_examples=20, deadline=None)
@given(layouts())
def test_arrays_come_back_from_where_they_were_laid(drawn) -> None:
    T, segments, layout = drawn
    (x,) = numbers((2, T, 3))
    np.testing.assert_array_equal(layout.positions(layout.rows(x)), x)
    seen_later = segments.in_tail(np.arange(T)) & (segments.of(np.arange(T)) < segments.count(T) - 1)
    np.testing.assert_array_equal(layout.from_tails(layout.tails(x)), np.where(seen_later[:, None], x, 0))


@settings(max_examples=20, deadline=None)
@given(layouts())
def test_pieces_fit_into_each_other(drawn) -> None:
    _, _, layout = drawn
    assert layout.block % layout.part == 0
    assert layout.keys % layout.part == 0
    assert layout.padded % layout.block == 0 or layout.block % layout.padded == 0
    if layout.padded > layout.block:  # chunks of rows end where blocks do
        assert layout.block % layout.keys == 0


def test_blocks_of_sizes_in_use_are_as_large_as_the_tiles_and_waste_nothing() -> None:
    tiles = Tiles(2048, 1024, 512)
    for W in (128, 256, 512, 1024, 2048, 4096):
        layout = lay_out(32768, Segments(W, W // 2), tiles)
        assert (layout.block, layout.keys, layout.part) == (2048, 1024, 512)
        assert layout.num_blocks * layout.block == 32768


# ---------------------------------------------------------------- documents


@settings(max_examples=20, deadline=None)
@given(layouts(), st.integers(0, 9), st.booleans())
def test_chunks_are_skipped_only_where_nothing_is_seen_and_go_unmasked_only_where_all_is(drawn, seed, sorted_ids):
    T, _, layout = drawn
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((2, T)) < 0.1, axis=1) if sorted_ids else rng.integers(0, 4, (2, T))
    arrays, tables = document_tables(jnp.asarray(ids), layout)
    rows = np.asarray(arrays["block"]).reshape(2, layout.num_blocks, layout.block)
    for name in ("tails", "rows"):
        if not layout.uses(name):
            continue
        chunks = np.asarray(arrays[name]).reshape(2, -1, layout.keys)
        for batch, b, c in np.ndindex(2, layout.num_blocks, chunks.shape[1]):
            first = layout.own_start[b] - layout.before[b] if name == "rows" else 0
            if not first <= c * layout.keys < (layout.own_start[b] if name == "rows" else layout.seen[b]):
                continue
            present, keys = rows[batch, b][rows[batch, b] >= 0], chunks[batch, c][chunks[batch, c] >= 0]
            same = present[:, None] == keys
            meet, one = meeting(tables, name, batch * layout.num_blocks + b, batch * chunks.shape[1] + c)
            assert meet or not same.any()
            assert same.all() or not one
            if same.any():
                assert tables[f"{name}_first"][batch * layout.num_blocks + b] <= c


def test_keys_of_other_documents_and_of_the_future_are_not_touched() -> None:
    """NaN times a probability of 0 is NaN: what is only masked out would show."""
    T, segments, scale = 128, Segments(16, 8), 0.3
    q, k, v, dout = numbers((1, T, 1, 8), (1, T, 1, 8), (1, T, 1, 8), (1, T, 1, 8))
    ids = jnp.asarray([[1] * 64 + [2] * 64])
    static = {"segments": segments, "scale": scale, "interpret": True, "tiles": SMALL}
    old, new = slice(0, 64), slice(64, T)

    @jax.jit
    def both(k, v):
        out, log = tpu.forward(q, k, v, ids, **static)
        grads = tpu.backward(q, k, v, ids, jnp.nan_to_num(out), jnp.nan_to_num(log), dout, **static)
        return out, log, *grads

    want = both(k, v)
    for poisoned, clean in ((old, new), (new, old)):
        got = both(k.at[:, poisoned].set(jnp.nan), v.at[:, poisoned].set(jnp.nan))
        assert np.isnan(got[0][:, poisoned]).any()
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(g[:, clean], w[:, clean])


# ---------------------------------------------------------------- numbers


def dense(q, k, v, ids, dout, segments: Segments, scale: float):
    """Output, logarithm and gradients, from all pairs."""
    B, T, N, H = q.shape
    K = k.shape[2]
    sees = visible(T, segments)[None]
    sees = sees if ids is None else sees & (ids[:, :, None] == ids[:, None, :])

    def attend(q, k, v):
        q = q.reshape(B, T, K, N // K, H)
        scores = scale * jnp.einsum("BTKGH,BSKH->BTKGS", q, k, precision="highest")
        scores = jnp.where(sees[:, :, None, None], scores, -jnp.inf)
        out = jnp.einsum("BTKGS,BSKU->BTKGU", jax.nn.softmax(scores), v, precision="highest")
        return out.reshape(B, T, N, -1), jax.nn.logsumexp(scores, axis=-1).reshape(B, T, N)

    (out, log), pull = jax.vjp(attend, *(x.astype(jnp.float32) for x in (q, k, v)))
    return out, log, *pull((dout.astype(jnp.float32), jnp.zeros_like(log)))


@pytest.mark.parametrize(
    ("shape", "documents"),
    [
        ("several segments", "one"),
        ("several segments", "packed"),
        ("one segment", "scattered"),
        ("part of a segment", "packed"),
        ("chunks that are parts", "one"),
        ("one long segment", "scattered"),
        ("sums in the product", "packed"),
        ("no tails", "one"),
    ],
)
def test_every_way_to_cut_gives_the_same(shape: str, documents: str) -> None:
    T, segments, tiles = SHAPES[shape]
    q, k, v, dout = numbers((2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 12), (2, T, 4, 12))
    rng = np.random.default_rng(1)
    ids = {
        "one": None,
        "packed": jnp.asarray(np.cumsum(rng.random((2, T)) < 0.06, axis=1)),
        "scattered": jnp.asarray(rng.integers(0, 3, (2, T))),
    }[documents]
    static = {"segments": segments, "scale": 0.3, "interpret": True, "tiles": tiles}

    @jax.jit
    def both(q, k, v, dout):
        out, log = tpu.forward(q, k, v, ids, **static)
        return out, log, *tpu.backward(q, k, v, ids, out, log, dout, **static)

    # Sums of up to 90 float32 terms of about 1, in another order.
    for got, want in zip(both(q, k, v, dout), dense(q, k, v, ids, dout, segments, 0.3), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_heads_that_are_laid_out_a_few_at_a_time_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    T, segments = 20, Segments(8, 4, 3)
    q, k, v, dout = numbers((2, T, 8, 8), (2, T, 4, 8), (2, T, 4, 6), (2, T, 8, 6))
    out, log, *want = dense(q, k, v, None, dout, segments, 0.3)
    monkeypatch.setattr(tpu_backward, "POSITIONS_AND_HEADS", 2 * 2 * T * 2)  # two key/value heads of four
    backward = functools.partial(tpu.backward, segments=segments, scale=0.3, interpret=True, tiles=SMALL)
    jaxpr = str(jax.make_jaxpr(lambda *x: backward(*x[:3], None, *x[3:]))(q, k, v, out, log, dout))
    assert "length=2" in jaxpr
    for got, expected in zip(jax.jit(backward)(q, k, v, None, out, log, dout), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)  # float32, in another order


def test_rows_that_look_at_nothing_are_skipped_and_tails_that_nobody_looks_at_get_nothing() -> None:
    B, K, G, J, w, rows = 1, 2, 2, 4, 5, 8
    segment = jnp.asarray([[[1, 1, 3, -1], [0, 2, -1, -1]]])
    R = rows * segment.shape[2]
    q, k, v, dout = numbers((B, K, R, G, 8), (B, K, J, w, 8), (B, K, J, w, 6), (B, K, R, G, 6))
    ids, tail_ids = jnp.ones((B, K, R), jnp.int32), jnp.ones((B, J, w), jnp.int32)

    def one_block(q, k, v):  # of rows and its tail
        scores = jnp.einsum("RGH,wH->RGw", q, k, precision="highest")
        return jnp.einsum("RGw,wU->RGU", jax.nn.softmax(scores), v, precision="highest"), jax.nn.logsumexp(scores, -1)

    @jax.jit
    def ours(q, k, v, dout):
        given = (q, ids, segment, k, v, tail_ids)
        out, log = tpu.forward_rows(*given, scale=1.0, interpret=True)
        along = jnp.sum(out * dout, axis=-1)
        return out, log, *tpu.backward_rows(*given, log, along, dout, scale=1.0, interpret=True)

    out, log, dq, dk, dv = ours(q, k, v, dout)
    want_dk, want_dv = jnp.zeros_like(k), jnp.zeros_like(v)
    for head, i in np.ndindex(K, segment.shape[2]):
        if (j := int(segment[0, head, i])) < 0:
            continue
        at = (0, head, slice(i * rows, (i + 1) * rows))
        (want, want_log), pull = jax.vjp(one_block, q[at], k[0, head, j], v[0, head, j])
        grads = pull((dout[at], jnp.zeros_like(want_log)))
        want_dk, want_dv = want_dk.at[0, head, j].add(grads[1]), want_dv.at[0, head, j].add(grads[2])
        for got, expected in zip((out[at], log[at], dq[at]), (want, want_log, grads[0]), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)  # float32, in another order
    np.testing.assert_allclose(dk, want_dk, atol=1e-5)
    np.testing.assert_allclose(dv, want_dv, atol=1e-5)


def test_rows_with_a_tail_of_several_products() -> None:
    (q, k, v), ids = numbers((1, 1, 8, 1, 8), (1, 1, 1, 1100, 8), (1, 1, 1, 1100, 8)), jnp.ones((1, 1, 8), jnp.int32)
    tail_ids = jnp.asarray(np.arange(1100) >= 700, jnp.int32)[None, None]  # the first product sees nothing
    out, log = tpu.forward_rows(q, ids, jnp.zeros((1, 1, 1), int), k, v, tail_ids, scale=1.0, interpret=True)
    scores = q[0, 0, :, 0] @ k[0, 0, 0, 700:].T
    np.testing.assert_allclose(log[0, 0, :, 0], jax.nn.logsumexp(scores, axis=-1), atol=1e-5)  # 400 float32 terms
    np.testing.assert_allclose(out[0, 0, :, 0], jax.nn.softmax(scores) @ v[0, 0, 0, 700:], atol=1e-5)


# ---------------------------------------------------------------- what it can not do


def test_reasons() -> None:
    def why(function: str, width: int, w: int, *dtypes: str) -> str | None:
        q, k, v = (jax.ShapeDtypeStruct((1, 64, 1, width), dtype) for dtype in dtypes)
        if function == "forward":
            return tpu.why_not(function, q, k, v, None)
        k, v = (jax.ShapeDtypeStruct((1, 1, 2, w, width), x.dtype) for x in (k, v))
        return tpu.why_not(function, q, None, None, k, v, None)

    assert why("forward", 192, 0, *["bfloat16"] * 3) is None
    assert why("forward_rows", 64, 4096, *["float32"] * 3) is None
    assert "float16" in str(why("forward", 64, 0, *["float16"] * 3))
    assert "all bfloat16 or all float32" in str(why("forward", 64, 0, "float32", "float32", "bfloat16"))
    assert "up to 256" in str(why("forward", 320, 0, *["float32"] * 3))
    assert "window is 4097" in str(why("backward_rows", 64, 4097, *["float32"] * 3))


# ---------------------------------------------------------------- long sequences

LONG = """
import sys
import time
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pallas_kernels.segmented_attention import segmented_attention

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = Mesh(np.array(devices[:1]), ("device",))
x = jax.ShapeDtypeStruct((1, 131072, 8, 128), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

def both(q, k, v, dout):
    attend = lambda q, k, v: segmented_attention(q, k, v, segment_size=1024, implementation="tpu")
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(dout)

begin = time.perf_counter()
with jax.set_mesh(mesh):
    compiled = jax.jit(both).trace(x, x, x, x).lower().compile()
print("seconds", time.perf_counter() - begin, "temporary bytes", compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_131072_tokens_compile_and_take_less_room_than_splash_attention(topology: str) -> None:
    more = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", LONG, topology]
    answer = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr[-3000:]
    print(topology, answer.stdout)
    assert int(answer.stdout.split()[-1]) < 1.4 * 2**30
