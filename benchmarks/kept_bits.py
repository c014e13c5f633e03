"""What is kept of full attention's prediction: small models of code that differ in attention alone.

Equal parameters, rows and tokens, on the quickstart's data (Python's standard library) in rows of eight segments; no
look-ups beside attention, which would hide what it does not see. Each finished run is a line of a file, so that a study
can be stopped and goes on.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.needles import one_group
from benchmarks.plans import table
from dsjax.data.pipeline import make_batches
from dsjax.data.prepare import Corpus, DataConfig, prepare
from dsjax.evals.bits import document_bits
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.masks import Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.runs import cache_dir
from dsjax.sharding import MeshConfig, make_mesh
from dsjax.train.optimizer import OptimConfig
from dsjax.train.step import make_trainer

SEGMENT, LENGTH, BATCH, STEPS = 128, 1024, 4, 300
DATA = DataConfig(vocab_size=4096, seq_len=LENGTH, batch_size=BATCH)
OPTIM = OptimConfig(
    name="muon", lr=0.02, muon_lr=0.003, weight_decay=0.0, clip_norm=0.0, warmup_steps=30, decay_share=0.7
)
BASE = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=32, qk_norm=True, conv_taps=4)


def segmented(share: int, shift: Any) -> AttentionConfig:
    return dataclasses.replace(BASE, segmented=Segmented(SEGMENT, SEGMENT // share, shift))


VARIANTS: dict[str, AttentionConfig] = {
    "full": BASE,
    "sliding window": dataclasses.replace(BASE, window=352),  # as many pairs as segmented with half of each segment
    "strided": BASE,
    "segmented, w = W/2, by layer": segmented(2, "cycle"),
    "segmented, w = W/2, by head": segmented(2, "heads"),
    "segmented, w = W/4, by head": segmented(4, "heads"),
}


def model_config(variant: str) -> DecoderConfig:
    """Four layers of width 128."""
    group = LayerGroup(MLPConfig(d_ff=384), VARIANTS[variant])
    return DecoderConfig(vocab_size=DATA.vocab_size, d_model=128, num_layers=4, groups=(group,))


def make_model(variant: str, rngs: nnx.Rngs) -> Decoder:
    return one_group(variant, model_config(variant), ComputeConfig(unroll=True, loss_chunk=128), rngs)


def study_one(corpus: Corpus, variant: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Trains one model and reads the held-out documents with it, each as a whole as far as a row goes."""
    begin = time.perf_counter()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    trainer = make_trainer(lambda rngs: make_model(variant, rngs), OPTIM, mesh)
    number: Any = np.uint32(seed)
    state = trainer.init(number)
    batches = make_batches(corpus, dataclasses.replace(DATA, seed=seed))
    for _ in range(steps):
        state, _ = trainer.step(state, jax.tree.map(jnp.asarray, next(batches)), jnp.int32(steps))
    batches.close()
    bits = document_bits(
        trainer.graph, state.variables, corpus.held_out, seq_len=LENGTH, end_id=corpus.tokenizer.end_id, batch_size=4
    )
    return {
        "variant": variant,
        "seed": seed,
        "tokens": steps * BATCH * LENGTH,
        "bits_per_byte": float(bits.sum() / sum(d.num_bytes for d in corpus.held_out)),
        "num_params": model_config(variant).num_params(),
        "seconds": time.perf_counter() - begin,
    }


def study(seeds: int, kept: pathlib.Path, say: Callable[[str], None], steps: int = STEPS) -> list[dict[str, Any]]:
    """All variants and seeds; those that ``kept`` has a line of are not done again."""
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    corpus = prepare(DATA, cache_dir() / "data", progress=say)
    for seed in range(seeds):
        for variant in VARIANTS:
            if not any((row["variant"], row["seed"]) == (variant, seed) for row in done):
                done.append(study_one(corpus, variant, seed, steps))
                say(f"{variant}, seed {seed}: {done[-1]['bits_per_byte']:.4f} in {done[-1]['seconds']:.0f} s")
                kept.parent.mkdir(parents=True, exist_ok=True)
                with kept.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    return done


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By variant: bits per byte, and how much more than full attention's with the same seed: mean, 95 % interval."""
    by = {(row["variant"], row["seed"]): row["bits_per_byte"] for row in rows}
    out: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        seeds = [s for v, s in by if v == variant and ("full", s) in by]
        if not seeds:
            continue
        bits, full = (np.array([by[v, s] for s in seeds]) for v in (variant, "full"))
        more = bits / full - 1
        picks = np.random.default_rng(0).integers(0, len(seeds), (2000, len(seeds)))
        low, high = np.percentile(more[picks].mean(axis=1), [2.5, 97.5])
        out[variant] = {"seeds": len(seeds), "bits_per_byte": float(bits.mean()), "by_seed": bits.tolist()}
        out[variant] |= {"more_than_full": float(more.mean()), "interval": [float(low), float(high)]}
    return out


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        (
            variant,
            str(line["seeds"]),
            f"{line['bits_per_byte']:.3f}",
            f"{line['more_than_full']:+.2%} ({line['interval'][0]:+.2%} to {line['interval'][1]:+.2%})",
        )
        for variant, line in summary(rows).items()
    ]
    return table(("attention", "seeds", "bits per byte", "more than full"), lines)
