"""Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeInt, PositiveFloat, PositiveInt, UserError
from dsjax.nn.cache import LayerCache, filled, held_positions, num_slots, num_tails, tail_sums
from dsjax.nn.history import ShortConv
from dsjax.nn.linear import project
from dsjax.nn.masks import AttentionMask, Causal, Documents, Segmented, sees
from dsjax.nn.norm import RMSNorm
from dsjax.nn.rope import apply_rope
from dsjax.sharding import current_mesh, map_shards, param, shard
from pallas_kernels.causal_attention import causal_attention
from pallas_kernels.cost import useful_flops
from pallas_kernels.segmented_attention import Segments, context_parallel_attention, segmented_attention
from pallas_kernels.segmented_attention.selection import best_segments


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
        return (Causal(self.window),) if self.segmented is None else self.segmented.layers()

    def mask(self, layer: int) -> AttentionMask:
        """What the model's layer of this number sees, from 0."""
        return self.masks()[layer % len(self.masks())]

    def visible_pairs(self, length: int, layer: int = 0) -> int:
        """(query, key) pairs of a document of ``length``; with ``top_segments``, at most that many."""
        if isinstance(mask := self.mask(layer), Segments):
            return _pairs(mask, length)
        w = min(self.window or length, length)
        return w * (w + 1) // 2 + (length - w) * w

    def visible_positions(self, seq_len: int, layer: int = 0) -> float:
        """Mean number of positions that a query of a full-length document sees."""
        return self.visible_pairs(seq_len, layer) / seq_len

    def cache_size(self, length: int) -> tuple[int, int]:
        """What a layer keeps of ``length`` positions of a row: slots, and sums of tails."""
        slots = max(num_slots(mask, length) for mask in self.masks())
        chosen_from = [max(num_tails(m, length), 1) for m in self.masks() if isinstance(m, Segments) and chooses(m)]
        return slots, max(chosen_from, default=0)


Stack = tuple[LayerCache, Int[Array, ""] | int]
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
        stack: Stack | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """The layer's output, and what a cache must keep of these T positions.

        Args:
            x_BTD: input.
            documents: which document each position belongs to.
            positions_BT: place of each position in its document.
            rope: table of :func:`dsjax.nn.rope.rope_angles`.
            cache: of this layer, which is only read; None: nothing is to be kept.
            lengths_B: positions that the cache holds; None: none yet, and these are all that a query sees.
            layer: number of the layer in the model, as far as it says what a query sees.
            stack: the caches of a stack of layers, and the number of this one among them, for what reads little of it.

        Returns:
            The output, and (None without a cache) what :func:`dsjax.nn.cache.written` takes: the new keys and values,
            or the layer's whole cache if it held none.
        """
        mask, new_conv_BCD = self.cfg.mask(layer), None
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
            out_BTKGH = self._whole_rows(q_BTKGH, k_BTKH, v_BTKH, documents, mask)
        else:
            if isinstance(mask, Segments) and chooses(mask):
                sums_BJKH = with_new_tails(cache.tail_sums_BJKH, k_BTKH, documents.ids_BT, lengths_B, mask)
                cache = dataclasses.replace(cache, tail_sums_BJKH=sums_BJKH)
            out_BTKGH = cached_attention(q_BTKGH, k_BTKH, v_BTKH, cache, lengths_B, mask, stack)
        new = None
        if cache is not None:
            kept = cache if new_conv_BCD is None else dataclasses.replace(cache, conv_BCD=new_conv_BCD)
            new = kept_of(k_BTKH, v_BTKH, kept, documents.ids_BT, mask, is_empty=lengths_B is None)
        return project(out_BTKGH, self.w_out[...], num_inputs=3), new

    def _whole_rows(self, q_BTKGH, k_BTKH, v_BTKH, documents: Documents, mask: AttentionMask):
        """Whole rows at once; each device attends for its own rows and heads, over the keys of the whole row.

        With segments, rows stay cut by positions as well: of other devices' keys only the tails come.
        """
        axes = whole_segments(mask, q_BTKGH.shape[1])

        def attend(q_bTkGH, k_bTkH, v_bTkH, ids_bT):
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

        length = "length" if axes else None
        q, kv = ("batch", length, "kv_heads", "heads_per_kv", None), ("batch", length, "kv_heads", None)
        return map_shards(attend, (q, kv, kv, ("batch", length)), q)(q_BTKGH, k_BTKH, v_BTKH, documents.ids_BT)


def whole_segments(mask: AttentionMask, length: int) -> tuple[str, ...]:
    """The mesh axes over which rows of ``length`` positions are cut into whole segments; none: they are not."""
    current = current_mesh()
    if current is None or not isinstance(mask, Segments):
        return ()
    mesh, rules = current
    parts = math.prod(mesh.shape[axis] for axis in rules.length)
    return tuple(rules.length) if parts > 1 and length % (parts * mask.size) == 0 else ()


def kept_of(
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    cache: LayerCache,
    ids_BT: Int[Array, "B T"],
    mask: AttentionMask,
    *,
    is_empty: bool,
) -> LayerCache:
    """The new keys and values for a cache that holds some; the whole of one that holds none."""
    sums_BJKH, dtype = cache.tail_sums_BJKH, cache.k_BSKH.dtype
    if is_empty:
        if isinstance(mask, Segments) and chooses(mask):
            sums_BJKH = tail_sums(k_BTKH, ids_BT, mask, sums_BJKH.shape[1])
        slots, real_B = cache.k_BSKH.shape[1], jnp.sum(ids_BT > 0, axis=1)
        k_BTKH, v_BTKH = (filled(x_BTKH.astype(dtype), mask, slots, real_B) for x_BTKH in (k_BTKH, v_BTKH))
    return LayerCache(k_BTKH.astype(dtype), v_BTKH.astype(dtype), cache.conv_BCD, sums_BJKH)


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
    mask: AttentionMask,
    stack: Stack | None = None,
) -> Float[Array, "B T K G H"]:
    """T new positions of each row against what its cache holds of the ``lengths_B`` before, and against each other.

    One softmax over both. On a mesh each device looks at its own slots, for all query heads of its key/value heads;
    what is exchanged are queries, and maxima, sums and outputs of the softmax. The cache's sums of tails are those with
    the new positions.
    """
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    q_BTKGH = shard(q_BTKGH, "batch", None, "kv_heads", None, None)
    position_BKT = (lengths_B[:, None] + jnp.arange(T))[:, None]
    held_BKS = held_positions(mask, cache.k_BSKH.shape[1], lengths_B)[:, None]
    # Of each other, causal positions see by their distance, wherever they stand.
    new_BKT = position_BKT if isinstance(mask, Segments) else jnp.arange(T)[None, None]

    def attend(k_BSKH, v_BSKH, held_BKS, chosen_BKTX=None):
        k_BSKH, v_BSKH = k_BSKH.astype(q_BTKGH.dtype), v_BSKH.astype(q_BTKGH.dtype)
        chosen_BKT1X = None if chosen_BKTX is None else chosen_BKTX[..., None, :]

        def scores(k_BSKH, t_BKT, j_BKS):  # of the positions, B and K may be 1
            t_BKT1, j_BK1S = t_BKT[..., None], j_BKS[:, :, None]
            sees_BKTS = sees(mask, t_BKT1, j_BK1S, chosen_BKT1X) & (j_BK1S >= 0)
            scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH).astype(jnp.float32)
            return jnp.where(sees_BKTS[:, :, None], scores_BKGTS * H**-0.5, -jnp.inf)

        def mean(p_BKGTS, v_BSKH):
            return jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS.astype(v_BSKH.dtype), v_BSKH).astype(jnp.float32)

        held = shard(scores(k_BSKH, position_BKT, held_BKS), "batch", "kv_heads", None, None, "slots")
        new = scores(k_BTKH, new_BKT, new_BKT)
        top = jnp.maximum(jnp.max(held, axis=-1), jnp.max(new, axis=-1))[..., None]  # a position sees itself: finite
        held, new = jnp.exp(held - top), jnp.exp(new - top)
        total_BKGT = jnp.sum(held, axis=-1) + jnp.sum(new, axis=-1)
        out_BTKGH = (mean(held, v_BSKH) + mean(new, v_BTKH)) / jnp.moveaxis(total_BKGT, 3, 1)[..., None]
        return out_BTKGH.astype(q_BTKGH.dtype)

    everything = functools.partial(attend, cache.k_BSKH, cache.v_BSKH, held_BKS)
    if not isinstance(mask, Segments) or not chooses(mask):
        return everything()
    chosen_BKTX = chosen_tails(q_BTKGH, cache.tail_sums_BJKH, position_BKT[:, 0], mask)
    if not reads_chosen(mask, T, cache.k_BSKH.shape[1], chosen_BKTX.shape[-1]):
        return everything(chosen_BKTX)

    def chosen_alone():
        own_BK1 = jnp.broadcast_to(mask.of(position_BKT), (*chosen_BKTX.shape[:2], 1))
        tails_BKX = jnp.concatenate([chosen_BKTX[:, :, 0], own_BK1], axis=-1)
        return attend(*gathered(stack or (jax.tree.map(lambda x: x[None], cache), 0), held_BKS, tails_BKX, mask))

    if shards("kv_heads") == k_BTKH.shape[2]:
        return chosen_alone()
    # Heads stand beside each other in a TPU's tiles: to gather from each something else, it would copy the whole cache.
    return jax.lax.platform_dependent(tpu=functools.partial(everything, chosen_BKTX), default=chosen_alone)


# ---------------------------------------------------------------- chosen tails


def chooses(segments: Segments) -> bool:
    """Whether a position looks at some tails only."""
    return segments.top is not None and segments.window > 0


def with_new_tails(
    sums_BJKH: Float[Array, "B J K H"],
    k_BTKH: Float[Array, "B T K H"],
    ids_BT: Int[Array, "B T"],
    lengths_B: Int[Array, B],
    segments: Segments,
) -> Float[Array, "B J K H"]:
    """The sums of tails with the keys of T positions behind ``lengths_B``; those with id 0 do not count."""
    position_BT1 = (lengths_B[:, None] + jnp.arange(k_BTKH.shape[1]))[..., None]
    into_BTJ = segments.in_tail(position_BT1) & (segments.of(position_BT1) == jnp.arange(sums_BJKH.shape[1]))
    into_BTJ &= (ids_BT > 0)[..., None]
    with useful_flops(0):  # a sum, written as a product
        k_BTKH, into_BTJ = k_BTKH.astype(jnp.float32), into_BTJ.astype(jnp.float32)
        return sums_BJKH + jnp.einsum("BTJ,BTKH->BJKH", into_BTJ, k_BTKH, precision="highest")


def chosen_tails(
    q_BTKGH: Float[Array, "B T K G H"],
    sums_BJKH: Float[Array, "B J K H"],
    position_BT: Int[Array, "B T"],
    segments: Segments,
) -> Int[Array, "B K T X"]:
    """The segments whose tails a position sees, as :func:`pallas_kernels.segmented_attention.selection.choose` has it.

    Here of rows of one document each, from the sums of their tails.
    """
    assert segments.top is not None
    W, w, J = segments.size, segments.window, sums_BJKH.shape[1]
    keys_J = jnp.where(jnp.arange(J) == 0, min(w, W - segments.shift), w)  # the first segment may be cut short
    mean_BJKH = sums_BJKH / keys_J[:, None, None]
    mean_BTKH = q_BTKGH.astype(jnp.float32).mean(axis=3)
    there_BTJ = jnp.ones((*position_BT.shape, J), bool)
    chosen_BTKX = best_segments(mean_BTKH, mean_BJKH, there_BTJ, segments.of(position_BT), segments.top)
    return chosen_BTKX.swapaxes(1, 2)


def reads_chosen(segments: Segments, num_new: int, num_slots: int, num_chosen: int) -> bool:
    """Whether to bring the chosen tails together, rather than to look at all and mask.

    Not for several positions at a time, which choose differently; nor if that is hardly less; nor where devices share
    the slots of a row: each then looks at its own ones, and nothing of the cache moves.
    """
    gathered = segments.size - segments.window + (num_chosen + 1) * segments.window
    return num_new == 1 and shards("slots") == 1 and gathered < num_slots


def shards(axis: str) -> int:
    """Devices over which this logical axis is cut."""
    current = current_mesh()
    return 1 if current is None else math.prod(current[0].shape[name] for name in getattr(current[1], axis))


def gathered(
    stack: Stack,
    held_BKS: Int[Array, "B 1 S"],
    tails_BKX: Int[Array, "B K X"],
    segments: Segments,
) -> tuple[Float[Array, "B Z K H"], Float[Array, "B Z K H"], Int[Array, "B K Z"]]:
    """The slots of the open segment's head and of some tails (-1: of none), and the positions that they hold.

    Out of the whole stack: a layer cut out of it to be gathered from would be copied.
    """
    head, w, (caches, number) = segments.size - segments.window, segments.window, stack

    def take(x_LbSkH, tails_bkX, number):
        _, b, _, k, H = x_LbSkH.shape

        def one(row, kv_head, tail):
            at = (number, row, head + tail * w, kv_head, 0)
            return jax.lax.dynamic_slice(x_LbSkH, at, (1, 1, w, 1, H)).reshape(w, H)

        each = jax.vmap(jax.vmap(jax.vmap(one, (None, None, 0)), (None, 0, 0), 2), (0, None, 0))
        taken_bXwkH = each(jnp.arange(b), jnp.arange(k), jnp.maximum(tails_bkX, 0))
        head_bokH = jax.lax.dynamic_slice(x_LbSkH, (number, 0, 0, 0, 0), (1, b, head, k, H))[0]
        return jnp.concatenate([head_bokH, taken_bXwkH.reshape(b, -1, k, H)], axis=1)

    kv, tails = ("batch", None, "kv_heads", None), ("batch", "kv_heads", None)
    take = map_shards(take, (("layers", *kv), tails, ()), kv)
    k_BZKH, v_BZKH = (take(x_LBSKH, tails_BKX, jnp.asarray(number)) for x_LBSKH in (caches.k_BSKH, caches.v_BSKH))
    (B, K, _), S = tails_BKX.shape, held_BKS.shape[-1]
    slot_BKXw = head + tails_BKX[..., None] * w + jnp.arange(w)
    there_BKXw = (tails_BKX >= 0)[..., None] & (slot_BKXw < S)
    held_BKZ = jnp.take_along_axis(held_BKS, jnp.clip(slot_BKXw, 0, S - 1).reshape(B, K, -1), axis=-1)
    held_BKZ = jnp.where(there_BKXw.reshape(B, K, -1), held_BKZ, -1)
    head_BKo = jnp.broadcast_to(held_BKS[..., :head], (B, K, head))
    return k_BZKH, v_BZKH, jnp.concatenate([head_BKo, held_BKZ], axis=-1)
