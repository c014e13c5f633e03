"""How fast a program can be at best: its matrix products, memory traffic and link traffic, each at the chip's peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from dsjax.plan.chips import Topology, ici_bandwidth
from dsjax.plan.traffic import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step if nothing but this took time; None where the chip table has no figure.

    The step takes at least the longest of the three: they can overlap at best.
    """

    mxu: float | None
    hbm: float | None
    ici: float | None

    @property
    def bound(self) -> str | None:
        """Which of them limits the step."""
        known = {name: getattr(self, name) for name in ("mxu", "hbm", "ici")}
        known = {name: seconds for name, seconds in known.items() if seconds is not None}
        return max(known, key=known.__getitem__) if known else None

    @property
    def seconds(self) -> float | None:
        """The longest of them."""
        return None if self.bound is None else getattr(self, self.bound)


def make_roofline(
    topology: Topology,
    *,
    flops: float,
    hbm_bytes: float | None,
    collectives: Iterable[Collective] | None,
    places: np.ndarray | None,
) -> Roofline:
    """The roofline of a step.

    Args:
        topology: the chips.
        flops: executed by all devices, in bfloat16.
        hbm_bytes: read and written by one device; None: not known.
        collectives: of the step; None: not known.
        places: grid coordinates of each device of the flattened mesh, (devices, dims); None: links have no grid.
    """
    chip = topology.chip
    peak = chip.peak("bf16")
    mxu = None if peak is None else flops / topology.num_chips / peak
    per_device = None if chip.hbm_bandwidth is None else chip.hbm_bandwidth / chip.devices_per_chip
    hbm = None if per_device is None or hbm_bytes is None else hbm_bytes / per_device
    ici: float | None = None
    if collectives is not None and chip.ici_link_bandwidth is not None:
        ici = sum(seconds_of(c, topology, places) for c in collectives)
    return Roofline(mxu, hbm, ici)


def seconds_of(collective: Collective, topology: Topology, places: np.ndarray | None) -> float:
    """Time of all executions of one collective, as if nothing else used the links.

    It uses the links along every dimension of the grid in which the members of a group differ.
    """
    bandwidth = ici_bandwidth(topology, spanned(collective.groups, places))
    if not bandwidth:  # the devices of one chip talk inside it
        return 0.0
    return collective.bytes * collective.times / bandwidth


def spanned(groups: np.ndarray, places: np.ndarray | None) -> set[int]:
    """The grid dimensions in which members of a group differ, in the group that spans the fewest (the slowest)."""
    if places is None:
        return {0}
    coordinates = places[groups]  # (groups, members, dims)
    differs = (coordinates != coordinates[:, :1]).any(axis=1)
    moving = differs[differs.any(axis=1)]
    if not len(moving):
        return set()
    return set(np.flatnonzero(moving[moving.sum(axis=1).argmin()]).tolist())
