"""The DeepSeek lineage as one JAX/TPU-first library."""

__version__ = "0.1.0"
