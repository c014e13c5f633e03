"""Multi-head latent attention: both forms against the equations of the paper, one by one, and against each other."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsjax.config import UserError, validate
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.indexer import IndexerConfig
from dsjax.nn.latent_attention import LatentAttention, LatentAttentionConfig
from dsjax.nn.masks import Documents, Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.rope import YarnScaling, rope_angles
from dsjax.sharding import MeshConfig, make_mesh, use_mesh

SMALL = LatentAttentionConfig(num_heads=4, q_rank=6, kv_rank=8, nope_dim=6, rope_dim=4, v_dim=5)
INDEXED = dataclasses.replace(SMALL, indexer=IndexerConfig(num_heads=3, head_dim=6, top_k=3))
D = 12


def random_layer(cfg: LatentAttentionConfig, seed: int = 0) -> LatentAttention:
    """Norms as well: their scales are not 1."""
    layer = LatentAttention(cfg, D, rngs=nnx.Rngs(seed))
    graph, state = nnx.split(layer)
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    return nnx.merge(graph, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), state))


def by_the_paper(layer: LatentAttention, x_TD: np.ndarray, ids_T: np.ndarray) -> np.ndarray:
    """Equations (37) to (47) of arXiv 2405.04434, head by head and position by position, float64."""
    cfg, weights = layer.cfg, {name: np.asarray(x, np.float64) for name, x in flat(layer).items()}

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + 1e-6) * scale

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        half = len(x) // 2
        angles = position * cfg.rope_theta ** (-np.arange(half) / half)
        a, b = x[:half], x[half:]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)])

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
        return x * weights[f"{name}/scale"] + weights[f"{name}/bias"]

    def rotate_first(x: np.ndarray, position: int) -> np.ndarray:
        return np.append(rotate(x[: cfg.rope_dim], position), x[cfg.rope_dim :])

    T, positions = len(x_TD), np.array([np.sum(ids_T[:t] == ids_T[t]) for t in range(len(x_TD))])
    out = np.zeros((T, D))
    queries, keys, values, index_queries, index_keys = [], [], [], [], []
    for t, x in enumerate(x_TD):
        if cfg.q_rank is None:
            q = np.einsum("d,dnh->nh", x, weights["w_q"])
        else:
            q = np.einsum("q,qnh->nh", norm(x @ weights["w_q_down"], weights["q_norm/scale"]), weights["w_q_up"])
        down = x @ weights["w_kv_down"]
        latent = norm(down[: cfg.kv_rank], weights["kv_norm/scale"])
        k_rope = rotate(down[cfg.kv_rank :], positions[t])
        queries.append([np.append(q[n, : cfg.nope_dim], rotate(q[n, cfg.nope_dim :], positions[t])) for n in range(4)])
        keys.append([np.append(latent @ weights["w_k_up"][:, n], k_rope) for n in range(4)])
        values.append([latent @ weights["w_v_up"][:, n] for n in range(4)])
        if cfg.indexer is not None:
            q = np.einsum("q,qhd->hd", norm(x @ weights["w_q_down"], weights["q_norm/scale"]), weights["indexer/w_q"])
            index_queries.append([rotate_first(head, positions[t]) for head in q])
            index_keys.append(rotate_first(normed(x @ weights["indexer/w_k"], "indexer/k_norm"), positions[t]))
    for t in range(T):
        seen = [s for s in range(t + 1) if ids_T[s] == ids_T[t]]
        if cfg.indexer is not None:  # arXiv 2512.02556, equations (1) and (2)
            w = x_TD[t] @ weights["indexer/w_heads"]
            score = {s: w @ np.maximum(np.array(index_queries[t]) @ index_keys[s], 0) for s in seen}
            seen = sorted(seen, key=lambda s: (-score[s], s))[: cfg.indexer.top_k]
        for n in range(4):
            scores = np.array([queries[t][n] @ keys[s][n] for s in seen]) / math.sqrt(cfg.nope_dim + cfg.rope_dim)
            p = np.exp(scores - scores.max())
            out[t] += sum(w * values[s][n] for w, s in zip(p / p.sum(), seen, strict=True)) @ weights["w_out"][n]
    return out


def flat(layer: LatentAttention) -> dict[str, jax.Array]:
    return {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(nnx.state(layer))}


@pytest.mark.parametrize(("q_rank", "indexer"), [(None, None), (6, None), (6, IndexerConfig(3, 6, 3))])
def test_the_naive_form_is_the_papers(q_rank: int | None, indexer: IndexerConfig | None) -> None:
    layer = random_layer(dataclasses.replace(SMALL, q_rank=q_rank, indexer=indexer))
    x_BTD = jax.random.normal(jax.random.key(1), (1, 9, D))
    ids_BT = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    positions_BT = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    rope = rope_angles(positions_BT, SMALL.rope_dim, SMALL.rope_theta)
    got, _ = layer(x_BTD, documents=Documents(ids_BT, positions_BT), positions_BT=positions_BT, rope=rope)
    want = by_the_paper(layer, np.asarray(x_BTD[0], np.float64), np.asarray(ids_BT[0]))
    np.testing.assert_allclose(got[0], want, atol=2e-5)  # float32 sums of at most 20 terms near 1


@st.composite
def models(draw: st.DrawFn) -> DecoderConfig:
    attention = LatentAttentionConfig(
        num_heads=draw(st.sampled_from([1, 2, 4])),
        q_rank=draw(st.sampled_from([None, 5])),
        kv_rank=draw(st.sampled_from([4, 9])),
        nope_dim=draw(st.sampled_from([1, 6])),
        rope_dim=draw(st.sampled_from([2, 4])),
        v_dim=draw(st.sampled_from([1, 5, 8])),
        rope_scaling=draw(st.sampled_from([None, YarnScaling(4.0, 16, mscale=1.0, mscale_all_dim=0.7)])),
        window=draw(st.sampled_from([None, 1, 7])),
    )
    if attention.window is None and draw(st.booleans()):
        attention = dataclasses.replace(attention, segmented=Segmented(8, 4, draw(st.sampled_from(["heads", 0, 3]))))
    return DecoderConfig(16, 12, 2, (LayerGroup(MLPConfig(8), attention),))


SEGMENTED = dataclasses.replace(SMALL, segmented=Segmented(8, 4, "heads"))


@settings(max_examples=6, deadline=None)
@example(DecoderConfig(16, 12, 2, (LayerGroup(MLPConfig(8), SEGMENTED),)), 13, 0)
@given(models(), st.integers(1, 20), st.integers(0, 99))
def test_absorbed_and_naive_agree(cfg: DecoderConfig, prefill: int, seed: int) -> None:
    """Prefill, then two positions at a time from the cache of latents: the hidden states of the whole rows."""
    model = Decoder(cfg, ComputeConfig(), rngs=nnx.Rngs(seed))
    tokens_BT = jax.random.randint(jax.random.key(seed), (2, 24), 0, 16)
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, tokens, cache: nnx.merge(graph, state)(tokens, cache=cache))
    want = model(tokens_BT).hidden_BTD
    out = model(tokens_BT[:, :prefill], cache=model.empty_cache(2, 32), cache_is_empty=True)
    parts = [out.hidden_BTD]
    for t in range(prefill, 24, 2):
        out = run(state, tokens_BT[:, t : t + 2], out.cache)
        parts.append(out.hidden_BTD)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=2e-5)


def test_the_cache_holds_latents_alone() -> None:
    cfg = DecoderConfig(16, 12, 3, (LayerGroup(MLPConfig(8), SMALL),))
    assert cfg.kv_bytes_per_token("float32") == 3 * 4 * (SMALL.kv_rank + SMALL.rope_dim)
    pages = Decoder(cfg, rngs=nnx.Rngs(0)).empty_cache(2, 64).groups[0].pages
    assert pages.k_LMKPH.shape[2:] == (1, 64, SMALL.kv_rank + SMALL.rope_dim)
    assert pages.v_LMKPH.size == 0
    indexed = DecoderConfig(16, 12, 3, (LayerGroup(MLPConfig(8), INDEXED),))
    assert indexed.kv_bytes_per_token("float32") == 3 * 4 * (SMALL.kv_rank + SMALL.rope_dim + 6)
    heads = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=10)
    assert DecoderConfig(16, 12, 3, (LayerGroup(MLPConfig(8), heads),)).kv_bytes_per_token("float32") == 3 * 4 * 80


def test_counted_parameters_and_flops() -> None:
    for cfg in (SMALL, dataclasses.replace(SMALL, q_rank=None), INDEXED):
        layer = LatentAttention(cfg, D, rngs=nnx.Rngs(0))
        assert cfg.num_params(D) == sum(x.size for x in flat(layer).values())
        vectors = sum(x.size for x in flat(layer).values() if x.ndim == 1)
        assert cfg.num_matmul_params(D) == cfg.num_params(D) - vectors
    assert SMALL.pair_channels == 4 * (6 + 4) + 4 * 5
    assert SMALL.cached_pair_channels == 4 * (8 + 4) + 4 * 8
    # Of 5 positions a query sees at most 3, and scores all before it: 3 heads' products of 6, and their sum.
    assert INDEXED.visible_pairs(5) == 1 + 2 + 3 + 3 + 3
    assert INDEXED.pair_products(5) == 12 * SMALL.pair_channels + 15 * 3 * (6 + 1)
    assert INDEXED.pair_products(5, cached=True) == 12 * SMALL.cached_pair_channels + 15 * 3 * (6 + 1)
    assert INDEXED.product_channels - SMALL.product_channels == 3 * 6 + 6 + 3


@pytest.mark.parametrize("mesh", [{"tensor": 4, "fsdp": 2}, {"tensor": 2, "fsdp": 2, "context": 2}])
@pytest.mark.parametrize("segmented", [None, Segmented(8, 4)])
def test_eight_devices_are_as_one_forward_and_backward(mesh: dict[str, int], segmented: Segmented | None) -> None:
    layer = random_layer(dataclasses.replace(SMALL, segmented=segmented))
    x_BTD = jax.random.normal(jax.random.key(1), (4, 32, D))
    ids_BT = jnp.ones((4, 32), jnp.int32)
    graph, state = nnx.split(layer)

    def loss(state, x_BTD):
        positions_BT = jnp.broadcast_to(jnp.arange(32), ids_BT.shape)
        rope = rope_angles(positions_BT, SMALL.rope_dim, SMALL.rope_theta)
        documents = Documents(ids_BT, positions_BT)
        y = nnx.merge(graph, state)(x_BTD, documents=documents, positions_BT=positions_BT, rope=rope)[0]
        return jnp.sum(jnp.sin(y))

    want = jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x_BTD)
    with use_mesh(make_mesh(MeshConfig(data=1, **mesh), jax.devices()[:8])):
        got = jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x_BTD)
    # float32 sums in another order
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=3e-5), got, want)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rope_dim": 3}, "rope_dim is 3"),
        ({"window": 3, "segmented": Segmented(8)}, "window is 3; it must be none beside segmented"),
        ({"segmented": Segmented(8, top_segments=2)}, "top_segments is 2; it must be none with latent attention"),
        ({"indexer": IndexerConfig(), "window": 3}, "window is 3; it must be none beside indexer"),
        ({"indexer": IndexerConfig(), "segmented": Segmented(8)}, "segmented is .*; it must be none beside indexer"),
        ({"indexer": IndexerConfig(), "q_rank": None}, "q_rank is none; an indexer makes its queries"),
        ({"indexer": IndexerConfig(head_dim=2)}, "indexer.head_dim is 2; it must be at least rope_dim, 4"),
    ],
)
def test_what_can_not_be_is_refused(change: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        validate(dataclasses.replace(SMALL, **change))
