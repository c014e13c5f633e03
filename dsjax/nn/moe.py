"""Mixture of experts: route -> dispatch -> experts -> combine, dropless (DeepSeekMoE, Dai et al. 2024)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UserError
from dsjax.nn.mlp import MLP
from dsjax.nn.router import RouterStats, moved_bias, route
from dsjax.sharding import buffer, current_mesh, map_shards, param
from pallas_kernels.expert_dispatch import combine, dispatch, plan_dispatch
from pallas_kernels.grouped_matmul import grouped_swiglu


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A layer of ``num_experts`` feed-forward experts, ``top_k`` of them for each token.

    Attributes:
        num_experts: routed experts.
        top_k: experts that each token visits.
        d_ff: inner width of one expert.
        num_shared_experts: experts that every token visits (one MLP of that many times ``d_ff``).
        normalize_weights: a token's weights sum to 1 over its chosen experts.
        routed_scale: factor on the routed experts' output.
        balance_coef: weight of the Switch balance loss.
        z_coef: weight of the router z-loss.
        bias_update_rate: how far each step moves an expert's selection bias towards balance; 0: there is no bias.
    """

    num_experts: PositiveInt = 8
    top_k: PositiveInt = 2
    d_ff: PositiveInt = 256
    num_shared_experts: NonNegativeInt = 0
    normalize_weights: bool = True
    routed_scale: PositiveFloat = 1.0
    balance_coef: NonNegativeFloat = 0.01
    z_coef: NonNegativeFloat = 0.0
    bias_update_rate: NonNegativeFloat = 0.0

    def validate(self) -> None:
        if self.top_k > self.num_experts:
            raise UserError(f"top_k is {self.top_k}; it must be at most num_experts, {self.num_experts}")

    def num_params(self, d_model: int) -> int:
        return d_model * self.num_experts + 3 * d_model * self.d_ff * (self.num_experts + self.num_shared_experts)

    def num_active_params(self, d_model: int) -> int:
        return d_model * self.num_experts + 3 * d_model * self.d_ff * (self.top_k + self.num_shared_experts)

    def make(self, d_model: int, *, out_scale: float, rngs: nnx.Rngs) -> nnx.Module:
        return MoE(self, d_model, out_scale=out_scale, rngs=rngs)


class MoE(nnx.Module):
    """Routed experts plus shared ones; every (token, expert) pair is computed, none is dropped."""

    EXPERTS = ("w_gate", "w_up", "w_down")

    def __init__(self, cfg: MoEConfig, d_model: int, *, out_scale: float = 1.0, rngs: nnx.Rngs):
        E, D, F = cfg.num_experts, d_model, cfg.d_ff
        self.cfg = cfg
        self.w_router = param(rngs, (D, E), ("embed", "router"), fan_in=D)
        self.w_gate = param(rngs, (E, D, F), ("expert", "embed", "mlp"), fan_in=D)
        self.w_up = param(rngs, (E, D, F), ("expert", "embed", "mlp"), fan_in=D)
        self.w_down = param(rngs, (E, F, D), ("expert", "mlp", "embed"), fan_in=F, scale=out_scale)
        if cfg.bias_update_rate:
            self.selection_bias = buffer((E,), ("router",))
        if cfg.num_shared_experts:
            self.shared = MLP(D, cfg.num_shared_experts * F, out_scale=out_scale, rngs=rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], counted_BT: Float[Array, "B T"], layer: Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """``layer``: the experts' weights are those of a stack of layers, of which this is number ``layer``."""
        cfg = self.cfg
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), self.w_router[...])
        bias_E = self.selection_bias[...] if cfg.bias_update_rate else None
        experts_BTX, weights_BTX, stats = route(
            logits_BTE, counted_BT, top_k=cfg.top_k, normalize=cfg.normalize_weights, bias_E=bias_E
        )
        weights_BTX = (weights_BTX * cfg.routed_scale).astype(x_BTD.dtype)
        tokens, stack = ("batch", "length", None), () if layer is None else ("layers",)
        up, down = (*stack, "expert", None, "mlp"), (*stack, "expert", "mlp", None)
        weights = (getattr(self, name)[...].astype(x_BTD.dtype) for name in self.EXPERTS)
        number = () if layer is None else (layer,)
        specs = (tokens, tokens, tokens, up, up, down, *((),) * len(number))
        y_BTD = map_shards(apply_experts, specs, tokens)(x_BTD, experts_BTX, weights_BTX, *weights, *number)
        if cfg.num_shared_experts:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, stats

    def moved_buffers(self, load_E: Float[Array, "*layers E"]) -> dict[str, Float[Array, "*layers E"]]:
        """The buffers behind a step in which the experts received ``load_E``, alike for one layer and for a stack."""
        if not self.cfg.bias_update_rate:
            return {}
        return {"selection_bias": moved_bias(self.selection_bias[...], load_E, self.cfg.bias_update_rate)}


def apply_experts(
    x_BTD: Float[Array, "B T D"],
    experts_BTX: Int[Array, "B T X"],
    weights_BTX: Float[Array, "B T X"],
    w_gate_eDF: Float[Array, "*layers e D F"],
    w_up_eDF: Float[Array, "*layers e D F"],
    w_down_eFD: Float[Array, "*layers e F D"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "B T D"]:
    """The routed experts' weighted outputs, on each device for its own experts ``e``.

    Tokens of the devices along the expert axis are gathered, each device computes what its experts contribute to
    all of them, and the sums go back to the tokens' owners. Where each of those devices has all tokens (a batch too
    small to be cut), nothing is gathered, and the sums go to all.
    """
    current = current_mesh()
    if current is not None:
        rules = current[1]
        cut = tuple(axis for axis in rules.expert if axis in rules.batch)
        whole = tuple(axis for axis in rules.expert if axis not in rules.batch)
        if cut:
            x_BTD, experts_BTX, weights_BTX = (
                jax.lax.all_gather(a, cut, axis=0, tiled=True) for a in (x_BTD, experts_BTX, weights_BTX)
            )
        experts_BTX = experts_BTX - jax.lax.axis_index(rules.expert) * w_gate_eDF.shape[-3]
    y_BTD = _local_experts(x_BTD, experts_BTX, weights_BTX, w_gate_eDF, w_up_eDF, w_down_eFD, layer)
    if current is not None:
        y_BTD = jax.lax.psum(y_BTD, (*rules.mlp, *whole))
        if cut:
            y_BTD = jax.lax.psum_scatter(y_BTD, cut, scatter_dimension=0, tiled=True)
    return y_BTD


def _local_experts(x_BTD, experts_BTX, weights_BTX, w_gate_eDF, w_up_eDF, w_down_eFD, layer):
    """Sum over the pairs whose expert is one of ours, 0 <= expert < e."""
    B, T, D = x_BTD.shape
    X = experts_BTX.shape[-1]
    with jax.named_scope("dispatch"):
        plan = plan_dispatch(experts_BTX.reshape(-1, X), w_gate_eDF.shape[-3])
        x_RD = dispatch(x_BTD.reshape(-1, D), plan)
    with jax.named_scope("experts"):
        y_RD = grouped_swiglu(x_RD, w_gate_eDF, w_up_eDF, w_down_eFD, plan.sizes_E, layer=layer)
    with jax.named_scope("combine"):
        return combine(y_RD, weights_BTX.reshape(-1, X), plan).reshape(B, T, D)
