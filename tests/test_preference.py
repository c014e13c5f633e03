"""Pairs of texts: how they are read, put into rows, and become losses; the best of several texts."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ATTENTION, DENSE, V, graph, weights

from dsjax.config import UserError
from dsjax.data.batch import Batch
from dsjax.data.tokenizer import train_tokenizer
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.masks import Documents, Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.rl.preference import (
    Pair,
    PairBatch,
    TokenPair,
    best_of,
    implicit_rewards,
    of_pairs,
    pair_figures,
    pair_losses,
    pair_row,
    read_pairs,
    row_size,
    split_pairs,
    token_pair,
)
from dsjax.sharding import MeshConfig, make_mesh
from dsjax.train.optimizer import OptimConfig
from dsjax.train.preference import LabelConfig, pair_rewards, preference_loss
from dsjax.train.pretrain import place_batch
from dsjax.train.step import make_trainer

END = 0
SMALL = dataclasses.replace(DENSE, num_layers=1)
CUT_ATTENTION = dataclasses.replace(ATTENTION, segmented=Segmented(4, 2, 1))
CUT = dataclasses.replace(SMALL, groups=(LayerGroup(MLPConfig(d_ff=24), CUT_ATTENTION),))
NAN = math.nan

# ---------------------------------------------------------------- files


def written(folder: pathlib.Path, *lines: Any) -> pathlib.Path:
    path = folder / "pairs.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


GOOD = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def test_pairs_are_read(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, GOOD, "", GOOD | {"prompt": "", "chosen": "", "more": 3})
    assert read_pairs(path) == [Pair("p", "good", "bad"), Pair("", "", "bad")]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2 is no JSON: Expecting"),
        ("[1]", "line 2 is a list; a pair is a JSON object with prompt, chosen, rejected"),
        ({"prompt": "p", "chosen": "x"}, "line 2: there is no rejected; it must be a text"),
        (GOOD | {"chosen": 3}, "line 2: chosen is a int; it must be a text"),
        (GOOD | {"prompt": None}, "line 2: prompt is a NoneType; it must be a text"),
        (GOOD | {"chosen": "bad"}, "line 2: chosen and rejected are the same text"),
        ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "line 2: prompt holds half of a surrogate pair"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: pathlib.Path, line: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=f"pairs.jsonl, {sentence}"):
        read_pairs(written(tmp_path, GOOD, line))


def test_a_file_without_pairs_is_none(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"pairs\.jsonl has no pairs"):
        read_pairs(written(tmp_path, "", " "))
    with pytest.raises(UserError, match=r"none\.jsonl can not be read: No such file"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="can not be read: Is a directory"):
        read_pairs(tmp_path)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=r"bytes\.jsonl, line 1 is no JSON"):
        read_pairs(tmp_path / "bytes.jsonl")


@given(st.lists(st.integers(0, 30), min_size=2, max_size=40), st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_no_prompt_is_on_both_sides(prompts: list[int], share: float) -> None:
    pairs = [Pair(str(p), f"good {n}", "bad") for n, p in enumerate(prompts)]
    if len(set(prompts)) == 1:
        with pytest.raises(UserError, match="pairs have 1 different prompts; at least 2 are needed"):
            split_pairs(pairs, share)
        return
    training, held_out = split_pairs(pairs, share)
    assert training
    assert held_out
    assert not {p.prompt for p in training} & {p.prompt for p in held_out}
    assert sorted(training + held_out, key=pairs.index) == pairs
    more = split_pairs([*pairs, Pair("another", "x", "y")], share)[1]  # a file that grows moves few
    if len(held_out) > 1:
        assert set(held_out) <= set(more)


# ---------------------------------------------------------------- rows


def test_rows_by_hand() -> None:
    pair = TokenPair((5,), (6, 7), (8,))
    row = pair_row(pair, 10, END, ends=False)
    assert row_size(pair, ends=False) == 7
    assert row["tokens"].tolist() == [0, 5, 6, 7, 0, 5, 8, 0, 0, 0]
    assert row["targets"].tolist() == [5, 6, 7, 0, 5, 8, 0, 0, 0, 0]
    assert row["document_ids"].tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 0, 0]
    third, half = np.float32(1 / 6), 0.25  # of two tokens and an end, of one and an end
    assert row["loss_weight"].tolist() == [0, third, third, third, 0, half, half, 0, 0, 0]
    row = pair_row(pair, 10, END, ends=True)
    assert row_size(pair, ends=True) == 9
    assert row["tokens"].tolist() == [0, 5, 6, 7, 0, 0, 5, 8, 0, 0]
    assert row["document_ids"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2, 0]
    assert row["loss_weight"].tolist() == [0, 0, 0, 0, 0.5, 0, 0, 0, 0.5, 0]  # where the end was read
    row = pair_row(pair, 12, END, ends=False, turn=8)
    assert row_size(pair, ends=False, turn=8) == 11
    assert row["tokens"].tolist() == [0, 5, 6, 7, 0, 0, 0, 0, 0, 5, 8, 0]
    assert row["document_ids"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 2, 2, 2, 0]
    assert row["positions"].tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 0, 1, 2, 0]


def test_tokens_end_where_the_prompt_does() -> None:
    tokenizer = train_tokenizer(["def f(x):\n    return x\n\n"] * 3, 300)
    found = token_pair(Pair("def f(", "x):\n", "return"), tokenizer)
    assert found.prompt == tuple(tokenizer.encode("def f(").tolist())
    assert found.chosen == tuple(tokenizer.encode("x):\n").tolist())
    assert tokenizer.decode(found.rejected) == "return"


def pair_batch(num: int = 8, T: int = 20, *, ends: bool = False, seed: int = 0, turn: int = 1) -> Any:
    """Random pairs, and what a reference says of them."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: tuple(rng.integers(1, V, rng.integers(low, high)).tolist())  # noqa: E731
    pairs = [TokenPair(draw(0, 4), draw(1, 6), draw(0, 6)) for _ in range(num)]
    rows = [pair_row(pair, T, END, ends=ends, turn=turn) for pair in pairs]
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    documents = Documents(fields["document_ids"], fields["positions"])
    plain = Batch(fields["tokens"], fields["targets"], fields["loss_weight"], documents)
    return pairs, plain, rng.normal(-10, 1, (num, 2)).astype(np.float32)


@pytest.mark.parametrize("cfg", [SMALL, CUT], ids=["whole", "segmented"])
def test_texts_of_a_row_are_read_as_if_alone(cfg: DecoderConfig) -> None:
    pairs, batch, _ = pair_batch(T=24, turn=cfg.turn)
    model = nnx.merge(graph(cfg, loss_chunk=7), weights(cfg))

    @nnx.jit
    def in_rows(model: Decoder, batch: Batch) -> Any:
        out = model(batch.tokens_BT, batch.documents)
        return pair_rewards("dpo", LabelConfig(beta=1.0), model, out, batch)

    @nnx.jit
    def alone(model: Decoder, tokens_BT: Any) -> Any:
        return jax.nn.log_softmax(model.logits(model(tokens_BT)))

    found = in_rows(model, jax.tree.map(jnp.asarray, batch))
    width = max(1 + len(p.prompt) + len(text) for p in pairs for text in (p.chosen, p.rejected))
    for number, pair in enumerate(pairs):
        for side, text in enumerate((pair.chosen, pair.rejected)):
            stream = [END, *pair.prompt, *text]
            log_p = np.asarray(alone(model, jnp.asarray([stream + [END] * (width - len(stream))])))[0]
            targets, first = [*pair.prompt, *text, END], len(pair.prompt)
            expected = sum(log_p[at, targets[at]] for at in range(first, len(targets)))
            # up to seven float32 log-probabilities of size 4
            assert float(found[number, side]) == pytest.approx(float(expected), abs=2e-5)


# ---------------------------------------------------------------- losses


def test_dpo_by_hand() -> None:
    log_prob = jnp.array([[-4.0, -6.0], [-5.0, -2.0]])
    reference = jnp.array([[-5.0, -5.0], [-5.0, -2.0]])
    length = jnp.array([[2, 4], [2, 4]])
    rewards = implicit_rewards(log_prob, reference, length, beta=0.5)
    np.testing.assert_allclose(rewards, [[0.5, -0.5], [0, 0]], atol=1e-7)
    losses = pair_losses(rewards)
    # -log sigma(1), and of a policy that is its reference log 2
    np.testing.assert_allclose(losses, [math.log(1 + math.exp(-1)), math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(
        pair_losses(rewards, label_smoothing=0.25)[0],
        0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.exp(1)),
        rtol=1e-6,
    )
    per_token = implicit_rewards(log_prob, reference, length, beta=0.5, per_token=True)
    np.testing.assert_allclose(per_token[0], [0.25, -0.125], atol=1e-7)
    figures = pair_figures(rewards)
    assert figures["accuracy"].tolist() == [1.0, 0.5]  # a tie is half right
    assert figures["margin"].tolist() == [1.0, 0.0]


def test_the_slope_of_dpo_is_that_of_the_paper() -> None:
    """- beta sigma(r(rejected) - r(chosen)) (d log p(chosen) - d log p(rejected)): section 4 of arXiv 2305.18290."""
    log_prob, reference = jnp.array([[-4.0, -6.0]]), jnp.array([[-5.0, -5.5]])
    loss = lambda x: pair_losses(implicit_rewards(x, reference, jnp.ones((1, 2), int), beta=0.3))[0]  # noqa: E731
    margin = 0.3 * (1.0 + 0.5)
    expected = 0.3 / (1 + math.exp(margin))
    np.testing.assert_allclose(jax.grad(loss)(log_prob), [[-expected, expected]], rtol=1e-6)


def test_losses_stay_numbers_however_sure_the_model_is() -> None:
    far = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
    for smoothing in (0.0, 0.1):
        run = lambda x, s=smoothing: jnp.sum(pair_losses(x, label_smoothing=s))  # noqa: E731
        value, slope = jax.value_and_grad(run)(far)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_what_does_not_count_changes_no_bit() -> None:
    _, batch, _ = pair_batch()
    score = np.random.default_rng(0).normal(size=batch.tokens_BT.shape).astype(np.float32)
    junk = np.where(batch.loss_weight_BT > 0, score, np.nan).astype(np.float32)
    placed = jax.tree.map(jnp.asarray, batch)
    np.testing.assert_array_equal(of_pairs(jnp.asarray(score), placed), of_pairs(jnp.asarray(junk), placed))


@functools.cache
def trainer_of(method: Any, num_devices: int, accumulate: int, mesh_config: MeshConfig) -> Any:
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    cfg = dataclasses.replace(SMALL, values="head" if method == "reward" else "none")
    trainer = make_trainer(
        lambda rngs: Decoder(cfg, ComputeConfig(), rngs=rngs),
        OptimConfig(lr=3e-3, warmup_steps=0, schedule="constant"),
        mesh,
        accumulate=accumulate,
        loss_fn=preference_loss(method, LabelConfig(beta=0.5, label_smoothing=0.1)),
    )
    return trainer, mesh


def stepped(method: Any, num_devices: int = 1, accumulate: int = 1, mesh_config: Any = MeshConfig(), steps: int = 1):
    """Metrics and parameters behind some steps on one batch."""
    trainer, mesh = trainer_of(method, num_devices, accumulate, mesh_config)
    _, plain, reference = pair_batch(ends=method == "reward")
    batch = place_batch(plain, mesh)
    if method == "dpo":
        batch = PairBatch(**vars(batch), reference_B2=jnp.asarray(reference))
    state, found = trainer.init(np.uint32(0)), []
    for _ in range(steps):
        state, metrics = trainer.step(state, batch, 10)
        found.append(jax.device_get(metrics))
    return found, jax.device_get(state.params)


@pytest.mark.parametrize(
    ("method", "split"), [("dpo", (8, 2, MeshConfig(data=2, fsdp=2, tensor=2))), ("reward", (1, 4, MeshConfig()))]
)
def test_micro_batches_and_devices_change_no_step(method: Any, split: Any) -> None:
    (metrics,), params = stepped(method)
    (other,), others = stepped(method, *split)
    names = [name for name in metrics if name.startswith(("loss", "preference/"))]
    assert len(names) == 6
    for name in (*names, "grad_norm"):  # float32: sums over micro-batches and devices are made in another order
        assert other[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
    # Adam's first step is a sign, so what is nearly 0 may differ by the whole step of 3e-3
    close = jax.tree.map(lambda x, y: np.isclose(x, y, atol=1e-5).mean(), params, others)
    assert min(jax.tree.leaves(close)) > 0.98


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_the_chosen_texts_win(method: Any) -> None:
    metrics, _ = stepped(method, steps=40)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    assert metrics[-1]["preference/accuracy"] == pytest.approx(1, abs=1e-6)  # a weighted mean of eight
    assert metrics[-1]["preference/chosen"] - metrics[-1]["preference/rejected"] == pytest.approx(
        metrics[-1]["preference/margin"], abs=1e-4
    )
    if method == "reward":  # whose head begins with 0
        assert metrics[0]["preference/accuracy"] == 0.5
        assert metrics[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


# ---------------------------------------------------------------- the best of several


def test_the_best_of_several_by_hand() -> None:
    rewards = [[0.5, 1.0, 1.0, 1.0], [0.0, 0.0], [None, NAN], [None, -1.0], []]
    lengths = [[1, 9, 4, 4], [3, 2], [1, 1], [1, 7], []]
    assert best_of(rewards, lengths) == [2, 1, None, 1, None]  # of equal ones the shortest, of those the first
    assert best_of(rewards, lengths, least=1.0) == [2, None, None, None, None]


@given(st.lists(st.one_of(st.none(), st.floats(-5, 5), st.just(NAN)), max_size=8), st.data())
@settings(max_examples=100, deadline=None)
def test_nothing_is_better_than_the_best(rewards: list[float | None], data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=len(rewards), max_size=len(rewards)))
    (best,) = best_of([rewards], [lengths])
    known = [(r, -n, -i) for i, (r, n) in enumerate(zip(rewards, lengths, strict=True)) if r is not None and r == r]
    assert best == (-max(known)[2] if known else None)
