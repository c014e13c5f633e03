"""The real programs of a config, traced for devices that need not be there."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsjax.infer.engine import make_generator
from dsjax.models.decoder import DecoderConfig
from dsjax.nn.moe import MoEConfig
from dsjax.sharding import Rules, make_mesh, training_rules
from dsjax.train.pretrain import Pretrain, build, make_model
from pallas_kernels.platforms import ANY, compiled_for

Mode = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Program:
    """One step, traced.

    Attributes:
        traced: ``jax.stages.Traced``; lowers and compiles.
        mesh: of the devices.
        bytes_by_part: of what the step takes, the bytes that one device holds: parameters, optimizer, cache, batch ...
        parameter_shapes: (dtype, dimensions) of each parameter on one device.
        tokens: that one step learns from, reads or makes.
        model_flops: by the config's own arithmetic, for those tokens.
        ragged_share: see :func:`dsjax.plan.flops.count_flops`.
        experts_of_device: experts of one layer that a device holds; 0 without experts.
        pairs_of_device: pairs (token, expert) that those get at balanced routing, at the most.
    """

    traced: Any
    mesh: Any
    bytes_by_part: dict[str, int]
    parameter_shapes: list[tuple[str, tuple[int, ...]]]
    tokens: int
    model_flops: float
    ragged_share: float
    experts_of_device: int
    pairs_of_device: float


def make_program(
    config: Pretrain, mode: Mode, devices: Sequence[Any], *, batch_size: int | None = None, length: int | None = None
) -> Program:
    """The step of ``mode`` over ``devices``.

    Args:
        config: the job.
        mode: ``train``: one update; ``prefill``: all prompts at once; ``decode``: one token of each sequence.
        devices: of a topology, or real ones.
        batch_size: sequences; None: the config's (training), 1 (inference).
        length: tokens of a sequence, in decoding those in the cache; None: the config's.

    Raises:
        UserError: the mesh does not fit the devices, the batch or the model.
    """
    data = dataclasses.replace(
        config.data,
        batch_size=batch_size or (config.data.batch_size if mode == "train" else 1),
        seq_len=length or config.data.seq_len,
    )
    config = dataclasses.replace(config, data=data)
    with compiled_for(ANY):  # loops of one form may not say how long they are, and those of another do
        return _train(config, devices) if mode == "train" else _inference(config, mode, devices)


def _train(config: Pretrain, devices: Sequence[Any]) -> Program:
    mesh, trainer = build(config, list(devices))
    batch, total = config.step_batch(mesh), jax.ShapeDtypeStruct((), jnp.int32)
    tokens = config.data.batch_size * config.data.seq_len
    state = trainer.shapes
    parts = {"parameters": state.params, "optimizer": state.opt_state, "buffers": state.buffers, "batch": batch}
    if state.frozen:
        parts["frozen weights"] = state.frozen
    return Program(
        traced=trainer.step.trace(state, batch, total),
        mesh=mesh,
        bytes_by_part={name: device_bytes(tree) for name, tree in parts.items()},
        parameter_shapes=[device_shape(leaf) for leaf in jax.tree.leaves((state.params, state.frozen))],
        tokens=tokens,
        model_flops=config.model.flops_per_token(config.data.seq_len) * tokens,
        **_shares(config.model, mesh, training_rules(config.mesh), tokens // config.train.accumulate, training=True),
    )


def _inference(config: Pretrain, mode: Mode, devices: Sequence[Any]) -> Program:
    batch_size, length, model = config.data.batch_size, config.data.seq_len, config.model
    mesh = make_mesh(config.mesh, list(devices))
    make = functools.partial(make_model, config)
    generator = make_generator(make, mesh, batch_size=batch_size, slots=length)
    if mode == "prefill":
        tokens, traced = batch_size * length, generator.prefill.trace(*generator.prefill_shapes(length))
        flops = model.flops_per_token(length, training=False) * tokens
        flops -= 2 * model.vocab_size * model.d_model * (tokens - batch_size)  # logits of the last positions alone
    else:
        tokens, traced = batch_size, generator.decode_step.trace(*generator.decode_shapes())
        flops = tokens * decode_flops(model, length)
    shapes, cache = generator.shapes, generator.cache_shapes
    return Program(
        traced=traced,
        mesh=generator.mesh,
        bytes_by_part={"parameters": device_bytes(shapes), "cache": device_bytes(cache)},
        parameter_shapes=[device_shape(leaf) for leaf in jax.tree.leaves(shapes)],
        tokens=tokens,
        model_flops=flops,
        **_shares(model, generator.mesh, generator.rules, tokens, training=False),
    )


def _shares(model: DecoderConfig, mesh: Any, rules: Rules, tokens: int, *, training: bool) -> dict[str, Any]:
    """``ragged_share``, ``experts_of_device`` and ``pairs_of_device`` of the layers with the most experts.

    A device has room for all pairs that the tokens of the expert axes' devices can have with its experts, or that a
    capacity lets through; at balanced routing it gets as many pairs as the tokens of one device have.
    """
    layers = [group.ffn for group in model.groups if isinstance(group.ffn, MoEConfig)]
    if not layers:
        return {"ragged_share": 1.0, "experts_of_device": 0, "pairs_of_device": 0}
    moe = max(layers, key=lambda moe: moe.num_experts)
    devices = math.prod(mesh.shape[axis] for axis in rules.expert)
    own = moe.num_experts // devices
    share = moe.top_k / (devices * min(moe.top_k, own))
    if training and (factor := moe.training_factor()) is not None:
        parts = math.prod(mesh.shape[axis] for axis in (*rules.batch, *rules.length))
        share = max(share, min(1.0, devices / (factor * parts)))
    sharers = math.prod(mesh.shape[axis] for axis in {*rules.batch, *rules.length, *rules.expert})
    return {"ragged_share": share, "experts_of_device": own, "pairs_of_device": tokens * moe.top_k / sharers}


def decode_flops(model: DecoderConfig, length: int) -> float:
    """FLOPs of one token that sees ``length`` positions, itself included."""
    pairs = 0.0
    for attention, layer, num_layers in model.attentions():
        before, now = (attention.pair_products(n, layer, cached=True) for n in (length - 1, length))
        pairs += num_layers * (now - before)
    return 2 * (model.num_matmul_params() + pairs)


def device_shape(leaf: Any) -> tuple[str, tuple[int, ...]]:
    """Element type, as HLO names it, and dimensions of what one device holds of an abstract array."""
    names = {"float32": "f32", "bfloat16": "bf16", "int32": "s32", "uint32": "u32", "int8": "s8", "uint8": "u8"}
    kind = names.get(str(leaf.dtype), str(leaf.dtype))
    return kind, tuple(leaf.sharding.shard_shape(leaf.shape))


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
