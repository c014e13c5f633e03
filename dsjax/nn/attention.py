"""Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeInt, PositiveFloat, PositiveInt, UserError
from dsjax.nn.cache import LayerCache, Made, RowState, filled, num_slots, num_tails, tail_sums
from dsjax.nn.cached_attention import cached_attention, chooses, with_new_tails
from dsjax.nn.history import ShortConv
from dsjax.nn.linear import project
from dsjax.nn.masks import AttentionMask, ByHead, Causal, Documents, Segmented, by_head, parts_of
from dsjax.nn.norm import RMSNorm
from dsjax.nn.rope import apply_rope
from dsjax.sharding import current_mesh, map_shards, param
from pallas_kernels.causal_attention import causal_attention
from pallas_kernels.segmented_attention import Segments, context_parallel_attention, segmented_attention


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
        segmented: a query sees its own segment and the tails of the earlier ones; none: all of its document.
    """

    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 4
    head_dim: PositiveInt = 64
    rope_theta: PositiveFloat = 10_000.0
    qk_norm: bool = False
    window: PositiveInt | None = None
    conv_taps: NonNegativeInt = 0
    segmented: Segmented | None = None

    def validate(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; it must be even (rotary pairs)")
        if self.segmented is not None and self.window is not None:
            raise UserError(f"window is {self.window}; it must be none beside segmented, which has its own")

    def num_params(self, d_model: int) -> int:
        return self.num_matmul_params(d_model) + 2 * self.head_dim * self.qk_norm + self.conv_taps * d_model

    def num_matmul_params(self, d_model: int) -> int:
        return d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    def masks(self) -> tuple[AttentionMask, ...]:
        """What the layers of a model see in turn: layer n what stands at n modulo the length."""
        return (Causal(self.window),) if self.segmented is None else self.segmented.layers(self.num_kv_heads)

    def mask(self, layer: int) -> AttentionMask:
        """What the model's layer of this number sees, from 0."""
        return self.masks()[layer % len(self.masks())]

    def visible_pairs(self, length: int, layer: int = 0) -> float:
        """(query, key) pairs of a document of ``length``, mean over heads; with ``top_segments``, at most that many."""
        if isinstance(mask := self.mask(layer), ByHead):
            return sum(_pairs(part, length) for part in mask.parts) / len(mask.parts)
        if isinstance(mask, Segments):
            return _pairs(mask, length)
        w = min(self.window or length, length)
        return w * (w + 1) // 2 + (length - w) * w

    def visible_positions(self, seq_len: int, layer: int = 0) -> float:
        """Mean number of positions that a query of a full-length document sees."""
        return self.visible_pairs(seq_len, layer) / seq_len

    def cache_size(self, length: int) -> tuple[int, int]:
        """What a layer keeps of ``length`` positions of a row: slots, and sums of tails."""
        slots = max(num_slots(mask, length) for mask in self.masks())
        parts = [part for mask in self.masks() if chooses(mask) for part in parts_of(mask)]
        return slots, max((max(num_tails(part, length), 1) for part in parts if isinstance(part, Segments)), default=0)


_pairs = functools.lru_cache(maxsize=1024)(Segments.visible_pairs)  # a search for a mesh asks again and again


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
            out_BTKGH = cached_attention(q_BTKGH, k_BTKH, v_BTKH, cache, lengths_B, mask)
            new = Made(to_keep(k_BTKH, cache), to_keep(v_BTKH, cache), state)
        return project(out_BTKGH, self.w_out[...], num_inputs=3), new

    def _whole_rows(self, q_BTKGH, k_BTKH, v_BTKH, documents: Documents, mask: AttentionMask):
        """Whole rows at once; each device attends for its own rows and heads, over the keys of the whole row.

        With segments, rows stay cut by positions as well: of other devices' keys only the tails come.
        """
        axes = whole_segments(mask, q_BTKGH.shape[1])

        def attend(mask, q_bTkGH, k_bTkH, v_bTkH, ids_bT):
            b, T, k, G, H = q_bTkGH.shape
            q_bTnH = q_bTkGH.reshape(b, T, k * G, H)
            if not isinstance(mask, Segments):
                out_bTnH = causal_attention(q_bTnH, k_bTkH, v_bTkH, ids_bT, mask.window)
            elif axes:
                out_bTnH = context_parallel_attention(
                    q_bTnH, k_bTkH, v_bTkH, axis=axes, segments=mask, documents=ids_bT
                )
            else:
                out_bTnH = segmented_attention(
                    q_bTnH,
                    k_bTkH,
                    v_bTkH,
                    segment_size=mask.size,
                    window=mask.window,
                    shift=mask.shift,
                    top_segments=mask.top,
                    documents=ids_bT,
                )
            return out_bTnH.reshape(b, T, k, G, H)

        run = heads_apart(attend, mask) if isinstance(mask, ByHead) else functools.partial(attend, mask)
        length = "length" if axes else None
        q, kv = ("batch", length, "kv_heads", "heads_per_kv", None), ("batch", length, "kv_heads", None)
        return map_shards(run, (q, kv, kv, ("batch", length)), q)(q_BTKGH, k_BTKH, v_BTKH, documents.ids_BT)


def heads_apart(attend: Callable[..., jax.Array], mask: ByHead) -> Callable[..., jax.Array]:
    """``attend(mask, q, k, v, ids)`` inside a :func:`map_shards`, of heads that see different things.

    Heads that see the same go together. Devices that share heads out have what stands at the places of their own.
    """

    def own(first: int, q_bTkGH: jax.Array, k_bTkH: jax.Array, v_bTkH: jax.Array, ids_bT: jax.Array) -> jax.Array:
        k, num = k_bTkH.shape[2], len(mask.parts)
        turn = num if k % num == 0 else k
        masks = [mask.parts[(first + i) % len(mask.parts)] for i in range(turn)]
        parts = [[x_bTkH[:, :, i::turn] for x_bTkH in (q_bTkGH, k_bTkH, v_bTkH)] for i in range(turn)]
        out = [attend(mask, *part, ids_bT) for mask, part in zip(masks, parts, strict=True)]
        return jnp.stack(out, axis=3).reshape(*q_bTkGH.shape[:-1], -1)

    def run(q_bTkGH: jax.Array, k_bTkH: jax.Array, v_bTkH: jax.Array, ids_bT: jax.Array) -> jax.Array:
        k, num = k_bTkH.shape[2], len(mask.parts)
        if k % num == 0:
            return own(0, q_bTkGH, k_bTkH, v_bTkH, ids_bT)
        current = current_mesh()
        devices = 1 if current is None else math.prod(current[0].shape[axis] for axis in current[1].kv_heads)
        firsts = sorted({device * k % num for device in range(devices)})
        runs = [functools.partial(own, first) for first in firsts]
        place = 0 if current is None else jax.lax.axis_index(current[1].kv_heads) % len(firsts)
        return jax.lax.switch(place, runs, q_bTkGH, k_bTkH, v_bTkH, ids_bT)

    return run


def segments_of(mask: AttentionMask) -> Segments | None:
    """What is cut the same way in all heads; None: there are no segments."""
    mask = mask.parts[0] if isinstance(mask, ByHead) else mask
    return mask if isinstance(mask, Segments) else None


def whole_segments(mask: AttentionMask, length: int) -> tuple[str, ...]:
    """The mesh axes over which rows of ``length`` positions are cut into whole segments; none: they are not."""
    current, segments = current_mesh(), segments_of(mask)
    if current is None or segments is None:
        return ()
    mesh, rules = current
    parts = math.prod(mesh.shape[axis] for axis in rules.length)
    return tuple(rules.length) if parts > 1 and length % (parts * segments.size) == 0 else ()


def to_keep(x_BTKH: Float[Array, "B T K H"], cache: LayerCache) -> Float[Array, "B T K W"]:
    """In the cache's dtype and width, and finite: a weight of 0 times what a page holds must be 0."""
    x_BTKH, pool = jnp.where(jnp.isfinite(x_BTKH), x_BTKH, 0), cache.pages.k_LMKPH
    return jnp.pad(x_BTKH, [(0, 0)] * 3 + [(0, pool.shape[-1] - x_BTKH.shape[-1])]).astype(pool.dtype)


def all_kept(
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    cache: LayerCache,
    state: RowState,
    ids_BT: Int[Array, "B T"],
    mask: AttentionMask,
) -> Made:
    """All pages of a layer whose cache held nothing."""
    if chooses(mask):
        num = state.tail_sums_BJKH.shape[1]
        place_K = jnp.arange(k_BTKH.shape[2]) % len(parts_of(mask))
        sums_BJKH = by_head(mask, place_K, lambda segments: tail_sums(k_BTKH, ids_BT, segments, num), axis=2)
        state = dataclasses.replace(state, tail_sums_BJKH=sums_BJKH)
    real_B = jnp.sum(ids_BT > 0, axis=1)
    k_MKPH, v_MKPH = (filled(to_keep(x_BTKH, cache), mask, cache.pages, real_B) for x_BTKH in (k_BTKH, v_BTKH))
    return Made(k_MKPH, v_MKPH, state)


def last_inputs(
    before_BCD: Float[Array, "B C D"], x_BTD: Float[Array, "B T D"], new_B: Int[Array, B]
) -> Float[Array, "B C D"]:
    """The last C inputs of each row when ``new_B`` of the T new ones count."""
    both = jnp.concatenate([before_BCD, x_BTD.astype(before_BCD.dtype)], axis=1)
    take = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, before_BCD.shape[1], axis=0))
    return take(both, new_B)
