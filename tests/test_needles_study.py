"""The study of retrieval compares like with like, and its summary is arithmetic."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import needles
from benchmarks.attention_energy import Work, decode, layer
from benchmarks.sparse_layers import strided_mask
from dsjax.evals.needle import KINDS
from dsjax.nn.masks import Documents


def test_models_differ_in_attention_alone() -> None:
    assert len({needles.model_config(v).num_params() for v in needles.VARIANTS}) == 1
    shapes = [
        jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.split(make(variant), nnx.Param, ...)[1]))
        for variant in needles.VARIANTS
    ]
    assert all(shape == shapes[0] for shape in shapes)


def make(variant: str) -> nnx.Module:
    return nnx.eval_shape(lambda: needles.make_model(variant, nnx.Rngs(0)))


def test_the_strided_model_sees_what_its_mask_says() -> None:
    """Gradients of one position's output in the inputs of one layer: not zero where the mask is set, and only there."""
    model = needles.make_model("strided", nnx.Rngs(0))
    q = jax.random.normal(jax.random.key(0), (1, 64, 2, 1, 8))
    attend = model.group_0.attention._whole_rows
    ids = np.array([[1] * 40 + [2] * 24])
    documents = Documents(jnp.asarray(ids), jnp.zeros_like(ids))
    sees = jax.jacobian(lambda v: attend(q, q[:, :, :, 0], v, documents, None).sum((0, 2, 3, 4)))(q[:, :, :, 0])
    expected = strided_mask(64, needles.STRIDE) & (ids[0][:, None] == ids[0])
    np.testing.assert_array_equal(np.abs(sees).sum((1, 3, 4)) > 0, expected)


def test_batches_hold_equally_many_tokens_and_ask_in_turn() -> None:
    found = needles.batches(0)
    for kind in KINDS:
        batch = next(found)
        assert batch.tokens_BT.size == needles.ROW_TOKENS
        assert float(jnp.sum(batch.loss_weight_BT)) == 32 * 3 * (1 if kind == "one" else 2)


def test_summary_by_hand() -> None:
    def row(variant: str, seed: int, right: float) -> dict:
        return {"variant": variant, "seed": seed, "right": dict.fromkeys(KINDS, right), "visible_positions": 1.0}

    rows = [row("full", 0, 0.8), row("full", 1, 1.0), row("strided", 0, 0.4), row("strided", 1, 0.5)]
    line = needles.summary(rows)["strided"]["one"]
    assert line["right"] == pytest.approx(0.45)
    assert line["kept"] == pytest.approx(0.5)
    assert line["interval"] == pytest.approx([0.5, 0.5])
    assert "| strided | 1 | 2 | 45.0% |" in needles.tables(rows)


def test_what_a_cache_holds_by_hand() -> None:
    shares = {variant: needles.cached_share(variant, segments=8) for variant in needles.VARIANTS}
    assert shares["full"] == shares["strided"] == 1
    assert shares["segmented, w = W/4, by head"] == shares["segmented, w = W/4, by layer"] == 1 / 8 + 7 / 8 / 4
    assert shares["sliding window"] == 176 / 512
    for variant in ("full", "segmented, w = W/2, by head"):  # as the model itself says
        ours, full = (needles.model_config(v).kv_bytes(needles.FULL_LENGTH) for v in (variant, "full"))
        assert ours / full == pytest.approx(shares[variant], rel=0.02)  # states of the convolution beside


def test_the_picture_is_drawn(tmp_path: pathlib.Path) -> None:
    layers = ("dense", "block-sparse (BigBird)", "sliding window + global", "segmented, w = W/4, by head")
    memory = {"rows": [{"layer": name, "training_bytes": 2.0**n} for n, name in enumerate(layers, 30)]}
    rows = [
        {"variant": v, "seed": seed, "right": dict.fromkeys(KINDS, 0.5), "visible_positions": 1.0}
        for v in ("full", "sliding window", "segmented, w = W/4, by head")
        for seed in range(2)
    ]
    needles.draw(rows, memory, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_energy_of_decoding_by_hand() -> None:
    ours, full = decode("ours"), decode("dense")
    assert full == Work(4 * 128 * 16384, 2 * 128 * 2 * 16384)
    assert ours.hbm_bytes / full.hbm_bytes == pytest.approx((8192 + 256) / 16384)
    assert layer(1024, full, 1, 1).hbm_bytes == pytest.approx(8 * full.hbm_bytes + 24 * 1024**2 + 40 * 1024)
