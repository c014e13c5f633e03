"""FLOPs counted from programs, against hand arithmetic, the configs' own, and the compiler's."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from models import EVERYTHING

from dsjax.config import apply_overrides, load_config
from dsjax.data.prepare import DataConfig
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.masks import Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.plan.flops import Flops, count_flops
from dsjax.plan.programs import make_program
from dsjax.sharding import MeshConfig, make_mesh
from dsjax.train.pretrain import Pretrain
from pallas_kernels.causal_attention import causal_attention
from pallas_kernels.cost import useful_flops
from pallas_kernels.segmented_attention import Segments, segmented_attention

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
X = jnp.ones((8, 16))
W = jnp.ones((16, 32))


def count(f, *arguments, **options) -> Flops:
    return count_flops(jax.make_jaxpr(f)(*arguments), **options)


# ---------------------------------------------------------------- by hand


def test_a_product() -> None:
    assert count(lambda x, w: x @ w, X, W) == Flops(model=2 * 8 * 16 * 32)


def test_a_batched_product() -> None:
    f = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)  # noqa: E731
    assert count(f, jnp.ones((3, 8, 16)), jnp.ones((3, 16, 4))).model == 2 * 3 * 8 * 16 * 4


def test_a_convolution() -> None:
    f = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID")  # noqa: E731
    assert count(f, jnp.ones((2, 3, 10, 10)), jnp.ones((5, 3, 3, 3))).model == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)


def test_a_scan_counts_every_turn_also_within_another() -> None:
    square = jnp.ones((16, 16))

    def outer(x, _):
        return jax.lax.scan(lambda x, _: (x @ square, None), x, None, length=5)[0], None

    assert count(lambda x: jax.lax.scan(outer, x, None, length=7)[0], X).model == 35 * 2 * 8 * 16 * 16


def test_a_loop_of_unknown_length_counts_once_and_is_told() -> None:
    square = jnp.ones((16, 16))
    found = count(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x @ square, x), X, 3)
    assert found.model == 2 * 8 * 16 * 16
    assert len(found.unknown_loops) == 1


def test_a_choice_counts_its_dearest_branch() -> None:
    f = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: jnp.zeros((8, 32)))  # noqa: E731
    assert count(f, X, W).model == 2 * 8 * 16 * 32


@pytest.mark.parametrize(("platform", "products"), [("cpu", 1), ("tpu", 3), ("cuda", 3)])
def test_a_choice_by_platform_counts_what_runs_there(platform: str, products: int) -> None:
    square = jnp.ones((16, 16))

    def f(x):
        return jax.lax.platform_dependent(x, cpu=lambda x: x @ square, default=lambda x: x @ square @ square @ square)

    assert count(f, X, platform=platform).model == products * 2 * 8 * 16 * 16


def test_what_every_device_does_counts_for_each() -> None:
    mesh = make_mesh(MeshConfig(data=4, tensor=2), jax.devices())
    f = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
    once = 2 * 8 * 16 * 32
    assert count(f, X, W) == Flops(model=once, wasted=once)  # the two devices along tensor compute the same


def test_a_ragged_product_and_its_gradients() -> None:
    rows, groups = jnp.ones((12, 16)), jnp.ones((4, 16, 32))
    sizes = jnp.array([3, 0, 5, 4])
    once = 2 * 12 * 16 * 32
    assert count(jax.lax.ragged_dot, rows, groups, sizes).model == once
    assert count(jax.lax.ragged_dot, rows, groups, sizes, ragged_share=0.25).model == once / 4
    both = jax.grad(lambda r, g: jax.lax.ragged_dot(r, g, sizes).sum(), argnums=(0, 1))
    assert count(both, rows, groups).model == 3 * once  # the primal is computed, too


def test_what_is_computed_again_is_told_apart() -> None:
    f = jax.checkpoint(lambda w: jnp.sum(jnp.sin(X @ w) @ jnp.ones((32, 4))))
    found = count(jax.grad(f), W)
    assert found.recomputed == 2 * 8 * 16 * 32
    assert found.wasted == found.optimizer == 0


def test_a_scope_states_what_is_useful() -> None:
    def f(x, w):
        with useful_flops(0.25):
            return x @ w

    assert count(f, X, W) == Flops(model=2 * 8 * 16 * 32 / 4, wasted=2 * 8 * 16 * 32 * 3 / 4)


def kernel(x_ref, w_ref, o_ref):
    o_ref[...] = x_ref[...] @ w_ref[...]


@pytest.mark.parametrize(
    ("stated", "flops", "how"), [(None, 2, "its body at every grid step"), (99, 99, "stated cost")]
)
def test_a_kernel_counts_by_its_stated_cost_or_its_body(stated: int | None, flops: int, how: str) -> None:
    spec = pl.BlockSpec((4, 16), lambda i: (i, 0))
    call = pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[spec, pl.BlockSpec((16, 32), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((4, 32), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 32), jnp.float32),
        cost_estimate=stated and pl.CostEstimate(flops=stated, bytes_accessed=0, transcendentals=0),
        name="product",
    )
    found = count(call, X, W)
    assert found.model == (stated or flops * 8 * 16 * 32)
    assert found.kernels == (f"product: {how}",)


@pytest.mark.parametrize(("length", "window"), [(64, None), (512, None), (600, None), (600, 100), (1024, 17)])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_attention_counts_what_is_visible(length: int, window: int | None, platform: str) -> None:
    cfg = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=window)
    q, k = jnp.ones((2, length, 4, 8)), jnp.ones((2, length, 2, 8))
    ids = jnp.ones((2, length), jnp.int32)
    forward = 4 * 2 * length * 4 * 8 * cfg.visible_positions(length)
    found = count(lambda q, k, v: causal_attention(q, k, v, ids, window), q, k, k, platform=platform)
    assert found.model == pytest.approx(forward, rel=1e-6)
    gradient = jax.grad(lambda q, k, v: causal_attention(q, k, v, ids, window).sum(), argnums=(0, 1, 2))
    found = count(gradient, q, k, k, platform=platform)
    assert found.model == pytest.approx(3 * forward, rel=1e-6)
    assert found.wasted >= 0.5 * forward  # scores are computed again


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("documents", [False, True])
def test_segmented_attention_counts_what_is_visible(platform: str, documents: bool) -> None:
    cut, T = Segments(256, 128, 128), 1024
    q, k = jnp.ones((2, T, 4, 64), jnp.bfloat16), jnp.ones((2, T, 2, 64), jnp.bfloat16)
    ids = jnp.ones((2, T), jnp.int32) if documents else None

    def attend(q, k, v):
        return segmented_attention(q, k, v, segment_size=256, shift=128, documents=ids)

    forward = 2 * 4 * cut.visible_pairs(T) * 2 * (64 + 64)
    assert count(attend, q, k, k, platform=platform).model == pytest.approx(forward, rel=1e-6)
    gradient = jax.grad(lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    assert count(gradient, q, k, k, platform=platform).model == pytest.approx(3 * forward, rel=1e-6)


# ---------------------------------------------------------------- whole steps


MESHES = [{}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 4, "context": 2}]
REMATS = ["none", "dots", "full"]


def every_pair() -> Iterator[Any]:
    """Each mesh and each kind of recomputation once with the model of experts; the other pairs are slow."""
    for name in ("tiny", "tiny_moe"):
        for i, mesh in enumerate(MESHES):
            for j, remat in enumerate(REMATS):
                slow = name == "tiny_moe" and i != j
                yield pytest.param(name, mesh, remat, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("name", "mesh", "remat"), list(every_pair()))
def test_a_training_step_does_what_the_config_says(name: str, mesh: dict[str, int], remat: str) -> None:
    config = apply_overrides(load_config(CONFIGS / f"{name}.py"), [f"compute.remat={remat}"])
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    program = make_program(config, "train", jax.devices() if mesh else jax.devices()[:1])
    found = count_flops(program.traced.jaxpr, platform="cpu", ragged_share=program.ragged_share)
    assert found.model == pytest.approx(program.model_flops, rel=0.03)
    # Ragged products are none of the "dots" that are kept.
    least, most = {"none": (0, 0), "dots": (0, 0.15), "full": (0.19, 1 / 3)}[remat]
    assert least <= found.recomputed / program.model_flops <= most


def test_the_step_of_every_feature_does_what_its_config_says() -> None:
    config = Pretrain(model=EVERYTHING, data=DataConfig(vocab_size=320, seq_len=64, batch_size=4))
    program = make_program(config, "train", jax.devices()[:1])
    found = count_flops(program.traced.jaxpr, platform="cpu")
    assert found.model == pytest.approx(program.model_flops, rel=0.03)


def tiny_segmented() -> Pretrain:
    config = load_config(CONFIGS / "tiny.py")
    group = config.model.groups[0]
    attention = dataclasses.replace(group.attention, segmented=Segmented(32))
    model = dataclasses.replace(
        config.model, num_layers=3, groups=(dataclasses.replace(group, attention=attention, num_layers=3),)
    )
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2, "context": 2}])
def test_a_training_step_of_segmented_attention_does_what_the_config_says(mesh: dict[str, int]) -> None:
    config = apply_overrides(tiny_segmented(), ["compute.remat=full", "data.seq_len=256"])
    program = make_program(
        dataclasses.replace(config, mesh=MeshConfig(**mesh)), "train", jax.devices() if mesh else jax.devices()[:1]
    )
    found = count_flops(program.traced.jaxpr, platform="cpu")
    assert found.model == pytest.approx(program.model_flops, rel=0.01)
    full = dataclasses.replace(config.model.groups[0].attention, segmented=None)
    group = dataclasses.replace(config.model.groups[0], attention=full)
    assert (
        program.model_flops < dataclasses.replace(config.model, groups=(group,)).flops_per_token(256) * program.tokens
    )


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("mesh", [{}, {"data": 1, "expert": 4, "tensor": 2}])
@pytest.mark.parametrize("name", ["tiny", "tiny_moe", "segmented"])
def test_inference_does_what_the_config_says(name: str, mesh: dict[str, int], batch_size: int, mode: Any) -> None:
    config = tiny_segmented() if name == "segmented" else load_config(CONFIGS / f"{name}.py")
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    devices = jax.devices() if mesh else jax.devices()[:1]
    program = make_program(config, mode, devices, batch_size=batch_size, length=256)
    found = count_flops(program.traced.jaxpr, platform="cpu", ragged_share=program.ragged_share)
    assert found.model == pytest.approx(program.model_flops, rel=0.03)
    assert program.tokens == batch_size * (256 if mode == "prefill" else 1)


def test_accumulation_changes_nothing() -> None:
    config = load_config(CONFIGS / "tiny.py")
    counts = [
        count_flops(
            make_program(apply_overrides(config, [f"train.accumulate={n}"]), "train", jax.devices()[:1]).traced.jaxpr
        ).model
        for n in (1, 4)
    ]
    assert counts[0] == pytest.approx(counts[1], rel=1e-6)


def test_muons_products_are_the_optimizers() -> None:
    config = apply_overrides(load_config(CONFIGS / "tiny.py"), ["optim.name=muon"])
    program = make_program(config, "train", jax.devices()[:1])
    found = count_flops(program.traced.jaxpr)
    assert found.optimizer > 0
    assert found.model == pytest.approx(program.model_flops, rel=0.03)


def test_the_compiler_counts_the_same() -> None:
    """XLA counts a program without loops right; ours adds element-wise work to nothing, so it has a little less."""
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=64)
    model = DecoderConfig(512, d_model=256, num_layers=2, groups=(LayerGroup(MLPConfig(d_ff=1024), attention),))
    config = Pretrain(model=model, data=DataConfig(vocab_size=512, seq_len=128, batch_size=2))
    config = apply_overrides(config, ["compute.unroll=true"])
    program = make_program(config, "train", jax.devices()[:1])
    found = count_flops(program.traced.jaxpr, platform="cpu")
    xla = program.traced.lower().compile().cost_analysis()["flops"]
    assert found.executed == pytest.approx(xla, rel=0.1)
    assert found.executed < xla
