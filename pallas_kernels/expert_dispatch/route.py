"""The public call for choosing experts: which, with what score, and their places in a counting sort by expert."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.expert_dispatch.backends import Implementation, run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """The experts that each of T tokens chose, best first.

    Attributes:
        experts_TX: numbers of experts; E for a token that does not count.
        scores_TX: their scores, without the bias; differentiable. 0 for a token that does not count.
        position_TX: how many earlier pairs (by token, then by choice) chose the same expert.
        counts_E: pairs that chose each expert.
    """

    experts_TX: Any
    scores_TX: Any
    position_TX: Any
    counts_E: Any


@dataclasses.dataclass(frozen=True)
class TopK:
    """What is chosen: ``top_k`` experts, from the ``top_groups`` best of ``num_groups`` groups of neighbours.

    A group is judged by its best expert (``max``: DeepSeek-V2) or by the sum of its two best (``top2``: V3).
    """

    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"


def top_k_route(
    scores_TE: Float[Array, "T E"],
    top_k: int,
    *,
    bias_E: Float[Array, " E"] | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: Literal["max", "top2"] = "max",
    counted_T: Bool[Array, " T"] | None = None,
    implementation: Implementation | None = None,
) -> Choice:
    """The ``top_k`` experts of the highest ``scores + bias``, and where a counting sort by expert puts the pairs.

    Of equal scores the lower number comes first; NaN counts as -inf; -inf can be chosen, behind all else.

    Args:
        scores_TE: float32.
        top_k: X, experts for each token.
        bias_E: added when experts are chosen, and nowhere else.
        num_groups, top_groups, group_score: see :class:`TopK`.
        counted_T: tokens that choose at all; None: all of them.
        implementation: None: the best one for the platform that the program is compiled for. A named one runs or
            raises; away from its own platform a kernel is interpreted. For GPUs there is none:
            ``gpu`` raises, and says why.

    Raises:
        ValueError: sizes out of range, shapes that do not go together, or a kernel that can not do what is asked.
    """
    spec = TopK(top_k, num_groups, top_groups, group_score)
    _check(scores_TE, bias_E, counted_T, spec)
    return _route(scores_TE, bias_E, counted_T, spec, implementation)


def _check(scores_TE: jax.Array, bias_E: jax.Array | None, counted_T: jax.Array | None, spec: TopK) -> None:
    if scores_TE.ndim != 2:
        raise ValueError(f"scores are {scores_TE.shape}; they are (T, E)")
    (T, E), G, kept = scores_TE.shape, spec.num_groups, spec.top_groups
    for name, a, expected in (("bias", bias_E, (E,)), ("counted", counted_T, (T,))):
        if a is not None and a.shape != expected:
            raise ValueError(f"{name} is {a.shape}; with scores {scores_TE.shape} it is {expected}")
    if G < 1 or E % G or not 1 <= kept <= G:
        raise ValueError(f"num_groups is {G} and top_groups {kept}; the first must divide {E} experts")
    if spec.group_score not in ("max", "top2"):
        raise ValueError(f"group_score is {spec.group_score!r}; it is one of 'max', 'top2'")
    if not 1 <= spec.top_k <= kept * (E // G):
        raise ValueError(
            f"top_k is {spec.top_k}; it is between 1 and the {kept * (E // G)} experts of the chosen groups"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _route(scores_TE, bias_E, counted_T, spec: TopK, implementation: Implementation | None) -> Choice:
    choice_TE = scores_TE.astype(jnp.float32)
    choice_TE = choice_TE if bias_E is None else choice_TE + bias_E
    choice_TE = jnp.where(jnp.isnan(choice_TE), -jnp.inf, jnp.where(choice_TE == 0, 0, choice_TE))
    experts_TX, position_TX, counts_E = run(implementation, "select", choice_TE, counted_T, spec=spec)
    own_TX = jnp.sum(jnp.where(_chosen(experts_TX, scores_TE.shape[1]), scores_TE[:, None], 0), axis=2)
    return Choice(experts_TX, own_TX, position_TX, counts_E)


def _chosen(experts_TX, num_experts: int):
    """(T, X, E). A sum of one number and zeros: a TPU would take far longer to look the number up."""
    return experts_TX[..., None] == jnp.arange(num_experts)


def _forward(scores_TE, bias_E, counted_T, spec, implementation):
    choice = _route(scores_TE, bias_E, counted_T, spec, implementation)
    return choice, (choice.experts_TX, scores_TE.shape[1])


def _backward(spec, implementation, saved, dchoice: Choice):
    return jnp.sum(jnp.where(_chosen(*saved), dchoice.scores_TX[..., None], 0), axis=1), None, None


_route.defvjp(_forward, _backward)
