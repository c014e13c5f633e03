"""Weights in 8-bit floats, scaled by blocks (DeepSeek-V3, arXiv 2412.19437, section 3.3).

A weight ``x`` (M, N) is stored as float8_e4m3fn beside ``x_scale_inv`` (ceil(M / 128), ceil(N / 128)), float32; what it
stands for is each value times the scale of its block of 128 x 128.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.config import UserError
from dsjax.tensor_files import TensorFiles, TensorKind

SCALE = "_scale_inv"
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
LARGEST = float(ml_dtypes.finfo(FP8).max)  # 448
POWERS_OF_TWO = "ue8m0"

_VALUES = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def block_size(hf_config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        UserError: the weights are quantized in another way.
    """
    how = hf_config.get("quantization_config")
    if not how:
        return 128, 128
    if not isinstance(how, dict) or how.get("quant_method") != "fp8":
        method = how.get("quant_method") if isinstance(how, dict) else how
        raise UserError(f"config.json: quantization_config.quant_method is {method!r}; weights are plain or 'fp8'")
    size = how.get("weight_block_size", [128, 128])
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 2**20 for n in size)):
        raise UserError(f"config.json: quantization_config.weight_block_size is {size!r}; it must be two numbers")
    if (scales := how.get("scale_fmt")) not in (None, "float", POWERS_OF_TWO):
        raise UserError(
            f"config.json: quantization_config.scale_fmt is {scales!r}; scales are float or {POWERS_OF_TWO!r}"
        )
    return size[0], size[1]


def has_powers_of_two(hf_config: Mapping[str, Any]) -> bool:
    """Whether scales are powers of two (V3.1, V3.2), which kernels read as 8 bits; those are float32 in files, too."""
    return (hf_config.get("quantization_config") or {}).get("scale_fmt") == POWERS_OF_TWO


def dequantize(x_MN: np.ndarray, scale_mn: np.ndarray, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """The values in bfloat16: each times the scale of its block, in float32, then rounded."""
    out_MN = np.empty(x_MN.shape, BF16)
    for row, scale_n in enumerate(scale_mn.astype(np.float32)):
        rows = slice(row * block[0], (row + 1) * block[0])
        values_bN = _VALUES[x_MN[rows].view(np.uint8)]
        out_MN[rows] = values_bN * np.repeat(scale_n, block[1])[: x_MN.shape[1]]
    return out_MN


def quantize(x_MN: np.ndarray, scale_mn: np.ndarray, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """The 8-bit values that :func:`dequantize` made ``x_MN`` of.

    Bfloat16 has four more bits than they have: its rounding moves no quotient halfway to another of them.
    """
    out_MN = np.empty(x_MN.shape, FP8)
    for row, scale_n in enumerate(scale_mn.astype(np.float32)):
        rows = slice(row * block[0], (row + 1) * block[0])
        scale_N = np.repeat(np.where(scale_n == 0, 1, scale_n), block[1])[: x_MN.shape[1]]
        out_MN[rows] = (x_MN[rows].astype(np.float32) / scale_N).astype(FP8)
    return out_MN


def scales_for(x_MN: np.ndarray, block: tuple[int, int] = (128, 128), *, powers_of_two: bool = False) -> np.ndarray:
    """Scales with which the largest value of each block becomes the largest that 8 bits hold; 1 of a block of zeros.

    Or the next power of two above.
    """
    rows = np.arange(0, x_MN.shape[0], block[0])
    columns = np.arange(0, x_MN.shape[1], block[1])
    largest_mN = np.stack([np.abs(x_MN[r : r + block[0]].astype(np.float32)).max(axis=0) for r in rows])
    largest_mn = np.maximum.reduceat(largest_mN, columns, axis=1)
    scale_mn = np.where(largest_mn == 0, 1, largest_mn / LARGEST).astype(np.float32)
    return np.exp2(np.ceil(np.log2(scale_mn))) if powers_of_two else scale_mn


class Dequantized:
    """Tensors by name, as if the scaled ones had been stored in bfloat16.

    Args:
        files: the tensors of a checkpoint.
        block: rows and columns that share a scale.

    Raises:
        UserError: names an 8-bit tensor without a scale, or a scale without one or of another shape.
    """

    def __init__(self, files: TensorFiles, block: tuple[int, int] = (128, 128)):
        self.files, self.block = files, block
        self.scales = {}  # name of an 8-bit tensor -> name of its scale
        for name in files:
            if files.kind(name).dtype == FP8:
                self._check(name)
                self.scales[name] = name + SCALE
        self._hidden = set(self.scales.values())

    def _check(self, name: str) -> None:
        kind, scale = self.files.kind(name), name + SCALE
        if scale not in self.files:
            raise UserError(f"{kind.file}: tensor {name!r} has type {kind.dtype}, but there is no {scale!r}")
        found = self.files.kind(scale)
        if len(kind.shape) != 2:
            raise UserError(f"{kind.file}: tensor {name!r} has type {kind.dtype} and shape {kind.shape}, is no matrix")
        wanted = tuple(-(-n // b) for n, b in zip(kind.shape, self.block, strict=True))
        if found.shape != wanted or found.dtype != np.float32:
            raise UserError(
                f"{found.file}: tensor {scale!r} is {found.dtype}{list(found.shape)}; for {list(kind.shape)} values in"
                f" blocks of {self.block[0]} x {self.block[1]} it must be float32{list(wanted)}"
            )

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.files if name not in self._hidden)

    def __len__(self) -> int:
        return len(self.files) - len(self._hidden)

    def __contains__(self, name: object) -> bool:
        return name in self.files and name not in self._hidden

    def kind(self, name: str) -> TensorKind:
        """Shape, type as which it is read, and place of a tensor."""
        kind = self.files.kind(name)
        return dataclasses.replace(kind, dtype=BF16) if name in self.scales else kind

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.scales:
            return self.files[name]
        return dequantize(self.files[name], self.files[self.scales[name]], self.block)
