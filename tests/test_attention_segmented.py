"""Segmented attention in the model: which layer sees what, the slots of its cache, prefill and decode."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import V, graph, logits, random_tokens, weights

from dsjax.config import UserError, apply_overrides, validate
from dsjax.models.decoder import Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import Attention, AttentionConfig
from dsjax.nn.cache import (
    GroupCache,
    LayerCache,
    RowState,
    empty_pages,
    held_positions,
    num_slots,
    slots_by_head,
    slots_of,
    written,
)
from dsjax.nn.masks import Documents, Segmented, sees
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.nn.rope import rope_angles
from dsjax.nn.row_attention import whole_segments
from dsjax.sharding import MeshConfig, make_mesh, use_mesh
from pallas_kernels.segmented_attention import Segments, segmented_attention_reference

# float32 through three layers; sums are made in another order where shapes differ
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, segmented=Segmented(8))
ALTERNATE = DecoderConfig(V, d_model=16, num_layers=3, groups=(LayerGroup(MLPConfig(24), ATTENTION),))


# ---------------------------------------------------------------- slots

LONGEST, NEW = 60, 13


@st.composite
def segments(draw: st.DrawFn, **options: Any) -> Segments:
    W = draw(st.integers(1, 12))
    return Segments(W, draw(st.integers(0, W)), draw(st.integers(0, W - 1)), **options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(segments(), st.lists(st.integers(0, NEW), min_size=1, max_size=8))
def test_slots_hold_the_tails_and_the_open_segment(cut: Segments, chunks: list[int]) -> None:
    """Chunk by chunk, some of their positions not real; each slot is then asked for what a dict says that it holds."""
    slots, length = num_slots(cut, LONGEST), 0
    held = dict.fromkeys(range(slots), -1)
    for real in chunks:
        real = min(real, LONGEST - length)
        lengths = jnp.asarray([length])
        at = np.asarray(slots_of(cut, lengths, NEW, jnp.asarray([real])))[0]
        kept = [(slot, length + i) for i, slot in enumerate(at.tolist()) if slot >= 0]
        assert len({slot for slot, _ in kept}) == len(kept)  # none is written twice
        assert all(position < length + real for _, position in kept)
        held |= dict(kept)
        length += real
        want = {p for p in range(length) if cut.in_tail(p) or cut.of(p) == cut.of(length - 1)}
        found = np.asarray(held_positions(cut, jnp.arange(slots), jnp.asarray(length))).tolist()
        assert sorted(p for p in found if p >= 0) == sorted(want)
        assert all(held[slot] == position for slot, position in enumerate(found) if position >= 0)
    assert slots <= LONGEST * cut.window / cut.size + cut.size + cut.window


@pytest.mark.parametrize(("length", "slots"), [(0, 0), (1, 1), (4, 4), (5, 8), (8, 8), (13, 12), (1024, 516)])
def test_a_segment_of_eight_with_a_tail_of_four_keeps_half(length: int, slots: int) -> None:
    assert num_slots(Segments(8, 4), length) == slots


@pytest.mark.parametrize(("shift", "slots"), [(0, 16), (5, 21)])
def test_a_row_within_the_head_of_its_segment_keeps_no_more_than_it_has(shift: int, slots: int) -> None:
    assert num_slots(Segments(1 << 20, 1 << 19, shift), 16) == slots


# ---------------------------------------------------------------- one layer

T, CHUNK, PAGE = 44, 5, 4
LAYERS = {
    "all tails": (Segments(8, 4), 1),
    "shifted": (Segments(8, 4, 4), 2),
    "short tails": (Segments(7, 2, 3), 2),
    "long tails": (Segments(6, 5, 4), 1),
    "whole segments": (Segments(4, 4), 2),
    "own segment": (Segments(5, 0, 2), 1),
    "within the head": (Segments(60, 6, 3), 1),
    "chosen": (Segments(6, 3, 0, top=1), 2),
    "first and previous": (Segments(4, 2, 2, top=0), 1),
    "chosen, first cut short": (Segments(6, 4, 5, top=2), 2),
    "chosen, within the head": (Segments(60, 6, 3, top=0), 1),
    "by head": (Segmented(8, 4, "heads"), 1),
    "by head, short tails": (Segmented(6, 2, "heads"), 2),
    "by head, chosen": (Segmented(6, 3, "heads", 1), 2),
}


@functools.cache
def layer(name: str, dtype: str = "float32") -> Any:
    """A layer's output at all positions at once, and functions that prefill and continue a cache."""
    mask, G = LAYERS[name]
    segmented = mask if isinstance(mask, Segmented) else Segmented(mask.size, mask.window, mask.shift, mask.top)
    cfg = AttentionConfig(num_heads=2 * G, num_kv_heads=2, head_dim=4, segmented=segmented)
    mask = cfg.mask(0)
    module = Attention(cfg, 8, rngs=nnx.Rngs(0))
    x_BTD = 2 * jax.random.normal(jax.random.key(1), (3, T, 8))
    slots, sums = cfg.cache_size(T)
    pages = empty_pages(1, 3, slots, (2, 4, 4), dtype, page_size=PAGE)
    empty = GroupCache(pages, RowState(jnp.zeros((1, 3, 0, 8)), jnp.zeros((1, 3, sums, 2, 4))))

    def call(module, x_BTD, cache, lengths_B, real_B):
        start_B = 0 * real_B if lengths_B is None else lengths_B
        positions_BT = start_B[:, None] + jnp.arange(x_BTD.shape[1])
        ids_BT = (jnp.arange(x_BTD.shape[1]) < real_B[:, None]).astype(jnp.int32)
        rope = rope_angles(positions_BT, 4, 100.0)
        documents = Documents(ids_BT, positions_BT)
        options = {"documents": documents, "positions_BT": positions_BT, "rope": rope}
        if cache is None:
            return module(x_BTD, **options)[0], None
        state = jax.tree.map(lambda x: x[0], cache.state)
        out, made = module(x_BTD, cache=LayerCache(cache.pages, 0, state), lengths_B=lengths_B, **options)
        slots_NBTn = None
        if lengths_B is not None:
            slots_NBTn = slots_by_head(mask, lengths_B, x_BTD.shape[1], real_B)[None]
        return out, written(cache, jax.tree.map(lambda x: x[None], made), slots_NBTn)

    run = functools.partial(jax.jit(call), module)
    whole = np.asarray(run(x_BTD, None, None, jnp.full(3, T))[0])
    return whole, x_BTD, empty, run


def check_pieces(name: str, prompts: list[int], chunks: list[list[int]], chunk: int) -> None:
    """Prefill to ``prompts`` (0: none at all, the cache is continued from nothing), then rows get ``chunks`` each."""
    want, x_BTD, cache, run = layer(name)
    lengths = np.asarray(prompts)
    if lengths.any():
        out, cache = run(x_BTD, cache, None, jnp.asarray(lengths))
        for row, n in enumerate(prompts):
            np.testing.assert_allclose(out[row, :n], want[row, :n], **CLOSE)
    for real in zip(*chunks, strict=True):
        real_B = np.minimum(real, T - lengths)
        at_BT = np.minimum(lengths[:, None] + np.arange(chunk), T - 1)
        piece = jnp.asarray(np.take_along_axis(np.asarray(x_BTD), at_BT[..., None], axis=1))
        out, cache = run(piece, cache, jnp.asarray(lengths), jnp.asarray(real_B))
        for row, n in enumerate(real_B.tolist()):
            np.testing.assert_allclose(out[row, :n], want[row, lengths[row] : lengths[row] + n], **CLOSE)
        lengths = lengths + real_B


@pytest.mark.parametrize("name", LAYERS)
def test_prefill_and_decode_give_every_position_of_ragged_rows(name: str) -> None:
    """Position by position from prompts that end anywhere: in the head, in the tail, with a segment."""
    prompts = [1, 8, 19]
    check_pieces(name, prompts, [[1] * (T - 1)] * 3, 1)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.sampled_from(["short tails", "chosen, first cut short", "by head, short tails", "by head, chosen"]),
    st.lists(st.integers(1, T), min_size=3, max_size=3) | st.just([0, 0, 0]),
    st.lists(st.lists(st.integers(0, CHUNK), min_size=9, max_size=9), min_size=3, max_size=3),
)
def test_chunks_of_any_number_of_positions_may_cross_segments(name: str, prompts: list, chunks: list) -> None:
    check_pieces(name, prompts, chunks, CHUNK)


def test_other_tails_can_hold_anything() -> None:
    """What is not chosen is not read: NaN in it changes nothing."""
    name = "first and previous"
    want, x_BTD, cache, run = layer(name)
    length, columns = 34, cache.pages.table_BJ.shape[1]
    _, cache = run(x_BTD, cache, None, jnp.full(3, length))
    slots = jnp.arange(columns * PAGE)
    held = np.asarray(held_positions(LAYERS[name][0], slots, jnp.asarray(length))).reshape(columns, PAGE)
    # Segments of four, shifted by two: position 34 is in the ninth, sees the tails of the first and the eighth. A page
    # holds two tails, but for the first, which holds the head beside one.
    middle = ((held >= 4) & (held < 28)).all(axis=1)
    assert middle.sum() == 3
    poison = np.tile(middle, 3)[:, None, None, None]
    k, v = (jnp.where(poison, jnp.nan, x) for x in (cache.pages.k_LMKPH, cache.pages.v_LMKPH))
    broken = dataclasses.replace(cache, pages=dataclasses.replace(cache.pages, k_LMKPH=k, v_LMKPH=v))
    out, _ = run(x_BTD[:, length : length + 1], broken, jnp.full(3, length), jnp.ones(3, jnp.int32))
    np.testing.assert_allclose(out[:, 0], want[:, length], **CLOSE)


# ---------------------------------------------------------------- in the model


def test_odd_layers_are_shifted_by_the_window_and_even_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the specification, over groups that begin anywhere."""
    ids = jnp.ones((2, 20), jnp.int32)
    apart = tuple(
        LayerGroup(MLPConfig(24), dataclasses.replace(ATTENTION, segmented=Segmented(8, 3, shift)), num_layers=1)
        for shift in (0, 3, 0)
    )
    segmented = dataclasses.replace(ATTENTION, segmented=Segmented(8, 3))
    one = (LayerGroup(MLPConfig(24), segmented, num_layers=1), LayerGroup(MLPConfig(24), segmented))
    params, tokens = weights(ALTERNATE), random_tokens(2, 20)
    stacked = params.pop("group_0")
    cut = lambda a, b: jax.tree.map(lambda x: x[a:b], stacked)  # noqa: E731
    three = params | {f"group_{i}": cut(i, i + 1) for i in range(3)}
    two = params | {"group_0": cut(0, 1), "group_1": cut(1, 3)}
    cfg = dataclasses.replace(ALTERNATE, groups=(LayerGroup(MLPConfig(24), segmented),))
    got = logits(cfg, params | {"group_0": stacked}, tokens)
    np.testing.assert_allclose(logits(dataclasses.replace(cfg, groups=one), two, tokens), got, **CLOSE)

    def reference(q, k, v, *, segment_size, window, shift, top_segments, documents, scale):
        assert scale is None
        return segmented_attention_reference(
            q, k, v, documents, Segments(segment_size, window, shift, top_segments), q.shape[-1] ** -0.5
        )

    monkeypatch.setattr("dsjax.nn.row_attention.segmented_attention", reference)
    want = logits(
        dataclasses.replace(cfg, groups=apart), three, tokens, Documents(ids, jnp.tile(jnp.arange(20), (2, 1)))
    )
    np.testing.assert_allclose(got, want, **CLOSE)


MIXED = DecoderConfig(
    vocab_size=V,
    d_model=16,
    num_layers=5,
    groups=(
        LayerGroup(MLPConfig(24), dataclasses.replace(ATTENTION, segmented=None, conv_taps=3), num_layers=1),
        LayerGroup(
            MoEConfig(num_experts=4, top_k=2, d_ff=8),
            dataclasses.replace(ATTENTION, segmented=Segmented(6, top_segments=1), qk_norm=True),
            num_layers=3,
        ),
        LayerGroup(MLPConfig(24), dataclasses.replace(ATTENTION, segmented=Segmented(4, 1, 2))),
    ),
)


@pytest.mark.parametrize(("is_empty", "compute"), [(True, {}), (False, {"unroll": True})])
def test_prefill_and_decode_are_the_full_forward_of_a_mixed_model(is_empty: bool, compute: dict) -> None:
    params, tokens, T = weights(MIXED), random_tokens(2, 34), 34
    model = nnx.merge(graph(MIXED, **compute), params)

    @functools.partial(jax.jit, static_argnames="is_empty")
    def step(model, tokens_BT, cache, is_empty):
        out = model(tokens_BT, cache=cache, cache_is_empty=is_empty)
        return model.logits(out), out.cache

    cache, parts = model.empty_cache(2, T), []
    for start, end in ((0, 19), *((t, t + 1) for t in range(19, T))):
        part, cache = step(model, jnp.asarray(tokens[:, start:end]), cache, is_empty and start == 0)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), logits(MIXED, params, tokens), **CLOSE)


@pytest.mark.parametrize("compute", [{"unroll": True}, {"remat": "full"}])
def test_how_it_is_computed_changes_no_gradient(compute: dict) -> None:
    params, tokens = weights(ALTERNATE), jnp.asarray(random_tokens(2, 20))

    def gradients(definition):
        def loss(params):
            model = nnx.merge(definition, params)
            return jnp.mean(jax.nn.logsumexp(model.logits(model(tokens)), axis=-1) ** 2)

        return jax.jit(jax.grad(loss))(params)

    want, got = gradients(graph(ALTERNATE)), gradients(graph(ALTERNATE, **compute))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6), got, want)


@pytest.mark.parametrize(
    ("length", "mesh", "top"),
    [
        # rows are gathered: 10 positions are no whole segments
        pytest.param(20, MeshConfig(data=2, tensor=2, context=2), None, marks=pytest.mark.slow),
        pytest.param(32, MeshConfig(data=2, context=4), None, marks=pytest.mark.slow),
        (32, MeshConfig(tensor=2, context=4), 0),
    ],
)
def test_eight_devices_give_the_gradients_of_one(length: int, mesh: MeshConfig, top: int | None) -> None:
    attention = dataclasses.replace(ATTENTION, segmented=Segmented(8, top_segments=top))
    cfg = dataclasses.replace(ALTERNATE, groups=(LayerGroup(MLPConfig(24), attention),))
    params, tokens = weights(cfg), jnp.asarray(random_tokens(2, length))
    definition = graph(cfg, remat="full")
    with use_mesh(make_mesh(mesh)):
        assert whole_segments(attention.mask(0), length) == (() if length == 20 else ("context",))

    def gradients(mesh: Any) -> Any:
        def loss(params):
            with use_mesh(mesh):
                model = nnx.merge(definition, params)
                return jnp.mean(jax.nn.logsumexp(model.logits(model(tokens)), axis=-1) ** 2)

        return jax.jit(jax.grad(loss))(params)

    want, got = gradients(None), gradients(make_mesh(mesh))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6), got, want)


def test_nothing_is_seen_across_documents_nor_behind_a_position() -> None:
    params, tokens = weights(MIXED), random_tokens(1, 24)
    ids = jnp.repeat(jnp.asarray([[1, 2]]), jnp.asarray([12, 12]), axis=1)  # 12: a multiple of both segment sizes
    documents = Documents(ids, jnp.tile(jnp.arange(12), (1, 2)))
    run = jax.jit(lambda model, tokens: model.logits(model(tokens, documents)))
    model = nnx.merge(graph(MIXED), params)
    base = np.asarray(run(model, jnp.asarray(tokens)))
    for t in range(24):
        other = tokens.copy()
        other[0, t] = V - 1
        changed = np.abs(np.asarray(run(model, jnp.asarray(other))) - base)[0].max(axis=-1)
        assert changed[t] > 1e-3
        assert changed[:t].max(initial=0) < 1e-5
        assert t >= 12 or changed[12:].max() < 1e-5
    alone = logits(MIXED, params, tokens[:, 12:])  # cut as in the row, where a segment begins with the document
    np.testing.assert_allclose(base[:, 12:], alone, **CLOSE)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 12, 50])
def test_kv_bytes_are_those_of_the_cache(length: int, dtype: str) -> None:
    cache = jax.eval_shape(lambda: Decoder(MIXED, rngs=nnx.Rngs(0)).empty_cache(1, length, dtype, page_size=1))
    held = [(g.pages.k_LMKPH, g.pages.v_LMKPH, g.state.tail_sums_BJKH) for g in cache.groups]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    assert MIXED.kv_bytes(length, dtype) == size == length * MIXED.kv_bytes_per_token(dtype, length)


def test_kv_bytes_per_token_is_what_one_more_position_costs_in_the_end() -> None:
    full = dataclasses.replace(
        ALTERNATE, groups=(LayerGroup(MLPConfig(24), dataclasses.replace(ATTENTION, segmented=None)),)
    )
    assert full.kv_bytes_per_token() == 3 * 2 * 2 * 8 * 2
    assert ALTERNATE.kv_bytes_per_token() == full.kv_bytes_per_token() / 2
    grown = [MIXED.kv_bytes(n, "float32") for n in (120, 240)]
    assert grown[1] - grown[0] == pytest.approx(120 * MIXED.kv_bytes_per_token("float32"))


def test_visible_positions_by_hand() -> None:
    attention = dataclasses.replace(ATTENTION, segmented=Segmented(4, 2))
    # without a shift: 1 2 3 4 | 2+1 2+2 2+3 2+4 | 4+1; shifted by two: 1 2 | 2+1 ... 2+4 | 4+1 4+2 4+3
    assert attention.visible_positions(9, 0) == (10 + 18 + 5) / 9
    assert attention.visible_positions(9, 1) == attention.visible_positions(9, 3) == (3 + 18 + 18) / 9
    full = dataclasses.replace(ATTENTION, segmented=Segmented(4, 4))
    assert full.visible_positions(9) == 45 / 9


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("attention", "sentence"),
    [
        ({"segmented": Segmented(8, 9)}, "attention.segmented.window is 9; it must be at most segment_size, 8"),
        ({"segmented": Segmented(8, shift=8)}, "attention.segmented.shift is 8; it must be less than segment_size, 8"),
        ({"segmented": Segmented(8), "window": 3}, "attention.window is 3; it must be none beside segmented"),
        ({"segmented": Segmented(0)}, "attention.segmented.segment_size is 0; it must be an integer >= 1"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(attention: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate(LayerGroup(attention=AttentionConfig(**attention)))


def test_shifts_go_around() -> None:
    def shifts(segmented: Segmented) -> list[int]:
        return [cut.shift for cut in segmented.layers(2)]

    assert shifts(Segmented(8)) == shifts(Segmented(8, shift="cycle")) == [0, 4]
    assert shifts(Segmented(8, 2)) == [0, 2]
    assert shifts(Segmented(8, 2, "cycle")) == [0, 2, 4, 6]
    assert shifts(Segmented(8, 8, "cycle")) == shifts(Segmented(8, 0, "cycle"))[:1] == [0]
    assert shifts(Segmented(10, 3, "cycle")) == [0, 3, 6, 9]
    t, j = jnp.arange(64)[:, None], jnp.arange(64)
    for cycle in (Segmented(8, 2, "cycle"), Segmented(10, 3, "cycle"), Segmented(7, shift="cycle")):
        together = functools.reduce(jnp.logical_or, [sees(cut, t, j) for cut in cycle.layers(2)])
        assert bool((together == (j <= t)).all())


def test_overrides_reach_it() -> None:
    key = "groups.0.attention.segmented"
    cfg = apply_overrides(ALTERNATE, [f"{key}=window=2,shift=3", f"{key}.top_segments=4"])
    assert cfg.groups[0].attention.segmented == Segmented(8, 2, 3, 4)
    assert apply_overrides(cfg, [f"{key}.shift=alternate"]).groups[0].attention.segmented == Segmented(
        8, 2, top_segments=4
    )
    assert apply_overrides(cfg, [f"{key}=none"]).groups[0].attention.segmented is None
    allowed = "alternate, cycle, heads or an integer"
    with pytest.raises(UserError, match=rf"{key}.shift is 'odd'; it must be one of {allowed}"):
        apply_overrides(cfg, [f"{key}.shift=odd"])
