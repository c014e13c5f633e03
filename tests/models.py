"""Small models with every part switched on, whose weights are all random (zero-initialised parts would hide)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.history import CopyConfig, NgramConfig
from dsjax.nn.masks import Documents
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from pallas_kernels.platforms import compiled_for

ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True, conv_taps=3)
V = 32

DENSE = DecoderConfig(
    vocab_size=V,
    d_model=16,
    num_layers=2,
    groups=(LayerGroup(MLPConfig(d_ff=24), ATTENTION),),
)
EVERYTHING = DecoderConfig(
    vocab_size=V,
    d_model=16,
    num_layers=3,
    groups=(
        LayerGroup(MLPConfig(d_ff=24), ATTENTION, num_layers=1),
        LayerGroup(
            MoEConfig(num_experts=4, top_k=2, d_ff=8, num_shared_experts=1, bias_update_rate=0.01),
            dataclasses.replace(ATTENTION, window=5),
        ),
    ),
    ngram=NgramConfig(sizes=(2, 3), num_buckets=40, d_table=4),
    copy=CopyConfig(max_match=3),
)
CONFIGS = {"dense": DENSE, "tied": dataclasses.replace(DENSE, tied=True), "everything": EVERYTHING}


def weights(cfg: DecoderConfig, seed: int = 0) -> Any:
    """Random values in the shape of the model's parameters and buffers, near their usual size."""
    return jax.tree.map(lambda x: x, _weights(cfg, seed))  # dicts of the caller's own


@functools.cache
def _weights(cfg: DecoderConfig, seed: int) -> Any:
    state = nnx.to_pure_dict(nnx.split(Decoder(cfg, rngs=nnx.Rngs(seed)))[1])
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state)


@functools.cache
def graph(cfg: DecoderConfig, **compute: Any) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Decoder(cfg, ComputeConfig(**compute), rngs=nnx.Rngs(0))))[0]


def logits(cfg: DecoderConfig, params: Any, tokens_BT: np.ndarray, documents: Documents | None = None, **compute: Any):
    """Logits of whole rows, jitted."""
    with compiled_for("cpu"):
        return np.asarray(_logits(graph(cfg, **compute), params, jnp.asarray(tokens_BT, jnp.int32), documents))


@functools.partial(jax.jit, static_argnums=0)
def _logits(definition: Any, params: Any, tokens_BT: jax.Array, documents: Documents | None) -> jax.Array:
    model = nnx.merge(definition, params)
    return model.logits(model(tokens_BT, documents))


def random_tokens(B: int, T: int, seed: int = 0, ids: int = 6) -> np.ndarray:
    """Few distinct tokens, so that n-grams and matches recur."""
    return np.random.default_rng(seed).integers(1, ids, (B, T)).astype(np.int32)
