"""Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeInt, PositiveFloat, PositiveInt, UserError
from dsjax.nn.cache import LayerCache, Made
from dsjax.nn.cached_attention import all_kept, cached_attention, to_keep, with_new_tails
from dsjax.nn.history import ShortConv
from dsjax.nn.linear import project
from dsjax.nn.masks import AttentionMask, Documents, Segmented, chooses
from dsjax.nn.norm import RMSNorm
from dsjax.nn.rope import RopeScaling, apply_rope
from dsjax.nn.row_attention import row_attention
from dsjax.nn.visibility import Visibility
from dsjax.sharding import param


@dataclasses.dataclass(frozen=True)
class AttentionConfig(Visibility):
    """Causal grouped-query attention.

    Attributes:
        num_heads: query heads N.
        num_kv_heads: key/value heads K; each serves N / K query heads.
        head_dim: width of a head, even.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched to longer contexts, or none.
        qkv_bias: a bias on queries, keys and values (Qwen2).
        qk_norm: RMSNorm of queries and keys over the head.
        window: a query sees this many last positions; none: all of its document.
        conv_taps: positions that a short convolution on the layer's input spans; 0: no convolution.
        segmented: a query sees its own segment and the tails of the earlier ones; none: all of its document.
        scope_heads: key/value heads, the first ones, in which a query sees only what stands in blocks that are still
            open, and its own statement (:class:`dsjax.nn.structure.Scopes`); of a model with ``structure``.
    """

    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: PositiveInt = 64
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    window: PositiveInt | None = None
    conv_taps: NonNegativeInt = 0
    segmented: Segmented | None = None
    scope_heads: NonNegativeInt = 0

    def validate(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; it must be even (rotary pairs)")
        if self.segmented is not None and self.window is not None:
            raise UserError(f"window is {self.window}; it must be none beside segmented, which has its own")
        if self.scope_heads > self.num_kv_heads:
            raise UserError(f"scope_heads is {self.scope_heads}; it must be at most num_kv_heads, {self.num_kv_heads}")
        if self.scope_heads and self.segmented is not None:
            raise UserError(f"scope_heads is {self.scope_heads}; it must be 0 beside segmented")

    def num_params(self, d_model: int) -> int:
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.qkv_bias
        return self.num_matmul_params(d_model) + 2 * self.head_dim * self.qk_norm + self.conv_taps * d_model + biases

    def num_matmul_params(self, d_model: int) -> int:
        return d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    @property
    def num_cached_heads(self) -> int:
        return self.num_kv_heads

    @property
    def rope_width(self) -> int:
        return self.head_dim

    @property
    def inference_heads(self) -> tuple[int, int]:
        """Key/value heads of a cache, and query heads that share one."""
        return self.num_kv_heads, self.num_heads // self.num_kv_heads

    @property
    def training_heads(self) -> int:
        """Heads that can be cut apart in training."""
        return self.num_kv_heads

    @property
    def cached_widths(self) -> tuple[int, int]:
        """Of a key and of a value in a cache."""
        return self.head_dim, self.head_dim

    @property
    def pair_channels(self) -> int:
        """Channels of all heads' products with a key and with a value, for each visible pair."""
        return 2 * self.num_heads * self.head_dim

    @property
    def cached_pair_channels(self) -> int:
        """The same with what a cache holds."""
        return self.pair_channels

    @property
    def product_channels(self) -> int:
        """Channels that the products with weights make of a position, the output apart."""
        return (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def make(self, d_model: int, *, out_scale: float, rngs: nnx.Rngs) -> nnx.Module:
        return Attention(self, d_model, out_scale=out_scale, rngs=rngs)


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
        if cfg.qkv_bias:
            self.b_q = param(rngs, (K, G, H), ("kv_heads", "heads_per_kv", "head_dim"), value=0.0)
            self.b_k = param(rngs, (K, H), ("kv_heads", "head_dim"), value=0.0)
            self.b_v = param(rngs, (K, H), ("kv_heads", "head_dim"), value=0.0)
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
        layer: int = 0,
    ) -> tuple[Float[Array, "B T D"], Made | None]:
        """The layer's output, and what a cache must keep of these T positions.

        Args:
            x_BTD: input.
            documents: which document each position belongs to.
            positions_BT: place of each position in its document.
            rope: table of :func:`dsjax.nn.rope.rope_angles`.
            cache: of this layer, which is only read; None: nothing is to be kept.
            lengths_B: positions that the cache holds; None: none yet, and these are all that a query sees.
            layer: number of the layer in the model, as far as it says what a query sees.

        Returns:
            The output, and (None without a cache) what :func:`dsjax.nn.cache.written` takes.
        """
        mask, state = self.cfg.mask(layer), None if cache is None else cache.state
        if self.cfg.conv_taps:
            before_BCD, raw_BTD = None if state is None else state.conv_BCD, x_BTD
            x_BTD = self.conv(raw_BTD, positions_BT, before_BCD)
            if state is not None:
                last_BCD = last_inputs(state.conv_BCD, raw_BTD, jnp.sum(documents.ids_BT > 0, axis=1))
                state = dataclasses.replace(state, conv_BCD=last_BCD)
        q_BTKGH, k_BTKH, v_BTKH = (project(x_BTD, w[...]) for w in (self.w_q, self.w_k, self.w_v))
        if self.cfg.qkv_bias:
            biases = (b[...].astype(x_BTD.dtype) for b in (self.b_q, self.b_k, self.b_v))
            q_BTKGH, k_BTKH, v_BTKH = (x + b for x, b in zip((q_BTKGH, k_BTKH, v_BTKH), biases, strict=True))
        if self.cfg.qk_norm:
            q_BTKGH, k_BTKH = self.q_norm(q_BTKGH), self.k_norm(k_BTKH)
        q_BTKGH, k_BTKH = apply_rope(q_BTKGH, rope), apply_rope(k_BTKH, rope)
        if cache is None or state is None:
            out_BTKGH, new = self._whole_rows(q_BTKGH, k_BTKH, v_BTKH, documents, mask), None
        elif lengths_B is None:
            out_BTKGH = self._whole_rows(q_BTKGH, k_BTKH, v_BTKH, documents, mask)
            new = all_kept(k_BTKH, v_BTKH, cache, state, documents.ids_BT, mask)
        else:
            if chooses(mask):
                sums_BJKH = with_new_tails(state.tail_sums_BJKH, k_BTKH, documents.ids_BT, lengths_B, mask)
                state = dataclasses.replace(state, tail_sums_BJKH=sums_BJKH)
            cache = dataclasses.replace(cache, state=state)
            closes_BSK = self._closes(documents)
            out_BTKGH = cached_attention(q_BTKGH, k_BTKH, v_BTKH, cache, lengths_B, mask, closes_BSK=closes_BSK)
            new = Made(to_keep(k_BTKH, cache.pages.k_LMKPH), to_keep(v_BTKH, cache.pages.v_LMKPH), state)
        return project(out_BTKGH, self.w_out[...], num_inputs=3), new

    def _whole_rows(self, q_BTKGH, k_BTKH, v_BTKH, documents: Documents, mask: AttentionMask):
        closes_BSK = self._closes(documents)  # in front of a cache's first positions: of all its slots
        closes_BTK = None if closes_BSK is None else closes_BSK[:, : q_BTKGH.shape[1]]
        return row_attention(q_BTKGH, k_BTKH, v_BTKH, documents, mask, closes_BTK=closes_BTK)

    def _closes(self, documents: Documents) -> Int[Array, "B S K"] | None:
        """The position from which on each head does not see a key any more; None: all see all."""
        if not self.cfg.scope_heads:
            return None
        is_scope_K = jnp.arange(self.cfg.num_kv_heads) < self.cfg.scope_heads
        return jnp.where(is_scope_K, documents.closes_BS[..., None], jnp.iinfo(jnp.int32).max)


def last_inputs(
    before_BCD: Float[Array, "B C D"], x_BTD: Float[Array, "B T D"], new_B: Int[Array, B]
) -> Float[Array, "B C D"]:
    """The last C inputs of each row when ``new_B`` of the T new ones count."""
    both = jnp.concatenate([before_BCD, x_BTD.astype(before_BCD.dtype)], axis=1)
    take = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, before_BCD.shape[1], axis=0))
    return take(both, new_B)
