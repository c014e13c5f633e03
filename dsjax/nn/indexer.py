"""The lightning indexer of DeepSeek-V3.2 (arXiv 2512.02556, section 2.1): which positions a query attends to.

A few small heads score every position before a query t, and the ``top_k`` best ones are what the attention sees:

    I(t, s) = sum over heads j of w(t, j) relu(q(t, j) · k(s))

It costs a product of ``num_heads * head_dim`` channels for each pair, little beside that of the attention, whose own
cost then grows with ``top_k`` and no longer with the length. A choice passes no gradient on: the indexer learns from a
loss of its own, to be like the attention (:func:`divergence`), and the rest of the model does not see that loss.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsjax.config import NonNegativeFloat, PositiveInt
from dsjax.nn.linear import project
from dsjax.nn.masks import Leaf
from dsjax.nn.rope import apply_rope
from dsjax.sharding import param


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """What chooses the positions that latent attention sees.

    Attributes:
        num_heads: heads h of the indexer.
        head_dim: width d of a head, and of the one key that they share; the first channels are rotary, as many as in
            the attention.
        top_k: positions that a query attends to; all, if there are no more.
        warm_up: the attention sees all positions, and the indexer learns from that, alone: the first stage of its
            training.
        loss_coef: weight of the indexer's loss.
    """

    num_heads: PositiveInt = 64
    head_dim: PositiveInt = 128
    top_k: PositiveInt = 2048
    warm_up: bool = False
    loss_coef: NonNegativeFloat = 1.0

    @property
    def pair_channels(self) -> int:
        """Channels of the products of a (query, key) pair: of each head with the key, and of their sum."""
        return self.num_heads * (self.head_dim + 1)

    @property
    def product_channels(self) -> int:
        """Channels that the products with weights make of a position."""
        return self.num_heads * (self.head_dim + 1) + self.head_dim

    def num_matmul_params(self, d_model: int, q_rank: int) -> int:
        return q_rank * self.num_heads * self.head_dim + d_model * (self.head_dim + self.num_heads)

    def num_params(self, d_model: int, q_rank: int) -> int:
        return self.num_matmul_params(d_model, q_rank) + 2 * self.head_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Index:
    """What the indexer makes of T positions.

    Attributes:
        q_BThd: queries of its heads.
        w_BTh: how much each of them counts, float32.
        k_BTd: the key that they share.
    """

    q_BThd: Leaf
    w_BTh: Leaf
    k_BTd: Leaf


class LayerNorm(nnx.Module):
    """Normalisation to mean 0 and variance 1 with a learned scale and bias (Ba et al. 2016); computed in float32."""

    def __init__(self, d: int, *, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, (d,), ("norm",), value=1.0)
        self.bias = param(rngs, (d,), ("norm",), value=0.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...] + self.bias[...]).astype(x.dtype)


class Indexer(nnx.Module):
    """Queries from the latent of the attention's queries; keys and the heads' weights from the layer's input.

    DeepSeek's own code turns queries and keys by a Hadamard matrix, which changes no product, and scores in 8 bits.
    Neither is done here.
    """

    def __init__(self, cfg: IndexerConfig, d_model: int, q_rank: int, *, rngs: nnx.Rngs):
        D, Q, h, d = d_model, q_rank, cfg.num_heads, cfg.head_dim
        self.cfg = cfg
        self.w_q = param(rngs, (Q, h, d), ("latent", "index_heads", "head_dim"), fan_in=Q)
        self.w_k = param(rngs, (D, d), ("embed", "head_dim"), fan_in=D)
        self.k_norm = LayerNorm(d, eps=1e-6, rngs=rngs)
        self.w_heads = param(rngs, (D, h), ("embed", "router"), fan_in=D)  # as routers, in float32

    def __call__(
        self, x_BTD: Float[Array, "B T D"], latent_BTQ: Float[Array, "B T Q"], rope: tuple[Float[Array, "B T r"], ...]
    ) -> Index:
        """Queries, weights and keys; none of them passes a gradient on to what it is made of."""
        x_BTD, latent_BTQ = map(jax.lax.stop_gradient, (x_BTD, latent_BTQ))
        h, d = self.cfg.num_heads, self.cfg.head_dim
        q_BThd = _rotated(project(latent_BTQ, self.w_q[...]), rope)
        k_BTd = _rotated(self.k_norm(project(x_BTD, self.w_k[...])), rope)
        w_BTh = jnp.einsum("BTD,Dh->BTh", x_BTD.astype(jnp.float32), self.w_heads[...], precision="highest")
        return Index(q_BThd, w_BTh * (h * d) ** -0.5, k_BTd)


def _rotated(x_BTXd: Float[Array, "B T ... d"], rope: tuple[Float[Array, "B T r"], ...]) -> Float[Array, "B T ... d"]:
    """The first channels by the angles of their positions."""
    rotary, rest = jnp.split(x_BTXd, [2 * rope[0].shape[-1]], axis=-1)
    return jnp.concatenate([apply_rope(rotary, rope), rest], axis=-1)


def index_scores(
    q_bqhd: Float[Array, "b q h d"], w_bqh: Float[Array, "b q h"], k_bSd: Float[Array, "b S d"]
) -> Float[Array, "b q S"]:
    """I(t, s), float32; the products of all heads exist for these queries together."""
    products_bhqS = jnp.einsum("bqhd,bSd->bhqS", q_bqhd, k_bSd, preferred_element_type=jnp.float32)
    return jnp.einsum("bhqS,bqh->bqS", jax.nn.relu(products_bhqS), w_bqh)


def ranked(scores: Float[Array, "... S"], visible: Bool[Array, "... S"]) -> Float[Array, "... S"]:
    """Scores to choose by: -inf where nothing is seen. Many are 0, and 0 has no sign: `top_k` would tell both apart."""
    return jnp.where(visible, jnp.where(scores == 0, 0, jax.lax.stop_gradient(scores)), -jnp.inf)


def chosen(ranked_S: Float[Array, "... S"], top_k: int) -> Bool[Array, "... S"]:
    """The ``top_k`` highest along the last axis, of equal ones the earliest; -inf is never chosen."""
    least = jax.lax.top_k(ranked_S, min(top_k, ranked_S.shape[-1]))[0][..., -1:]
    above_S, equal_S = ranked_S > least, ranked_S == least
    left = top_k - jnp.sum(above_S, axis=-1, keepdims=True)
    return (above_S | (equal_S & (jnp.cumsum(equal_S, axis=-1) <= left))) & (ranked_S > -jnp.inf)


def divergence(
    p_bqS: Float[Array, "b q S"], scores_bqS: Float[Array, "b q S"], seen_bqS: Bool[Array, "b q S"]
) -> Float[Array, "b q"]:
    """KL(p || softmax(I)) over the positions that a query sees, nats: what the indexer learns by.

    ``p``: the attention's weights, mean over its heads, without a gradient (equations 3 and 4 of the report).
    """
    p_bqS = jax.lax.stop_gradient(p_bqS)
    log_q_bqS = jax.nn.log_softmax(jnp.where(seen_bqS, scores_bqS, -jnp.inf), axis=-1)
    there = seen_bqS & (p_bqS > 0)
    ratio_bqS = jnp.log(jnp.where(there, p_bqS, 1)) - jnp.where(there, log_q_bqS, 0)
    return jnp.sum(p_bqS * ratio_bqS, axis=-1)


def mean_divergence(divergence_BT: Any, counted_BT: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over the positions that are no padding."""
    total = jnp.sum(jnp.where(counted_BT, divergence_BT, 0))
    return total / jnp.maximum(jnp.sum(counted_BT), 1)
