"""Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import PositiveFloat, PositiveInt, UserError
from dsjax.nn.cache import LayerCache
from dsjax.nn.masks import Documents
from dsjax.nn.norm import rms_normalize
from dsjax.nn.rope import apply_rope
from dsjax.sharding import map_shards, param
from pallas_kernels.causal_attention import causal_attention


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal grouped-query attention.

    Attributes:
        num_heads: query heads N.
        num_kv_heads: key/value heads K; each serves N / K query heads.
        head_dim: width of a head, even.
        rope_theta: base of the rotary frequencies.
        qk_norm: normalise queries and keys by their root mean square (no learned scale).
        window: a query sees this many last positions; none: all of its document.
    """

    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: PositiveInt = 64
    rope_theta: PositiveFloat = 10_000.0
    qk_norm: bool = False
    window: PositiveInt | None = None

    def validate(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; it must be even (rotary pairs)")

    def num_params(self, d_model: int) -> int:
        return d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    def visible_positions(self, seq_len: int) -> float:
        """Mean number of positions that a query of a full-length document sees."""
        w = min(self.window or seq_len, seq_len)
        return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


class Attention(nnx.Module):
    """Queries, keys and values of one key/value head lie side by side in one fused weight.

    ``w_qkv`` is (D, K, G + 2, H): for each key/value head its G query heads, then key, then value. So the
    projection is a single matmul and still splits over ``tensor`` by key/value heads.
    """

    def __init__(self, cfg: AttentionConfig, d_model: int, *, rngs: nnx.Rngs):
        D, K, G, H = d_model, cfg.num_kv_heads, cfg.num_heads // cfg.num_kv_heads, cfg.head_dim
        self.cfg = cfg
        self.w_qkv = param(rngs, (D, K, G + 2, H), ("embed", "kv_heads", "heads_per_kv", "head_dim"), fan_in=D)
        self.w_out = param(rngs, (K, G, H, D), ("kv_heads", "heads_per_kv", "head_dim", "embed"), fan_in=K * G * H)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        documents: Documents,
        rope: tuple[Float[Array, "B T h"], ...],
        cache: LayerCache | None = None,
        lengths_B: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        qkv_BTKCH = jnp.einsum("BTD,DKCH->BTKCH", x_BTD, self.w_qkv[...].astype(x_BTD.dtype))
        G = qkv_BTKCH.shape[3] - 2
        q_BTKGH, k_BTKH, v_BTKH = qkv_BTKCH[..., :G, :], qkv_BTKCH[..., G, :], qkv_BTKCH[..., G + 1, :]
        if self.cfg.qk_norm:
            q_BTKGH, k_BTKH = rms_normalize(q_BTKGH, 1e-6), rms_normalize(k_BTKH, 1e-6)
        q_BTKGH, k_BTKH = apply_rope(q_BTKGH, rope), apply_rope(k_BTKH, rope)
        if cache is None:
            out_BTKGH = self._train(q_BTKGH, k_BTKH, v_BTKH, documents)
        else:
            assert lengths_B is not None
            cache = cache.append(k_BTKH, v_BTKH, lengths_B)
            out_BTKGH = cached_attention(q_BTKGH, cache, lengths_B, self.cfg.window)
        return jnp.einsum("BTKGH,KGHD->BTD", out_BTKGH, self.w_out[...].astype(x_BTD.dtype)), cache

    def _train(self, q_BTKGH, k_BTKH, v_BTKH, documents: Documents):
        """Whole rows at once; each device attends for its own rows and heads, over the keys of the whole row."""

        def attend(q_bTkGH, k_bTkH, v_bTkH, ids_bT):
            b, T, k, G, H = q_bTkGH.shape
            q_bTnH = q_bTkGH.reshape(b, T, k * G, H)
            return causal_attention(q_bTnH, k_bTkH, v_bTkH, ids_bT, self.cfg.window).reshape(b, T, k, G, H)

        q, kv = ("batch", None, "kv_heads", None, None), ("batch", None, "kv_heads", None)
        return map_shards(attend, (q, kv, kv, ("batch", None)), q)(q_BTKGH, k_BTKH, v_BTKH, documents.ids_BT)


def cached_attention(
    q_BTKGH: Float[Array, "B T K G H"],
    cache: LayerCache,
    lengths_B: Int[Array, "B"],
    window: int | None,
) -> Float[Array, "B T K G H"]:
    """New queries against the slots of a cache: query t of a row sees slots up to ``lengths_B + t``."""
    S, T, H = cache.k_BSKH.shape[1], q_BTKGH.shape[1], q_BTKGH.shape[-1]
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, cache.k_BSKH.astype(q_BTKGH.dtype)).astype(jnp.float32)
    position_BT = lengths_B[:, None] + jnp.arange(T)
    sees_BTS = jnp.arange(S) <= position_BT[..., None]
    if window is not None:
        sees_BTS &= jnp.arange(S) > position_BT[..., None] - window
    probs_BKGTS = jax.nn.softmax(jnp.where(sees_BTS[:, None, None], scores_BKGTS * H**-0.5, -jnp.inf), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS.astype(q_BTKGH.dtype), cache.v_BSKH.astype(q_BTKGH.dtype))
