"""Grouped matmul: rows sorted by group, each group times its own matrix."""

from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference as grouped_matmul

__all__ = ["grouped_matmul"]
