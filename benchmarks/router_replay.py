"""How far a trainer is from the engine that wrote its texts, with router decisions used again and without.

    python -m benchmarks.router_replay

A model of DeepSeek-V3's shape (latent attention, a dense layer, then experts by sigmoid in groups with a bias), small
and with random weights, writes texts at temperature 1. The trainer's forward pass over whole rows then gives each
written token its log-probability. Printed for float32 and bfloat16: the mean and the largest difference in nats, and
the share of expert choices that the trainer's routers would have made alike.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsjax.infer.batching import Engine
from dsjax.infer.requests import Completion, Request
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.nn.router import agreement

PROMPTS, LENGTH, NEW = 16, 64, 64
ATTENTION = LatentAttentionConfig(num_heads=8, q_rank=64, kv_rank=32, nope_dim=16, rope_dim=16, v_dim=16)
EXPERTS = MoEConfig(
    num_experts=32, top_k=4, d_ff=64, num_shared_experts=1, scoring="sigmoid", num_groups=8, top_groups=4,
    group_score="top2", routed_scale=2.5, bias_update_rate=0.001,
)  # fmt: skip
MODEL = DecoderConfig(512, 128, 6, (LayerGroup(MLPConfig(512), ATTENTION, 1), LayerGroup(EXPERTS, ATTENTION)))


def model(dtype: Any) -> tuple[Any, Any]:
    """Graph and variables; biases as large as differences of scores, so that they matter."""
    made: Any = Decoder(MODEL, ComputeConfig(dtype=dtype), rngs=nnx.Rngs(0))
    bias = made.group_1.ffn.selection_bias
    bias[...] = 0.05 * jax.random.normal(jax.random.key(1), bias[...].shape)
    graph, state = nnx.split(made)
    return graph, nnx.to_pure_dict(state)


def written(graph: Any, params: Any) -> list[tuple[list[int], Completion]]:
    """Prompts of random tokens, and what was written behind them."""
    prompts = np.random.default_rng(0).integers(0, MODEL.vocab_size, (PROMPTS, LENGTH)).tolist()
    engine = Engine(graph, params, end_ids=(), max_length=LENGTH + NEW, batch_size=PROMPTS, tell_experts=True)
    numbers = [engine.submit(Request(p, NEW, SamplingConfig(1.0, 0, 1.0), seed=n)) for n, p in enumerate(prompts)]
    got = engine.run()
    return [(prompt, got[number][0]) for prompt, number in zip(prompts, numbers, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def scored(graph: Any, params: Any, tokens_BT: Any, experts_BTLK: Any) -> tuple[Any, Any]:
    """Log-probabilities of all tokens at each place, and what the routers would choose."""
    found = nnx.merge(graph, params)
    out = found(tokens_BT, experts_BTLK=experts_BTLK, tell_experts=True)
    return jax.nn.log_softmax(found.logits(out)), out.own_experts_BTLK


def gap(graph: Any, params: Any, found: Sequence[tuple[list[int], Completion]], replay: bool) -> str:
    """A line of the table."""
    tokens_BT = np.array([[*prompt, *c.tokens] for prompt, c in found], np.int32)
    told = np.stack([c.experts for _, c in found if c.experts is not None])
    log_probs_BTV, own = scored(graph, params, tokens_BT, told if replay else np.full_like(told, -1))
    new_BT = tokens_BT[:, LENGTH:, None]
    here_BT = np.take_along_axis(np.asarray(log_probs_BTV)[:, LENGTH - 1 : -1], new_BT, axis=2)[..., 0]
    off_BT = np.abs(here_BT - np.array([c.log_probs for _, c in found]))
    alike = float(agreement(told, own, np.ones(tokens_BT.shape)))
    return f"mean {off_BT.mean():.1e}  largest {off_BT.max():.1e}  routers alike {alike:.2%}"


def main() -> None:
    """Prints the table."""
    for dtype in ("float32", "bfloat16"):
        graph, params = model(dtype)
        found = written(graph, params)
        for replay in (True, False):
            print(f"{dtype:8}  {'replayed' if replay else 'free':8}  {gap(graph, params, found, replay)}", flush=True)


if __name__ == "__main__":
    main()
