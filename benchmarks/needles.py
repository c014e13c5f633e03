"""What is kept of full attention's retrieval: small models that differ in attention alone, trained to find needles.

Equal parameters, rows and tokens; rows grow from one segment to eight in the course of training, and models are asked
at eight. Each finished run is a line of a file, so that a study can be stopped and goes on.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.plans import table
from benchmarks.sparse_layers import strided_mask
from dsjax.data.batch import Batch
from dsjax.evals.needle import KINDS, NeedleConfig, NeedleRows, needle_rows
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import Attention, AttentionConfig
from dsjax.nn.masks import Documents, Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.sharding import MeshConfig, make_mesh
from dsjax.train.optimizer import OptimConfig
from dsjax.train.step import Trainer, make_trainer

SEGMENT, STRIDE, ROW_TOKENS = 64, 16, 2048
BASE = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=16, qk_norm=True, conv_taps=4)
FULL_LENGTH = 8 * SEGMENT


@dataclasses.dataclass(frozen=True)
class Stage:
    """Part of the training: ``steps`` batches of rows of ``length``."""

    length: int
    steps: int
    facts: int
    questions: int


# Most at two segments: there the heads that find facts in one segment learn to find them by tails, too.
STAGES = (Stage(64, 500, 6, 3), Stage(128, 1000, 12, 6), Stage(256, 300, 16, 8), Stage(FULL_LENGTH, 800, 16, 8))


def segmented(share: int, shift: Any, top: int | None = None) -> AttentionConfig:
    return dataclasses.replace(BASE, segmented=Segmented(SEGMENT, SEGMENT // share, shift, top))


VARIANTS: dict[str, AttentionConfig] = {
    "full": BASE,
    "sliding window": dataclasses.replace(BASE, window=176),  # as many pairs as segmented with half of each segment
    "strided": BASE,
    "segmented, w = W/2, by head": segmented(2, "heads"),
    "segmented, w = W/4, by head": segmented(4, "heads"),
    "segmented, w = W/2, by layer": segmented(2, "cycle"),
    "segmented, w = W/4, by layer": segmented(4, "cycle"),
    "segmented, w = W/2, no shift": segmented(2, 0),
    "segmented, w = W/2, by head, top 2": segmented(2, "heads", 2),
    "segmented, w = W/4, by head, top 2": segmented(4, "heads", 2),
}


class StridedAttention(Attention):
    """Attention under the mask of the Sparse Transformer, as one array: for short rows."""

    def _whole_rows(self, q_BTKGH, k_BTKH, v_BTKH, documents, mask):
        del mask
        B, T, K, G, H = q_BTKGH.shape
        same_B1TS = documents.ids_BT[:, None, :, None] == documents.ids_BT[:, None, None, :]
        sees_B1TS = same_B1TS & strided_mask(T, STRIDE)
        out = jax.nn.dot_product_attention(q_BTKGH.reshape(B, T, K * G, H), k_BTKH, v_BTKH, mask=sees_B1TS)
        return out.reshape(B, T, K, G, H)


def model_config(variant: str) -> DecoderConfig:
    """Four layers of width 64."""
    vocab_size = NeedleConfig(FULL_LENGTH).vocab_size
    group = LayerGroup(MLPConfig(d_ff=128), VARIANTS[variant])
    return DecoderConfig(vocab_size=vocab_size, d_model=64, num_layers=4, groups=(group,))


def make_model(variant: str, rngs: nnx.Rngs) -> Decoder:
    return one_group(variant, model_config(variant), ComputeConfig(unroll=True), rngs)


def one_group(variant: str, config: DecoderConfig, compute: ComputeConfig, rngs: nnx.Rngs) -> Decoder:
    """A model whose layers are stacked in one group."""
    model: Any = Decoder(config, compute, rngs=rngs)
    if variant == "strided":
        model.group_0.attention.__class__ = StridedAttention  # the same weights, another mask
    return model


def rows_of(stage: Stage, kind: Any, rows: int, seed: int) -> NeedleRows:
    return needle_rows(NeedleConfig(stage.length, stage.facts, stage.questions), kind, rows, seed)


def batches(seed: int) -> Iterator[Batch]:
    """The kinds in turn, through all stages; the loss is on answers alone."""
    number = 0
    for stage in STAGES:
        num_rows = ROW_TOKENS // stage.length
        documents = Documents.single(jnp.zeros((num_rows, stage.length), jnp.int32))
        for _ in range(stage.steps):
            rows = rows_of(stage, KINDS[number % len(KINDS)], num_rows, 1_000_000 * seed + number)
            weight_BT = (rows.question_BT > 0).astype(np.float32)
            yield Batch(jnp.asarray(rows.tokens_BT), jnp.asarray(rows.targets_BT), jnp.asarray(weight_BT), documents)
            number += 1


def study_one(variant: str, seed: int, num_rows: int = 64) -> dict[str, Any]:
    """Trains one model, and asks it ``num_rows`` rows of each kind that nobody was trained on."""
    begin = time.perf_counter()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optim = OptimConfig(name="muon", weight_decay=0.0, warmup_steps=30, decay_share=0.5)
    trainer = make_trainer(lambda rngs: make_model(variant, rngs), optim, mesh)
    number: Any = np.uint32(seed)
    state, total, losses = trainer.init(number), sum(stage.steps for stage in STAGES), []
    for batch in batches(seed):
        state, metrics = trainer.step(state, batch, jnp.int32(total))
        losses.append(metrics["loss"])
    right = {kind: share_right(trainer, state.variables, kind, num_rows) for kind in KINDS}
    config = model_config(variant)
    visible: Any = np.mean([config.groups[0].attention.visible_positions(FULL_LENGTH, layer) for layer in range(4)])
    if variant == "strided":
        visible = float(strided_mask(FULL_LENGTH, STRIDE).sum()) / FULL_LENGTH
    return {
        "variant": variant,
        "seed": seed,
        "right": right,
        "visible_positions": float(visible),
        "num_params": config.num_params(),
        "last_loss": float(np.mean([float(x) for x in losses[-30:]])),
        "seconds": time.perf_counter() - begin,
    }


def share_right(trainer: Trainer, variables: Any, kind: Any, num_rows: int) -> float:
    @jax.jit
    def predict(variables: Any, tokens_BT: Any) -> Any:
        model = nnx.merge(trainer.graph, variables)
        return jnp.argmax(model.logits(model(tokens_BT)), axis=-1)

    rows = rows_of(STAGES[-1], kind, num_rows, seed=2**40)
    predicted = [np.asarray(predict(variables, jnp.asarray(part))) for part in np.split(rows.tokens_BT, 8)]
    return rows.share_right(np.concatenate(predicted))


def study(seeds: int, kept: pathlib.Path, say: Any) -> list[dict[str, Any]]:
    """All variants and seeds; those that ``kept`` has a line of are not done again."""
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for seed in range(seeds):
        for variant in VARIANTS:
            if not any((row["variant"], row["seed"]) == (variant, seed) for row in done):
                done.append(study_one(variant, seed))
                say(f"{variant}, seed {seed}: {done[-1]['right']} in {done[-1]['seconds']:.0f} s")
                kept.parent.mkdir(parents=True, exist_ok=True)
                with kept.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    return done


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By variant and kind: the mean share of right answers, and what that is of full attention's.

    With the half-width of the 95 % interval of the latter over seeds, which are paired with those of full attention.
    """
    by = {(row["variant"], row["seed"]): row for row in rows}
    out: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        seeds = [s for v, s in by if v == variant and ("full", s) in by]
        if not seeds:
            continue
        line: dict[str, Any] = {"seeds": len(seeds), "visible_positions": by[variant, seeds[0]]["visible_positions"]}
        for kind in KINDS:
            share, full = (np.array([by[v, s]["right"][kind] for s in seeds]) for v in (variant, "full"))
            rng = np.random.default_rng(0)
            picks = rng.integers(0, len(seeds), (2000, len(seeds)))
            kept = share[picks].mean(axis=1) / np.maximum(full[picks].mean(axis=1), 1e-9)
            low, high = np.percentile(kept, [2.5, 97.5])
            line[kind] = {"right": float(share.mean()), "kept": float(share.mean() / max(full.mean(), 1e-9))}
            line[kind] |= {"interval": [float(low), float(high)], "by_seed": share.tolist()}
        out[variant] = line
    return out


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ("attention", "positions seen", "seeds", *(f"{kind}, right" for kind in KINDS), "kept of full attention's")
    lines = []
    for variant, line in summary(rows).items():
        kept = ", ".join(
            f"{line[k]['kept']:.1%} ({line[k]['interval'][0]:.0%}-{line[k]['interval'][1]:.0%})" for k in KINDS
        )
        shares = (f"{line[kind]['right']:.1%}" for kind in KINDS)
        lines.append((variant, f"{line['visible_positions']:.0f}", str(line["seeds"]), *shares, kept))
    return table(head, lines)


# ---------------------------------------------------------------- memory beside it


def cached_share(variant: str, segments: int = 100) -> float:
    """Of full attention's decode cache, for a row of so many segments."""
    attention = VARIANTS[variant]
    if attention.segmented is not None:
        assert attention.segmented.window is not None
        return (1 + attention.segmented.window / SEGMENT * (segments - 1)) / segments
    return 1.0 if attention.window is None else attention.window / (SEGMENT * segments)


def draw(rows: list[dict[str, Any]], memory: dict[str, Any], picture: pathlib.Path) -> None:
    """What is kept of full attention's retrieval, all kinds together, against memory at 102,400 positions.

    Args:
        rows: of :func:`study`.
        memory: of ``scripts/bench attention-memory``: there a segment has 1,024 positions, and a row 100.
        picture: where it is written.
    """
    from matplotlib.figure import Figure

    from dsjax.plan.report import save

    training = {row["layer"]: row["training_bytes"] / 2**30 for row in memory["rows"]}
    training |= {"full": training["dense"], "sliding window": training["sliding window + global"]}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (variant, line) in enumerate(summary(rows).items()):
        kept = np.mean([line[kind]["kept"] for kind in KINDS])
        low, high = (np.mean([line[kind]["interval"][i] for kind in KINDS]) for i in (0, 1))
        points = [(left, cached_share(variant))]
        if variant in training:
            points.append((right, training[variant]))
        for axis, x in points:
            error = [[max(kept - low, 0)], [max(high - kept, 0)]]
            axis.errorbar([x], [kept], yerr=error, fmt="o", capsize=3, color=f"C{number}", label=variant)
    left.axhline(0.91, color="gray", linestyle="--", label="91 %")
    right.axhline(0.91, color="gray", linestyle="--")
    peer = training["block-sparse (BigBird)"]
    threshold = right.axvline(0.38 * peer, color="gray", linestyle=":", label="62 % below a block-sparse layer")
    left.set(xlabel="decode cache, share of full attention's", ylabel="retrieval, share of full attention's")
    right.set(xlabel="a training step of one layer, GiB", xscale="log")
    left.set_ylim(0, 1.05)
    left.legend(loc="center right", fontsize=8)
    right.legend(handles=[threshold], loc="center right", fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save(figure, picture)
