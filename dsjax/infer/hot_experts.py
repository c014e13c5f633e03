"""A model laid out for decoding with its busiest experts in several places, once, by measured loads (docs/experts.md).

loads = measured_loads(graph, params, tokens_BT, ids_BT)           # of a prefill, or of other requests like these
graph, params = with_replicas(graph, params, loads, num_replicas=8, num_devices=mesh.shape["expert"])
generate(graph, params, prompts, mesh=mesh, ...)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from dsjax.models.decoder import Decoder
from dsjax.nn.masks import Documents
from dsjax.nn.moe import MoE, MoEConfig
from dsjax.nn.placement import place_replicas, slots_at_home
from dsjax.sharding import INFERENCE, Rules, use_mesh


def measured_loads(
    graph: Any,
    variables: Any,
    tokens_BT: Int[np.ndarray, "B T"],
    ids_BT: Int[np.ndarray, "B T"],
    *,
    mesh: Mesh | None = None,
    rules: Rules = INFERENCE,
) -> dict[str, Int[np.ndarray, "L E"]]:
    """How many pairs (token, expert) of these prompts chose each expert of each layer, by group of experts.

    Args:
        graph, variables: the model, buffers included.
        tokens_BT: prompts.
        ids_BT: 1 for their tokens, 0 for the padding behind them.
        mesh: devices that the model lies on; None: one.
        rules: logical axis -> mesh axes.
    """
    loads = _loads(graph, mesh, rules, variables, jnp.asarray(tokens_BT), jnp.asarray(ids_BT))
    return {name: np.asarray(load_LE) for name, load_LE in loads.items()}


@functools.partial(jax.jit, static_argnames=("graph", "mesh", "rules"))
def _loads(graph: Any, mesh: Any, rules: Rules, variables: Any, tokens_BT: Any, ids_BT: Any) -> dict[str, jax.Array]:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    with use_mesh(mesh, rules):
        return nnx.merge(graph, variables)(tokens_BT, Documents(ids_BT, positions_BT)).loads


def with_replicas(
    graph: Any, variables: Any, loads: Mapping[str, np.ndarray], *, num_replicas: int, num_devices: int
) -> tuple[Any, Any]:
    """The same model with ``num_replicas`` further places in each layer of experts, and the weights of all its places.

    Results are the same but for the order of sums. Weights are placed here, so that in decoding none is sent.

    Args:
        graph, variables: the model, buffers included, with weights (layers, E, ...).
        loads: of the groups of experts that are to get replicas, (layers, experts).
        num_replicas: for each layer; the devices divide it.
        num_devices: of the expert axes.

    Returns:
        Its graph and its variables, with weights (layers, E + num_replicas, ...), device by device.

    Raises:
        UserError: sizes that do not go together.
    """
    model, placed, groups = nnx.merge(graph, variables), dict(variables), []
    for index, group in enumerate(model.cfg.groups):
        name, moe = f"group_{index}", group.ffn
        if isinstance(moe, MoEConfig) and name in loads:
            moe = dataclasses.replace(moe, num_replicas=num_replicas)
            placed[name] = placed[name] | {"ffn": _with_places(placed[name]["ffn"], moe, loads[name], num_devices)}
        groups.append(dataclasses.replace(group, ffn=moe))
    cfg = dataclasses.replace(model.cfg, groups=tuple(groups))
    return nnx.split(nnx.eval_shape(lambda: Decoder(cfg, model.compute, rngs=nnx.Rngs(0))))[0], placed


def _with_places(ffn: dict[str, Any], moe: MoEConfig, load_LE: np.ndarray, num_devices: int) -> dict[str, Any]:
    """The variables of a stack of layers of experts, with a copy of the weights for each place."""
    replicas_LR = place_replicas(load_LE, num_devices, moe.num_replicas)
    slots_LP = jax.vmap(lambda replicas_R: slots_at_home(replicas_R, moe.num_experts, num_devices))(replicas_LR)
    weights = {name: jnp.take_along_axis(ffn[name], slots_LP[..., None, None], axis=1) for name in MoE.EXPERTS}
    placed: dict[str, Array] = {"replicas": jnp.asarray(replicas_LR, jnp.float32)}
    return ffn | weights | placed | {"mean_load": jnp.asarray(load_LE, jnp.float32)}
