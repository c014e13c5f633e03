"""What only the blocked form in XLA promises: which blocks it visits, its memory, the size of its program, FLOPs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.plan.flops import count_flops
from pallas_kernels.segmented_attention import Segments, segmented_attention, xla
from pallas_kernels.segmented_attention.xla import Tiles

attend = functools.partial(segmented_attention, implementation="xla")


def cut(T: int, G: int, segments: Segments, tiles: Tiles, ids_T: Any = None) -> tuple[xla._Blocks, xla.Visits]:
    blocks = xla._Blocks(segments, tiles, jnp.zeros((T, G, 1)), ids_T)
    return blocks, blocks.visits(tiles)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, Segments, Tiles]:
    size = draw(st.integers(1, 24))
    segments = Segments(size, draw(st.integers(0, size)), draw(st.integers(0, size - 1)))
    tiles = Tiles(draw(st.sampled_from([3, 4, 8])), draw(st.sampled_from([3, 4, 8])))
    return draw(st.integers(1, 40)), draw(st.integers(1, 3)), segments, tiles


@given(cuts())
@settings(max_examples=40, deadline=None)
def test_each_visible_pair_is_visited_once_and_no_block_without_one(cut_of: tuple[int, int, Segments, Tiles]) -> None:
    T, G, segments, _ = cut_of

    @jax.jit
    def masks() -> tuple[jax.Array, jax.Array, jax.Array]:
        """Positions of the keys and queries of each visit, -1 where nothing is, and its visible pairs."""
        blocks, visits = cut(*cut_of)
        position_T = jnp.arange(1, T + 1)
        keys_PS = blocks.of_keys(position_T)[visits.key_P] - 1
        queries_PR = blocks.of_queries(jnp.repeat(position_T[:, None], G, axis=1))[visits.query_P] - 1
        return keys_PS, queries_PR, jax.vmap(blocks.sees)(visits.query_P, visits.key_P)

    times_TT = np.zeros((T, T), int)
    for keys_S, queries_R, sees_RS in zip(*map(np.asarray, masks()), strict=True):
        real_RS = (queries_R >= 0)[:, None] & sees_RS
        assert real_RS.any()
        assert not real_RS[:, keys_S < 0].any()
        r, s = np.nonzero(real_RS)
        np.add.at(times_TT, (queries_R[r], keys_S[s]), 1)
    t, j = np.arange(T)[:, None], np.arange(T)
    visible = (j <= t) & ((segments.of(j) == segments.of(t)) | segments.in_tail(j))
    assert (times_TT == G * visible).all()


def test_aligned_tails_are_read_in_their_places_and_others_compacted() -> None:
    aligned, _ = cut(64, 1, Segments(16, 8), Tiles(8, 8))
    assert aligned.plan.num_tails == 0
    # Per segment of 16: 3 blocks of 8 x 8 of its own, and 2 for each tail of the 0, 1, 2, 3 before it.
    assert len(aligned.plan.query_P) == 4 * 3 + 2 * (0 + 1 + 2 + 3)
    # Of three tails of 4 positions each, one has half of a block to itself.
    shifted, _ = cut(64, 1, Segments(16, 4), Tiles(8, 8))
    assert shifted.plan.num_tails == 2
    assert len(shifted.plan.query_P) == 4 * 3 + 2 * (0 + 1 + 1 + 2)


def test_blocks_of_different_documents_are_skipped() -> None:
    T, tiles = 32, Tiles(8, 8)
    _, visits = cut(T, 1, Segments(T, T), tiles, jnp.repeat(jnp.asarray([3, 7]), T // 2))
    same = np.asarray(visits.query_P) // 2 == np.asarray(visits.key_P) // 2
    np.testing.assert_array_equal(visits.meet_P, same)
    _, visits = cut(T, 1, Segments(T, T), tiles, jnp.full(T, 3).at[T // 2 :].set(0))  # padding meets padding
    np.testing.assert_array_equal(visits.meet_P, same)


@pytest.mark.parametrize("top_segments", [None, 1])
def test_memory_grows_as_the_length(top_segments: int | None) -> None:
    def loss(q, k, v):
        return attend(q, k, v, segment_size=512, top_segments=top_segments).sum()

    def temporaries(T: int) -> int:
        q, k = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32), jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    half, whole = temporaries(32768), temporaries(65536)
    assert whole <= 2 * half  # with what does not grow, less
    assert whole < 65536 * 65536 / 16


@functools.cache
def program(T: int, gradients: bool = False) -> Any:
    """The jaxpr of one layer of 2 heads, 16 wide with values of 8."""

    def out(q, k, v):
        return attend(q, k, v, segment_size=512, window=100, shift=3, scale=0.25)

    f = jax.grad(lambda *x: out(*x).sum(), argnums=(0, 1, 2)) if gradients else out
    x = [jax.ShapeDtypeStruct((1, T, heads, width), jnp.float32) for heads, width in ((2, 16), (1, 16), (1, 8))]
    return jax.make_jaxpr(f)(*x).jaxpr


def equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_program_does_not_grow_with_the_length(gradients: bool) -> None:
    short, long = (list(equations(program(T, gradients))) for T in (4096, 131072))
    assert len(short) == len(long)
    largest = max(v.aval.size for eqn in long for v in eqn.outvars)
    assert largest <= 2 * 131072 * 2 * 16  # keys and tails of all positions and heads, and no more


@pytest.mark.parametrize("T", [100, 4096])
def test_the_flops_that_count_are_those_of_visible_pairs(T: int) -> None:
    pairs = 2 * Segments(512, 100, 3).visible_pairs(T)  # 2 heads
    forward, both = (count_flops(program(T, gradients), platform="cpu") for gradients in (False, True))
    # The share is stated with 9 digits.
    assert forward.model == pytest.approx(2 * (16 + 8) * pairs, rel=1e-6)
    assert both.model - forward.model == pytest.approx(2 * (2 * 16 + 2 * 8) * pairs, rel=1e-6)
    assert not both.unknown_loops


def test_rows_of_unused_blocks_are_not_computed() -> None:
    """A block without a segment keeps what it had; were it computed, NaN would come out of it."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(1, 1, 8, 2, 4), (1, 1, 3, 5, 4), (1, 1, 3, 5, 4)]
    )
    q = q.at[:, :, 4:].set(jnp.nan)
    ids, tail_ids = jnp.ones((1, 1, 8), jnp.int32), jnp.ones((1, 3, 5), jnp.int32)
    segment = jnp.asarray([[[2, -1]]])
    out, log = xla.forward_rows(q, ids, segment, k, v, tail_ids, scale=0.5, tiles=Tiles())
    assert np.isfinite(out).all()
    scores = 0.5 * np.einsum("rgh,wh->rgw", q[0, 0, :4], k[0, 0, 2])
    want = np.log(np.exp(scores).sum(axis=-1))
    np.testing.assert_allclose(log[0, 0, :4], want, atol=2e-6)  # float32, a few terms near 1
