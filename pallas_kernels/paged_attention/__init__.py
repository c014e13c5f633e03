"""A few queries of each row against keys and values that lie in pages of a pool (docs/inference.md)."""

from pallas_kernels.paged_attention.attend import paged_attention
from pallas_kernels.paged_attention.reference import ALWAYS, NEVER, paged_attention_reference

__all__ = ["ALWAYS", "NEVER", "paged_attention", "paged_attention_reference"]
