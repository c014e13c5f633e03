"""What a decoder returns."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Int

from dsjax.nn.cache import Cache
from dsjax.nn.history import Copy
from dsjax.nn.masks import Leaf
from dsjax.nn.router import RouterStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """Hidden states after the final norm, the cache behind them, and what the layers report.

    Attributes:
        hidden_BTD: input of the output matrix.
        cache: advanced by T positions; None without one.
        router: RouterStats of each group of experts, by group name, stacked over its layers.
        losses: auxiliary losses by name, already weighted.
        copy: a bonus on one logit of each position, or none.
        experts_BTLK: the K experts that each position was sent to in each of the L layers of experts, first to last, if
            that was asked for; -1: at padding, or where a layer has fewer.
        own_experts_BTLK: those that the routers chose by themselves: the same, unless they were given others to use.
    """

    hidden_BTD: Leaf
    cache: Cache | None
    router: dict[str, RouterStats]
    losses: dict[str, Leaf]
    copy: Copy | None
    experts_BTLK: Leaf = None
    own_experts_BTLK: Leaf = None

    @property
    def loads(self) -> dict[str, Int[Array, "L E"]]:
        """By group of experts: the (token, expert) pairs that each expert of each layer received."""
        return {name: stats.load_E for name, stats in self.router.items()}
