"""Gated feed-forward layer, SwiGLU (Shazeer 2020)."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Float

from dsjax.config import PositiveInt
from dsjax.nn.linear import project
from dsjax.sharding import param, shard


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """A dense feed-forward layer of inner width ``d_ff``."""

    d_ff: PositiveInt = 1024

    def num_params(self, d_model: int) -> int:
        return 3 * d_model * self.d_ff

    def num_active_params(self, d_model: int) -> int:
        return self.num_params(d_model)

    def make(self, d_model: int, *, out_scale: float, rngs: nnx.Rngs) -> nnx.Module:
        return MLP(d_model, self.d_ff, out_scale=out_scale, rngs=rngs)


@jax.custom_vjp
def swiglu(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """silu(gate) * up; the backward pass keeps its inputs alone."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(saved, dy):
    gate, up = saved
    s = jax.nn.sigmoid(gate)
    return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, d_model: int, d_ff: int, *, out_scale: float = 1.0, rngs: nnx.Rngs):
        self.w_gate = param(rngs, (d_model, d_ff), ("embed", "mlp"), fan_in=d_model)
        self.w_up = param(rngs, (d_model, d_ff), ("embed", "mlp"), fan_in=d_model)
        self.w_down = param(rngs, (d_ff, d_model), ("mlp", "embed"), fan_in=d_ff, scale=out_scale)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        h_BTF = swiglu(project(x_BTD, self.w_gate[...]), project(x_BTD, self.w_up[...]))
        h_BTF = shard(h_BTF, "batch", "length", "mlp")
        return project(h_BTF, self.w_down[...])
