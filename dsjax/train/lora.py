"""The frozen weights of a job that trains pairs beside them: what they are, where they lie, how they are made."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.nn.lora import FrozenWeight, LoraConfig, frozen, merged
from dsjax.sharding import Rules, logical_axes, shardings


@dataclasses.dataclass(frozen=True)
class FrozenWeights:
    """Every weight of a model, frozen.

    Attributes:
        weights: by path, as they are read: abstract float32 arrays with shardings.
        shapes: the same as they are kept, nested as in the model.
        places: shardings of those.
    """

    weights: dict[tuple[str, ...], Any]
    shapes: dict[str, Any]
    places: dict[str, Any]
    _makers: dict[tuple[str, ...], Any]

    @classmethod
    def of(cls, lora: LoraConfig, model: Any, mesh: Mesh, rules: Rules) -> FrozenWeights:
        """Those of an abstract model that has a ``compute.dtype``.

        Raises:
            UserError: a weight does not divide over the mesh.
        """
        axes, dtype = logical_axes(model, nnx.Param), jnp.dtype(model.compute.dtype)
        abstract = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        placed = traverse_util.flatten_dict(shardings(abstract, axes, mesh, rules))
        flat_axes = traverse_util.flatten_dict(axes)
        weights, shapes, places, makers = {}, {}, {}, {}
        for path, leaf in traverse_util.flatten_dict(abstract).items():
            make = functools.partial(frozen, lora, path, flat_axes[path], dtype=dtype)
            weights[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=placed[path])
            shapes[path] = jax.eval_shape(make, weights[path])
            places[path] = jax.tree.map(functools.partial(_fitting, placed[path]), shapes[path])
            makers[path] = jax.jit(make, out_shardings=places[path])
        nested = traverse_util.unflatten_dict
        return cls(weights, nested(shapes), nested(places), makers)

    def freeze(self, path: tuple[str, ...], x: jax.Array) -> Any:
        """A weight as it is kept."""
        return self._makers[path](x)


def _fitting(place: NamedSharding, leaf: Any) -> NamedSharding:
    """Where codes and scales of a weight lie: as the weight, but not cut along what is too short for it."""
    cut = []
    for size, axes in zip(leaf.shape, place.spec, strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        cut.append(None if size % math.prod(place.mesh.shape[name] for name in names) else axes)
    return NamedSharding(place.mesh, PartitionSpec(*cut))


def whole_weights(variables: Any, dtype: Any) -> Any:
    """Variables with arrays of ``dtype`` in place of frozen weights and their pairs; if there are none, as they are."""
    if not any(isinstance(leaf, FrozenWeight) for leaf in jax.tree.leaves(variables, is_leaf=_is_frozen)):
        return variables
    return _whole(variables, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _whole(variables: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: merged(x, dtype) if _is_frozen(x) else x, variables, is_leaf=_is_frozen)


def _is_frozen(x: Any) -> bool:
    return isinstance(x, FrozenWeight)
