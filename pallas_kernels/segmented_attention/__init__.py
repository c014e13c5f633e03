"""Segmented attention: a query sees its own segment and the tails of the earlier ones (docs/segmented_attention.md)."""

from __future__ import annotations

from pallas_kernels.segmented_attention.attend import segmented_attention
from pallas_kernels.segmented_attention.context import context_parallel_attention
from pallas_kernels.segmented_attention.reference import segmented_attention_loop, segmented_attention_reference
from pallas_kernels.segmented_attention.segments import Segments

__all__ = [
    "Segments",
    "context_parallel_attention",
    "segmented_attention",
    "segmented_attention_loop",
    "segmented_attention_reference",
]
