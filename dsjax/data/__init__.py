"""Data: reading, de-duplication, tokenizer, packing, mixtures; see docs/data.md."""
