"""Causal attention within the documents of a packed row."""

from pallas_kernels.causal_attention.reference import causal_attention_reference as causal_attention

__all__ = ["causal_attention"]
