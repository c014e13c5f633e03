"""What must hold of every decoder: causality, packing, caching, and that its sizes are what it says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, DENSE, EVERYTHING, V, graph, logits, random_tokens, weights

from dsjax.config import UserError, validate
from dsjax.models.decoder import Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.masks import Documents
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.sharding import split_variables

T = 12
# float32 through three layers; sums are made in another order where shapes differ
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_changes_nothing_before_it(name: str) -> None:
    cfg, params, tokens = CONFIGS[name], weights(CONFIGS[name]), random_tokens(1, T)
    base = logits(cfg, params, tokens)
    for t in range(T):
        other = tokens.copy()
        other[0, t] = V - 1
        changed = logits(cfg, params, other)
        np.testing.assert_allclose(changed[:, :t], base[:, :t], **CLOSE)
        assert np.abs(changed[0, t] - base[0, t]).max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [(12,), (5, 7), (1, 4, 2, 3)])
def test_packed_documents_are_as_if_alone(name: str, lengths: tuple[int, ...]) -> None:
    cfg, params, tokens = CONFIGS[name], weights(CONFIGS[name]), random_tokens(1, T)
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    pad = T - sum(lengths)
    documents = Documents(
        jnp.asarray(np.pad(ids, ((0, 0), (0, pad))), jnp.int32),
        jnp.asarray(np.pad(positions, ((0, 0), (0, pad))), jnp.int32),
    )
    packed, start = logits(cfg, params, tokens, documents), 0
    for n in lengths:
        alone = logits(cfg, params, tokens[:, start : start + n])
        np.testing.assert_allclose(packed[:, start : start + n], alone, **CLOSE)
        start += n


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cuts", [(12,), (7, 1, 1, 1, 1, 1), (3, 4, 5)])
def test_prefill_and_decode_are_the_full_forward(name: str, cuts: tuple[int, ...]) -> None:
    cfg, params, tokens = CONFIGS[name], weights(CONFIGS[name]), random_tokens(2, T)
    model = nnx.merge(graph(cfg), params)
    step = jax.jit(lambda m, tokens, cache: (lambda out: (m.logits(out), out.cache))(m(tokens, cache=cache)))
    cache, parts, start = model.empty_cache(2, T + 4), [], 0
    for n in cuts:
        part, cache = step(model, jnp.asarray(tokens[:, start : start + n]), cache)
        parts.append(part)
        start += n
    np.testing.assert_allclose(np.concatenate(parts, axis=1), logits(cfg, params, tokens), **CLOSE)
    assert cache.lengths_B.tolist() == [T, T]


@pytest.mark.parametrize("cuts", [(12,), (7, 1, 1, 1, 1, 1)])
def test_the_selection_bias_takes_part_in_prefill_and_decode(cuts: tuple[int, ...]) -> None:
    """Three biases send the tokens to three different lots of experts; one that outweighs every score, to its own."""
    cfg, tokens, parts = EVERYTHING, random_tokens(2, T), {}
    for name, bias in (("random", None), ("none", [0.0] * 4), ("first two", [9.0, 9.0, 0.0, 0.0])):
        params = weights(cfg)
        if bias is not None:
            params["group_1"]["ffn"]["selection_bias"] = jnp.asarray([bias] * 2)
        model, start, rows = nnx.merge(graph(cfg), params), 0, []
        step = jax.jit(lambda m, tokens, cache: m(tokens, cache=cache))
        cache = model.empty_cache(2, T)
        for n in cuts:
            out = step(model, jnp.asarray(tokens[:, start : start + n]), cache)
            cache, start = out.cache, start + n
            rows.append(np.asarray(out.loads["group_1"]))
        parts[name] = sum(rows)
    assert (parts["first two"] == [[2 * T, 2 * T, 0, 0]] * 2).all()
    assert len({part.tobytes() for part in parts.values()}) == 3


def test_prompts_of_different_lengths_in_one_padded_prefill() -> None:
    cfg, params, tokens = EVERYTHING, weights(EVERYTHING), random_tokens(2, T)
    model, lengths = nnx.merge(graph(cfg), params), (4, 9)
    ids = np.arange(10)[None] < np.array(lengths)[:, None]
    positions = np.broadcast_to(np.arange(10, dtype=np.int32), (2, 10))
    documents = Documents(jnp.asarray(ids, jnp.int32), jnp.asarray(positions))
    run = jax.jit(lambda m, tokens, documents, cache: m(tokens, documents, cache=cache))
    cache = run(model, jnp.asarray(tokens[:, :10]), documents, model.empty_cache(2, T + 4)).cache
    assert cache.lengths_B.tolist() == [4, 9]
    for offset in range(3):
        now = jnp.asarray([[tokens[row, n + offset]] for row, n in enumerate(lengths)])
        out = run(model, now, Documents.single(now), cache)
        cache, got = out.cache, model.logits(out)
        for row, n in enumerate(lengths):
            want = logits(cfg, params, tokens[row : row + 1, : n + offset + 1])[0, -1]
            np.testing.assert_allclose(got[row, 0], want, **CLOSE)


@pytest.mark.parametrize(
    "compute",
    [
        {"unroll": True},
        {"remat": "dots"},
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"remat": "full", "unroll": True}, marks=pytest.mark.slow),
    ],
)
def test_how_it_is_computed_changes_no_gradient(compute: dict) -> None:
    cfg, params, tokens = EVERYTHING, weights(EVERYTHING), jnp.asarray(random_tokens(2, T))

    def gradients(definition):
        def loss(params):
            model = nnx.merge(definition, params)
            return jnp.mean(jax.nn.logsumexp(model.logits(model(tokens)), axis=-1) ** 2)

        return jax.jit(jax.grad(loss))(params)

    want, got = gradients(graph(cfg)), gradients(graph(cfg, **compute))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-6), got, want)


def test_bfloat16_is_near_float32_and_keeps_weights_and_logits_float32() -> None:
    params, tokens = weights(DENSE), random_tokens(2, T)
    half = logits(DENSE, params, tokens, dtype="bfloat16")
    assert half.dtype == np.float32
    # 8 bits of mantissa through two layers
    np.testing.assert_allclose(half, logits(DENSE, params, tokens), atol=0.15)


# ---------------------------------------------------------------- sizes


@st.composite
def decoder_configs(draw: st.DrawFn) -> DecoderConfig:
    K = draw(st.sampled_from([1, 2]))
    attention = AttentionConfig(
        num_heads=K * draw(st.sampled_from([1, 3])),
        num_kv_heads=K,
        head_dim=draw(st.sampled_from([2, 6])),
        qk_norm=draw(st.booleans()),
        conv_taps=draw(st.sampled_from([0, 2])),
    )
    E = draw(st.integers(1, 5))
    rate = draw(st.sampled_from([0.0, 0.01]))
    moe = MoEConfig(E, draw(st.integers(1, E)), 4, num_shared_experts=draw(st.integers(0, 2)), bias_update_rate=rate)
    ffns = draw(st.lists(st.sampled_from([MLPConfig(6), moe]), min_size=1, max_size=3))
    groups = tuple(LayerGroup(ffn, attention, draw(st.integers(1, 3))) for ffn in ffns)
    return DecoderConfig(
        vocab_size=draw(st.integers(2, 9)),
        d_model=draw(st.integers(2, 9)),
        num_layers=sum(g.num_layers for g in groups),
        groups=groups,
        tied=draw(st.booleans()),
        ngram=draw(st.sampled_from([None, EVERYTHING.ngram])),
        copy=draw(st.sampled_from([None, EVERYTHING.copy])),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(decoder_configs())
def test_num_params_counts_the_arrays(cfg: DecoderConfig) -> None:
    validate(cfg)
    _, params, buffers = split_variables(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))
    assert cfg.num_params() == sum(x.size for x in jax.tree.leaves(params))
    experts = [(g.ffn, n) for g, n in cfg.sized_groups() if isinstance(g.ffn, MoEConfig) and g.ffn.bias_update_rate]
    assert sum(x.size for x in jax.tree.leaves(buffers)) == sum(n * ffn.num_experts for ffn, n in experts)


def test_num_active_params_leaves_out_the_experts_that_are_not_chosen() -> None:
    expert = 3 * 16 * 8
    assert EVERYTHING.num_params() - EVERYTHING.num_active_params() == 2 * (4 - 2) * expert


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_bytes_per_token_counts_the_cache(dtype: str) -> None:
    model = nnx.merge(graph(EVERYTHING), weights(EVERYTHING))
    caches = [model.empty_cache(3, n, dtype, page_size=1) for n in (5, 6)]
    bytes_of = [sum(g.pages.k_LMKPH.nbytes + g.pages.v_LMKPH.nbytes for g in cache.groups) for cache in caches]
    assert bytes_of[1] - bytes_of[0] == 3 * EVERYTHING.kv_bytes_per_token(dtype)


@pytest.mark.parametrize("window", [None, 64])
def test_flops_per_token_agrees_with_the_compiler(window: int | None) -> None:
    """Forward pass of a model wide enough that its matmuls outweigh the rest."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, window=window)
    cfg = DecoderConfig(512, 256, 2, (LayerGroup(MLPConfig(512), attention),))
    T = 128
    definition = graph(cfg, unroll=True)
    state = nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))[1]

    def forward(params, tokens):
        model = nnx.merge(definition, params)
        return model.logits(model(tokens))

    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    cost = jax.jit(forward).lower(nnx.to_pure_dict(state), tokens).compile().cost_analysis()
    # The blocked attention computes its one block of 128 x 128 whole; the formula counts what is visible.
    visible = attention.visible_positions(T)
    computed = cfg.flops_per_token(T, training=False) + 2 * 4 * 4 * 64 * (T - visible)
    assert cost["flops"] / T == pytest.approx(computed, rel=0.03)


def test_visible_positions_by_hand() -> None:
    assert AttentionConfig().visible_positions(4) == (1 + 2 + 3 + 4) / 4
    assert AttentionConfig(window=2).visible_positions(4) == (1 + 2 + 2 + 2) / 4


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"groups": ()}, "groups is empty"),
        ({"num_layers": 1, "groups": (LayerGroup(num_layers=1), LayerGroup())}, "num_layers is 1; it must exceed"),
        ({"groups": (LayerGroup(), LayerGroup())}, "only one group can leave num_layers open"),
        ({"num_layers": 4, "groups": (LayerGroup(num_layers=3),)}, "num_layers is 4; its groups have 3"),
    ],
)
def test_groups_that_do_not_add_up_are_refused(change: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate(dataclasses.replace(DecoderConfig(), **change))
