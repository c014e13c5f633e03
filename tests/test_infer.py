"""Sampling and generation."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import ATTENTION, EVERYTHING, V, graph, logits, random_tokens, weights

from dsjax.config import UserError, apply_overrides
from dsjax.infer.engine import Generator, complete, generate, make_generator
from dsjax.infer.sampling import SamplingConfig, sample
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.masks import Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.sharding import MeshConfig, make_mesh

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

LOGITS = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))


def counts(cfg: SamplingConfig, n: int = 4000) -> np.ndarray:
    rows = jnp.broadcast_to(LOGITS, (n, 4))
    return np.bincount(np.asarray(sample(rows, jax.random.key(0), cfg)), minlength=4) / n


@pytest.mark.parametrize("temperature", [0.0, 1e-50, 1e-3])
def test_temperatures_near_zero_are_greedy(temperature: float) -> None:
    assert counts(SamplingConfig(temperature=temperature)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("cfg", "want"),
    [
        (SamplingConfig(1.0, 0, 1.0), [0.5, 0.3, 0.15, 0.05]),
        (SamplingConfig(1.0, 2, 1.0), [0.625, 0.375, 0, 0]),
        (SamplingConfig(1.0, 0, 0.79), [0.625, 0.375, 0, 0]),  # the second token carries the sum over 0.79
        (SamplingConfig(1.0, 0, 0.0), [1, 0, 0, 0]),
        (SamplingConfig(1.0, 3, 0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),  # of the three best: 0.84 comes before
        (SamplingConfig(1.0, 0, 1.0, 0.5), [0.625, 0.375, 0, 0]),
        (SamplingConfig(0.5, 0, 1.0), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ],
)
def test_samples_follow_the_stated_distribution(cfg: SamplingConfig, want: list[float]) -> None:
    got = counts(cfg)
    # four standard deviations of a share of 4,000 draws
    np.testing.assert_allclose(got, want, atol=4 * 0.5 / np.sqrt(4000))
    assert all(g == 0 for g, w in zip(got, want, strict=True) if w == 0)


GREEDY = SamplingConfig(temperature=0.0)
GRAPH, PARAMS = graph(EVERYTHING), weights(EVERYTHING)


def naive(prompt: list[int], n: int) -> list[int]:
    """Greedy decoding by full forward passes, over what is not yet written as well: it changes nothing before it."""
    tokens = list(prompt)
    for _ in range(n):
        row = np.array([tokens + [0] * (12 - len(tokens))])
        tokens.append(int(logits(EVERYTHING, PARAMS, row)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def test_generation_of_a_ragged_batch_is_naive_decoding_row_by_row() -> None:
    prompts = [[1, 2, 3], [4, 5, 4, 5, 4], [3]]
    got = complete(GRAPH, PARAMS, prompts, max_tokens=5, end_id=31, max_length=64, sampling=GREEDY, steps=2)
    want = [naive(p, 5) for p in prompts]
    want = [row[: row.index(31)] if 31 in row else row for row in want]
    assert got == want


def test_nothing_but_the_end_token_stands_behind_it() -> None:
    first = naive([1, 2, 3], 3)
    end = first[2] if first[2] not in first[:2] else first[0]
    parts = list(
        generate(GRAPH, PARAMS, [[1, 2, 3]], max_tokens=9, end_id=end, max_length=64, sampling=GREEDY, steps=4)
    )
    row = np.concatenate(parts, axis=1)[0].tolist()
    assert set(row[row.index(end) :]) == {end}
    assert len(row) <= 4 * -(-(row.index(end) + 1) // 4)  # and it stopped at the chunk in which the row ended


def test_a_row_keeps_the_end_token_that_was_chosen() -> None:
    tokens = naive([1, 2, 3], 4)
    ends = (tokens[3], 31)  # 31 fills up
    options: dict[str, Any] = {"max_tokens": 9, "end_id": 31, "end_ids": ends, "max_length": 64, "sampling": GREEDY}
    cut = next(place for place, token in enumerate(tokens) if token in ends)
    row = np.concatenate(list(generate(GRAPH, PARAMS, [[1, 2, 3]], **options)), axis=1)[0].tolist()
    assert row == [*tokens[: cut + 1], *[31] * (len(row) - cut - 1)]
    assert complete(GRAPH, PARAMS, [[1, 2, 3]], **options) == [tokens[:cut]]


def test_a_seed_gives_the_same_samples_again_and_another_seed_others() -> None:
    def run(seed: int) -> list[list[int]]:
        options = {"max_tokens": 12, "end_id": 31, "max_length": 64, "sampling": SamplingConfig(1.5, 0, 1.0)}
        return complete(GRAPH, PARAMS, [[1, 2]], seed=seed, **options)

    assert run(1) == run(1) != run(2)


def test_new_tokens_stop_at_the_length_of_the_model() -> None:
    got = complete(GRAPH, PARAMS, [[1] * 10], max_tokens=50, end_id=31, max_length=14, sampling=GREEDY)
    assert len(got[0]) <= 4


@pytest.mark.parametrize(("prompts", "sentence"), [([[]], "a prompt is empty"), ([[1] * 20], "a prompt has 20 tokens")])
def test_prompts_that_cannot_be_continued_are_refused(prompts: list, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list(generate(GRAPH, PARAMS, prompts, max_tokens=4, end_id=0, max_length=20))


def test_healing_lets_a_prompt_end_inside_a_token() -> None:
    from dsjax.data.tokenizer import train_tokenizer
    from dsjax.infer.engine import heal

    tokenizer = train_tokenizer(["if x:\n    y()\nfor i in z:\n    y()\n" * 50], 300)
    whole = tokenizer.encode("if x:\n    y").tolist()
    ids = [tokenizer.end_id, *tokenizer.encode("if x:\n").tolist()]
    assert ids[1:] != whole[: len(ids) - 1]  # ":\n    " is one token: the prompt's own cut is never seen in training
    healed, first = heal(tokenizer, ids)
    assert healed == ids[:-1]
    assert first[whole[len(healed) - 1]]
    allowed = [tokenizer.decode([i]) for i in np.flatnonzero(first).tolist()]
    assert all(text.startswith(tokenizer.decode(ids[-1:])) for text in allowed)
    assert heal(tokenizer, [tokenizer.end_id])[0] == [tokenizer.end_id]


@pytest.mark.parametrize("size", [V - 2, V, V + 5])  # of the tokenizer
def test_only_the_given_first_tokens_come_first(size: int) -> None:
    only = np.arange(size) >= V
    only[[7, 9]] = True
    rows = complete(
        GRAPH, PARAMS, [[1, 2]] * 20, max_tokens=2, end_id=31, max_length=64,
        sampling=SamplingConfig(2.0, 0, 1.0), first_tokens=[only] * 20,
    )  # fmt: skip
    assert {row[0] for row in rows} == {7, 9}


# ---------------------------------------------------------------- meshes

HEADS_4 = dataclasses.replace(ATTENTION, num_heads=8, num_kv_heads=4)
HEADS_2 = dataclasses.replace(ATTENTION, num_heads=8, num_kv_heads=2)
EXPERTS = MoEConfig(num_experts=8, top_k=2, d_ff=32, num_shared_experts=1, bias_update_rate=0.01)
SHARDED = {
    "dense": DecoderConfig(
        vocab_size=64, d_model=64, num_layers=2, groups=(LayerGroup(MLPConfig(d_ff=64), HEADS_2),), tied=True
    ),
    "experts": DecoderConfig(
        vocab_size=64,
        d_model=64,
        num_layers=3,
        groups=(
            LayerGroup(MLPConfig(d_ff=64), HEADS_4, num_layers=1),
            LayerGroup(EXPERTS, dataclasses.replace(HEADS_4, window=7)),
        ),
    ),
    "segmented": DecoderConfig(
        vocab_size=64,
        d_model=64,
        num_layers=4,
        groups=(
            LayerGroup(MLPConfig(d_ff=64), dataclasses.replace(HEADS_2, segmented=Segmented(4)), num_layers=2),
            LayerGroup(EXPERTS, dataclasses.replace(HEADS_4, segmented=Segmented(4, top_segments=0)), num_layers=1),
            LayerGroup(MLPConfig(d_ff=64), HEADS_4),
        ),
    ),
}
PROMPTS = random_tokens(8, 12)
IDS = np.ones_like(PROMPTS)
IDS[1, 9:] = IDS[4, 3:] = 0


def generator(name: str, mesh: str, batch: int, devices: list | None = None, **options: Any) -> Generator:
    config = apply_overrides(MeshConfig(data=1), mesh.split(","))
    compute = ComputeConfig(dtype=options.pop("compute", "float32"))
    make = lambda rngs: Decoder(SHARDED[name], compute, rngs=rngs)  # noqa: E731
    return make_generator(make, make_mesh(config, devices), batch_size=batch, slots=21, **options)


def steps(made: Generator, name: str) -> np.ndarray:
    """Logits behind the prompts and behind each of three greedy tokens."""
    batch = made.cache_shapes.lengths_B.shape[0]
    params = made.place(weights(SHARDED[name]))
    now, cache = made.prefill(params, made.place_rows(PROMPTS[:batch]), made.place_rows(IDS[:batch]))
    out = [np.asarray(now)]
    for _ in range(3):
        now, cache = made.decode_step(params, made.place_rows(out[-1].argmax(-1).astype(np.int32)), cache)
        out.append(np.asarray(now))
    return np.stack(out)


@functools.cache
def on_one_device(name: str, batch: int) -> np.ndarray:
    return steps(generator(name, "data=1", batch, jax.devices()[:1]), name)


def moved(text: str) -> dict[str, int]:
    """What a compiled program sends between devices without adding it up: elements of each result."""
    found = re.findall(r"= (\w+\[([\d,]*)\]\S*) (all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    return {f"{kind} {shape}": math.prod(int(n) for n in dims.split(",") if n) for shape, dims, kind in found}


MESHES = [
    ("dense", "tensor=8", 8),  # more than there are key/value heads
    ("dense", "fsdp=2,tensor=2,context=2", 8),
    ("experts", "expert=8", 1),
    ("experts", "data=2,expert=2,tensor=2", 8),
    ("segmented", "data=4,tensor=2", 8),  # chosen tails are gathered
]
FURTHER = [
    *(
        ("dense", *mesh)
        for mesh in (("data=8", 8), ("data=2,tensor=4", 8), ("expert=8", 8), ("expert=8", 1), ("tensor=8", 1))
    ),
    *(("experts", *mesh) for mesh in (("data=8", 8), ("data=2,tensor=4", 8), ("expert=8", 8), ("tensor=8", 8))),
    *(("experts", *mesh) for mesh in (("tensor=8", 1), ("fsdp=2,tensor=2,context=2", 8))),
    ("segmented", "expert=8", 1),  # a row's slots lie on eight devices
    ("segmented", "fsdp=2,tensor=2,context=2", 8),
]


@pytest.mark.parametrize(
    ("name", "mesh", "batch"), [*MESHES, *(pytest.param(*of, marks=pytest.mark.slow) for of in FURTHER)]
)
def test_every_mesh_gives_the_logits_of_one_device_and_moves_no_weight(name: str, mesh: str, batch: int) -> None:
    made, want = generator(name, mesh, batch), on_one_device(name, batch)
    got = steps(made, name)
    # float32 sums in another order; a logit near 0 is a difference of such, so that errors go with the largest logit
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
    # Rows at hand have at most batch x 64 elements, the smallest matrix of a layer 64 x 2 x 8: twice that at batch 8.
    text = made.decode_step.trace(*made.decode_shapes()).lower().compile().as_text()
    assert all(size <= batch * 64 for size in moved(text).values()), moved(text)


def test_devices_beyond_the_key_value_heads_cut_query_heads_and_slots() -> None:
    made = generator("dense", "tensor=8", 8)
    assert dict(made.mesh.shape) == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 2, "context": 1}
    cache = made.cache_shapes.groups[0].pages.k_LMKPH
    assert cache.shape == (2, 8 * 4, 2, 16, 8)  # each of four devices has a page of each row
    assert cache.sharding.shard_shape(cache.shape) == (2, 8, 1, 16, 8)
    w_q = made.shapes["group_0"]["attention"]["w_q"]
    assert w_q.sharding.shard_shape(w_q.shape) == (2, 64, 1, 1, 8)


def test_rows_are_cut_over_the_expert_axis_if_they_divide_over_it() -> None:
    cut, whole = (generator("experts", "expert=8", n).cache_shapes.groups[0].pages.k_LMKPH for n in (8, 1))
    assert cut.sharding.shard_shape(cut.shape) == (1, 2, 4, 16, 8)  # two pages for 21 slots
    assert whole.sharding.shard_shape(whole.shape) == (1, 1, 4, 16, 8)  # then its slots are


def test_a_long_prefill_may_cut_positions_and_a_step_does_not() -> None:
    made = generator("experts", "context=8", 8)
    params = made.place(weights(SHARDED["experts"]))
    # 12 positions do not divide over 8; 16 do
    longer = np.pad(PROMPTS, ((0, 0), (0, 4))), np.pad(IDS, ((0, 0), (0, 4)))
    want = on_one_device("experts", 8)[0]
    for tokens, ids in ((PROMPTS, IDS), longer):
        got = made.prefill(params, made.place_rows(tokens), made.place_rows(ids))[0]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("name", "mesh", "batch", "sentence"),
    [
        ("dense", "data=8", 3, "batch_size is 3; it must divide over the 8 devices of mesh data=8"),
        ("dense", "data=4,fsdp=2", 6, "batch_size is 6; it must divide over the 4 devices of mesh data=4"),
        ("experts", "fsdp=2,tensor=3", 1, "mesh.fsdp \\* mesh.tensor is 2 \\* 3: 6 devices can not share the"),
    ],
)
def test_what_does_not_divide_is_said_before_anything_is_compiled(
    name: str, mesh: str, batch: int, sentence: str
) -> None:
    size = apply_overrides(MeshConfig(data=1), mesh.split(","))
    devices = jax.devices()[: size.data * size.fsdp * size.tensor]
    with pytest.raises(UserError, match=sentence):
        generator(name, mesh, batch, devices)


def test_weights_are_kept_in_the_dtype_that_they_are_used_in() -> None:
    made = generator("experts", "data=1", 8, jax.devices()[:1], compute="bfloat16")
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="/").split("/", 1)[-1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(made.shapes)
        if leaf.dtype == jnp.float32
    }
    norms = {f"{name}/scale" for name in ("attention_norm", "ffn_norm", "attention/q_norm", "attention/k_norm")}
    assert kept == norms | {"scale", "ffn/w_router", "ffn/selection_bias"}
    cast = generator("experts", "data=1", 8, jax.devices()[:1], compute="bfloat16", dtype="float32")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(cast.shapes))
    np.testing.assert_array_equal(steps(made, "experts"), steps(cast, "experts"))  # cast once, or at each use


def test_a_decode_step_takes_the_cache_that_it_is_given() -> None:
    made = generator("dense", "data=2,tensor=4", 8)
    params = made.place(weights(SHARDED["dense"]))
    _, cache = made.prefill(params, made.place_rows(PROMPTS), made.place_rows(IDS))
    assert jax.tree.map(lambda x: x.sharding, cache) == jax.tree.map(lambda s: s.sharding, made.cache_shapes)
    made.decode_step(params, made.place_rows(PROMPTS[:, 0]), cache)
    assert cache.groups[0].pages.k_LMKPH.is_deleted()


def test_generation_on_a_mesh_is_that_on_one_device() -> None:
    def run(mesh: Any) -> list[list[int]]:
        options = {"max_tokens": 6, "end_id": 63, "max_length": 64, "sampling": GREEDY, "steps": 3, "mesh": mesh}
        prompts = [[1, 2, 3], [4, 5, 4, 5, 4], [3], [2, 2]]
        return complete(graph(SHARDED["experts"]), weights(SHARDED["experts"]), prompts, **options)

    assert run(make_mesh(MeshConfig(data=2, tensor=4))) == run(None)


@pytest.mark.parametrize(
    ("mesh", "batch"), [("data=2,expert=2,tensor=2", 8), pytest.param("fsdp=2,expert=4", 1, marks=pytest.mark.slow)]
)
def test_prefill_and_decode_compile_for_tpu(mesh: str, batch: int) -> None:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    made = generator("experts", mesh, batch, list(devices), compute="bfloat16")
    prefill = made.prefill.trace(*made.prefill_shapes(16)).lower().compile()
    assert prefill.memory_analysis().output_size_in_bytes > 0
    step = made.decode_step.trace(*made.decode_shapes()).lower().compile()
    cache_bytes = sum(
        math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(made.cache_shapes)
    )
    assert step.memory_analysis().alias_size_in_bytes >= cache_bytes  # changed in place
    assert all(size <= batch * 64 for size in moved(step.as_text()).values()), moved(step.as_text())


def test_mesh_axes_may_take_parts_of_the_axes_of_a_torus() -> None:
    from jax.experimental import topologies

    devices = list(topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4").devices)
    mesh = make_mesh(MeshConfig(data=1, expert=8, tensor=8), devices)
    assert (mesh.shape["expert"], mesh.shape["tensor"]) == (8, 8)
    assert len({device.id for device in mesh.devices.flat}) == 64


def kept_by_hand(logits: np.ndarray, cfg: SamplingConfig) -> np.ndarray:
    """Which tokens may be drawn: the k best, of those the likeliest until top_p is reached; ties stay together."""
    scaled = logits.astype(np.float64) / cfg.temperature
    kept = np.ones(len(scaled), bool)
    if cfg.top_k:
        kept &= scaled >= np.sort(scaled)[::-1][min(cfg.top_k, len(scaled)) - 1]
    p = np.where(kept, np.exp(scaled - scaled.max()), 0)
    p /= p.sum()
    if cfg.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        last = np.flatnonzero((before < cfg.top_p) | (np.arange(len(p)) == 0))[-1]
        kept &= p >= p[order[last]]
    return kept & (scaled >= scaled.max() + np.log(max(cfg.min_p, 1e-300)))


@pytest.mark.parametrize("spread", [0.05, 4.0])  # nearly even: far more than the best few are kept; and peaked
@pytest.mark.parametrize(
    "cfg",
    [
        SamplingConfig(1.0, 0, 0.9),
        SamplingConfig(0.7, 50, 0.95),
        SamplingConfig(1.3, 400, 0.5),
        SamplingConfig(1.0, 700, 1.0),
        SamplingConfig(1.0, 0, 1.0, 0.3),
        SamplingConfig(1.0, 0, 0.0),
        SamplingConfig(1.0, 256, 0.999),
    ],
)
def test_of_a_large_vocabulary_the_same_tokens_are_kept(cfg: SamplingConfig, spread: float) -> None:
    """Whether the least one is among the best few or all must be sorted; beside rows that are not cut at all."""
    from dsjax.infer.sampling import RowSampling, sample_rows

    logits = (np.random.default_rng(0).normal(size=1000) * spread).astype(np.float32)
    want = kept_by_hand(logits, cfg)
    configs = [cfg] * 3000 + [SamplingConfig(1.0, 0, 1.0), SamplingConfig(0.0)]
    rows = jnp.broadcast_to(logits, (len(configs), 1000))
    keys = jax.random.split(jax.random.key(1), len(configs))
    drawn = np.asarray(sample_rows(rows, keys, jax.tree.map(jnp.asarray, RowSampling.of(configs))))
    assert drawn[-1] == logits.argmax()
    counted = np.bincount(drawn[:3000], minlength=1000)
    # A token at the edge may fall on the other side of a float32 sum.
    assert counted[~want].sum() <= 3
    p = np.where(want, np.exp(logits / cfg.temperature - (logits / cfg.temperature).max()), 0)
    p /= p.sum()
    likely = np.argsort(-p)[:20]
    np.testing.assert_allclose(counted[likely] / 3000, p[likely], atol=5 * np.sqrt(p.max() / 3000))
