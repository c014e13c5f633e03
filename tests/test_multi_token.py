"""Multi-token prediction against its equations, written out in NumPy; its loss; devices; buffers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.data.batch import Batch
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig, ahead, shifted
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.masks import Documents
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.sharding import MeshConfig, make_mesh
from dsjax.train.optimizer import OptimConfig
from dsjax.train.step import make_trainer, next_token_loss

V, D, T = 24, 8, 10
PLAIN = DecoderConfig(
    V, D, 1, (LayerGroup(MLPConfig(12), AttentionConfig(2, 2, 4)),), multi_token=MultiTokenConfig(2, weight=0.5)
)
EXPERTS = DecoderConfig(
    V,
    D,
    2,
    (
        LayerGroup(MLPConfig(12), LatentAttentionConfig(2, 4, 8, 4, 2, 4), num_layers=1),
        LayerGroup(
            MoEConfig(4, 2, 8, 1, scoring="sigmoid", balance_coef=0.0, sequence_coef=0.01, bias_update_rate=0.1),
            LatentAttentionConfig(2, 4, 8, 4, 2, 4),
        ),
    ),
    multi_token=MultiTokenConfig(1),
)
IDS = np.array([[1] * 6 + [2] * 4, [1] * 9 + [0]])


def batch(seed: int = 0, rows: int = 1) -> Batch:
    rng = np.random.default_rng(seed)
    tokens_BT, ids_BT = rng.integers(1, V, (2 * rows, T)), np.tile(IDS, (rows, 1))
    positions_BT = np.stack([[np.sum(row[:t] == row[t]) for t in range(T)] for row in ids_BT])
    targets_BT = np.where(np.roll(ids_BT, -1, 1) == ids_BT, np.roll(tokens_BT, -1, 1), 0)
    weight_BT = (ids_BT > 0) * rng.choice([1.0, 0.5], (2 * rows, T))
    arrays = (jnp.asarray(x, jnp.int32) for x in (tokens_BT, targets_BT, ids_BT, positions_BT))
    tokens, targets, ids, positions = arrays
    return Batch(tokens, targets, jnp.asarray(weight_BT, jnp.float32), Documents(ids, positions))


def random_model(cfg: DecoderConfig) -> Decoder:
    graph, state = nnx.split(Decoder(cfg, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, noisy))


def by_the_paper(model: Decoder, hidden_TD: np.ndarray, tokens_T: np.ndarray, ids_T: np.ndarray) -> list[np.ndarray]:
    """Equations (21) to (23), for a layer of plain attention and a dense feed-forward: hidden states, float64."""
    weights = {"/".join(map(str, p)): np.asarray(x[...], np.float64) for p, x in nnx.to_flat_state(nnx.state(model))}

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        half = len(x) // 2
        angles = position * 10_000.0 ** (-np.arange(half) / half)
        a, b = x[:half], x[half:]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)])

    found = []
    for n in range(2):
        w = {name.removeprefix("multi_token/"): x[n] for name, x in weights.items() if name.startswith("multi_token/")}
        next_T = np.append(tokens_T[n + 1 :], np.zeros(n + 1, int))
        embedded = norm(weights["embedding"][next_T], w["embedding_norm/scale"])
        x_TD = np.concatenate([embedded, norm(hidden_TD, w["hidden_norm/scale"])], axis=1) @ w["w_join"].reshape(
            2 * D, D
        )
        h = norm(x_TD, w["block/attention_norm/scale"])
        q, k, v = (np.einsum("td,dkh->tkh", h, w[f"block/attention/w_{c}"].reshape(D, 2, 4)) for c in "qkv")
        for t in range(len(tokens_T)):
            seen = [s for s in range(t + 1) if ids_T[s] == ids_T[t]]
            for head in range(2):
                scores = np.array([rotate(q[t, head], t) @ rotate(k[s, head], s) for s in seen]) / 2.0
                p = np.exp(scores - scores.max())
                x_TD[t] += (p / p.sum()) @ v[seen, head] @ w["block/attention/w_out"].reshape(2, 4, D)[head]
        h = norm(x_TD, w["block/ffn_norm/scale"])
        gate, up = h @ w["block/ffn/w_gate"], h @ w["block/ffn/w_up"]
        x_TD = x_TD + (gate / (1 + np.exp(-gate)) * up) @ w["block/ffn/w_down"]
        hidden_TD = norm(x_TD, w["final_norm/scale"])
        found.append(hidden_TD)
    return found


def test_hidden_states_and_loss_are_the_papers() -> None:
    model, b = random_model(PLAIN), batch()
    out = model(b.tokens_BT, b.documents)
    further, stats = model.further_hidden(out, b.tokens_BT, b.documents)
    assert stats is None
    want_loss, w_DV = 0.0, np.asarray(model.w_logits[...], np.float64)
    for row in range(2):
        arrays = (np.asarray(x[row]) for x in (out.hidden_BTD, b.tokens_BT, b.documents.ids_BT))
        hidden, tokens, ids = arrays
        for n, want in enumerate(by_the_paper(model, hidden.astype(np.float64), tokens, ids)):
            for t in range(T - n - 1):
                if ids[t + n + 1] != ids[t] or ids[t] == 0:
                    continue
                # float32 sums of at most 20 terms near 1
                np.testing.assert_allclose(further[n][row, t], want[t], atol=5e-5)
                logits = want[t] @ w_DV
                loss = np.log(np.exp(logits).sum()) - logits[int(b.targets_BT[row, t + n + 1])]
                want_loss += loss * float(b.loss_weight_BT[row, t + n + 1])
    total = jnp.sum(b.loss_weight_BT)
    loss, report = next_token_loss(model, b, jax.random.key(0), total)
    assert float(report.metrics["loss/multi_token"]) == pytest.approx(0.5 * want_loss / 2 / float(total), rel=1e-5)
    assert float(loss) == pytest.approx(float(report.metrics["loss"] + report.metrics["loss/multi_token"]), rel=1e-6)


def test_no_other_document_and_no_future_is_seen() -> None:
    """What a module says of a position does not change with tokens beyond the one that it is given."""
    model, b = random_model(PLAIN), batch()

    def say(tokens_BT: Any) -> list[Any]:
        return model.further_hidden(model(tokens_BT, b.documents), tokens_BT, b.documents)[0]

    base, t = say(b.tokens_BT), 3
    for n, by in ((0, 1), (1, 2)):
        later = b.tokens_BT.at[0, t + by + 1 :].add(1)
        np.testing.assert_array_equal(say(later)[n][0, : t + 1], base[n][0, : t + 1])
        sooner = b.tokens_BT.at[0, t + by].add(1)
        assert np.abs(say(sooner)[n][0, t] - base[n][0, t]).max() > 1e-3
    other = b.tokens_BT.at[0, :6].add(1)  # the first document
    np.testing.assert_array_equal(say(other)[0][0, 6:], base[0][0, 6:])


def test_shifting_by_hand() -> None:
    x = jnp.asarray([[1, 1, 2, 2, 0]])
    assert shifted(x, 2).tolist() == [[2, 2, 0, 0, 0]]
    assert shifted(x, 9).tolist() == [[0] * 5]
    assert ahead(x, 1).tolist() == [[True, False, True, False, False]]


@pytest.mark.parametrize("cfg", [PLAIN, EXPERTS])
def test_counts(cfg: DecoderConfig) -> None:
    model, without = Decoder(cfg, rngs=nnx.Rngs(0)), dataclasses.replace(cfg, multi_token=None)
    assert cfg.num_params() == sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert cfg.num_active_params() == without.num_active_params()
    assert cfg.flops_per_token(T, training=False) == without.flops_per_token(T, training=False)
    assert cfg.flops_per_token(T) > without.flops_per_token(T)
    graph = nnx.split(model)[0], nnx.split(Decoder(without, rngs=nnx.Rngs(0)))[0]
    assert graph[0] != graph[1]


@pytest.mark.parametrize(
    "mesh",
    [{"data": 2, "expert": 2, "tensor": 2}, pytest.param({"fsdp": 4, "context": 2}, marks=pytest.mark.slow)],
)
def test_a_step_on_eight_devices_is_as_on_one(mesh: dict[str, int]) -> None:
    """Loss, weights and the selection biases of all routers, the module's among them."""
    results = []
    for devices in (MeshConfig(data=1), MeshConfig(**mesh)):
        count = 1 if devices == MeshConfig(data=1) else 8
        made = make_mesh(devices, jax.devices()[:count])
        compute = ComputeConfig(remat="full" if count == 8 else "none")
        trainer = make_trainer(
            lambda rngs, c=compute: Decoder(EXPERTS, c, rngs=rngs), OptimConfig(warmup_steps=0), made
        )
        state, metrics = trainer.init(0), {}
        for seed in range(3):
            state, metrics = trainer.step(state, batch(seed, rows=4), 100)
        results.append(
            (jax.tree.map(np.asarray, (state.params, state.buffers)), {k: float(v) for k, v in metrics.items()})
        )
    (one, one_metrics), (many, many_metrics) = results
    assert one_metrics["loss/multi_token"] > 0
    assert one_metrics["loss/multi_token_sequence_balance"] > 0
    assert "router/multi_token/max_over_mean_load" in one_metrics
    for name in ("loss", "loss/multi_token", "router/multi_token/load_entropy"):
        assert many_metrics[name] == pytest.approx(one_metrics[name], rel=1e-5)
    biases = one[1]["multi_token"]["block"]["ffn"]["selection_bias"]
    assert np.abs(biases).max() > 0.09  # three steps of 0.1, one way or the other
    # Adam's first steps divide by the gradient's own size: where that is nothing but rounding, signs may differ.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-3), one, many)


def test_training_learns_to_say_more_than_the_next_token() -> None:
    """Rows that count up: after some steps the token behind the next one is known."""
    tokens = (np.arange(T) + np.arange(8)[:, None] * 3) % (V - 1) + 1
    ids = jnp.ones((8, T), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (8, T))
    targets = jnp.asarray(tokens % (V - 1) + 1, jnp.int32)
    b = Batch(jnp.asarray(tokens, jnp.int32), targets, jnp.ones((8, T)), Documents(ids, positions))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    trainer = make_trainer(lambda rngs: Decoder(PLAIN, rngs=rngs), OptimConfig(lr=0.02, warmup_steps=5), mesh)
    state, first = trainer.init(0), None
    for _ in range(60):
        state, metrics = trainer.step(state, b, 60)
        first = first or float(metrics["loss/multi_token"])
    assert float(metrics["loss/multi_token"]) < 0.2 * first
