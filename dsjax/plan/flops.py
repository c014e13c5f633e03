"""FLOPs of a traced program: of its matrix products, by what they are for.

Counted before compilation, where every loop still says how often it runs; XLA's own cost analysis counts the body of a
scan once, and a ragged product E times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels.cost import stated_flops, stated_share


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs over all devices; two for each multiplication and addition.

    Attributes:
        model: what the definition of the model asks for, forward and backward.
        recomputed: computed again in the backward pass instead of being kept (remat).
        wasted: pairs that an attention kernel computes and masks out, or computes again by its nature; what several
            devices compute alike.
        optimizer: products of the update (Muon); element-wise work is not counted anywhere.
        unknown_loops: loops whose length the program does not tell; their bodies are counted once.
        kernels: Pallas calls, and where their count comes from.
    """

    model: float = 0.0
    recomputed: float = 0.0
    wasted: float = 0.0
    optimizer: float = 0.0
    unknown_loops: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()

    @property
    def executed(self) -> float:
        """All that the devices compute."""
        return self.model + self.recomputed + self.wasted + self.optimizer

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.model + other.model,
            self.recomputed + other.recomputed,
            self.wasted + other.wasted,
            self.optimizer + other.optimizer,
            self.unknown_loops + other.unknown_loops,
            self.kernels + other.kernels,
        )

    def times(self, factor: float) -> Flops:
        model, recomputed, wasted = factor * self.model, factor * self.recomputed, factor * self.wasted
        return Flops(model, recomputed, wasted, factor * self.optimizer, self.unknown_loops, self.kernels)


@dataclasses.dataclass(frozen=True)
class _Assumed:
    """What the program leaves open."""

    platform: str
    ragged_share: float


def count_flops(jaxpr: Any, *, platform: str = "tpu", ragged_share: float = 1.0) -> Flops:
    """The FLOPs of a (closed) jaxpr.

    Args:
        jaxpr: of ``jax.make_jaxpr``, or of a traced function.
        platform: where it will run, if the program depends on it.
        ragged_share: of the rows of a ragged product (XLA's, or a kernel whose name begins with ``grouped_``), those
            that belong to a group. Known at run time only; see :mod:`dsjax.plan.programs` for balanced routing.
    """
    return _count(getattr(jaxpr, "jaxpr", jaxpr), "", _Assumed(platform, ragged_share))


def _count(jaxpr: Any, scopes: str, assumed: _Assumed) -> Flops:
    total = Flops()
    for eqn in jaxpr.eqns:
        here = f"{scopes}/{eqn.source_info.name_stack}"
        total += _equation(eqn, here, assumed)
    return total


def _equation(eqn: Any, scopes: str, assumed: _Assumed) -> Flops:
    name, params = eqn.primitive.name, eqn.params

    def inside(jaxpr: Any) -> Flops:
        return _count(getattr(jaxpr, "jaxpr", jaxpr), scopes, assumed)

    if name in _PRODUCTS:
        share = assumed.ragged_share if name == "ragged_dot_general" else 1.0
        return _sorted(_PRODUCTS[name](eqn) * share, scopes)
    if name == "scan":
        return inside(params["jaxpr"]).times(params["length"])
    if name == "while":
        body = inside(params["body_jaxpr"]) + inside(params["cond_jaxpr"])
        return dataclasses.replace(body, unknown_loops=(*body.unknown_loops, scopes)) if body.executed else body
    if name == "cond":
        return _branch([inside(branch) for branch in params["branches"]], params, assumed)
    if name == "shard_map":
        return _on_each_device(inside(params["jaxpr"]), params)
    if name in ("pallas_call", "mpmd_map"):  # the latter is Mosaic GPU's
        return _kernel(eqn, scopes, assumed)
    if name == "custom_vjp_call":
        return inside(params["call_jaxpr"])
    total = Flops()
    for inner in _jaxprs(params.values()):
        total += inside(inner)
    return total


def _sorted(flops: float, scopes: str) -> Flops:
    """FLOPs under what they are for, which the names of the scopes tell."""
    if "optimizer" in scopes.split("/"):
        return Flops(optimizer=flops)
    useful = flops * stated_share(scopes)
    if "rematted_computation" in scopes:
        return Flops(recomputed=useful, wasted=flops - useful)
    return Flops(model=useful, wasted=flops - useful)


def _on_each_device(flops: Flops, params: Any) -> Flops:
    """The FLOPs of all devices; devices along an axis that cuts no operand and no result do the same work again."""
    sizes, axes, cutting = params["mesh"].shape, params["newly_manual_axes"], set[str]()
    for spec in (*params["in_specs"], *params["out_specs"]):
        for entry in spec:
            names = {entry} if isinstance(entry, str) else set(entry or ())
            # What waits for the backward pass is cut over all axes by JAX, whatever it is.
            if names != axes or len(axes) == 1:
                cutting |= names
    all_devices = flops.times(math.prod(sizes[axis] for axis in axes))
    share = 1 / math.prod(sizes[axis] for axis in axes if axis not in cutting)
    once = all_devices.times(share)
    return dataclasses.replace(once, wasted=all_devices.executed - once.executed + once.wasted)


def _branch(branches: list[Flops], params: Any, assumed: _Assumed) -> Flops:
    """The branch of the platform, or the one with the most work.

    If the loops of the platform's branch do not say how long they are, one that computes the same and does say.
    """
    for flops, platforms in zip(branches, params.get("branches_platforms") or (), strict=False):
        if (platforms is None or assumed.platform in platforms) and not flops.unknown_loops:
            return flops
    return min(branches, key=lambda flops: (len(flops.unknown_loops), -flops.executed))


def _kernel(eqn: Any, scopes: str, assumed: _Assumed) -> Flops:
    """A Pallas call: the cost that it states, or else its body at every grid step."""
    label = str(eqn.params.get("name") or eqn.params.get("name_and_src_info") or "kernel").split(" ")[0]
    stated = eqn.params.get("cost_estimate")
    flops = stated_flops(scopes) if stated is None else float(stated.flops)
    if flops is not None:
        found, source = _sorted(flops, scopes), "stated cost"
    else:
        steps = math.prod(int(n) for n in eqn.params["grid_mapping"].grid)
        found, source = _count(eqn.params["jaxpr"], scopes, assumed).times(steps), "its body at every grid step"
    if label.startswith("grouped_"):
        found = found.times(assumed.ragged_share)
    return dataclasses.replace(found, kernels=(*found.kernels, f"{label}: {source}"))


def _jaxprs(values: Any) -> Iterator[Any]:
    for value in values:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _jaxprs(value)


# ---------------------------------------------------------------- products


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracted)


def _ragged_dot(eqn: Any) -> float:
    """Each row times the matrix of its group (or, of a gradient, each row of both operands into its group's)."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    groups = set(numbers.rhs_group_dimensions)
    free = [d for d in range(len(rhs)) if d not in {*contracted, *batch, *groups}]
    return 2.0 * math.prod(lhs) * math.prod(rhs[d] for d in free)


def _convolution(eqn: Any) -> float:
    numbers = eqn.params["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]


_PRODUCTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
