"""Rows sorted by expert, to those devices along one mesh axis that hold the experts, and back.

A device has rows for all experts of the axis, sorted by expert, and holds a part of the experts. Its rows of one expert
are a *segment*: it goes to one device, where it stands behind the segments of the same expert of the devices before. So
what arrives is sorted by expert again, and nothing is sorted a second time. Every device knows the size of every
segment (an all-gather of counts), and with it where each one begins, here and there.

TPU and GPU send the segments as they are (`jax.lax.ragged_all_to_all`: real bytes only). That does not exist on CPU:
there each device sends as many slots to each other one as it may ever need, filled or not, with the same result.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.platforms import by_platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hop:
    """One exchange over a mesh axis, inside a shard_map over it.

    Attributes:
        counts_NE: rows that each of the N devices has for each of the E experts of them all; the first E / N experts
            are those of device 0.
        axis: of the mesh.
        num_sent: static size of a device's rows.
        num_received: static size of what a device receives.
        num_slots: static bound on what one device sends to one other.
    """

    counts_NE: Any
    axis: str = dataclasses.field(metadata={"static": True})
    num_sent: int = dataclasses.field(metadata={"static": True})
    num_received: int = dataclasses.field(metadata={"static": True})
    num_slots: int = dataclasses.field(metadata={"static": True})

    @property
    def sizes_e(self) -> Int[Array, " e"]:
        """Rows of each of this device's experts behind the exchange, those that found no room left out.

        Room is made for the worst case; so if any is left out, there is an error in this library, and whoever counts
        pairs finds it.
        """
        rows_Ne = self._own(self.counts_NE)
        arrival_Ne = _sums_before(jnp.sum(rows_Ne, axis=0), axis=0) + _sums_before(rows_Ne, axis=0)
        room_Ne = jnp.minimum(self.num_slots - _sums_before(rows_Ne, axis=1), self.num_received - arrival_Ne)
        return jnp.sum(jnp.clip(room_Ne, 0, rows_Ne), axis=0)

    def segments(self) -> tuple[Segments, Segments]:
        """What this device sends, by expert; what it receives, by device and then by its own expert."""
        counts_NE, (N, E) = self.counts_NE, self.counts_NE.shape
        begin_NE = _sums_before(counts_NE, axis=1)  # of each segment among the rows of the device that sends it
        rows_Ne = jnp.sum(counts_NE, axis=0).reshape(N, E // N)
        arrival_NE = _sums_before(rows_Ne, axis=1).reshape(E) + _sums_before(counts_NE, axis=0)
        here = jax.lax.axis_index(self.axis)
        sent = Segments(counts_NE[here], begin_NE[here], arrival_NE[here])
        received = Segments(*(self._own(a).reshape(-1) for a in (counts_NE, arrival_NE, begin_NE)))
        return sent, received

    def _own(self, a_NE: jax.Array) -> jax.Array:
        """The columns of this device's experts."""
        N, E = a_NE.shape
        return jax.lax.dynamic_slice_in_dim(a_NE, jax.lax.axis_index(self.axis) * (E // N), E // N, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """As many segments for each other device; those of the first device come first.

    Attributes:
        sizes_U: rows of each.
        here_U: where each begins among this device's rows.
        there_U: where each begins among the rows of the other device.
    """

    sizes_U: Any
    here_U: Any
    there_U: Any


def make_hop(counts_E: Int[Array, " E"], axis: str, *, num_sent: int, num_received: int, num_slots: int) -> Hop:
    """The exchange of rows of which this device has ``counts_E``; sizes as in :class:`Hop`."""
    return Hop(jax.lax.all_gather(counts_E, axis), axis, num_sent, num_received, num_slots)


@jax.custom_vjp
def send(rows_RD: Float[Array, "R D"], hop: Hop) -> Float[Array, "S D"]:
    """This device's rows, sorted by expert, to the devices of those experts; what arrives is sorted by expert, too.

    What stands behind the last row that arrived is not said.
    """
    sent, received = hop.segments()
    return _move(rows_RD, sent, received, hop, hop.num_received)


@jax.custom_vjp
def bring_back(rows_SD: Float[Array, "S D"], hop: Hop) -> Float[Array, "R D"]:
    """The inverse and the transpose of :func:`send`."""
    sent, received = hop.segments()
    return _move(rows_SD, received, sent, hop, hop.num_sent)


send.defvjp(lambda rows, hop: (send(rows, hop), hop), lambda hop, d_SD: (bring_back(d_SD, hop), None))
bring_back.defvjp(lambda rows, hop: (bring_back(rows, hop), hop), lambda hop, d_RD: (send(d_RD, hop), None))


def _move(rows_RD, out: Segments, into: Segments, hop: Hop, num_rows: int):
    kernels = {"tpu": _ragged, "cuda": _ragged, "default": _padded}
    static: dict[str, Any] = {"axis": hop.axis, "num_rows": num_rows, "num_slots": hop.num_slots}
    choices = {platform: functools.partial(f, **static) for platform, f in kernels.items()}
    return by_platform(rows_RD, out, into, **choices)


def _ragged(rows_RD, out: Segments, into: Segments, *, axis: str, num_rows: int, num_slots: int):
    space_SD = jax.lax.empty((num_rows, rows_RD.shape[1]), rows_RD.dtype)
    offsets = (out.here_U, out.sizes_U, out.there_U, into.sizes_U)
    return jax.lax.ragged_all_to_all(rows_RD, space_SD, *offsets, axis_name=axis)


def _padded(rows_RD, out: Segments, into: Segments, *, axis: str, num_rows: int, num_slots: int):
    """``num_slots`` rows to each device, its segments one behind the other."""
    N = jax.lax.axis_size(axis)
    from_NC, _ = _rows_of_slots(out, N, num_slots)
    slots_NCD = jax.lax.all_to_all(rows_RD[from_NC], axis, 0, 0)
    to_NC, filled_NC = _rows_of_slots(into, N, num_slots)
    slot_S = jnp.zeros(num_rows, jnp.int32)
    slot_S = slot_S.at[jnp.where(filled_NC, to_NC, num_rows).reshape(-1)].set(
        jnp.arange(N * num_slots, dtype=jnp.int32), mode="drop", unique_indices=True
    )
    return slots_NCD.reshape(-1, rows_RD.shape[1])[slot_S]


def _rows_of_slots(segments: Segments, N: int, num_slots: int) -> tuple[jax.Array, jax.Array]:
    """The row here that belongs in each slot for each device, and whether there is one (else row 0)."""
    sizes_NU, here_NU = segments.sizes_U.reshape(N, -1), segments.here_U.reshape(N, -1)
    end_NU, slot_C = jnp.cumsum(sizes_NU, axis=1), jnp.arange(num_slots)
    number_NC = jax.vmap(lambda end_U: jnp.searchsorted(end_U, slot_C, side="right"))(end_NU)
    filled_NC = number_NC < sizes_NU.shape[1]
    shift_NU = here_NU - (end_NU - sizes_NU)
    row_NC = slot_C + jnp.take_along_axis(shift_NU, jnp.where(filled_NC, number_NC, 0), axis=1)
    return jnp.where(filled_NC, row_NC, 0), filled_NC


def _sums_before(a: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(a, axis=axis) - a
