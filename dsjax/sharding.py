"""Sharding: one mesh, one table of rules, ``param`` and ``buffer`` to declare arrays, ``shard`` to place activations.

Weights and activations name *logical* axes (``embed``, ``heads``, ``batch`` ...). :class:`Rules` maps those to the
mesh axes ``data, fsdp, expert, tensor, context`` and is the only place that knows them. Every mesh has all five
axes; an axis of size 1 is off, so moving a model from one device to FSDP x tensor x expert parallelism changes the
mesh and nothing else.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsjax.config import Bounds, UserError
from pallas_kernels.platforms import ANY, compiled_for

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: whatever is left.

    With ``expert_over_data``, experts are cut over ``data`` too, which then are slices with a slower network between
    them: in training, tokens go to the right slice first, then to the device in it (docs/experts.md).
    """

    data: Annotated[int, Bounds(ge=-1)] = -1
    fsdp: Annotated[int, Bounds(ge=-1)] = 1
    expert: Annotated[int, Bounds(ge=-1)] = 1
    tensor: Annotated[int, Bounds(ge=-1)] = 1
    context: Annotated[int, Bounds(ge=-1)] = 1
    expert_over_data: bool = False

    def validate(self) -> None:
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if 0 in sizes:
            raise UserError(
                f"{MESH_AXES[sizes.index(0)]} is 0; a mesh axis has at least 1 device (-1: all that are left)"
            )
        if sizes.count(-1) > 1:
            free = " and ".join(a for a in MESH_AXES if getattr(self, a) == -1)
            raise UserError(f"{free} are both -1; only one axis can take the devices that are left")

    def shape(self, num_devices: int) -> tuple[int, ...]:
        """The size of each axis on ``num_devices`` devices.

        Raises:
            UserError: the sizes do not multiply to the number of devices.
        """
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        fixed = math.prod(s for s in sizes if s != -1)
        named = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True) if s not in (1, -1)) or "all 1"
        if -1 in sizes:
            if num_devices % fixed:
                raise UserError(f"mesh is {named}: {fixed} does not divide the {num_devices} devices present")
            sizes[sizes.index(-1)] = num_devices // fixed
        elif fixed != num_devices:
            raise UserError(f"mesh is {named}: {fixed} devices, but {num_devices} are present; set one axis to -1")
        return tuple(sizes)


def make_mesh(cfg: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh of ``cfg`` over ``devices`` (all of them when None)."""
    devices = jax.devices() if devices is None else devices
    shape = cfg.shape(len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # no axis of the chips' torus has this length: an axis of ours takes a part of one
        chips = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(chips, MESH_AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. The first half places weights, the second activations."""

    # weights
    layers: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp",)
    kv_heads: tuple[str, ...] = ("tensor",)
    heads_per_kv: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("tensor",)
    index_heads: tuple[str, ...] = ()
    latent: tuple[str, ...] = ("fsdp",)
    rank: tuple[str, ...] = ()
    low_rank: tuple[str, ...] = ()  # of a pair of thin matrices: see dsjax.nn.lora
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    expert: tuple[str, ...] = ("expert",)
    buckets: tuple[str, ...] = ("fsdp",)
    taps: tuple[str, ...] = ()
    lengths: tuple[str, ...] = ()
    router: tuple[str, ...] = ()
    orders: tuple[str, ...] = ()
    halves: tuple[str, ...] = ()
    table: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    # activations
    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    length: tuple[str, ...] = ("context",)
    slots: tuple[str, ...] = ()  # of a decode cache

    @property
    def pages(self) -> tuple[str, ...]:
        """Of a decode cache: each device has those of its rows and slots."""
        return (*self.batch, *self.slots)

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array whose dimensions carry these logical axes (None: not split)."""
        return PartitionSpec(*(getattr(self, a) or None if a is not None else None for a in axes))


def training_rules(cfg: MeshConfig) -> Rules:
    """Where training places things on the mesh of ``cfg``."""
    return Rules(expert=("data", "expert")) if cfg.expert_over_data else Rules()


# Where prefill and decode place things: tokens move, weights stay. No weight is cut over an axis that rows are cut
# over, but the experts, and to those the tokens go. `fsdp` cuts what `tensor` cuts, further: `tensor` key/value heads,
# `fsdp` the query heads that share one, both together `mlp`, `vocab` and the heads of latent attention.
INFERENCE = Rules(
    vocab=("fsdp", "tensor"),
    embed=(),
    heads_per_kv=("fsdp",),
    heads=("fsdp", "tensor"),
    latent=(),
    mlp=("fsdp", "tensor"),
    batch=("data", "expert"),
    slots=("context", "fsdp"),
)


def inference_layout(
    mesh: Mesh, heads: Iterable[tuple[int, int]], batch_size: int, rules: Rules = INFERENCE
) -> tuple[Mesh, Rules]:
    """Mesh and rules for ``batch_size`` sequences.

    ``tensor * fsdp`` devices cut a layer's heads. If ``tensor`` does not divide the key/value heads, or ``fsdp`` the
    query heads of one, the same devices are shared out anew between the two. Rows are cut over ``expert`` if they
    divide over it; if not, each of its devices has all rows, and the slots of a cache are cut over it instead.

    Args:
        mesh: devices.
        heads: (key/value heads, query heads that share one) of each layer group.
        batch_size: sequences at a time.
        rules: logical axis -> mesh axes.

    Raises:
        UserError: batch or heads do not divide over the devices.
    """
    fixed = tuple(a for a in rules.batch if a not in rules.expert)
    rows = math.prod(mesh.shape[a] for a in fixed)
    if batch_size % rows:
        over = "*".join(f"{a}={mesh.shape[a]}" for a in fixed if mesh.shape[a] > 1)
        raise UserError(f"batch_size is {batch_size}; it must divide over the {rows} devices of mesh {over}")
    if batch_size % math.prod(mesh.shape[a] for a in rules.batch):
        slots = (*rules.slots, *(a for a in rules.expert if a not in rules.slots))
        rules = dataclasses.replace(rules, batch=fixed, slots=slots)
    return _share_out_heads(mesh, tuple(heads)), rules


def _share_out_heads(mesh: Mesh, heads: tuple[tuple[int, int], ...]) -> Mesh:
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    ways = fsdp * tensor
    # What was asked for if it fits, else as many key/value heads apart as possible: those share no cache.
    candidates = [tensor, *(n for n in range(ways, 0, -1) if ways % n == 0)]
    fits = (n for n in candidates if all(K % n == 0 and G % (ways // n) == 0 for K, G in heads))
    found = next(fits, None)
    if found is None:
        counts = " or ".join(f"{K} * {G}" for K, G in sorted(set(heads)))
        raise UserError(
            f"mesh.fsdp * mesh.tensor is {fsdp} * {tensor}: {ways} devices can not share the"
            f" attention.num_heads={counts} query heads (key/value heads * queries of each) out evenly"
        )
    if found == tensor:
        return mesh
    devices = np.moveaxis(mesh.devices, MESH_AXES.index("fsdp"), 2)  # data, expert, fsdp, tensor, context
    data, expert, _, _, context = devices.shape
    devices = np.moveaxis(devices.reshape(data, expert, ways // found, found, context), 2, MESH_AXES.index("fsdp"))
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


_current: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("mesh and rules", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None, rules: Rules = Rules()) -> Iterator[None]:
    """Within it, :func:`shard` places activations on ``mesh``; a step function enters it while it is traced.

    Of what is written for each platform apart, only the form for the mesh's devices is traced.
    """
    token = _current.set(None if mesh is None or mesh.size == 1 else (mesh, rules))
    try:
        with compiled_for(_platform(mesh)):
            yield
    finally:
        _current.reset(token)


def _platform(mesh: Mesh | None) -> str | None:
    """What :func:`jax.lax.platform_dependent` calls the platform of the mesh's devices, if nobody wants all of them."""
    if mesh is None or compiled_for.value == ANY:
        return compiled_for.value
    platform = mesh.devices.flat[0].platform
    return None if platform == "gpu" else platform  # CUDA and ROCm


def current_mesh() -> tuple[Mesh, Rules] | None:
    """The mesh and rules in force, or None on a single device."""
    return _current.get()


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """``x`` constrained to the layout that its logical axes have under the rules in force."""
    current = _current.get()
    if current is None:
        return x
    mesh, rules = current
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rules.spec(*axes)))


def map_shards(f: Callable, in_axes: tuple[tuple[str | None, ...], ...], out_axes: Any) -> Callable:
    """``f`` run on each device's own shards (`jax.shard_map`), or plainly where there is one device.

    Args:
        f: takes one array for each entry of ``in_axes``.
        in_axes: logical axes of each argument.
        out_axes: logical axes of the result, or a tuple of such for several results.
    """
    current = _current.get()
    if current is None:
        return f
    mesh, rules = current
    specs = tuple(rules.spec(*axes) for axes in in_axes)
    several = bool(out_axes) and isinstance(out_axes[0], tuple)
    out = tuple(rules.spec(*axes) for axes in out_axes) if several else rules.spec(*out_axes)
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


# ---------------------------------------------------------------- weights


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    fan_in: int | None = None,
    scale: float = 1.0,
    value: float | None = None,
) -> nnx.Param:
    """A float32 weight: normal with variance ``1 / fan_in``, or filled with ``value``.

    Args:
        rngs: source of the initial values; used here only.
        shape: dimensions.
        axes: one logical axis for each dimension, as in :class:`Rules`.
        fan_in: number of inputs summed into each output.
        scale: factor on the standard deviation.
        value: constant to fill with instead (norm scales, zero-initialised projections).
    """
    assert len(shape) == len(axes), (shape, axes)
    if value is not None:
        return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)
    assert fan_in is not None
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * (scale * fan_in**-0.5), axes=axes)


SIDES = ("low_rank", "embed", "latent")  # what a matrix maps from or to: the first that it has


def sides(axes: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which dimensions of a weight are a matrix's inputs and which its outputs; the others stack matrices.

    ``axes`` has one of :data:`SIDES`. Inputs stand in front of outputs; a matrix has one dimension on that side.
    """
    inner = [i for i, name in enumerate(axes) if name not in ("layers", "expert", "halves")]
    side = next(axes.index(name) for name in SIDES if name in axes)
    others = tuple(i for i in inner if i != side)
    reads = side == inner[0]  # else it writes to that side
    return ((side,), others) if reads else (others, (side,))


class Buffer(nnx.Variable):
    """State without a gradient: a step moves it by what the model saw; the optimizer never sees it."""


def buffer(shape: tuple[int, ...], axes: tuple[str, ...], *, value: float = 0.0) -> Buffer:
    """A float32 buffer filled with ``value``; ``shape`` and ``axes`` as in :func:`param`."""
    assert len(shape) == len(axes), (shape, axes)
    return Buffer(jnp.full(shape, value, jnp.float32), axes=axes)


def split_variables(module: nnx.Module) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The graph of a module, its parameters and its buffers, both as pure dicts; `nnx.merge` takes all three."""
    graph, *states = nnx.split(module, nnx.Param, Buffer)
    params, buffers = map(nnx.to_pure_dict, states)
    return graph, params, buffers


def joined(params: dict[str, Any], buffers: dict[str, Any]) -> dict[str, Any]:
    """Parameters and buffers as one pure dict: all that a module's graph lacks."""
    out = dict(params)
    for name, below in buffers.items():
        out[name] = joined(out[name], below) if name in out else below
    return out


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """``num_layers`` modules as one whose weights have a leading ``layers`` dimension."""
    keys = jax.random.split(rngs.params(), num_layers)
    graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
    weights = jax.vmap(lambda key: nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)))[1]))(keys)
    stacked = nnx.merge(graph, weights)
    for _, variable in nnx.iter_graph(stacked):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata(axes=("layers", *variable.get_metadata()["axes"]))
    return stacked


def logical_axes(module: nnx.Module, kind: type[nnx.Variable] = nnx.Variable) -> dict[str, Any]:
    """The logical axes of every variable of a module that is a ``kind``, in the shape of its pure dict."""
    state = nnx.state(module, kind)
    axes = jax.tree.map(lambda v: tuple(v.get_metadata()["axes"]), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.to_pure_dict(axes)


def shardings(shapes: Any, axes: Any, mesh: Mesh, rules: Rules = Rules()) -> Any:
    """The `NamedSharding` of every array of a tree.

    Args:
        shapes: tree of anything with ``shape``.
        axes: the same tree of logical axes (:func:`logical_axes`).
        mesh: the devices.
        rules: logical axis -> mesh axes.

    Raises:
        UserError: a dimension does not divide over its mesh axes (names the weight, the axis and both sizes).
    """

    def one(path: tuple, leaf: Any, names: tuple[str, ...]) -> NamedSharding:
        for size, name in zip(leaf.shape, names, strict=True):
            parts = math.prod(mesh.shape[a] for a in getattr(rules, name))
            if size % parts:
                weight = "/".join(str(getattr(k, "key", k)) for k in path)
                over = "*".join(getattr(rules, name))
                raise UserError(f"mesh.{over} is {parts}: it does not divide {name}={size} of the weight {weight}")
        return NamedSharding(mesh, rules.spec(*names))

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def rows_of_process(mesh: Mesh, num_rows: int, rules: Rules = Rules()) -> tuple[int, int]:
    """Which part of a batch's rows this process needs for its devices, as (part, parts): the part-th of equal parts.

    The parts of two processes may overlap: all rows, if the batch is not split over processes.
    """
    spec = rules.spec("batch")
    places = NamedSharding(mesh, spec).addressable_devices_indices_map((num_rows,)).values()
    bounds = [(index[0].start or 0, num_rows if index[0].stop is None else index[0].stop) for index in places if index]
    low, high = min(b[0] for b in bounds), max(b[1] for b in bounds)
    if num_rows % (high - low) or low % (high - low):
        return 0, 1
    return low // (high - low), num_rows // (high - low)


def host_array_to_global(x: np.ndarray, mesh: Mesh, spec: PartitionSpec, *, part: int = 0, parts: int = 1) -> jax.Array:
    """A global array from the rows that this process has: the ``part``-th of ``parts`` equal parts of all rows."""
    before = part * len(x)

    def piece(index: Any) -> np.ndarray:
        rows = index[0]
        stop = len(x) if rows.stop is None else rows.stop - before
        return x[(slice((rows.start or 0) - before, stop), *index[1:])]

    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback((len(x) * parts, *x.shape[1:]), sharding, piece)
