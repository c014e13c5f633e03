"""Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeInt, PositiveFloat, PositiveInt, UserError
from dsjax.nn.cache import LayerCache
from dsjax.nn.history import ShortConv
from dsjax.nn.linear import project
from dsjax.nn.masks import Documents
from dsjax.nn.norm import RMSNorm
from dsjax.nn.rope import apply_rope
from dsjax.sharding import map_shards, param, shard
from pallas_kernels.causal_attention import causal_attention


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal grouped-query attention.

    Attributes:
        num_heads: query heads N.
        num_kv_heads: key/value heads K; each serves N / K query heads.
        head_dim: width of a head, even.
        rope_theta: base of the rotary frequencies.
        qk_norm: RMSNorm of queries and keys over the head.
        window: a query sees this many last positions; none: all of its document.
        conv_taps: positions that a short convolution on the layer's input spans; 0: no convolution.
    """

    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: PositiveInt = 64
    rope_theta: PositiveFloat = 10_000.0
    qk_norm: bool = False
    window: PositiveInt | None = None
    conv_taps: NonNegativeInt = 0

    def validate(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; it must be even (rotary pairs)")

    def num_params(self, d_model: int) -> int:
        return self.num_matmul_params(d_model) + 2 * self.head_dim * self.qk_norm + self.conv_taps * d_model

    def num_matmul_params(self, d_model: int) -> int:
        return d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    def visible_positions(self, seq_len: int) -> float:
        """Mean number of positions that a query of a full-length document sees."""
        w = min(self.window or seq_len, seq_len)
        return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


class Attention(nnx.Module):
    """Grouped-query attention; query heads are stored by the key/value head that they share, (K, G)."""

    def __init__(self, cfg: AttentionConfig, d_model: int, *, out_scale: float = 1.0, rngs: nnx.Rngs):
        D, K, G, H = d_model, cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_dim
        self.cfg = cfg
        self.w_q = param(rngs, (D, K, G, H), ("embed", "kv_heads", "heads_per_kv", "head_dim"), fan_in=D)
        self.w_k = param(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
        self.w_v = param(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), fan_in=D)
        self.w_out = param(
            rngs, (K, G, H, D), ("kv_heads", "heads_per_kv", "head_dim", "embed"), fan_in=K * G * H, scale=out_scale
        )
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(H, eps=1e-6, rngs=rngs), RMSNorm(H, eps=1e-6, rngs=rngs)
        if cfg.conv_taps:
            self.conv = ShortConv(cfg.conv_taps, D, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        documents: Documents,
        positions_BT: Int[Array, "B T"],
        rope: tuple[Float[Array, "B T h"], ...],
        cache: LayerCache | None = None,
        lengths_B: Int[Array, B] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """The layer's output, and what a cache must keep of these T positions.

        Args:
            x_BTD: input.
            documents: which document each position belongs to.
            positions_BT: place of each position in its document.
            rope: table of :func:`dsjax.nn.rope.rope_angles`.
            cache: of this layer, which is only read; None: nothing is to be kept.
            lengths_B: slots that the cache holds; None: none yet, and these positions are all that a query sees.

        Returns:
            The output, and (None without a cache) their keys and values, for :func:`dsjax.nn.cache.written`.
        """
        new_conv_BCD = None
        if self.cfg.conv_taps:
            before_BCD, raw_BTD = None if cache is None else cache.conv_BCD, x_BTD
            x_BTD = self.conv(raw_BTD, positions_BT, before_BCD)
            if before_BCD is not None:
                new_conv_BCD = last_inputs(before_BCD, raw_BTD, jnp.sum(documents.ids_BT > 0, axis=1))
        q_BTKGH, k_BTKH, v_BTKH = (project(x_BTD, w[...]) for w in (self.w_q, self.w_k, self.w_v))
        if self.cfg.qk_norm:
            q_BTKGH, k_BTKH = self.q_norm(q_BTKGH), self.k_norm(k_BTKH)
        q_BTKGH, k_BTKH = apply_rope(q_BTKGH, rope), apply_rope(k_BTKH, rope)
        if cache is None or lengths_B is None:
            out_BTKGH = self._whole_rows(q_BTKGH, k_BTKH, v_BTKH, documents)
        else:
            out_BTKGH = cached_attention(q_BTKGH, k_BTKH, v_BTKH, cache, lengths_B, self.cfg.window)
        new = None
        if cache is not None:
            kept = cache.conv_BCD if new_conv_BCD is None else new_conv_BCD
            new = LayerCache(k_BTKH.astype(cache.k_BSKH.dtype), v_BTKH.astype(cache.v_BSKH.dtype), kept)
        return project(out_BTKGH, self.w_out[...], num_inputs=3), new

    def _whole_rows(self, q_BTKGH, k_BTKH, v_BTKH, documents: Documents):
        """Whole rows at once; each device attends for its own rows and heads, over the keys of the whole row."""

        def attend(q_bTkGH, k_bTkH, v_bTkH, ids_bT):
            b, T, k, G, H = q_bTkGH.shape
            q_bTnH = q_bTkGH.reshape(b, T, k * G, H)
            return causal_attention(q_bTnH, k_bTkH, v_bTkH, ids_bT, self.cfg.window).reshape(b, T, k, G, H)

        q, kv = ("batch", None, "kv_heads", "heads_per_kv", None), ("batch", None, "kv_heads", None)
        return map_shards(attend, (q, kv, kv, ("batch", None)), q)(q_BTKGH, k_BTKH, v_BTKH, documents.ids_BT)


def last_inputs(
    before_BCD: Float[Array, "B C D"], x_BTD: Float[Array, "B T D"], new_B: Int[Array, B]
) -> Float[Array, "B C D"]:
    """The last C inputs of each row when ``new_B`` of the T new ones count."""
    both = jnp.concatenate([before_BCD, x_BTD.astype(before_BCD.dtype)], axis=1)
    take = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, before_BCD.shape[1], axis=0))
    return take(both, new_B)


def cached_attention(
    q_BTKGH: Float[Array, "B T K G H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    cache: LayerCache,
    lengths_B: Int[Array, B],
    window: int | None,
) -> Float[Array, "B T K G H"]:
    """T new positions of each row against the ``lengths_B`` slots that its cache holds, and against each other.

    One softmax over both. On a mesh each device looks at its own slots, for all query heads of its key/value heads;
    what is exchanged are queries, and maxima, sums and outputs of the softmax.
    """
    S, T, H = cache.k_BSKH.shape[1], q_BTKGH.shape[1], q_BTKGH.shape[-1]
    q_BTKGH = shard(q_BTKGH, "batch", None, "kv_heads", None, None)
    k_BSKH, v_BSKH = cache.k_BSKH.astype(q_BTKGH.dtype), cache.v_BSKH.astype(q_BTKGH.dtype)
    position_BT1 = (lengths_B[:, None] + jnp.arange(T))[..., None]
    held_BTS = jnp.broadcast_to(jnp.arange(S) < lengths_B[:, None, None], (len(lengths_B), T, S))
    new_TT = jnp.arange(T) <= jnp.arange(T)[:, None]
    if window is not None:
        held_BTS &= jnp.arange(S) > position_BT1 - window
        new_TT &= jnp.arange(T) > jnp.arange(T)[:, None] - window

    def scores(k_BSKH, sees):
        scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH).astype(jnp.float32)
        return jnp.where(sees, scores_BKGTS * H**-0.5, -jnp.inf)

    held = shard(scores(k_BSKH, held_BTS[:, None, None]), "batch", "kv_heads", None, None, "slots")
    new = scores(k_BTKH, new_TT)
    top = jnp.maximum(jnp.max(held, axis=-1), jnp.max(new, axis=-1))[..., None]  # a position sees itself: finite
    held, new = jnp.exp(held - top), jnp.exp(new - top)
    total_BKGT = jnp.sum(held, axis=-1) + jnp.sum(new, axis=-1)

    def mean(p_BKGTS, v_BSKH):
        return jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS.astype(v_BSKH.dtype), v_BSKH).astype(jnp.float32)

    out_BTKGH = (mean(held, v_BSKH) + mean(new, v_BTKH)) / jnp.moveaxis(total_BKGT, 3, 1)[..., None]
    return out_BTKGH.astype(q_BTKGH.dtype)
