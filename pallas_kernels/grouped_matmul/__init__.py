"""Grouped matmul: rows sorted by group, each group times its own matrix; and a whole SwiGLU of them."""

from pallas_kernels.grouped_matmul.multiply import expert_swiglu, grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference, grouped_swiglu_reference

__all__ = [
    "expert_swiglu",
    "grouped_matmul",
    "grouped_matmul_reference",
    "grouped_swiglu",
    "grouped_swiglu_reference",
]
