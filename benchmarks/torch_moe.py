"""Hugging Face's sparse MoE block of Mixtral, with the weights of :func:`benchmarks.moe.problem`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.moe import D_FF, D_MODEL, EXPERTS, HUGGING_FACE, TOP_K, problem


def make(contender: str, routing: str, gradients: bool) -> Callable[[], tuple[Any, ...]]:
    """One call: the output, and with ``gradients`` those of the inputs and of all weights."""
    implementation = next(name for name, known_as in HUGGING_FACE.items() if known_as == contender)
    config = MixtralConfig(
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation=implementation,
    )
    block, arrays = MixtralSparseMoeBlock(config).eval(), problem(routing)
    x, dy, router, gate, up, down = (
        torch.from_numpy(arrays[name]) for name in ("x", "dy", "router", "gate", "up", "down")
    )
    with torch.no_grad():
        block.gate.weight.copy_(router.T)
        block.experts.gate_up_proj.copy_(torch.cat([gate, up], dim=-1).transpose(1, 2))
        block.experts.down_proj.copy_(down.transpose(1, 2))
    inputs = [x[None].clone().requires_grad_(gradients), *block.parameters()]

    def call() -> tuple[Any, ...]:
        with torch.set_grad_enabled(gradients):
            y = block(inputs[0])
            if not gradients:
                return (y[0],)
            return y[0].detach(), torch.autograd.grad(y, inputs, dy[None])[0][0]

    return call
