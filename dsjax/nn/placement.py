"""Experts that are asked for most stand in several places: which do, where, and which token goes to which.

The idea is that of DeepSeek-V3's redundant experts (arXiv 2412.19437, 3.4). Loads are measured; the places follow from
them on the host, now and then; no program is compiled anew for it.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import UserError
from pallas_kernels.expert_dispatch import Choice
from pallas_kernels.expert_dispatch.plan import positions

MEMORY = 0.9  # of the running mean of loads
Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down: (experts, ., .), or layers of these


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Which expert stands in each of P slots, P / N on each of the N devices of the expert axes.

    Attributes:
        expert_P: numbers of experts, device by device; each of them occurs.
        num_experts: E.
        home: the first E / N slots of a device hold the experts that it has without a placement.
    """

    expert_P: Any
    num_experts: int = dataclasses.field(metadata={"static": True})
    home: bool = dataclasses.field(default=False, metadata={"static": True})

    def choice_of_slots(
        self, choice: Choice, limit_E: jax.Array | None, shift: Any = 0
    ) -> tuple[Choice, jax.Array | None]:
        """``choice`` among slots, and each slot's part of the limit.

        An expert's pairs take turns at its slots; they begin with number ``shift``, another one on each device.
        """
        E, expert_P = self.num_experts, jnp.asarray(self.expert_P)
        P = len(expert_P)
        turn_P1, replicas_E = positions(expert_P[:, None], E)
        turn_P, replicas_P = turn_P1[:, 0], replicas_E[expert_P]
        first_E = jnp.cumsum(replicas_E) - replicas_E
        slot_P = jnp.zeros(P, jnp.int32).at[first_E[expert_P] + turn_P].set(jnp.arange(P, dtype=jnp.int32))

        counted_TX = choice.experts_TX < E
        expert_TX = jnp.where(counted_TX, choice.experts_TX, 0)
        replicas_TX = replicas_E[expert_TX]
        turn_TX = (choice.position_TX + shift) % replicas_TX
        slots_TX = jnp.where(counted_TX, slot_P[first_E[expert_TX] + turn_TX], P)

        def parts(a_E: jax.Array) -> Int[Array, " P"]:
            """Of the first ``a_E`` pairs of each expert, those that go to each slot."""
            return (a_E[expert_P] + replicas_P - 1 - (turn_P - shift) % replicas_P) // replicas_P

        limit_P = None if limit_E is None else parts(jnp.minimum(limit_E, choice.counts_E))
        position_TX = choice.position_TX // replicas_TX
        return Choice(slots_TX, choice.scores_TX, position_TX, parts(choice.counts_E)), limit_P

    def weights_of_device(
        self, weights: Weights, axes: tuple[str, ...], layer: jax.Array | None
    ) -> tuple[Weights, jax.Array | None]:
        """The weights of this device's slots, and the number of their layer.

        Weights of slots come back as they are. Of experts, each device adds what it has to a sum over the devices,
        which is scattered over them; in the backward pass the gradients of the replicas go back the same way.
        """
        N = 1 if not axes else jax.lax.axis_size(axes)
        slots, own = len(self.expert_P) // N, self.num_experts // N
        if weights[0].shape[-3] == slots and slots != own:
            return weights, layer
        expert_Np = jnp.reshape(self.expert_P, (N, slots))[:, own if self.home else 0 :]
        here_Np = expert_Np - (jax.lax.axis_index(axes) * own if axes else 0)
        mine_Np = (here_Np >= 0) & (here_Np < own)

        def of_slots(w: jax.Array) -> jax.Array:
            w = w if layer is None else w[layer]
            copies = jnp.where(mine_Np[..., None, None], w[jnp.where(mine_Np, here_Np, 0)], 0)
            copies = jax.lax.psum_scatter(copies, axes, tiled=False) if axes else copies[0]
            return jnp.concatenate([w, copies]) if self.home else copies

        gate, up, down = map(of_slots, weights)
        return (gate, up, down), None


def place_experts(load_E: np.ndarray, num_devices: int, slots_per_device: int, *, home: bool = False) -> Placement:
    """Slots for experts with these loads, such that the busiest device has little more than the others.

    First the replicas: each slot that is left over goes to the expert whose load per replica is the highest. No other
    numbers of replicas have a smaller highest load per replica, w, in as many slots. Take numbers that differ: some
    expert has fewer replicas there than here. When it was given its last one here, its load per replica was the highest
    of all, so at least w; with fewer replicas it still is.

    Then the packing: replicas, heaviest first, in rounds of one for each device, the heaviest of a round to the device
    with the least load; or without rounds, each to the least load that has a slot left. The better of both counts.

    Bound. A round has weights a_1 >= ... >= a_N for devices of loads L_1 <= ... <= L_N. The difference of devices i < j
    becomes (L_i - L_j) + (a_i - a_j): one part is at most 0, the other at least 0, so it lies between -(L_N - L_1) and
    a_1 - a_N. So in the end no two devices differ by more than d, the largest a_1 - a_N of any round, and the busiest
    device has at most mean + (1 - 1/N) d. Since d <= w, and no placement in as many slots has a busiest device below
    the mean or below w, that is less than twice the best possible.

    Args:
        load_E: pairs that chose each expert.
        num_devices: N, of the expert axes; divides E.
        slots_per_device: at least E / N.
        home: keep every expert where it is without a placement, and place only what is added: in training, so that only
            the weights of replicas travel. The bound then holds with d at least the differences that were there before.

    Raises:
        UserError: sizes that do not go together.
    """
    load_E = np.asarray(load_E, np.float64)
    E, N, P = len(load_E), num_devices, num_devices * slots_per_device
    if E % N or P < E:
        raise UserError(
            f"{E} experts over {N} devices with {slots_per_device} slots each: N must divide E, slots be enough"
        )
    replicas_E = np.ones(E, int)
    heaviest = [(-load, e) for e, load in enumerate(load_E)]
    heapq.heapify(heaviest)
    for _ in range(P - E):
        e = heaviest[0][1]
        replicas_E[e] += 1
        heapq.heapreplace(heaviest, (-load_E[e] / replicas_E[e], e))
    weight_E = load_E / replicas_E

    fixed: list[list[int]] = [list(range(n * E // N, (n + 1) * E // N)) if home else [] for n in range(N)]
    rest_E = replicas_E - 1 if home else replicas_E
    order = [int(e) for e in np.argsort(-weight_E, kind="stable") for _ in range(rest_E[e])]
    packed = [_packed(fixed, order, weight_E, slots_per_device, in_rounds) for in_rounds in (True, False)]
    best = min(packed, key=lambda held: max(sum(weight_E[e] for e in experts) for experts in held))
    return Placement(np.array(best, np.int32).reshape(P), E, home)


def place_replicas(load_LE: np.ndarray, num_devices: int, num_replicas: int) -> np.ndarray:
    """The experts of the slots that are added, (layers, num_replicas), for the loads of each layer of a stack.

    See :func:`place_experts`, with ``home``.

    Raises:
        UserError: experts or replicas do not divide over the devices.
    """
    E, N = load_LE.shape[1], num_devices
    if num_replicas % N:
        raise UserError(f"num_replicas is {num_replicas}; it must divide over {N} devices")
    placed = [place_experts(load_E, N, (E + num_replicas) // N, home=True) for load_E in load_LE]
    return np.stack([found.expert_P.reshape(N, -1)[:, E // N :].reshape(-1) for found in placed])


def slots_at_home(replicas_R: jax.Array, num_experts: int, num_devices: int) -> Int[Array, " P"]:
    """The expert of each slot: on each device its own experts, and behind them its part of ``replicas_R``."""
    own_Ne = jnp.arange(num_experts, dtype=jnp.int32).reshape(num_devices, -1)
    return jnp.concatenate([own_Ne, replicas_R.reshape(num_devices, -1)], axis=1).reshape(-1)


# ---------------------------------------------------------------- from measured loads


def moved_mean(mean_E: Float[Array, "*layers E"], load_E: Int[Array, "*layers E"]) -> Float[Array, "*layers E"]:
    """A running mean of loads behind one more step; the last 1 / (1 - MEMORY) steps count most."""
    return MEMORY * mean_E + (1 - MEMORY) * load_E


def placed_anew(buffers: Mapping[str, Any], num_devices: int) -> dict[str, Any]:
    """A model's buffers with the replicas of all layers of experts placed for the loads that training measured.

    It is done on the host, between two steps; who stands where is data, and no step is compiled anew for it.

    Args:
        buffers: nested, as in :class:`dsjax.train.step.TrainState`. What is not of replicas stays as it is.
        num_devices: of the expert axes.
    """
    placed = {name: placed_anew(x, num_devices) if isinstance(x, Mapping) else x for name, x in buffers.items()}
    if "replicas" in buffers:
        old = buffers["replicas"]
        new_LR = place_replicas(np.asarray(buffers["mean_load"]), num_devices, old.shape[1])
        placed["replicas"] = jax.device_put(new_LR.astype(old.dtype), old.sharding)
    return placed


def _packed(
    fixed: list[list[int]], order: list[int], weight_E: np.ndarray, num_slots: int, in_rounds: bool
) -> list[list[int]]:
    """The experts of each device: the fixed ones, then each of ``order`` to the least load with a slot left."""
    held = [list(experts) for experts in fixed]
    load_N = [float(sum(weight_E[e] for e in experts)) for experts in held]
    for e in order:
        limit = min(map(len, held)) + 1 if in_rounds else num_slots
        n = min((n for n in range(len(held)) if len(held[n]) < limit), key=lambda n: load_N[n])
        held[n].append(e)
        load_N[n] += weight_E[e]
    return held


def device_loads(placement: Placement, load_E: np.ndarray, num_devices: int) -> np.ndarray:
    """Pairs that go to each device where each expert's pairs are shared out among its slots evenly."""
    expert_P = np.asarray(placement.expert_P)
    replicas_E = np.bincount(expert_P, minlength=placement.num_experts)
    return (np.asarray(load_E) / replicas_E)[expert_P].reshape(num_devices, -1).sum(axis=1)
