"""General compressors as baselines for bits per byte."""

from __future__ import annotations

import lzma
from collections.abc import Iterable


def xz_bits(texts: Iterable[str]) -> list[int]:
    """Bits of each text, in UTF-8, as a file of its own under `xz -9e` (container included)."""
    preset = 9 | lzma.PRESET_EXTREME
    return [8 * len(lzma.compress(text.encode(), format=lzma.FORMAT_XZ, preset=preset)) for text in texts]
