"""Gated feed-forward layer, SwiGLU (Shazeer 2020)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.config import PositiveInt
from dsjax.sharding import param, shard


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """A dense feed-forward layer of inner width ``d_ff``."""

    d_ff: PositiveInt = 1024

    def num_params(self, d_model: int) -> int:
        return 3 * d_model * self.d_ff

    def num_active_params(self, d_model: int) -> int:
        return self.num_params(d_model)

    def make(self, d_model: int, *, rngs: nnx.Rngs) -> nnx.Module:
        return MLP(d_model, self.d_ff, rngs=rngs)


def swiglu(gate_up: Float[Array, "... 2 F"]) -> Float[Array, "... F"]:
    """silu(gate) * up, the two stacked in the second-last dimension."""
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are one matmul."""

    def __init__(self, d_model: int, d_ff: int, *, rngs: nnx.Rngs):
        self.w_gate_up = param(rngs, (d_model, 2, d_ff), ("embed", "gate_up", "mlp"), fan_in=d_model)
        self.w_down = param(rngs, (d_ff, d_model), ("mlp", "embed"), fan_in=d_ff)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        h_BTF = swiglu(jnp.einsum("BTD,DgF->BTgF", x_BTD, self.w_gate_up[...].astype(x_BTD.dtype)))
        h_BTF = shard(h_BTF, "batch", "length", "mlp")
        return jnp.einsum("BTF,FD->BTD", h_BTF, self.w_down[...].astype(x_BTD.dtype))
