"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one narrow latent.

A position's keys and values of all heads are two linear maps of its latent c (R channels), beside one rotary key that
all heads share. Two forms of the same thing:

- naive: keys and values are written out, by head. What whole rows do, in training and in prefill.
- absorbed: the maps move to the other side of the products, q (W c) = (q W) c. Then all heads attend to one key, the
  latent and the rotary key side by side, whose first R channels are its value; and that is all that a cache keeps.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import PositiveFloat, PositiveInt, UserError
from dsjax.nn.cache import LayerCache, Made
from dsjax.nn.cached_attention import all_kept, cached_attention, to_keep
from dsjax.nn.linear import project
from dsjax.nn.masks import Documents, Segmented
from dsjax.nn.norm import RMSNorm
from dsjax.nn.rope import RopeScaling, apply_rope
from dsjax.nn.row_attention import row_attention
from dsjax.nn.visibility import Visibility
from dsjax.sharding import param, shard


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig(Visibility):
    """Causal multi-head latent attention.

    Attributes:
        num_heads: heads N.
        q_rank: width Q of the queries' latent; none: queries come from the input straight.
        kv_rank: width R of the keys' and values' latent.
        nope_dim: channels of a head's keys without positions.
        rope_dim: rotary channels of a head's queries, and of the key that all heads share; even.
        v_dim: channels of a head's values.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched to longer contexts, or none.
        window: a query sees this many last positions; none: all of its document.
        segmented: a query sees its own segment and the tails of the earlier ones; none: all of its document.
    """

    num_heads: PositiveInt = 16
    q_rank: PositiveInt | None = None
    kv_rank: PositiveInt = 512
    nope_dim: PositiveInt = 128
    rope_dim: PositiveInt = 64
    v_dim: PositiveInt = 128
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: PositiveInt | None = None
    segmented: Segmented | None = None

    conv_taps: ClassVar[int] = 0
    num_cached_heads: ClassVar[int] = 1

    def validate(self) -> None:
        if self.rope_dim % 2:
            raise UserError(f"rope_dim is {self.rope_dim}; it must be even (rotary pairs)")
        if self.segmented is not None and self.window is not None:
            raise UserError(f"window is {self.window}; it must be none beside segmented, which has its own")
        if self.segmented is not None and self.segmented.top_segments is not None:
            raise UserError(
                f"segmented.top_segments is {self.segmented.top_segments}; it must be none with latent attention, whose"
                " heads share what a cache could choose by"
            )

    @property
    def rope_width(self) -> int:
        return self.rope_dim

    @property
    def inference_heads(self) -> tuple[int, int]:
        """Key/value heads of a cache, and query heads that share one."""
        return 1, self.num_heads

    @property
    def training_heads(self) -> int:
        """Heads that can be cut apart in training."""
        return self.num_heads

    @property
    def cached_widths(self) -> tuple[int, int]:
        """Of a key and of a value in a cache: here a key begins with its value."""
        return self.kv_rank + self.rope_dim, 0

    @property
    def pair_channels(self) -> int:
        """Channels of all heads' products with a key and with a value, for each visible pair, written out."""
        return self.num_heads * (self.nope_dim + self.rope_dim + self.v_dim)

    @property
    def cached_pair_channels(self) -> int:
        """The same with what a cache holds."""
        return self.num_heads * (2 * self.kv_rank + self.rope_dim)

    @property
    def product_channels(self) -> int:
        """Channels that the products with weights make of a position, the output apart."""
        N, down = self.num_heads, self.kv_rank + self.rope_dim + (self.q_rank or 0)
        return down + N * (2 * self.nope_dim + self.rope_dim + 2 * self.v_dim)

    def num_matmul_params(self, d_model: int) -> int:
        D, N, R, Q = d_model, self.num_heads, self.kv_rank, self.q_rank
        heads = N * (self.nope_dim + self.rope_dim)
        queries = D * heads if Q is None else Q * (D + heads)
        return queries + D * (R + self.rope_dim) + R * N * (self.nope_dim + self.v_dim) + N * self.v_dim * D

    def num_params(self, d_model: int) -> int:
        return self.num_matmul_params(d_model) + self.kv_rank + (self.q_rank or 0)

    def make(self, d_model: int, *, out_scale: float, rngs: nnx.Rngs) -> nnx.Module:
        return LatentAttention(self, d_model, out_scale=out_scale, rngs=rngs)


class LatentAttention(nnx.Module):
    """Multi-head latent attention; the rotary channels of a query stand last."""

    def __init__(self, cfg: LatentAttentionConfig, d_model: int, *, out_scale: float = 1.0, rngs: nnx.Rngs):
        D, N, Q, R, C, U = d_model, cfg.num_heads, cfg.q_rank, cfg.kv_rank, cfg.nope_dim, cfg.v_dim
        self.cfg = cfg
        heads = ("latent", "heads", "head_dim")
        if Q is None:
            self.w_q = param(rngs, (D, N, C + cfg.rope_dim), ("embed", "heads", "head_dim"), fan_in=D)
        else:
            self.w_q_down = param(rngs, (D, Q), ("embed", "rank"), fan_in=D)
            self.q_norm = RMSNorm(Q, eps=1e-6, rngs=rngs)
            self.w_q_up = param(rngs, (Q, N, C + cfg.rope_dim), heads, fan_in=Q)
        self.w_kv_down = param(rngs, (D, R + cfg.rope_dim), ("embed", "rank"), fan_in=D)
        self.kv_norm = RMSNorm(R, eps=1e-6, rngs=rngs)
        self.w_k_up = param(rngs, (R, N, C), heads, fan_in=R)
        self.w_v_up = param(rngs, (R, N, U), heads, fan_in=R)
        self.w_out = param(rngs, (N, U, D), ("heads", "head_dim", "embed"), fan_in=N * U, scale=out_scale)

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

        Arguments and results are those of :class:`dsjax.nn.attention.Attention`; the cache has one key/value head.
        """
        del positions_BT  # the rotary table has them
        cfg, mask = self.cfg, self.cfg.mask(layer)
        q_BTNC, q_BTNr = self._queries(x_BTD, rope)
        latent_BTR, k_BTr = jnp.split(project(x_BTD, self.w_kv_down[...]), [cfg.kv_rank], axis=-1)
        latent_BTR, k_BTr = self.kv_norm(latent_BTR), apply_rope(k_BTr, rope)
        if cache is None or lengths_B is None:
            out_BTNU = self._naive(q_BTNC, q_BTNr, latent_BTR, k_BTr, documents, mask)
        else:
            out_BTNU = self._absorbed(q_BTNC, q_BTNr, latent_BTR, k_BTr, cache, lengths_B, mask)
        made = None
        if cache is not None:
            kept_BT1H = jnp.concatenate([latent_BTR, k_BTr], axis=-1)[:, :, None]
            none_BT10 = kept_BT1H[..., :0]
            if lengths_B is None:
                made = all_kept(kept_BT1H, none_BT10, cache, cache.state, documents.ids_BT, mask)
            else:
                made = Made(
                    to_keep(kept_BT1H, cache.pages.k_LMKPH), to_keep(none_BT10, cache.pages.v_LMKPH), cache.state
                )
        return project(out_BTNU, self.w_out[...], num_inputs=2), made

    def _queries(self, x_BTD, rope):
        """Without and with positions."""
        if self.cfg.q_rank is None:
            q_BTNH = project(x_BTD, self.w_q[...])
        else:
            q_BTNH = project(self.q_norm(project(x_BTD, self.w_q_down[...])), self.w_q_up[...])
        q_BTNC, q_BTNr = jnp.split(q_BTNH, [self.cfg.nope_dim], axis=-1)
        return q_BTNC, apply_rope(q_BTNr, rope)

    @property
    def _scale(self) -> float:
        cfg = self.cfg
        sharpness = 1.0 if cfg.rope_scaling is None else cfg.rope_scaling.sharpness
        return (cfg.nope_dim + cfg.rope_dim) ** -0.5 * sharpness

    def _naive(self, q_BTNC, q_BTNr, latent_BTR, k_BTr, documents, mask):
        """Each head with its own keys and values."""
        k_BTNC, v_BTNU = project(latent_BTR, self.w_k_up[...]), project(latent_BTR, self.w_v_up[...])
        k_BTNr = jnp.broadcast_to(k_BTr[:, :, None], q_BTNr.shape)
        q_BTNH, k_BTNH = (jnp.concatenate(parts, axis=-1) for parts in ((q_BTNC, q_BTNr), (k_BTNC, k_BTNr)))
        q_BTN1H, heads = q_BTNH[:, :, :, None], ("heads", None)
        return row_attention(q_BTN1H, k_BTNH, v_BTNU, documents, mask, scale=self._scale, heads=heads)[:, :, :, 0]

    def _absorbed(self, q_BTNC, q_BTNr, latent_BTR, k_BTr, cache, lengths_B, mask):
        """All heads with one key and one value, the latent."""
        dtype = q_BTNC.dtype
        q_BTNR = jnp.einsum("BTNC,RNC->BTNR", q_BTNC, self.w_k_up[...].astype(dtype))
        q_BT1NH = jnp.concatenate([q_BTNR, q_BTNr], axis=-1)[:, :, None]
        k_BT1H = jnp.concatenate([latent_BTR, k_BTr], axis=-1)[:, :, None]
        out_BT1NR = cached_attention(q_BT1NH, k_BT1H, latent_BTR[:, :, None], cache, lengths_B, mask, scale=self._scale)
        out_BTNR = shard(out_BT1NR[:, :, 0], "batch", None, "heads", None)
        return jnp.einsum("BTNR,RNU->BTNU", out_BTNR, self.w_v_up[...].astype(dtype))
