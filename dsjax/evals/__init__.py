"""Judging a model: bits per byte, baselines, samples that parse, the report."""
