"""Segmented attention on Hopper GPUs (Pallas Mosaic GPU): the functions of a backend, and what they can not do.

Rows are lengthened to whole segments, and the tails are copied together once, so that a tile of queries visits a
prefix of them and the blocks of its own segment. Rows of chosen segments (``top_segments``) are left to XLA: they are
gathered already, and what remains are dense products. So is float32, which the tensor cores would round to tf32.

Mosaic GPU is loaded when a kernel is traced, not before: other platforms ask :func:`why_not` only.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import simulated, wrong_device
from pallas_kernels.segmented_attention.segments import Segments
from pallas_kernels.segmented_attention.selection import cut, tails

TILE = 128  # of queries; a segment holds whole ones
KEY_WIDTHS, VALUE_WIDTHS = (64, 128, 192), (64, 128)  # what the registers of two warpgroups hold


def why_not(function: str, *arrays: Any, **static: Any) -> str | None:
    """Why ``function`` can not take these arrays, in a sentence; None: it can."""
    if function.endswith("_rows"):
        return "rows of chosen segments (top_segments) have no Mosaic GPU kernel; XLA computes them"
    q, k, v = arrays[:3]
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; the kernel takes bfloat16 (wgmma has no float32)"
    H, U = q.shape[-1], v.shape[-1]
    if H not in KEY_WIDTHS or U not in VALUE_WIDTHS:
        return f"heads are {H} and {U} wide; the kernel takes {KEY_WIDTHS} and {VALUE_WIDTHS}"
    if static["segments"].size % TILE:
        return f"segment_size is {static['segments'].size}; the kernel takes multiples of {TILE}"
    if static["scale"] <= 0:
        return f"scale is {static['scale']}; the kernel takes positive ones"
    return wrong_device()


def forward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    ids_BT: Int[Array, "B T"] | None,
    *,
    segments: Segments,
    scale: float,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
    """See :mod:`pallas_kernels.segmented_attention.attend`; ``interpret`` may be the parameters of the simulator."""
    from pallas_kernels.segmented_attention import gpu_forward, gpu_tiles

    if interpret is True:
        return _simulated(forward, q_BTNH, k_BTKH, v_BTKU, ids_BT, segments=segments, scale=scale)
    whole = _Whole(q_BTNH, segments, ids_BT)
    setting = gpu_tiles.Setting(segments, scale, segments.visible_pairs(whole.T), interpret or None)
    q, k, v = (whole.of(x) for x in (q_BTNH, k_BTKH, v_BTKU))
    tail = [whole.tails(x, gpu_forward.KEYS) for x in (k_BTKH, v_BTKU)]
    out, log = gpu_forward.attend(setting, q, k, v, tail, *whole.keys(gpu_forward.KEYS))
    return whole.cut(out), whole.cut(log.swapaxes(1, 2))


def backward(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    ids_BT: Int[Array, "B T"] | None,
    out_BTNU: Float[Array, "B T N U"],
    log_BTN: Float[Array, "B T N"],
    dout_BTNU: Float[Array, "B T N U"],
    *,
    segments: Segments,
    scale: float,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K U"]]:
    """See :func:`forward`."""
    from pallas_kernels.segmented_attention import gpu_backward, gpu_tiles

    if interpret is True:
        arrays = (q_BTNH, k_BTKH, v_BTKU, ids_BT, out_BTNU, log_BTN, dout_BTNU)
        return _simulated(backward, *arrays, segments=segments, scale=scale)
    whole = _Whole(q_BTNH, segments, ids_BT)
    setting = gpu_tiles.Setting(segments, scale, segments.visible_pairs(whole.T), interpret or None)
    q, k, v, dout = (whole.of(x) for x in (q_BTNH, k_BTKH, v_BTKU, dout_BTNU.astype(q_BTNH.dtype)))
    along_BTN = jnp.sum(dout_BTNU.astype(jnp.float32) * out_BTNU.astype(jnp.float32), axis=-1)
    bias = tuple(whole.of(x).swapaxes(1, 2) for x in (-log_BTN / scale, -along_BTN))
    tail = [whole.tails(x, gpu_backward.KEYS) for x in (k_BTKH, v_BTKU)]
    keys = whole.keys(gpu_backward.KEYS)
    dq = gpu_backward.query_gradient(setting, q, k, v, tail, *keys, dout, bias)
    queries = whole.queries(gpu_backward.block_of_queries(q.shape[-1]))
    dk, dv = gpu_backward.key_value_gradients(setting, q, k, v, *queries, dout, bias)
    return whole.cut(dq), whole.cut(dk), whole.cut(dv)


def _simulated(f: Any, *arrays: Any, **static: Any) -> Any:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return simulated(f, InterpretGPUParams(), *arrays, **static)


class _Whole:
    """Rows lengthened to whole segments; what is before the first position is a document of its own, id -1."""

    def __init__(self, q_BTNH: Array, segments: Segments, ids_BT: Array | None):
        self.B, self.T = q_BTNH.shape[:2]
        self.segments = segments
        self.length = segments.count(self.T) * segments.size
        if ids_BT is None and segments.shift:
            ids_BT = jnp.ones((self.B, self.T), jnp.int32)
        self.ids = None if ids_BT is None else ids_BT.astype(jnp.int32)

    def of(self, x_BT: Array) -> Array:
        """(B, T, ...) -> (B, S, ...), with zeros."""
        x = cut(x_BT, self.segments)
        return x.reshape(self.B, self.length, *x.shape[3:])

    def cut(self, x_BS: Array) -> Array:
        return x_BS[:, self.segments.shift : self.segments.shift + self.T]

    def tails(self, x_BT: Array, block: int) -> Array:
        """(B, T, ...) -> (B, P, ...): the tails that anything sees, one after the other; P a multiple of ``block``."""
        x = tails(x_BT, self.segments)[:, :-1]
        x = x.reshape(self.B, -1 if x.size else 0, *x.shape[3:])
        extra = max(-x.shape[1] % block, block - x.shape[1])
        return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))

    def keys(self, block: int) -> tuple[Array, tuple[Array, ...]]:
        """Which blocks of keys the tiles of queries visit; ids of queries and of keys (tails, then all)."""
        from pallas_kernels.segmented_attention.gpu_tiles import key_spans

        find = functools.partial(key_spans, self.segments, count=self.length // TILE, keys=block, batch=self.B)
        if self.ids is None:
            return find(None, None), ()
        ids, tail_ids = self.of(self.ids + 1) - 1, self.tails(self.ids + 1, block) - 1
        return find(ids, tail_ids), (ids, jnp.concatenate([tail_ids, ids], axis=1))

    def queries(self, block: int) -> tuple[Array, tuple[Array, ...]]:
        """Which blocks of queries see the tiles of keys; ids."""
        from pallas_kernels.segmented_attention.gpu_tiles import query_spans

        ids = None if self.ids is None else self.of(self.ids + 1) - 1
        spans = query_spans(self.segments, ids, self.length // TILE, block, self.B)
        return spans, () if ids is None else (ids,)
