"""Mixture of experts: route -> dispatch -> experts -> combine (DeepSeekMoE, Dai et al. 2024)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeFloat, NonNegativeInt, OpenShare, PositiveFloat, PositiveInt, Share, UserError
from dsjax.nn.expert_parallel import apply_experts, placement_of
from dsjax.nn.lora import FrozenWeight
from dsjax.nn.mlp import MLP
from dsjax.nn.placement import moved_mean
from dsjax.nn.router import (
    Decisions,
    RouterStats,
    RouterSums,
    Scoring,
    capacity_of,
    chosen_weights,
    log_distribution,
    moved_bias,
    replayed,
)
from dsjax.nn.routing_losses import (
    EntropyConstraint,
    entropy_loss,
    moved_multipliers,
    sequence_loss,
    switch_loss,
    z_loss,
)
from dsjax.sharding import buffer, current_mesh, map_shards, param
from pallas_kernels.expert_dispatch import top_k_route


@dataclasses.dataclass(frozen=True)
class DynamicCapacity:
    """A capacity factor that follows the loads, out of a short list, each compiled when first needed.

    The smallest factor is taken at which ``quantile`` of the last ``window`` steps would have dropped at most
    ``target_drop_rate`` of their pairs (docs/dynamic_capacity.md).

    Attributes:
        factors: the list, rising. Training begins with the last one.
        target_drop_rate: share of the pairs (token, expert) that may be dropped.
        quantile: share of the steps in which it may be no more.
        window: steps that are looked back on.
        hysteresis: a smaller factor must keep the drop rate below ``1 - hysteresis`` times the target.
    """

    factors: tuple[PositiveFloat, ...] = (1.0, 1.25, 1.5, 2.0)
    target_drop_rate: OpenShare = 0.001
    quantile: Share = 0.9
    window: PositiveInt = 50
    hysteresis: OpenShare = 0.5

    def validate(self) -> None:
        if not self.factors or list(self.factors) != sorted(set(self.factors)):
            raise UserError(f"factors is {self.factors}; it must be a list of rising numbers")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A layer of ``num_experts`` feed-forward experts, ``top_k`` of them for each token.

    Attributes:
        num_experts: routed experts.
        top_k: experts that each token visits.
        d_ff: inner width of one expert.
        num_shared_experts: experts that every token visits (one MLP of that many times ``d_ff``).
        scoring: ``softmax`` over the experts (DeepSeek-V2), or ``sigmoid`` of each (V3).
        num_groups: groups of neighbouring experts, 1 for none; a token chooses among its ``top_groups`` best.
        top_groups: how many those are.
        group_score: a group counts by its best expert (``max``: V2) or by the sum of its two best (``top2``: V3).
        normalize_weights: a token's weights sum to 1 over its chosen experts; of one choice alone the weight is 1 then,
            from which its router learns nothing.
        routed_scale: factor on the routed experts' output.
        balance_coef: weight of the Switch balance loss.
        sequence_coef: weight of the balance loss within each sequence.
        z_coef: weight of the router z-loss.
        entropy: bounds on the routing entropies, held by multipliers, or none.
        bias_update_rate: how far each step moves an expert's selection bias towards balance; 0: not at all, and there
            is no bias unless ``selection_bias`` says so.
        selection_bias: there is a bias even if it does not move: that of a checkpoint.
        capacity: pairs that an expert takes of a training batch, as a multiple of its even share; those behind it, in
            the order of the batch, are dropped. None: no expert drops any, as everywhere outside of training.
        num_replicas: further places for the busiest experts, as many on each device of the expert axes; 0: each expert
            has one place (docs/experts.md).
    """

    num_experts: PositiveInt = 8
    top_k: PositiveInt = 2
    d_ff: PositiveInt = 256
    num_shared_experts: NonNegativeInt = 0
    scoring: Scoring = "softmax"
    num_groups: PositiveInt = 1
    top_groups: PositiveInt = 1
    group_score: Literal["max", "top2"] = "max"
    normalize_weights: bool = True
    routed_scale: PositiveFloat = 1.0
    balance_coef: NonNegativeFloat = 0.01
    sequence_coef: NonNegativeFloat = 0.0
    z_coef: NonNegativeFloat = 0.0
    entropy: EntropyConstraint | None = None
    bias_update_rate: NonNegativeFloat = 0.0
    selection_bias: bool = False
    capacity: PositiveFloat | DynamicCapacity | None = None
    num_replicas: NonNegativeInt = 0

    def validate(self) -> None:
        E, G, kept = self.num_experts, self.num_groups, self.top_groups
        if self.top_k > E:
            raise UserError(f"top_k is {self.top_k}; it must be at most num_experts, {E}")
        if E % G:
            raise UserError(f"num_groups is {G}; it must divide num_experts, {E}")
        if kept > G:
            raise UserError(f"top_groups is {kept}; it must be at most num_groups, {G}")
        if self.top_k > kept * (E // G):
            raise UserError(
                f"top_k is {self.top_k}; the top_groups={kept} chosen groups have {kept * (E // G)} experts"
            )
        if self.entropy is not None and E == 1:
            raise UserError("entropy is set, but num_experts is 1: there is nothing to choose")

    @property
    def decision_dtype(self) -> np.dtype:
        """The type that the number of an expert is told in."""
        return np.dtype(np.int16 if self.num_experts <= 2**15 else np.int32)

    @property
    def has_bias(self) -> bool:
        return self.selection_bias or self.bias_update_rate > 0

    def num_params(self, d_model: int) -> int:
        return d_model * self.num_experts + 3 * d_model * self.d_ff * (self.num_experts + self.num_shared_experts)

    def num_active_params(self, d_model: int) -> int:
        return d_model * self.num_experts + 3 * d_model * self.d_ff * (self.top_k + self.num_shared_experts)

    def loss_weights(self) -> dict[str, float]:
        """Weight of each auxiliary loss in use, by name."""
        weights = {
            "balance": self.balance_coef,
            "router_z": self.z_coef,
            "sequence_balance": self.sequence_coef,
            "entropy_constraint": 0.0 if self.entropy is None else 1.0,  # its weights are the multipliers
        }
        return {name: weight for name, weight in weights.items() if weight}

    def training_factor(self, dynamic: float | None = None) -> float | None:
        """The capacity factor in training; of a dynamic one ``dynamic``, or by default the largest."""
        if isinstance(self.capacity, DynamicCapacity):
            return self.capacity.factors[-1] if dynamic is None else dynamic
        return self.capacity

    def make(self, d_model: int, *, out_scale: float, rngs: nnx.Rngs) -> nnx.Module:
        return MoE(self, d_model, out_scale=out_scale, rngs=rngs)


class MoE(nnx.Module):
    """Routed experts plus shared ones.

    ``capacity_factor`` is None, so that every pair (token, expert) is computed, unless a trainer sets it.
    """

    EXPERTS = ("w_gate", "w_up", "w_down")

    def __init__(self, cfg: MoEConfig, d_model: int, *, out_scale: float = 1.0, rngs: nnx.Rngs):
        E, D, F = cfg.num_experts, d_model, cfg.d_ff
        self.cfg = cfg
        self.capacity_factor: float | None = None
        self.w_router = param(rngs, (D, E), ("embed", "router"), fan_in=D)
        self.w_gate = param(rngs, (E, D, F), ("expert", "embed", "mlp"), fan_in=D)
        self.w_up = param(rngs, (E, D, F), ("expert", "embed", "mlp"), fan_in=D)
        self.w_down = param(rngs, (E, F, D), ("expert", "mlp", "embed"), fan_in=F, scale=out_scale)
        if cfg.has_bias:
            self.selection_bias = buffer((E,), ("router",))
        if cfg.entropy is not None:
            self.entropy_multipliers = buffer((3,), ("router",))
        if cfg.num_replicas:
            # The experts that they are of; laid out for decoding, the experts of all places (placement_of).
            self.replicas = buffer((cfg.num_replicas,), ("router",))
            self.mean_load = buffer((E,), ("router",))
        if cfg.num_shared_experts:
            self.shared = MLP(D, cfg.num_shared_experts * F, out_scale=out_scale, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        counted_BT: Float[Array, "B T"],
        layer: Int[Array, ""] | None = None,
        *,
        experts_BTX: Int[Array, "B T X"] | None = None,
        tell_experts: bool = False,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Outputs of the tokens, and what the router did; padding visits no routed expert.

        Args:
            x_BTD: tokens.
            counted_BT: 1 for tokens, 0 for padding.
            layer: the experts' weights are those of a stack of layers, of which this is number ``layer``.
            experts_BTX: decisions to use in place of its own (:func:`dsjax.nn.router.replayed`).
            tell_experts: the stats have the decisions.
        """
        cfg = self.cfg
        # By default a TPU would round both to bfloat16 first.
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), self.w_router[...], precision="highest")
        log_probs_BTE = log_distribution(logits_BTE, cfg.scoring)
        probs_BTE = jnp.exp(log_probs_BTE)
        scores_BTE = probs_BTE if cfg.scoring == "softmax" else jax.nn.sigmoid(logits_BTE)
        y_BTD, load_E, kept_E, decisions = self._routed(x_BTD, scores_BTE, counted_BT, layer, experts_BTX, tell_experts)
        if cfg.num_shared_experts:
            y_BTD = y_BTD + self.shared(x_BTD)

        entropy_BT = -jnp.sum(probs_BTE * log_probs_BTE, axis=-1)
        tokens, places = jnp.sum(counted_BT > 0, dtype=jnp.int32), counted_BT.size
        factors = cfg.capacity.factors if isinstance(cfg.capacity, DynamicCapacity) else ()
        sums = RouterSums(
            tokens=tokens,
            pairs=tokens * cfg.top_k,
            load_E=load_E,
            kept_E=kept_E,
            dropped_E=self._dropped(load_E, self.capacity_factor, places),
            dropped_at={str(factor): jnp.sum(self._dropped(load_E, factor, places)) for factor in factors},
            prob_E=jnp.einsum("BTE,BT->E", probs_BTE, counted_BT),
            entropy=jnp.sum(entropy_BT * counted_BT),
        )
        losses = self._losses(logits_BTE, scores_BTE, probs_BTE, counted_BT, sums)
        return y_BTD, RouterStats(sums, losses, decisions)

    def _capacity(self, factor: float, places: int) -> int:
        """Pairs that an expert has room for, of a batch with that many places for tokens."""
        return capacity_of(factor, places, self.cfg.top_k, self.cfg.num_experts)

    def _dropped(self, load_E: Int[Array, " E"], factor: float | None, places: int) -> Int[Array, " E"]:
        """Pairs that find no room, by expert."""
        return jnp.zeros_like(load_E) if factor is None else jnp.maximum(load_E - self._capacity(factor, places), 0)

    def _routed(
        self, x_BTD: Any, scores_BTE: Any, counted_BT: Any, layer: Any, experts_BTX: Any, tell_experts: bool
    ) -> tuple[Float[Array, "B T D"], Int[Array, " E"], Int[Array, " E"], Decisions | None]:
        """Route, dispatch, experts, combine, each device with its own tokens; loads and kept pairs of all devices.

        And the decisions, if they are to be told.
        """
        cfg, factor = self.cfg, self.capacity_factor
        capacity = None if factor is None else self._capacity(factor, counted_BT.size)

        def own(x_BTD, scores_BTE, counted_BT, experts_BTX, bias_E, replicas_R, w_gate, w_up, w_down, layer):
            scores_TE = scores_BTE.reshape(-1, cfg.num_experts)
            chosen = choice = top_k_route(
                scores_TE,
                cfg.top_k,
                bias_E=bias_E,
                num_groups=cfg.num_groups,
                top_groups=cfg.top_groups,
                group_score=cfg.group_score,
                counted_T=counted_BT.reshape(-1) > 0,
            )
            if experts_BTX is not None:
                choice = replayed(chosen, scores_TE, experts_BTX.reshape(-1, cfg.top_k))
            weights_TX = chosen_weights(choice.scores_TX, normalize=cfg.normalize_weights, scale=cfg.routed_scale)
            x_TD, experts = x_BTD.reshape(-1, x_BTD.shape[-1]), (w_gate, w_up, w_down)
            options: dict[str, Any] = {"layer": layer, "capacity": capacity, "num_sequences": len(x_BTD)}
            if replicas_R is not None:
                options["placement"] = placement_of(replicas_R, cfg.num_experts, cfg.num_replicas)
            y_TD, kept_E = apply_experts(x_TD, choice, weights_TX.astype(x_TD.dtype), *experts, **options)
            load_E = choice.counts_E
            if (current := current_mesh()) is not None:
                load_E = jax.lax.psum(load_E, (*current[1].batch, *current[1].length))
            told = None
            if tell_experts:
                told = Decisions(*(self._told(x.experts_TX, counted_BT.shape) for x in (choice, chosen)))
            return y_TD.reshape(x_BTD.shape), load_E, kept_E, told

        tokens, stack = ("batch", "length", None), () if layer is None else ("layers",)
        up, down = (*stack, "expert", None, "mlp"), (*stack, "expert", "mlp", None)
        bias_E = self.selection_bias[...] if cfg.has_bias else None
        replicas_R = self.replicas[...].astype(jnp.int32) if cfg.num_replicas else None
        weights = [getattr(self, name)[...] for name in self.EXPERTS]
        in_axes = (tokens, tokens, tokens[:2], tokens, (), (), up, up, down, ())
        on_shards = map_shards(own, in_axes, (tokens, (), (), tokens))

        def run(x_BTD: Any, scores_BTE: Any, *weights: Any) -> Any:
            arrays = (w.astype(x_BTD.dtype) for w in weights)
            return on_shards(x_BTD, scores_BTE, counted_BT, experts_BTX, bias_E, replicas_R, *arrays, layer)

        if any(isinstance(w, FrozenWeight) for w in weights):
            run = jax.checkpoint(run)  # the backward pass keeps them as they are stored, and writes them out again
        return run(x_BTD, scores_BTE, *weights)

    def _told(self, experts_TX: Int[Array, "tokens X"], shape: tuple[int, ...]) -> Int[Array, "B T X"]:
        """Decisions as they are told: in few bytes, -1 for a token that does not count."""
        told_TX = jnp.where(experts_TX < self.cfg.num_experts, experts_TX, -1)
        return told_TX.astype(self.cfg.decision_dtype).reshape(*shape, -1)

    def _losses(
        self, logits_BTE: Any, scores_BTE: Any, probs_BTE: Any, counted_BT: Any, sums: RouterSums
    ) -> dict[str, Float[Array, ""]]:
        """The auxiliary losses in use, by name."""
        cfg, tokens, losses = self.cfg, jnp.maximum(jnp.sum(counted_BT), 1.0), {}
        if cfg.balance_coef:
            losses["balance"] = switch_loss(sums.load_E, sums.prob_E / tokens, tokens, cfg.top_k)
        if cfg.z_coef:
            losses["router_z"] = z_loss(logits_BTE, counted_BT, tokens)
        if cfg.sequence_coef:
            losses["sequence_balance"] = sequence_loss(scores_BTE, probs_BTE, counted_BT, cfg.top_k)
        if cfg.entropy is not None:
            losses["entropy_constraint"] = entropy_loss(cfg.entropy, self.entropy_multipliers[...], sums)
        return losses

    def moved_buffers(self, sums: RouterSums) -> dict[str, Array]:
        """The buffers behind a step whose whole batch has ``sums``, alike for one layer and for a stack."""
        cfg, moved = self.cfg, {}
        if cfg.has_bias:
            moved["selection_bias"] = moved_bias(self.selection_bias[...], sums.load_E, cfg.bias_update_rate)
        if cfg.entropy is not None:
            moved["entropy_multipliers"] = moved_multipliers(cfg.entropy, self.entropy_multipliers[...], sums)
        if cfg.num_replicas:  # they stay where they are: see placed_anew
            moved["replicas"] = self.replicas[...]
            moved["mean_load"] = moved_mean(self.mean_load[...], sums.load_E)
        return moved


def set_capacity(model: nnx.Module, dynamic: float | None = None) -> None:
    """Gives the layers of experts in ``model`` the capacities that their configs ask for in training.

    ``dynamic`` is the factor of those that have a dynamic one; None: the largest of its list.
    """
    for _, module in nnx.iter_graph(model):
        if isinstance(module, MoE):
            module.capacity_factor = module.cfg.training_factor(dynamic)
