"""The two benchmark models and their batch, shared by all contenders (numpy only)."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spec:
    """One benchmark model and its batch."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    num_experts: int = 0
    experts_per_token: int = 0
    batch_size: int = 8
    length: int = 256

    @property
    def d_head(self) -> int:
        return self.d_model // self.num_heads

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.length


SPECS = {
    "dense": Spec(vocab_size=4096, d_model=256, num_layers=8, num_heads=4, d_ff=1024),
    "moe": Spec(
        vocab_size=1024, d_model=128, num_layers=4, num_heads=4, d_ff=256, num_experts=8, experts_per_token=2,
        batch_size=2,
    ),
}  # fmt: skip


def make_batch(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens in two documents per row, every token weighted one."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, spec.vocab_size, (spec.batch_size, spec.length + 1), dtype=np.int32)
    cuts = rng.integers(1, spec.length, (spec.batch_size, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "documents": (np.arange(spec.length) >= cuts).astype(np.int32),
        "weights": np.ones((spec.batch_size, spec.length), np.float32),
    }
