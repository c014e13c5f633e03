"""Mixture of experts: route -> dispatch -> experts -> combine, dropless (DeepSeekMoE, Dai et al. 2024)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UserError
from dsjax.nn.expert_parallel import apply_experts
from dsjax.nn.mlp import MLP
from dsjax.nn.router import RouterStats, moved_bias, route
from dsjax.sharding import buffer, map_shards, param
from pallas_kernels.expert_dispatch import Choice
from pallas_kernels.expert_dispatch.plan import positions


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

        def routed(x_BTD, experts_BTX, weights_BTX, w_gate_eDF, w_up_eDF, w_down_eFD, layer=None):
            (B, T, D), X = x_BTD.shape, experts_BTX.shape[-1]
            experts_TX = experts_BTX.reshape(-1, X)
            choice = Choice(experts_TX, None, *positions(experts_TX, cfg.num_experts))
            rest = (weights_BTX.reshape(-1, X), w_gate_eDF, w_up_eDF, w_down_eFD)
            return apply_experts(x_BTD.reshape(-1, D), choice, *rest, layer=layer)[0].reshape(B, T, D)

        up, down = (*stack, "expert", None, "mlp"), (*stack, "expert", "mlp", None)
        weights = (getattr(self, name)[...].astype(x_BTD.dtype) for name in self.EXPERTS)
        number = () if layer is None else (layer,)
        specs = (tokens, tokens, tokens, up, up, down, *((),) * len(number))
        y_BTD = map_shards(routed, specs, tokens)(x_BTD, experts_BTX, weights_BTX, *weights, *number)
        if cfg.num_shared_experts:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, stats

    def moved_buffers(self, load_E: Float[Array, "*layers E"]) -> dict[str, Float[Array, "*layers E"]]:
        """The buffers behind a step in which the experts received ``load_E``, alike for one layer and for a stack."""
        if not self.cfg.bias_update_rate:
            return {}
        return {"selection_bias": moved_bias(self.selection_bias[...], load_E, self.cfg.bias_update_rate)}
