"""The engine on eight devices is the engine on one, whatever the axes; and what its programs cost on one CPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import ATTENTION, V, graph, random_tokens, weights

from dsjax.infer.batching import Engine
from dsjax.infer.requests import Completion, Request
from dsjax.infer.sampling import RowSampling, SamplingConfig
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.masks import Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.sharding import MeshConfig, make_mesh

HEADS = dataclasses.replace(ATTENTION, num_heads=8, num_kv_heads=4, qk_norm=False, conv_taps=0)
MLP, EXPERTS = MLPConfig(d_ff=32), MoEConfig(num_experts=8, top_k=2, d_ff=8, num_shared_experts=1)
LATENT = LatentAttentionConfig(num_heads=8, q_rank=12, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=8)
MODELS = {
    "experts": DecoderConfig(V, 32, 2, (LayerGroup(MLP, HEADS, 1), LayerGroup(EXPERTS, HEADS))),
    "by head": DecoderConfig(
        V, 32, 2, (LayerGroup(MLP, dataclasses.replace(HEADS, segmented=Segmented(8, 2, "heads"))),)
    ),
    "chosen by head": DecoderConfig(
        V, 32, 2, (LayerGroup(MLP, dataclasses.replace(HEADS, segmented=Segmented(8, 4, "heads", top_segments=1))),)
    ),
    "latent": DecoderConfig(V, 32, 2, (LayerGroup(EXPERTS, LATENT),)),
    "drafted": DecoderConfig(V, 32, 2, (LayerGroup(EXPERTS, LATENT),), multi_token=MultiTokenConfig()),
}
LENGTHS = (3, 17, 22, 17, 9)


def engine(name: str, mesh: Any = None, **options: Any) -> Engine:
    config = MODELS[name]
    chosen = {"end_ids": (), "max_length": 48, "batch_size": 4, "page_size": 4, "chunk": 8, "steps": 3} | options
    chosen["draft"] = 2 if name == "drafted" else 0
    return Engine(graph(config), weights(config), mesh=mesh, **chosen)


def completions(name: str, mesh: Any = None) -> list[Completion]:
    made = engine(name, mesh)
    numbers = [
        made.submit(Request(random_tokens(1, n, n)[0].tolist(), 8, SamplingConfig(0.0), num_samples=1 + n % 2))
        for n in LENGTHS
    ]
    got = made.run()
    return [sample for number in numbers for sample in got[number]]


on_one_device = functools.cache(completions)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("experts", {"data": 2, "expert": 2, "tensor": 2}),
        ("experts", {"expert": 4, "fsdp": 2}),
        ("experts", {"tensor": 4, "fsdp": 2}),
        ("by head", {"data": 2, "tensor": 4}),
        ("by head", {"tensor": 2, "fsdp": 2, "context": 2}),
        ("chosen by head", {"data": 4, "tensor": 2}),
        ("latent", {"data": 2, "expert": 2, "tensor": 2}),
        ("drafted", {"data": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_eight_devices_give_what_one_gives(name: str, axes: dict[str, int]) -> None:
    got = completions(name, make_mesh(MeshConfig(**{"data": 1} | axes)))
    for mine, one in zip(got, on_one_device(name), strict=True):
        assert mine.tokens == one.tokens
        # float32 sums of up to 32 numbers in another order, over two layers
        np.testing.assert_allclose(mine.log_probs, one.log_probs, atol=1e-5)
        assert mine.drafts == one.drafts


@pytest.mark.parametrize("name", ["experts", "by head", "latent", "drafted"])
def test_on_one_cpu_no_weight_and_no_cache_is_copied(name: str) -> None:
    """Beside what it is given, the decode program keeps little: positions of slots, a quarter of these small heads.

    The module's passes have their own; a copy of a pool would be a third of that cache, or more.
    """
    made = engine(name, batch_size=4, max_length=4096, steps=4, page_size=16, chunk=16)
    zeros = np.zeros(4, np.int32)
    rows = (np.full(4, 4, np.int32), zeros, np.zeros(4, np.uint32), zeros)
    sampling = jax.tree.map(jnp.asarray, RowSampling.of([SamplingConfig(0.0)] * 4))
    lowered = made.programs.decode.lower(
        made.params, made.behind, made.current(), *rows, sampling, np.int32(4), width=4, num_top=0
    )
    memory = lowered.compile().memory_analysis()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves([group.pages for group in made.cache.groups]))
    assert memory.alias_size_in_bytes > cache  # it is changed in place
    assert memory.temp_size_in_bytes < cache / (3 if name == "drafted" else 4)


def test_weights_a_layer_at_a_time_are_views_of_the_stacks_and_experts_stay() -> None:
    from dsjax.infer.written_out import stacked, written_out

    config = MODELS["experts"]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = weights(config)
    made = written_out(graph(config), params, mesh)[1]
    assert isinstance(made["group_1"]["attention"]["w_q"], tuple)
    assert not isinstance(made["group_1"]["ffn"]["w_gate"], tuple)  # experts
    assert isinstance(made["group_1"]["ffn"]["shared"]["w_gate"], tuple)
    jax.tree.map(np.testing.assert_array_equal, stacked(made), params)
    wide = jnp.ones((3, 64, 64))  # of whole cache lines
    params["group_1"]["attention"]["w_q"] = wide
    layers = written_out(graph(config), params, mesh)[1]["group_1"]["attention"]["w_q"]
    first = wide.unsafe_buffer_pointer()
    assert [x.unsafe_buffer_pointer() - first for x in layers] == [0, 64 * 64 * 4, 2 * 64 * 64 * 4]
