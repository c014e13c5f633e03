"""Weights that are only read, in 8 or 4 bits: each block of neighbouring numbers shares one scale.

int8, int4:  x = code * scale,       scale = max |x| / (2^(bits - 1) - 1/2): no number is further off than scale / 2
nf4:         x = NF4[code] * scale,  scale = max |x|: the quantiles of a normal distribution (QLoRA, arXiv 2305.14314)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["int8", "int4", "nf4"]

BLOCK = 64  # numbers that share a scale, at the most
BITS: dict[str, int] = {"int8": 8, "int4": 4, "nf4": 4}
# QLoRA, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["kind", "width"])
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array in few bits. Blocks lie along its last dimension, so it can be cut along any other.

    Attributes:
        codes: (..., width) int8, or two codes in each uint8, (..., (width + 1) // 2).
        scales: (..., blocks), float32.
        kind: what a code stands for.
        width: of the last dimension.
    """

    codes: Any
    scales: Any
    kind: Kind
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.width)


def block_size(width: int) -> int:
    """How many numbers share a scale: as many as divide the last dimension, at most :data:`BLOCK`."""
    return next(n for n in range(min(BLOCK, width), 0, -1) if width % n == 0)


def quantize(x: Float[Array, ...], kind: Kind) -> Quantized:
    """The nearest that ``kind`` can express; of a block of zeros, zeros."""
    *leading, width = x.shape
    block = block_size(width)
    x = x.astype(jnp.float32).reshape(*leading, width // block, block)
    half = 0.0 if kind == "nf4" else 2.0 ** (BITS[kind] - 1)
    scales = jnp.max(jnp.abs(x), axis=-1) / (1.0 if kind == "nf4" else half - 0.5)
    x = x / jnp.where(scales > 0, scales, 1.0)[..., None]
    if kind == "nf4":
        middles = ((low + high) / 2 for low, high in itertools.pairwise(NF4))
        codes = sum((x > middle).astype(jnp.uint8) for middle in middles)
    else:
        codes = jnp.clip(jnp.round(x), -half, half - 1).astype(jnp.int8)
    codes = jnp.reshape(codes, (*leading, width))
    return Quantized(codes if kind == "int8" else _packed(codes), scales, kind, width)


def dequantize(q: Quantized) -> Float[Array, ...]:
    """The numbers that are meant, float32."""
    codes = q.codes if q.kind == "int8" else _unpacked(q.codes, q.width)
    if q.kind == "nf4":
        x = _looked_up(codes, NF4)
    elif q.kind == "int4":
        x = ((codes ^ 8).astype(jnp.int8) - 8).astype(jnp.float32)  # two's complement in four bits
    else:
        x = codes.astype(jnp.float32)
    blocks = x.reshape(*q.scales.shape, q.width // q.scales.shape[-1])
    return (blocks * q.scales[..., None]).reshape(x.shape)


def _packed(codes: jax.Array) -> jax.Array:
    """Two codes of four bits in each byte, the first in the lower half."""
    codes = (codes & 15).astype(jnp.uint8)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return codes[..., ::2] | codes[..., 1::2] << 4


def _unpacked(packed: jax.Array, width: int) -> jax.Array:
    both = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)[..., :width]


def _looked_up(codes: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """``table[codes]``, bit by bit of the codes: 15 choices that fuse, where a TPU would look up one by one."""
    values: list[Any] = list(table)
    while len(values) > 1:
        odd = codes & 1 == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
        codes = codes >> 1
    return values[0].astype(jnp.float32)
