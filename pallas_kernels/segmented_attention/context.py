"""Context parallelism: a row's positions cut over devices, of which only the tails travel.

A device holds whole segments. Where cuts are shifted, its first segment begins on the device before it, which sends it
those positions; then every device has the tails of the segments that end on it, and all of them are gathered: w / W of
the keys and values that ring attention (Liu et al. 2023) sends around. In the backward pass their gradients go back
the same ways.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.cost import useful_flops
from pallas_kernels.segmented_attention.attend import Backend, attend, check_name, sizes, without_choice
from pallas_kernels.segmented_attention.far import Tails, pairs_before
from pallas_kernels.segmented_attention.segments import Segments
from pallas_kernels.segmented_attention.selection import tails

Apart = Callable[[Callable[..., Array]], Callable[..., Array]]


def context_parallel_attention(
    q_BtNH: Float[Array, "B t N H"],
    k_BtKH: Float[Array, "B t K H"],
    v_BtKU: Float[Array, "B t K U"],
    *,
    axis: str | tuple[str, ...],
    segments: Segments | tuple[Segments, ...],
    apart: Apart | None = None,
    documents: Int[Array, "B t"] | None = None,
    scale: float | None = None,
    implementation: Backend | None = None,
) -> Float[Array, "B t N U"]:
    """:func:`segmented_attention` over rows cut along a mesh axis; for `jax.shard_map` with `check_vma=False`.

    Args:
        q_BtNH, k_BtKH, v_BtKU: this device's positions, T / devices of them; the devices' parts follow each other.
        axis: the mesh axis, or axes.
        segments: how the whole row is cut; several, which differ in their shift alone: by some heads.
        apart: ``apart(f)(*arrays)`` joins ``f(cut, *some)`` of the key/value heads of each cut, which stand in
            dimension 2 of the arrays and of what ``f`` returns. None: all heads are cut alike.
        documents: of this device's positions.
        scale: of the scores; None: 1 / sqrt(H).
        implementation: see :func:`segmented_attention`; there is no reference over devices.

    Raises:
        ValueError: a device's part is no whole number of segments, or as :func:`segmented_attention`.
    """
    B, t, N, H, U = sizes(q_BtNH, k_BtKH, v_BtKU, documents)
    check_name(implementation, get_args(Backend))
    cuts = (segments,) if isinstance(segments, Segments) else segments
    W, w, K, front = cuts[0].size, cuts[0].window, k_BtKH.shape[2], max(cut.shift for cut in cuts)
    if t % W:
        raise ValueError(f"a device has {t} positions; segment_size, {W}, must divide them")
    apart = (lambda f: functools.partial(f, cuts[0])) if apart is None else apart
    ids_Bt = jnp.ones(q_BtNH.shape[:2], jnp.int32) if documents is None else documents
    scale = H**-0.5 if scale is None else float(scale)
    num_devices, per_device, place = jax.lax.axis_size(axis), t // W, jax.lax.axis_index(axis)

    def own(cut: Segments, x_Bs: Array) -> Array:
        return x_Bs[:, front - cut.shift :]

    def closed(cut: Segments, x_Bs: Array) -> Array:
        """The tails of the segments that end on this device, one behind the other."""
        tails_BJw = tails(own(cut, x_Bs), dataclasses.replace(cut, shift=0))[:, :per_device]
        return tails_BJw.reshape(B, per_device * w, *x_Bs.shape[2:])

    # Devices may have heads of different cuts: all that travels does so here, and not in what differs between them.
    k_BsKH, v_BsKU, ids_Bs = (_with_front(x, front, axis) for x in (k_BtKH, v_BtKU, ids_Bt))
    gather = functools.partial(jax.lax.all_gather, axis_name=axis, axis=1, tiled=True)
    gathered = [gather(apart(closed)(x)) for x in (k_BsKH, v_BsKU)] if w else []
    ids_of = {cut: gather(closed(cut, ids_Bs)) for cut in dict.fromkeys(cuts)} if w else {}

    def run(cut: Segments, q_BtkGH: Array, k_BskH: Array, v_BskU: Array, *gathered: Array) -> Array:
        behind, (k, G) = None, q_BtkGH.shape[2:4]
        if gathered:
            found = (x.reshape(B, num_devices * per_device, w, *x.shape[2:]) for x in (*gathered, ids_of[cut]))
            k_BJwkH, v_BJwkU, ids_BJw = found
            behind = Tails(k_BJwkH, v_BJwkU, ids_BJw, before=place * per_device)
        some = q_BtkGH.reshape(B, t, k * G, H), own(cut, k_BskH), own(cut, v_BskU), own(cut, ids_Bs)
        out_BtnU = _attend(*some, behind, without_choice(cut, num_devices * t), num_devices, scale, implementation)
        return out_BtnU.reshape(B, t, k, G, U)

    out_BtKGU = apart(run)(q_BtNH.reshape(B, t, K, N // K, H), k_BsKH, v_BsKU, *gathered)
    return out_BtKGU.reshape(B, t, N, U)


def _with_front(x_Bt: Array, num: int, axis: str | tuple[str, ...]) -> Array:
    """With the last ``num`` positions of the device before in front; in front of a row, zeros."""
    if num == 0:
        return x_Bt
    onward = [(device, device + 1) for device in range(jax.lax.axis_size(axis) - 1)]
    return jnp.concatenate([jax.lax.ppermute(x_Bt[:, -num:], axis, onward), x_Bt], axis=1)


def _attend(
    q_BtNH: Array,
    k_BsKH: Array,
    v_BsKU: Array,
    ids_Bs: Array,
    behind: Tails | None,
    segments: Segments,
    num_devices: int,
    scale: float,
    implementation: Backend | None,
) -> Array:
    """A device's queries, with keys from where its first segment begins, and all tails of the row."""
    t, shift, local = q_BtNH.shape[1], segments.shift, dataclasses.replace(segments, shift=0)
    q_BsNH = jnp.pad(q_BtNH, ((0, 0), (shift, 0), (0, 0), (0, 0)))  # what comes of these is another device's
    # A backend counts all that a device computes: also for the positions before its first segment, and chunks skipped.
    computed = local.visible_pairs(shift + t)
    if behind is not None and local.top is None:
        computed += pairs_before(shift + t, behind.ids_BJw.shape[1], local.window)
    with useful_flops(min(segments.visible_pairs(num_devices * t) / num_devices / computed, 1)):
        return attend(q_BsNH, k_BsKH, v_BsKU, ids_Bs, behind, local, scale, implementation)[:, shift:]
