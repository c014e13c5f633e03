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
from jaxtyping import Int

from dsjax.config import UserError
from dsjax.models.decoder import Decoder, DecoderConfig, without_values
from dsjax.models.multi_token import MULTI_TOKEN
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

    Results are the same but for the order of sums, on ``num_devices`` and on any number of devices that divides the
    places. Weights are placed here, so that in decoding none is sent. What makes values is left out.

    Args:
        graph, variables: the model, buffers included; also one that was laid out before, for other loads.
        loads: of the groups of experts that are to get replicas, (layers, experts). Modules of ``multi_token``, which
            no prefill runs, go by those of the last layer, which theirs is like.
        num_replicas: for each layer; the devices divide it.
        num_devices: of the expert axes, to share the loads out among.

    Returns:
        Its graph and its variables, with weights (layers, E + num_replicas, ...), device by device.

    Raises:
        UserError: sizes that do not go together.
    """
    graph, variables = without_values(graph, variables)
    model, placed = nnx.merge(graph, variables), dict(variables)
    _check(model.cfg, loads, num_replicas, num_devices)
    groups, further = list(model.cfg.groups), model.cfg.multi_token
    for index, group in enumerate(groups):
        if (name := f"group_{index}") in loads:
            moe = dataclasses.replace(group.ffn, num_replicas=num_replicas)
            groups[index] = dataclasses.replace(group, ffn=moe)
            placed[name] = placed[name] | {"ffn": _with_places(placed[name]["ffn"], moe, loads[name], num_devices)}
    if further is not None and (name := f"group_{len(groups) - 1}") in loads:
        block, load_LE = placed[MULTI_TOKEN]["block"], np.repeat(loads[name][-1:], further.num_modules, axis=0)
        block = block | {"ffn": _with_places(block["ffn"], moe, load_LE, num_devices)}
        placed[MULTI_TOKEN] = placed[MULTI_TOKEN] | {"block": block}
    cfg = dataclasses.replace(model.cfg, groups=tuple(groups))
    return nnx.split(nnx.eval_shape(lambda: Decoder(cfg, model.compute, rngs=nnx.Rngs(0))))[0], placed


def _check(cfg: DecoderConfig, loads: Mapping[str, np.ndarray], num_replicas: int, num_devices: int) -> None:
    """Whether there are such groups of experts, with loads for each, and numbers that something can be shared out by.

    Raises:
        UserError: there are not.
    """
    for key, number in {"num_replicas": num_replicas, "num_devices": num_devices}.items():
        if number < 1:
            raise UserError(f"{key} is {number}; it must be at least 1")
    layers = {f"group_{index}": num_layers for index, (_, num_layers) in enumerate(cfg.sized_groups())}
    shapes = {name: (layers[name], moe.num_experts) for name, moe in cfg.experts().items()}
    for name, load_LE in loads.items():
        if name not in shapes:
            raise UserError(f"loads has {name}; the groups of experts are: {', '.join(shapes) or 'none'}")
        if np.shape(load_LE) != shapes[name]:
            raise UserError(f"loads[{name}] has shape {np.shape(load_LE)}; (layers, experts) of it are {shapes[name]}")


def _with_places(ffn: dict[str, Any], moe: MoEConfig, load_LE: np.ndarray, num_devices: int) -> dict[str, Any]:
    """The variables of a stack of layers of experts, with a copy of the weights for each place."""
    E = moe.num_experts
    replicas_LR = place_replicas(load_LE, num_devices, moe.num_replicas)
    slots_LP = jax.vmap(lambda replicas_R: slots_at_home(replicas_R, E, num_devices))(replicas_LR)
    if ffn["w_gate"].shape[1] == E:
        from_LP = slots_LP
    else:  # laid out before: each expert from the first place that it has
        first_LE = jnp.argmax(ffn["replicas"][:, None] == jnp.arange(E)[:, None], axis=-1)
        from_LP = jnp.take_along_axis(first_LE, slots_LP, axis=1)
    weights = {name: jnp.take_along_axis(ffn[name], from_LP[..., None, None], axis=1) for name in MoE.EXPERTS}
    placed = {"replicas": slots_LP, "mean_load": load_LE}
    return ffn | weights | {name: jnp.asarray(x, jnp.float32) for name, x in placed.items()}
