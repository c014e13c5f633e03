"""Sizes of pieces that static schedules favour. Written by: dsjax kernels segmented_attention --chip CHIP --search"""

from __future__ import annotations

# By kind of chip, kernel and bytes of a number: the fields of Tiles.
TABLE: dict[tuple[str, str, int], tuple[int, ...]] = {
    ("TPU v5 lite", "backward", 2): (1024, 1024, 512, 8192),
    ("TPU v5 lite", "forward", 2): (2048, 1024, 512),
    ("TPU v6 lite", "backward", 2): (2048, 1024, 512, 8192),
    ("TPU v6 lite", "forward", 2): (2048, 1024, 512, 0, 1),
}
