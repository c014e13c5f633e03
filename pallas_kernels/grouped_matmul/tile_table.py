"""Sizes of pieces that static schedules favour. Written by: dsjax kernels grouped_matmul --chip CHIP --search"""

from __future__ import annotations

# By kind of chip, kernel and bytes of a number: the fields of Tiles.
TABLE: dict[tuple[str, str, int], tuple[int, ...]] = {
    ("TPU v5 lite", "matmul", 2): (512, 64, 32, 2048, 256),
    ("TPU v5 lite", "swiglu", 2): (512, 64, 64, 2048, 128),
    ("TPU v6 lite", "matmul", 2): (512, 128, 32, 2048, 2048),
}
