"""Experts across devices: tokens go to the devices that hold the experts they chose, and the results come back."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import UserError
from dsjax.nn.exchange import bring_back, make_hop, send
from dsjax.nn.placement import Placement, Weights, slots_at_home
from dsjax.sharding import current_mesh
from pallas_kernels.expert_dispatch import Choice, Plan, combine, dispatch, plan_dispatch
from pallas_kernels.grouped_matmul import expert_swiglu, grouped_swiglu


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
    num_sequences: int = 1,
    placement: Placement | None = None,
) -> tuple[Float[Array, "T D"], Int[Array, " E"]]:
    """The routed experts' weighted outputs, inside a :func:`dsjax.sharding.map_shards`, of each device's own tokens.

    Args:
        x_TD: this device's tokens, flat. Where the rules do not cut rows over the expert axis, its devices all have the
            same ones.
        choice: of these tokens, among all E experts.
        weights_TX: what each choice counts.
        w_gate_eDF, w_up_eDF, w_down_eFD: of this device's experts, or, with a placement, of its slots.
        layer: the weights are those of a stack of layers, of which this is number ``layer``.
        capacity: of all pairs of the whole batch that chose an expert, the first ``capacity`` go to it (by token, in
            the order of the batch) and the others nowhere; None: all.
        num_sequences: of the batch that the tokens are of, one behind the other: with a capacity, a mesh that cuts
            sequences needs to know.
        placement: of experts that have several places; weights may be given as those of the experts, then the
            replicas' are fetched from the devices that have them.

    Returns:
        The outputs, and how many pairs each of the E experts really got, over all devices: the rows that its matrix
        products ran over, where those were. Who compares them with what was chosen checks the exchange, too.
    """
    axes = _axes("expert")
    cut = bool(axes) and set(axes) <= set(_axes("batch"))
    limit_E = None if capacity is None else _limits(choice, capacity, num_sequences)
    weights = (w_gate_eDF, w_up_eDF, w_down_eFD)
    if placement is not None:
        weights, layer = placement.weights_of_device(weights, tuple(axes), layer)
        token_axes = (*_axes("batch"), *_axes("length"))
        shift = jax.lax.axis_index(token_axes) if token_axes else 0
        choice, limit_E = placement.choice_of_slots(choice, limit_E, shift)
    with jax.named_scope("dispatch"):
        plan = _plan(choice, limit_E, {} if cut else axes)
    if cut:
        y_RD, sizes_e = _elsewhere(x_TD, plan, weights, layer, axes, capacity)
    else:
        with jax.named_scope("experts"):
            y_RD, sizes_e = expert_swiglu(x_TD, *weights, plan, layer=layer), plan.sizes_E
    with jax.named_scope("combine"):
        y_TD = combine(y_RD, weights_TX, plan)
        y_TD = jax.lax.psum(y_TD, (*_axes("mlp"), *(() if cut else axes)))
    return y_TD, _over_devices(sizes_e, axes, placement)


def placement_of(experts_P: Int[Array, " P"], num_experts: int, num_replicas: int) -> Placement:
    """Which expert stands in each slot, by the ``replicas`` of a layer.

    In training those are the experts of the replicas alone: every expert is where it is without a placement, and after
    a device's experts come its replicas. Of a model that is laid out for decoding they are the experts of all slots, as
    its weights are, so that it is the same model on any number of devices.

    Raises:
        UserError: replicas do not divide over the devices.
    """
    axes, num = _axes("expert"), len(experts_P)
    if num > num_replicas:
        return Placement(experts_P, num_experts)
    N = math.prod(axes.values())
    if num % N:
        over = "*".join(f"{axis}={size}" for axis, size in axes.items())
        raise UserError(f"num_replicas is {num}; it must divide over the {N} devices of mesh {over}")
    return Placement(slots_at_home(experts_P, num_experts, N), num_experts, home=True)


def _elsewhere(
    x_TD: Any, plan: Plan, weights: Weights, layer: Any, axes: dict[str, int], capacity: int | None
) -> tuple[jax.Array, jax.Array]:
    """What the experts make of this device's rows: there, over one axis after the other, and back.

    And the rows that came to each of this device's experts.
    """
    (T, X), M, hops = plan.row_TX.shape, len(plan.sizes_E), []

    def most(tokens: int) -> int:
        """Rows of so many tokens that go to M experts: a token chooses none twice."""
        rows = tokens * min(X, M)
        return rows if capacity is None else min(rows, M * capacity)

    with jax.named_scope("dispatch"):
        rows_RD, counts_M = dispatch(x_TD, plan), plan.sizes_E
        for axis, size in axes.items():
            M //= size
            hop = make_hop(counts_M, axis, num_sent=len(rows_RD), num_received=most(T * size), num_slots=most(T))
            rows_RD, counts_M, T = send(rows_RD, hop), hop.sizes_e, T * size
            hops.append(hop)
    with jax.named_scope("experts"):
        y_RD = grouped_swiglu(rows_RD, *weights, sizes_E=counts_M, layer=layer)
    with jax.named_scope("combine"):
        for hop in reversed(hops):
            y_RD = bring_back(y_RD, hop)
    return y_RD, counts_M


def _over_devices(sizes_e: jax.Array, axes: dict[str, int], placement: Placement | None) -> Int[Array, " E"]:
    """Rows of each expert on all devices, from those of this device's experts or slots."""
    own, sizes_E = len(sizes_e), sizes_e
    if axes:
        sizes_E = jnp.zeros(own * math.prod(axes.values()), sizes_e.dtype)
        sizes_E = jax.lax.dynamic_update_slice_in_dim(sizes_E, sizes_e, jax.lax.axis_index(tuple(axes)) * own, axis=0)
    if placement is not None:
        sizes_E = jnp.zeros(placement.num_experts, sizes_e.dtype).at[placement.expert_P].add(sizes_E)
    return jax.lax.psum(sizes_E, tuple(dict.fromkeys((*_axes("batch"), *_axes("length"), *axes))))


def _plan(choice: Choice, limit_E: jax.Array | None, axes: dict[str, int]) -> Plan:
    """Of all experts; or, given axes along which devices have the same rows, of this device's part of them."""
    num, experts_TX, counts_E = len(choice.counts_E), choice.experts_TX, choice.counts_E
    if axes:
        num //= math.prod(axes.values())
        first = jax.lax.axis_index(tuple(axes)) * num
        experts_TX, counts_E = experts_TX - first, jax.lax.dynamic_slice_in_dim(counts_E, first, num)
        limit_E = None if limit_E is None else jax.lax.dynamic_slice_in_dim(limit_E, first, num)
    return plan_dispatch(experts_TX, num, position_TX=choice.position_TX, counts_E=counts_E, limit_E=limit_E)


def _axes(rule: str) -> dict[str, int]:
    """The mesh axes, and their sizes, that cut what ``rule`` names."""
    current = current_mesh()
    if current is None:
        return {}
    mesh, rules = current
    return {axis: mesh.shape[axis] for axis in getattr(rules, rule) if mesh.shape[axis] > 1}


def _limits(choice: Choice, capacity: int, num_sequences: int) -> Int[Array, " E"]:
    """How many of this device's pairs each expert takes."""
    batch, length, counts_E = tuple(_axes("batch")), tuple(_axes("length")), choice.counts_E
    # A batch counts sequence by sequence. Devices hold sequences in the order of the axes that cut the batch, and parts
    # of each in the order of those that cut its length.
    counts_CBE = counts_E[None, None]
    if length:
        experts_BP = choice.experts_TX.reshape(num_sequences, -1)
        counts_BE = jnp.sum(experts_BP[..., None] == jnp.arange(len(counts_E)), axis=1, dtype=jnp.int32)
        counts_CBE = jax.lax.all_gather(counts_BE, length)
    part = jax.lax.axis_index(length) if length else 0
    whole_BE = jnp.sum(counts_CBE, axis=0)
    before_BE = jnp.cumsum(whole_BE, axis=0) - whole_BE + (jnp.cumsum(counts_CBE, axis=0) - counts_CBE)[part]
    if batch:
        counts_NE = jax.lax.all_gather(jnp.sum(whole_BE, axis=0), batch)
        before_BE += (jnp.cumsum(counts_NE, axis=0) - counts_NE)[jax.lax.axis_index(batch)]
    return jnp.sum(jnp.clip(capacity - before_BE, 0, counts_CBE[part]), axis=0)
