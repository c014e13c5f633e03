"""A model whose layers are written out and whose weights come a layer at a time: the fast form on one CPU.

XLA:CPU copies what it cuts from a stack, so in a scan over the layers each decode step would read all weights, write
them, and read them again. Each layer's weights as arrays of their own are read once. Those arrays are views: nothing is
copied here. (Experts stay stacked: of them, only what tokens have chosen is read.)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig
from dsjax.nn.cache import Cache
from dsjax.nn.moe import MoE, MoEConfig
from dsjax.sharding import replicated


def is_better(mesh: Mesh) -> bool:
    """Whether it is the form for these devices."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def written_out(graph: Any, params: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The graph with its layers written out; ``params`` on the one CPU of ``mesh`` with tuples of layers for stacks."""
    model = nnx.merge(graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params))
    graph = _graph(model.cfg, dataclasses.replace(model.compute, unroll=True))

    def layers(stack: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.device_put(layer, replicated(mesh)) for layer in np.asarray(stack))

    params = dict(params)
    for index, group in enumerate(model.cfg.groups):
        params[f"group_{index}"] = _stacks(params[f"group_{index}"], layers, isinstance(group.ffn, MoEConfig))
    return graph, params


@functools.lru_cache(maxsize=4)
def _graph(cfg: DecoderConfig, compute: ComputeConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Decoder(cfg, compute, rngs=nnx.Rngs(0))))[0]


def _stacks(weights: dict[str, Any], change: Any, has_experts: bool) -> dict[str, Any]:
    """The weights of a group with all stacks changed but those of experts."""
    kept = {name: weights["ffn"][name] for name in MoE.EXPERTS} if has_experts else {}
    rest = weights | {"ffn": {name: w for name, w in weights["ffn"].items() if name not in kept}}
    changed = jax.tree.map(change, rest, is_leaf=lambda x: isinstance(x, tuple))
    return changed | {"ffn": changed["ffn"] | kept}


def in_order(cache: Cache) -> Cache:
    """Inside a program: a cache whose pools have their dimensions in order.

    XLA:CPU may find another order for a pool of one head, and then copy all of it in each step.
    """

    def order(pool: jax.Array) -> jax.Array:
        return with_layout_constraint(pool, Layout(tuple(range(pool.ndim)))) if pool.size else pool

    groups = (
        dataclasses.replace(
            group,
            pages=dataclasses.replace(
                group.pages, k_LMKPH=order(group.pages.k_LMKPH), v_LMKPH=order(group.pages.v_LMKPH)
            ),
        )
        for group in cache.groups
    )
    return dataclasses.replace(cache, groups=tuple(groups))


def stacked(params: Any) -> Any:
    """Inside a program: the stacks again, which XLA takes apart where they are cut. Others are as they were."""
    return jax.tree.map(
        lambda x: jnp.stack(x) if isinstance(x, tuple) else x, params, is_leaf=lambda x: isinstance(x, tuple)
    )
