"""Checkpoints of Hugging Face's layout and ours, one into the other."""
