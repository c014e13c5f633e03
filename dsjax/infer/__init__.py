"""Inference: prefill, decode and sampling."""
