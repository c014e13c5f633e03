"""Key/value heads that cut a row at different places: `attention.segmented.shift` is "heads"."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.nn.attention import Attention, AttentionConfig
from dsjax.nn.masks import ByHead, Documents, Segmented
from dsjax.nn.rope import rope_angles
from dsjax.nn.row_attention import whole_segments
from dsjax.sharding import MeshConfig, make_mesh, use_mesh
from pallas_kernels.segmented_attention import Segments, segmented_attention

T, D, H = 37, 12, 4


def shifts(segmented: Segmented, num_kv_heads: int) -> list[list[int]]:
    """The shift of each head, layer by layer, until it repeats."""
    layers = segmented.layers(num_kv_heads)
    return [
        [mask.parts[k % len(mask.parts)].shift for k in range(num_kv_heads)]
        if isinstance(mask, ByHead)
        else [mask.shift] * num_kv_heads
        for mask in layers
    ]


@pytest.mark.parametrize(
    ("window", "heads", "expected"),
    [
        (4, 2, [[0, 4]]),
        (4, 4, [[0, 0, 4, 4]]),
        (4, 1, [[0], [4]]),
        (4, 3, [[0, 4, 0], [4, 0, 4]]),
        (2, 2, [[0, 2], [4, 6]]),
        (2, 8, [[0, 0, 2, 2, 4, 4, 6, 6]]),
        (2, 6, [[0, 2, 4, 6, 0, 2], [4, 6, 0, 2, 4, 6]]),
        (8, 2, [[0, 0]]),
        (0, 2, [[0, 0]]),
    ],
)
def test_the_shifts_by_hand(window: int, heads: int, expected: list) -> None:
    assert shifts(Segmented(8, window, "heads"), heads) == expected


def attention(kv_heads: int, window: int, top: int | None = None) -> Attention:
    cfg = AttentionConfig(2 * kv_heads, kv_heads, H, segmented=Segmented(8, window, "heads", top))
    return Attention(cfg, D, rngs=nnx.Rngs(0))


def run(layer: Attention, x_BTD, ids_BT, depth: int = 0) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(T), ids_BT.shape)
    rope = rope_angles(positions_BT, H, 10_000.0)
    documents = Documents(ids_BT, positions_BT)
    return layer(x_BTD, documents=documents, positions_BT=positions_BT, rope=rope, layer=depth)[0]


@pytest.mark.parametrize(
    ("kv_heads", "window", "top"), [(2, 4, None), (3, 4, None), (4, 4, 0), (2, 2, None), (4, 2, None)]
)
def test_each_head_attends_with_its_own_shift(kv_heads: int, window: int, top: int | None) -> None:
    """As one head at a time, by a layer that has that head alone."""
    layer = attention(kv_heads, window, top)
    x_BTD = jax.random.normal(jax.random.key(1), (2, T, D))
    ids_BT = jnp.asarray([[1] * 20 + [2] * 17, [1] * 30 + [0] * 7])
    heads = shifts(layer.cfg.segmented, kv_heads)
    for depth, layer_shifts in enumerate(heads):
        want = 0.0
        for k, shift in enumerate(layer_shifts):
            cut = dataclasses.replace(layer.cfg.segmented, shift=shift)
            one = Attention(AttentionConfig(2, 1, H, segmented=cut), D, rngs=nnx.Rngs(0))
            for name, axis in (("w_q", 1), ("w_k", 1), ("w_v", 1), ("w_out", 0)):
                getattr(one, name)[...] = jnp.take(getattr(layer, name)[...], jnp.array([k]), axis=axis)
            want = want + run(one, x_BTD, ids_BT)
        np.testing.assert_allclose(run(layer, x_BTD, ids_BT, depth), want, atol=1e-5)  # sums in another order


@pytest.mark.parametrize(
    ("heads", "mesh", "length"),
    [
        (4, {"tensor": 2}, 40),
        (4, {"tensor": 4, "context": 2}, 40),  # rows are gathered: 20 positions are no whole segments
        (12, {"tensor": 2, "fsdp": 2}, 40),
        (12, {"tensor": 4}, 40),
        (6, {"tensor": 2, "context": 2}, 40),
        (8, {"tensor": 2}, 40),
        (4, {"tensor": 4, "context": 2}, 64),
        pytest.param(6, {"tensor": 2, "context": 4}, 64, marks=pytest.mark.slow),
    ],
)
def test_devices_that_share_heads_out_have_the_shifts_of_their_own(heads: int, mesh: dict, length: int) -> None:
    """A device has two of the four shifts, one, two of three heads each, one of three heads, three, or two of two."""
    layer = attention(heads, 2)
    x_BTD = jax.random.normal(jax.random.key(1), (4, length, D))
    ids_BT = jnp.asarray([[1] * 25 + [2] * (length - 25), [1] * (length - 7) + [0] * 7] * 2)

    def loss(w_q, x_BTD):
        graph, state = nnx.split(layer)
        state["w_q"] = state["w_q"].replace(w_q)
        positions_BT = jnp.broadcast_to(jnp.arange(length), ids_BT.shape)
        rope = rope_angles(positions_BT, H, 10_000.0)
        documents = Documents(ids_BT, positions_BT)
        y = nnx.merge(graph, state)(x_BTD, documents=documents, positions_BT=positions_BT, rope=rope)[0]
        return jnp.sum(jnp.sin(y))

    want = jax.jit(jax.value_and_grad(loss, (0, 1)))(layer.w_q[...], x_BTD)
    num = int(np.prod(list(mesh.values())))
    with use_mesh(make_mesh(MeshConfig(**mesh), jax.devices()[:num])):
        whole = length % (8 * mesh.get("context", 1)) == 0
        assert whole_segments(layer.cfg.mask(0), length) == (("context",) if "context" in mesh and whole else ())
        got = jax.jit(jax.value_and_grad(loss, (0, 1)))(layer.w_q[...], x_BTD)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


def test_a_layer_of_enough_heads_sees_every_position() -> None:
    """What the feature is for: of W / w heads, some one sees whatever stands before."""
    for mask in Segmented(8, 2, "heads").layers(4):
        seen = np.zeros((T, T), bool)
        for part in mask.parts:
            eye = jnp.eye(T)[None, :, None, :]
            zeros = jnp.zeros((1, T, 1, H))
            p = segmented_attention(zeros, zeros, eye, segment_size=8, window=2, shift=part.shift)
            seen |= np.asarray(p[0, :, 0]) > 0
        np.testing.assert_array_equal(seen, np.tril(np.ones((T, T), bool)))


def test_visible_pairs_are_a_mean_over_heads() -> None:
    cfg = attention(2, 4).cfg
    pairs = [Segments(8, 4, shift).visible_pairs(T) for shift in (0, 4)]
    assert pairs[0] != pairs[1]
    assert cfg.visible_pairs(T) == sum(pairs) / 2
