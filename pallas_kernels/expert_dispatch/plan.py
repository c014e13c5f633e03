"""Where each pair (token, choice) goes when the pairs are sorted by expert: a counting sort."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num

from pallas_kernels.platforms import by_platform


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
    # Sums of one number and zeros: a TPU takes ten cycles to look a number up.
    chosen_TXE = experts_TX[..., None] == jnp.arange(num_experts, dtype=experts_TX.dtype)
    start_TX, size_TX = (jnp.sum(jnp.where(chosen_TXE, of_E, 0), axis=2) for of_E in (starts_E, sizes_E))
    row_TX = jnp.where(position_TX < size_TX, start_TX + position_TX, R)
    pair_TX = jnp.arange(T * X, dtype=jnp.int32).reshape(T, X)
    return Plan(row_TX, by_row(pair_TX, row_TX, R), sizes_E)


def by_row(of_TX: Num[Array, "T X"], row_TX: Int[Array, "T X"], num_rows: int) -> Num[Array, " R"]:
    """What belongs to the pairs, in the order of their rows; 0 behind the last group."""
    by_sorting, by_scattering = (functools.partial(f, num_rows=num_rows) for f in (_by_sorting, _by_scattering))
    return by_platform(of_TX, row_TX, tpu=by_sorting, default=by_scattering)


def _by_scattering(of_TX: jax.Array, row_TX: jax.Array, num_rows: int) -> jax.Array:
    return jnp.zeros(num_rows, of_TX.dtype).at[row_TX].set(of_TX, mode="drop", unique_indices=True)


def _by_sorting(of_TX: jax.Array, row_TX: jax.Array, num_rows: int) -> jax.Array:
    """Takes a v5e 9,300 cycles for 8192 pairs, where scattering takes it 56,500."""
    of_P = jax.lax.sort((row_TX.reshape(-1), of_TX.reshape(-1)), num_keys=1, is_stable=False)[1]
    of_R = jnp.pad(of_P, (0, max(num_rows - of_P.size, 0)))[:num_rows]
    return jnp.where(jnp.arange(num_rows) < jnp.sum(row_TX < num_rows), of_R, 0)


def positions(experts_TX: Int[Array, "T X"], num_experts: int) -> tuple[Int[Array, "T X"], Int[Array, " E"]]:
    """How many earlier pairs, by token and then by choice, chose the same of E experts, and each expert's count."""
    chosen_PE = (experts_TX.reshape(-1, 1) == jnp.arange(num_experts, dtype=experts_TX.dtype)).astype(jnp.int32)
    count_PE = jnp.cumsum(chosen_PE, axis=0)
    position_P = jnp.sum(chosen_PE * (count_PE - 1), axis=1)
    return position_P.reshape(experts_TX.shape), jnp.sum(chosen_PE, axis=0)
