"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one narrow latent.

A position's keys and values of all heads are two linear maps of its latent c (R channels), beside one rotary key that
all heads share. Two forms of the same thing:

- naive: keys and values are written out, by head. What whole rows do, in training and in prefill.
- absorbed: the maps move to the other side of the products, q (W c) = (q W) c. Then all heads attend to one key, the
  latent and the rotary key side by side, whose first R channels are its value; and that is all that a cache keeps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import PositiveFloat, PositiveInt, UserError
from dsjax.nn.cache import LayerCache, Made
from dsjax.nn.cached_attention import all_kept, cached_attention, to_keep
from dsjax.nn.indexed_attention import indexed_cached_attention, indexed_row_attention
from dsjax.nn.indexer import Index, Indexer, IndexerConfig, mean_divergence
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
        indexer: chooses the positions that a query sees (DeepSeek-V3.2); none: all of its document.
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
    indexer: IndexerConfig | None = None

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
        if self.indexer is not None:
            self._validate_indexer(self.indexer)

    def _validate_indexer(self, indexer: IndexerConfig) -> None:
        for name, value in (("window", self.window), ("segmented", self.segmented)):
            if value is not None:
                raise UserError(f"{name} is {value}; it must be none beside indexer, which chooses among all positions")
        if self.q_rank is None:
            raise UserError("q_rank is none; an indexer makes its queries of the queries' latent")
        if indexer.head_dim < self.rope_dim:
            raise UserError(f"indexer.head_dim is {indexer.head_dim}; it must be at least rope_dim, {self.rope_dim}")

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
        """Of a key and of a value in a cache: a key begins with its value here, and an index key stands for that."""
        return self.kv_rank + self.rope_dim, 0 if self.indexer is None else self.indexer.head_dim

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
        if self.indexer is not None:
            down += self.indexer.product_channels
        return down + N * (2 * self.nope_dim + self.rope_dim + 2 * self.v_dim)

    def num_matmul_params(self, d_model: int) -> int:
        D, N, R, Q = d_model, self.num_heads, self.kv_rank, self.q_rank
        heads = N * (self.nope_dim + self.rope_dim)
        queries = D * heads if Q is None else Q * (D + heads)
        if self.indexer is not None and Q is not None:
            queries += self.indexer.num_matmul_params(D, Q)
        return queries + D * (R + self.rope_dim) + R * N * (self.nope_dim + self.v_dim) + N * self.v_dim * D

    def num_params(self, d_model: int) -> int:
        vectors = self.kv_rank + (self.q_rank or 0) + (2 * self.indexer.head_dim if self.indexer is not None else 0)
        return self.num_matmul_params(d_model) + vectors

    def visible_pairs(self, length: int, layer: int = 0) -> float:
        """Pairs of a query and a position that it attends to, of a document of ``length``."""
        if self.indexer is None or self.indexer.warm_up:
            return super().visible_pairs(length, layer)
        return dataclasses.replace(self, indexer=None, window=self.indexer.top_k).visible_pairs(length)

    def pair_products(self, length: int, layer: int = 0, *, cached: bool = False) -> float:
        """Channels of all products of pairs: of the attention's, and of all that the indexer scores."""
        scored = 0 if self.indexer is None else self.indexer.pair_channels * length * (length + 1) // 2
        return super().pair_products(length, layer, cached=cached) + scored

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
        if cfg.indexer is not None and Q is not None:
            self.indexer = Indexer(cfg.indexer, D, Q, rngs=rngs)

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
    ) -> tuple[Float[Array, "B T D"], Made | Float[Array, ""] | None]:
        """The layer's output, and what a cache must keep of these T positions; without a cache the indexer's loss.

        Arguments and results are those of :class:`dsjax.nn.attention.Attention`; the cache has one key/value head.
        """
        del positions_BT  # the rotary table has them
        cfg, mask = self.cfg, self.cfg.mask(layer)
        x_BTQ = x_BTD if cfg.q_rank is None else self.q_norm(project(x_BTD, self.w_q_down[...]))
        q_BTNH = project(x_BTQ, self.w_q[...] if cfg.q_rank is None else self.w_q_up[...])
        q_BTNC, q_BTNr = jnp.split(q_BTNH, [cfg.nope_dim], axis=-1)
        q_BTNr = apply_rope(q_BTNr, rope)
        latent_BTR, k_BTr = jnp.split(project(x_BTD, self.w_kv_down[...]), [cfg.kv_rank], axis=-1)
        latent_BTR, k_BTr = self.kv_norm(latent_BTR), apply_rope(k_BTr, rope)
        index = None if cfg.indexer is None else self.indexer(x_BTD, x_BTQ, rope)
        made: Made | Float[Array, ""] | None = None
        if cache is None or lengths_B is None:
            out_BTNU, made = self._naive(q_BTNC, q_BTNr, latent_BTR, k_BTr, index, documents, mask)
        else:
            out_BTNU = self._absorbed(q_BTNC, q_BTNr, latent_BTR, k_BTr, index, cache, lengths_B, mask)
        if cache is not None:
            kept_BT1H = jnp.concatenate([latent_BTR, k_BTr], axis=-1)[:, :, None]
            index_BT1d = kept_BT1H[..., :0] if index is None else index.k_BTd[:, :, None]
            if lengths_B is None:
                made = all_kept(kept_BT1H, index_BT1d, cache, cache.state, documents.ids_BT, mask)
            else:
                made = Made(
                    to_keep(kept_BT1H, cache.pages.k_LMKPH), to_keep(index_BT1d, cache.pages.v_LMKPH), cache.state
                )
        return project(out_BTNU, self.w_out[...], num_inputs=2), made

    @property
    def _scale(self) -> float:
        cfg = self.cfg
        sharpness = 1.0 if cfg.rope_scaling is None else cfg.rope_scaling.sharpness
        return (cfg.nope_dim + cfg.rope_dim) ** -0.5 * sharpness

    def _naive(self, q_BTNC, q_BTNr, latent_BTR, k_BTr, index: Index | None, documents, mask):
        """Each head with its own keys and values; and the indexer's loss."""
        k_BTNC, v_BTNU = project(latent_BTR, self.w_k_up[...]), project(latent_BTR, self.w_v_up[...])
        k_BTNr = jnp.broadcast_to(k_BTr[:, :, None], q_BTNr.shape)
        q_BTNH, k_BTNH = (jnp.concatenate(parts, axis=-1) for parts in ((q_BTNC, q_BTNr), (k_BTNC, k_BTNr)))
        if index is not None:
            out_BTNU, divergence_BT = indexed_row_attention(
                q_BTNH, k_BTNH, v_BTNU, index, documents, self.indexer.cfg, scale=self._scale
            )
            return out_BTNU, mean_divergence(divergence_BT, documents.ids_BT > 0)
        q_BTN1H, heads = q_BTNH[:, :, :, None], ("heads", None)
        out_BTN1U = row_attention(q_BTN1H, k_BTNH, v_BTNU, documents, mask, scale=self._scale, heads=heads)
        return out_BTN1U[:, :, :, 0], None

    def _absorbed(self, q_BTNC, q_BTNr, latent_BTR, k_BTr, index: Index | None, cache, lengths_B, mask):
        """All heads with one key and one value, the latent."""
        dtype = q_BTNC.dtype
        q_BTNR = jnp.einsum("BTNC,RNC->BTNR", q_BTNC, self.w_k_up[...].astype(dtype))
        q_BTNH, k_BTH = (jnp.concatenate(parts, axis=-1) for parts in ((q_BTNR, q_BTNr), (latent_BTR, k_BTr)))
        if index is not None and self._chooses(cache):
            run = functools.partial(indexed_cached_attention, scale=self._scale, value_width=self.cfg.kv_rank)
            out_BTNR = run(q_BTNH, k_BTH, index, cache, lengths_B, self.indexer.cfg)
        else:
            without = dataclasses.replace(cache.pages, v_LMKPH=cache.pages.v_LMKPH[..., :0])  # they are no values
            parts = (q_BTNH[:, :, None], k_BTH[:, :, None], latent_BTR[:, :, None])
            cache = dataclasses.replace(cache, pages=without)
            out_BTNR = cached_attention(*parts, cache, lengths_B, mask, scale=self._scale)[:, :, 0]
        out_BTNR = shard(out_BTNR, "batch", None, "heads", None)
        return jnp.einsum("BTNR,RNU->BTNU", out_BTNR, self.w_v_up[...].astype(dtype))

    def _chooses(self, cache: LayerCache) -> bool:
        """Whether a row can have more positions than the indexer takes."""
        indexer = self.cfg.indexer
        return indexer is not None and not indexer.warm_up and (cache.slots is None or cache.slots > indexer.top_k)


def indexer_loss(attentions: Sequence[Any], made: Sequence[Any]) -> dict[str, Float[Array, ""]]:
    """What a model's indexers learn by, weighted: a mean over the layers that have one; nothing if none has.

    Args:
        attentions: the config of each group of layers.
        made: what the layers of each group made of whole rows, without a cache.
    """
    weighted, layers = jnp.float32(0), 0
    for attention, loss_L in zip(attentions, made, strict=True):
        if isinstance(attention, LatentAttentionConfig) and attention.indexer is not None:
            weighted, layers = weighted + attention.indexer.loss_coef * jnp.sum(loss_L), layers + len(loss_L)
    return {"indexer": weighted / layers} if layers else {}


def only_indexers_learn(attentions: Sequence[Any]) -> bool:
    """Whether a model's indexers are in the first stage of their training, in which nothing else learns."""
    return any(isinstance(a, LatentAttentionConfig) and a.indexer is not None and a.indexer.warm_up for a in attentions)
