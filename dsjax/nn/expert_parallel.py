"""Experts across devices: tokens go to the devices that hold the experts they chose, and the results come back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.sharding import current_mesh
from pallas_kernels.expert_dispatch import Choice, combine, plan_dispatch
from pallas_kernels.grouped_matmul import expert_swiglu


def apply_experts(
    x_TD: Float[Array, "T D"],
    choice: Choice,
    weights_TX: Float[Array, "T X"],
    w_gate_eDF: Float[Array, "*layers e D F"],
    w_up_eDF: Float[Array, "*layers e D F"],
    w_down_eFD: Float[Array, "*layers e F D"],
    *,
    layer: Int[Array, ""] | None = None,
    capacity: int | None = None,
) -> tuple[Float[Array, "T D"], Int[Array, " E"]]:
    """The routed experts' weighted outputs, inside a :func:`dsjax.sharding.map_shards`, of each device's own tokens.

    Args:
        x_TD: this device's tokens, flat. Where the rules do not cut rows over the expert axis, its devices all have the
            same ones.
        choice: of these tokens, among all E experts.
        weights_TX: what each choice counts.
        w_gate_eDF, w_up_eDF, w_down_eFD: of this device's experts.
        layer: the weights are those of a stack of layers, of which this is number ``layer``.
        capacity: of all pairs of the whole batch that chose an expert, the first ``capacity`` go to it (by token, in
            the order of the batch) and the others nowhere; None: all.

    Returns:
        The outputs, and how many pairs each of the E experts took, over all devices.
    """
    current, experts_TX = current_mesh(), choice.experts_TX
    counts_E, limit_E = choice.counts_E, None
    if capacity is not None:
        limit_E = jnp.full_like(counts_E, capacity)
    cut: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    if current is not None:
        assert capacity is None, "not yet"
        rules = current[1]
        cut = tuple(axis for axis in rules.expert if axis in rules.batch)
        whole = tuple(axis for axis in rules.expert if axis not in rules.batch)
        counts_E = jax.lax.psum(counts_E, (*rules.batch, *rules.length))
        if cut:
            x_TD, experts_TX, weights_TX = (
                jax.lax.all_gather(a, cut, axis=0, tiled=True) for a in (x_TD, experts_TX, weights_TX)
            )
        experts_TX = experts_TX - jax.lax.axis_index(rules.expert) * w_gate_eDF.shape[-3]
    kept_E = counts_E if limit_E is None else jnp.minimum(counts_E, limit_E)
    with jax.named_scope("dispatch"):
        plan = plan_dispatch(experts_TX, w_gate_eDF.shape[-3], limit_E=limit_E)
    with jax.named_scope("experts"):
        y_RD = expert_swiglu(x_TD, w_gate_eDF, w_up_eDF, w_down_eFD, plan, layer=layer)
    with jax.named_scope("combine"):
        y_TD = combine(y_RD, weights_TX, plan)
    if current is not None:
        y_TD = jax.lax.psum(y_TD, (*rules.mlp, *whole))
        if cut:
            y_TD = jax.lax.psum_scatter(y_TD, cut, scatter_dimension=0, tiled=True)
    return y_TD, kept_E
