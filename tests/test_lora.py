"""Frozen weights, in few bits or not, and trained low-rank pairs beside them: values, gradients, runs, export."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import changed
from test_sharding import random_batch

from dsjax.config import apply_overrides, validate
from dsjax.data.batch import Batch
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.linear import project
from dsjax.nn.lora import FrozenWeight, LoraConfig, target_of
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.nn.quantize import NF4, Kind, block_size, dequantize, quantize
from dsjax.train.optimizer import OptimConfig, kinds, make_optimizer
from dsjax.train.pretrain import Pretrain, build, place_batch
from dsjax.train.step import Trainer, TrainState, next_token_loss

KINDS: tuple[Kind, ...] = ("int8", "int4", "nf4")
ALL = ("attention", "mlp", "experts")

# ---------------------------------------------------------------- few bits


def nearest(x: np.ndarray, kind: Kind) -> np.ndarray:
    """The plain transcription: each block by itself, each number to the nearest of all that its scale allows."""
    rows = x.reshape(-1, block_size(x.shape[-1]))
    out = np.zeros_like(rows)
    for row, block in enumerate(rows):
        most = np.abs(block).max()
        levels = np.asarray(NF4, np.float32) if kind == "nf4" else np.arange(-128, 128) if kind == "int8" else None
        levels = np.arange(-8, 8) if levels is None else levels
        scale = most / np.float32({"nf4": 1.0, "int8": 127.5, "int4": 7.5}[kind])
        if most > 0:
            out[row] = levels[np.argmin(np.abs(block[:, None] / scale - levels), axis=1)] * scale
    return out.reshape(x.shape)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(shape=st.sampled_from([(1,), (3, 5), (2, 3, 64), (2, 192), (4, 100), (1, 67)]), seed=st.integers(0, 2**31))
def test_every_number_goes_to_the_nearest_that_its_block_allows(kind: Kind, shape: tuple, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3)).astype(np.float32)
    x[rng.random(shape) < 0.1] = 0
    q = quantize(jnp.asarray(x), kind)
    found, want = np.asarray(dequantize(q)), nearest(x, kind)
    most = np.abs(x.reshape(-1, block_size(shape[-1]))).max(axis=1, keepdims=True)
    # Two neighbours that are equally near up to rounding: either may be taken, so what must agree is the error.
    error, least = (np.abs(y - x).reshape(most.shape[0], -1) for y in (found, want))
    assert (np.abs(error - least) <= 1e-6 * most).all()  # a few roundings of float32
    widest = {"int8": 1 / 255, "int4": 1 / 15, "nf4": 0.5 * np.diff(NF4).max()}[kind]
    assert (error <= (widest + 1e-6) * most).all()
    assert q.shape == shape
    assert q.codes.nbytes == math.prod(shape[:-1]) * (shape[-1] if kind == "int8" else (shape[-1] + 1) // 2)


def test_zeros_stay_zeros_and_the_largest_of_a_block_stays_itself() -> None:
    x = jnp.zeros((2, 128)).at[0, 3].set(-2.5)
    np.testing.assert_array_equal(dequantize(quantize(x, "nf4")), x)
    for kind in KINDS:
        np.testing.assert_array_equal(dequantize(quantize(x, kind))[:, 64:], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_qwix_stores_the_same(kind: Kind) -> None:
    qwix = pytest.importorskip("qwix")
    x = jax.random.normal(jax.random.key(0), (3, 128))
    theirs = qwix.quantize(x, jnp.dtype(kind) if kind != "nf4" else kind, channelwise_axes=(0,), tiled_axes={1: 64})
    # atol: their scale is divided in another order.
    np.testing.assert_allclose(dequantize(quantize(x, kind)), qwix.dequantize(theirs), atol=1e-6)


# ---------------------------------------------------------------- one weight


def product(path: tuple[str, ...], shape: tuple[int, ...], a: Any, b: Any) -> jax.Array:
    """The pair's product as plain matrices."""
    stack = 2 if path[-2:-1] == ("ffn",) and len(shape) == 4 else 1
    inputs = math.prod(shape[stack:-1] if path[-1] == "w_out" else shape[stack : stack + 1])
    rank = a.shape[-1]
    left, right = a.reshape(*shape[:stack], inputs, rank), b.reshape(*shape[:stack], rank, -1)
    return jnp.matmul(left, right, precision="highest").reshape(shape)


def test_a_product_with_a_frozen_weight() -> None:
    """Value and gradients are those of the weight with its pair added; it has none itself."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 3, 4, 5))
    w, a, b = (jax.random.normal(k, s) for k, s in zip(keys[1:], [(4, 5, 6, 7), (4, 5, 2), (2, 6, 7)], strict=True))

    def beside(x: Any, a: Any, b: Any) -> jax.Array:
        return project(x, FrozenWeight(quantize(w, "nf4"), (a, b), 0.5), num_inputs=2)

    def added(x: Any, a: Any, b: Any) -> jax.Array:
        whole = dequantize(quantize(w, "nf4")) + 0.5 * jnp.einsum("ijr,rkl->ijkl", a, b, precision="highest")
        return jnp.einsum("abij,ijkl->abkl", x, whole, precision="highest")

    np.testing.assert_allclose(beside(x, a, b), added(x, a, b), atol=1e-4, rtol=1e-5)  # sums of 20 terms near 10
    grads = [jax.grad(lambda *xs, f=f: f(*xs).sum(), (0, 1, 2))(x, a, b) for f in (beside, added)]
    for got, want in zip(*grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-5)  # sums of up to 250 terms near 10
    frozen = FrozenWeight(w, (a, b), 0.5)
    np.testing.assert_allclose(frozen.astype(jnp.float32), w + 0.5 * jnp.tensordot(a, b, 1), atol=1e-5)
    grad = jax.grad(lambda w: project(x, FrozenWeight(w, None, 1.0), num_inputs=2).sum())(w)
    np.testing.assert_array_equal(grad, 0)


# ---------------------------------------------------------------- a whole model

LATENT = LatentAttentionConfig(num_heads=8, q_rank=16, kv_rank=16, nope_dim=4, rope_dim=4, v_dim=8)
EXPERTS = MoEConfig(
    num_experts=8, top_k=2, d_ff=16, num_shared_experts=1, scoring="sigmoid", bias_update_rate=0.01, balance_coef=0.01
)
MODEL = DecoderConfig(vocab_size=320, d_model=32, num_layers=2, groups=(LayerGroup(EXPERTS, LATENT),))
# Dense, with a module that predicts a further token.
DENSE = DecoderConfig(
    vocab_size=320,
    d_model=32,
    num_layers=2,
    groups=(LayerGroup(MLPConfig(d_ff=48), AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)),),
    multi_token=MultiTokenConfig(num_modules=1),
)


def config(base: Kind | None = None, targets: tuple = ALL, model: DecoderConfig = MODEL, **compute: Any) -> Pretrain:
    found = Pretrain(
        model=model,
        optim=OptimConfig(lr=1e-2, warmup_steps=1, schedule="constant", weight_decay=0.01),
        compute=ComputeConfig(**compute),
        lora=LoraConfig(targets=targets, rank=4, alpha=8.0, base=base),
    )
    found = changed(found, data={"vocab_size": 320, "seq_len": 16, "batch_size": 8}, train={"start_from": "elsewhere"})
    validate(found)
    return found


def started(trainer: Trainer, *, b: float = 0.0) -> TrainState:
    """A new state beside random weights; ``b`` is the size of the second halves of the pairs."""
    state, noise = trainer.init(0), np.random.default_rng(0)
    assert trainer.base is not None
    kept = {}
    for path, weight in trainer.base.weights.items():
        x = (path[-1] == "scale") + 0.2 * noise.standard_normal(weight.shape)
        kept[path] = trainer.base.freeze(path, jax.device_put(x.astype(np.float32), weight.sharding))
    pairs = traverse_util.flatten_dict(state.params)
    for path, x in pairs.items():
        if path[-1] == "b" and b:
            pairs[path] = jax.device_put(b * noise.standard_normal(x.shape).astype(np.float32), x.sharding)
    nested = traverse_util.unflatten_dict
    return dataclasses.replace(state, params=nested(pairs), frozen=nested(kept))


def one_device(config: Pretrain) -> Trainer:
    return build(changed(config, mesh={"data": 1}), jax.devices()[:1])[1]


def value_and_grad(trainer: Trainer, state: TrainState, batch: Batch, weights: Any = None) -> Any:
    """Loss and gradients of the pairs; with ``weights``, a function pairs -> plain arrays, of the model of those."""

    @jax.jit
    def run(pairs: Any, state: TrainState, batch: Batch) -> Any:
        def loss(pairs: Any) -> jax.Array:
            variables = dataclasses.replace(state, params=pairs).variables
            model = nnx.merge(trainer.graph, variables if weights is None else weights(pairs, variables))
            return next_token_loss(model, batch, jax.random.key(0), jnp.float32(100))[0]

        return jax.value_and_grad(loss)(pairs)

    return run(state.params, state, batch)


def plain(pairs: Any, variables: Any) -> Any:
    """Every frozen weight as one plain array, each pair's product added by hand."""
    flat, pairs = traverse_util.flatten_dict(variables), traverse_util.flatten_dict(pairs)
    for path, w in flat.items():
        if isinstance(w, FrozenWeight):
            x = w.stored if isinstance(w.stored, jax.Array) else dequantize(w.stored)
            a, b = pairs[*path, "a"], pairs[*path, "b"]
            flat[path] = x + 2.0 * product(path, x.shape, a, b)  # alpha / rank
    return traverse_util.unflatten_dict(flat)


@functools.cache
def reference(there: Pretrain) -> Any:
    trainer = one_device(there)
    state = started(trainer, b=0.1)
    return value_and_grad(trainer, state, random_batch(config(), 0), plain)


@pytest.mark.parametrize(
    ("model", "base", "compute"),
    [
        pytest.param(MODEL, None, {}, marks=pytest.mark.slow),
        (MODEL, "nf4", {"remat": "full", "unroll": True}),
        (DENSE, None, {"unroll": True}),
        (DENSE, "int4", {"remat": "dots"}),
    ],
    ids=["experts", "experts in nf4, written out, rematerialised", "dense, written out", "dense in int4"],
)
def test_loss_and_gradients_are_those_of_the_weights_with_the_products_added(
    model: DecoderConfig, base: Kind, compute: dict
) -> None:
    """In both kinds of attention, experts, shared experts and modules that predict further tokens."""
    targets = ALL if model is MODEL else ("attention", "mlp")
    trainer = one_device(config(base, targets, model, **compute))
    loss, grads = value_and_grad(trainer, started(trainer, b=0.1), random_batch(config(), 0))
    want, want_grads = reference(config(base, targets, model))
    np.testing.assert_allclose(loss, want, rtol=1e-5)  # x W + (x a) b is another order of the sums of x (W + a b)
    flat, want_flat = (traverse_util.flatten_dict(tree) for tree in (grads, want_grads))
    assert flat.keys() == want_flat.keys()
    for path, x in flat.items():
        most = np.abs(want_flat[path]).max()
        assert most > 0, path  # every number of a pair is used
        np.testing.assert_allclose(x, want_flat[path], atol=2e-4 * most, rtol=0, err_msg=str(path))  # as above


def test_what_is_trained() -> None:
    """Of every matrix (inputs + outputs) * rank numbers, stacked over layers and experts; of nothing else any."""
    trainer, C = one_device(config()), LATENT
    D, N, Q, R, r = 32, C.num_heads, 16, 16, 4
    heads, latent = N * (C.nope_dim + C.rope_dim), R + C.rope_dim
    values = N * C.v_dim
    attention = (D + Q) + (Q + heads) + (D + latent) + (R + N * C.nope_dim) + (R + values) + (values + D)
    layers = 2
    experts, shared = 8 * 3 * (D + 16), 3 * (D + 16)
    want = r * layers * (attention + experts + shared)
    assert sum(x.size for x in jax.tree.leaves(trainer.shapes.params)) == want
    moments = [x for x in jax.tree.leaves(trainer.shapes.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * want
    names = {path[-2] for path in traverse_util.flatten_dict(trainer.shapes.params)}
    assert "w_router" not in names
    assert names >= {"w_q_down", "w_q_up", "w_kv_down", "w_k_up", "w_v_up", "w_out", "w_gate", "w_up", "w_down"}
    for target, some in (("attention", "w_k_up"), ("mlp", "w_gate"), ("experts", "w_gate")):
        only = traverse_util.flatten_dict(one_device(config(targets=(target,))).shapes.params)
        assert {target_of(p[:-1], ("expert",) * (len(x.shape) == 4)) for p, x in only.items()} <= {target, "attention"}
        assert some in {path[-2] for path in only}


@pytest.mark.parametrize(("base", "matrices"), [(None, {"bfloat16"}), ("int8", {"int8", "float32"})])
def test_what_is_frozen_is_stored_as_it_is_used(base: Kind | None, matrices: set[str]) -> None:
    """Matrices and embeddings in the type of the computation, or in few bits; routers and norms in float32."""
    found = traverse_util.flatten_dict(one_device(config(base, ("attention",), dtype="bfloat16")).shapes.frozen)
    weights = traverse_util.flatten_dict(
        nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0))), nnx.Param))
    )
    assert {path: x.stored.shape if isinstance(x, FrozenWeight) else x.shape for path, x in found.items()} == {
        path: x.shape for path, x in weights.items()
    }
    types: dict[str, set[str]] = {}
    for path, x in found.items():
        types.setdefault(path[-1], set()).update(str(leaf.dtype) for leaf in jax.tree.leaves(x))
    assert types.pop("embedding") == types.pop("w_logits") == {"bfloat16"}
    for name in ("w_router", "scale"):
        assert types.pop(name) == {"float32"}
    assert set(types) >= {"w_q_up", "w_gate"}
    assert all(kind == matrices for kind in types.values()), types


@pytest.fixture(scope="module")
def steps() -> tuple[list[float], TrainState, TrainState]:
    """Losses of five steps of one device, with the states before and behind them."""
    trainer = one_device(config("nf4"))
    state, out = started(trainer), []
    before = jax.tree.map(np.asarray, state)
    for i in range(5):
        state, metrics = trainer.step(state, random_batch(config(), i), jnp.int32(9))
        out.append(float(metrics["loss"]))
    return out, before, state


def test_a_step_moves_pairs_alone(steps: tuple[list[float], TrainState, TrainState]) -> None:
    losses, before, after = steps
    assert losses[-1] < losses[0] - 0.05
    for name, kept in (("frozen", True), ("buffers", True), ("params", False)):  # routers' biases do not move either
        old, new = (jax.tree.leaves(getattr(state, name)) for state in (before, after))
        assert old
        assert all(np.array_equal(x, y) == kept for x, y in zip(old, new, strict=True)), name


@pytest.mark.parametrize("mesh", ["fsdp=2,expert=2,tensor=2"])
def test_eight_devices_give_the_losses_of_one(mesh: str, steps: tuple[list[float], TrainState, TrainState]) -> None:
    there = apply_overrides(config("nf4"), [f"mesh={mesh}", "train.accumulate=2"])
    placed, trainer = build(there)
    state, out = started(trainer), []
    for i in range(3):
        state, metrics = trainer.step(state, place_batch(random_batch(config(), i), placed), jnp.int32(9))
        out.append(float(metrics["loss"]))
    # rtol: float32 sums in another order, over three steps of Adam, which divides by what was summed.
    np.testing.assert_allclose(out, steps[0][:3], rtol=1e-4)


def test_muon_takes_each_half_of_a_pair_as_a_matrix() -> None:
    """Its updates are orthogonal, for each layer and expert by itself."""
    axes = one_device(config()).axes
    assert set(jax.tree.leaves(kinds(axes))) == {"matrix"}
    axes = {name: axes["group_0"][part][name] for part, name in (("ffn", "w_down"), ("attention", "w_out"))}
    shapes = {"w_down": {"a": (2, 3, 16, 4), "b": (2, 3, 4, 32)}, "w_out": {"a": (2, 8, 8, 4), "b": (2, 4, 32)}}
    noise = np.random.default_rng(0)
    grads = jax.tree.map(
        lambda shape: noise.standard_normal(shape).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    tx = make_optimizer(OptimConfig(name="muon", weight_decay=0.0, clip_norm=0.0), axes)
    updates, _ = tx.update(grads, tx.init(grads), grads, router={})
    for name, pair in updates.items():
        stack = (2, 3) if name == "w_down" else (2,)
        for half, u in pair.items():
            matrices = np.asarray(u).reshape(
                -1, *((math.prod(u.shape[len(stack) : -1]), 4) if half == "a" else (4, 32))
            )
            for m in matrices:
                values = np.linalg.svd(m, compute_uv=False)
                assert values.min() > 0.5 * values.max(), name  # Newton-Schulz makes them equal up to that


# ---------------------------------------------------------------- memory, by the compiler


def large(base: Kind | None, num_layers: int) -> Trainer:
    """Layers whose weights are most of what there is."""
    attention = LatentAttentionConfig(num_heads=4, kv_rank=64, nope_dim=64, rope_dim=64, v_dim=64)
    groups = (LayerGroup(MoEConfig(num_experts=8, top_k=2, d_ff=128), attention),)
    model = DecoderConfig(vocab_size=320, d_model=256, num_layers=num_layers, groups=groups, tied=True)
    return one_device(changed(config(base, ("attention", "experts"), model), data={"batch_size": 1}))


def matrices(trainer: Trainer) -> tuple[int, int]:
    """Numbers in the frozen matrices, and the bytes that they take."""
    kept = [w for w in traverse_util.flatten_dict(trainer.shapes.frozen).values() if isinstance(w, FrozenWeight)]
    numbers = sum(math.prod(w.stored.shape) for w in kept)
    return numbers, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


@pytest.mark.parametrize(("base", "bits"), [(None, 32), ("int8", 8.5), ("int4", 4.5), ("nf4", 4.5)])
def test_few_bits_take_few_bytes(base: Kind | None, bits: float) -> None:
    numbers, num_bytes = matrices(large(base, 2))
    assert num_bytes == numbers * bits / 8  # a scale of 32 bits for 64 numbers


@pytest.mark.slow
def test_weights_are_written_out_a_layer_at_a_time() -> None:
    """By the compiler's figures, of steps that rematerialise nothing."""
    found = {}
    for num_layers in (2, 6):
        trainer = large("nf4", num_layers)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 16), x.dtype), random_batch(config(), 0))
        step = trainer.step.lower(trainer.shapes, batch, jax.ShapeDtypeStruct((), jnp.int32)).compile()
        found[num_layers] = step.memory_analysis().temp_size_in_bytes
    pairs = sum(x.size * 4 for x in jax.tree.leaves(trainer.shapes.params))
    # Of four layers more: gradients of pairs, what makes updates of them, activations of 16 tokens. Their weights would
    # be another 2 times the pairs in few bits, and 15 times written out or as gradients.
    assert found[6] - found[2] < 2 * pairs
