"""Where each pair (token, choice) goes when the pairs are sorted by expert: a counting sort."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each pair (token, choice) goes when the pairs are sorted by expert.

    Attributes:
        row_TX: the row of each pair; R (one behind the last) for a pair that goes nowhere.
        pair_R: token * X + choice of each row; rows behind the last group hold 0.
        sizes_E: rows of each expert.
    """

    row_TX: Any
    pair_R: Any
    sizes_E: Any

    @property
    def token_R(self) -> Any:
        """The token of each row."""
        return self.pair_R // self.row_TX.shape[1]


def plan_dispatch(
    experts_TX: Int[Array, "T X"],
    num_experts: int,
    *,
    position_TX: Int[Array, "T X"] | None = None,
    counts_E: Int[Array, " E"] | None = None,
    limit_E: Int[Array, " E"] | None = None,
    num_rows: int | None = None,
) -> Plan:
    """The plan for experts 0 ... E - 1; pairs of other numbers go nowhere.

    Args:
        experts_TX: a token's experts, which differ.
        num_experts: E.
        position_TX, counts_E: how many earlier pairs chose the same expert, and how many did in all, if that is known
            (:func:`top_k_route` tells); both or none.
        limit_E: of an expert's pairs, so many go to it, the first ones, and the others nowhere; None: all.
        num_rows: R, at least as many as there are pairs that go somewhere; None: T * min(X, E), which holds all.
    """
    T, X = experts_TX.shape
    R = T * min(X, num_experts) if num_rows is None else num_rows
    if position_TX is None or counts_E is None:
        position_TX, counts_E = positions(experts_TX, num_experts)
    sizes_E = counts_E if limit_E is None else jnp.minimum(counts_E, jnp.maximum(limit_E, 0))
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    local_TX = jnp.clip(experts_TX, 0, num_experts - 1)
    goes_TX = (experts_TX == local_TX) & (position_TX < sizes_E[local_TX])
    row_TX = jnp.where(goes_TX, starts_E[local_TX] + position_TX, R)
    pair_TX = jnp.arange(T * X, dtype=jnp.int32).reshape(T, X)
    pair_R = jnp.zeros(R, jnp.int32).at[row_TX].set(pair_TX, mode="drop", unique_indices=True)
    return Plan(row_TX, pair_R, sizes_E)


def positions(experts_TX: Int[Array, "T X"], num_experts: int) -> tuple[Int[Array, "T X"], Int[Array, " E"]]:
    """How many earlier pairs, by token and then by choice, chose the same of E experts, and each expert's count."""
    chosen_PE = (experts_TX.reshape(-1, 1) == jnp.arange(num_experts, dtype=experts_TX.dtype)).astype(jnp.int32)
    count_PE = jnp.cumsum(chosen_PE, axis=0)
    position_P = jnp.sum(chosen_PE * (count_PE - 1), axis=1)
    return position_P.reshape(experts_TX.shape), count_PE[-1]
