"""Context parallelism: a row's positions cut over devices, of which only the tails travel.

A device holds whole segments. Where cuts are shifted, its first segment begins on the device before it, which sends it
those positions; then every device has the tails of the segments that end on it, and all of them are gathered: w / W of
the keys and values that ring attention (Liu et al. 2023) sends around. In the backward pass their gradients go back
the same ways.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cost import useful_flops
from pallas_kernels.segmented_attention.attend import Backend, attend, check_name, sizes, without_choice
from pallas_kernels.segmented_attention.far import Tails, pairs_before
from pallas_kernels.segmented_attention.segments import Segments
from pallas_kernels.segmented_attention.selection import tails


def context_parallel_attention(
    q_BtNH: Float[Array, "B t N H"],
    k_BtKH: Float[Array, "B t K H"],
    v_BtKU: Float[Array, "B t K U"],
    *,
    axis: str | tuple[str, ...],
    segments: Segments,
    documents: Int[Array, "B t"] | None = None,
    scale: float | None = None,
    implementation: Backend | None = None,
) -> Float[Array, "B t N U"]:
    """:func:`segmented_attention` over rows cut along a mesh axis; for `jax.shard_map` with `check_vma=False`.

    Args:
        q_BtNH, k_BtKH, v_BtKU: this device's positions, T / devices of them; the devices' parts follow each other.
        axis: the mesh axis, or axes.
        segments: how the whole row is cut.
        documents: of this device's positions.
        scale: of the scores; None: 1 / sqrt(H).
        implementation: see :func:`segmented_attention`; there is no reference over devices.

    Raises:
        ValueError: a device's part is no whole number of segments, or as :func:`segmented_attention`.
    """
    _, t, _, H, _ = sizes(q_BtNH, k_BtKH, v_BtKU, documents)
    check_name(implementation, get_args(Backend))
    if t % segments.size:
        raise ValueError(f"a device has {t} positions; segment_size, {segments.size}, must divide them")
    ids_Bt = jnp.ones(q_BtNH.shape[:2], jnp.int32) if documents is None else documents
    scale = H**-0.5 if scale is None else float(scale)
    num_devices, shift, per_device = jax.lax.axis_size(axis), segments.shift, t // segments.size
    segments = without_choice(segments, num_devices * t)

    def with_start(x_Bt: Array) -> Array:
        """With the positions on the device before that the first segment begins with; in front of a row, zeros."""
        onward = [(device, device + 1) for device in range(num_devices - 1)]
        return jnp.concatenate([jax.lax.ppermute(x_Bt[:, t - shift :], axis, onward), x_Bt], axis=1)

    if shift:
        k_BtKH, v_BtKU, ids_Bt = (with_start(x) for x in (k_BtKH, v_BtKU, ids_Bt))
        q_BtNH = jnp.pad(q_BtNH, ((0, 0), (shift, 0), (0, 0), (0, 0)))  # what comes of these is another device's
    local = dataclasses.replace(segments, shift=0)
    behind = None
    if segments.window:
        closed = (tails(x, local)[:, :per_device] for x in (k_BtKH, v_BtKU, ids_Bt))
        k_BJwKH, v_BJwKU, ids_BJw = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in closed)
        behind = Tails(k_BJwKH, v_BJwKU, ids_BJw, before=jax.lax.axis_index(axis) * per_device)
    # A backend counts all that a device computes: also for the positions before its first segment, and chunks skipped.
    computed = local.visible_pairs(shift + t)
    if behind is not None and local.top is None:
        computed += pairs_before(shift + t, num_devices * per_device, local.window)
    with useful_flops(min(segments.visible_pairs(num_devices * t) / num_devices / computed, 1)):
        out_BtNU = attend(q_BtNH, k_BtKH, v_BtKU, ids_Bt, behind, local, scale, implementation)
    return out_BtNU[:, shift:]
