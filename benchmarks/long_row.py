"""A small model with segmented attention on one row of 102,400 real tokens, on a CPU: its peak memory, and its bits.

python -m benchmarks.long_row LENGTH STEPS     # one case in a process of its own: prints JSON
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import time
from typing import Any

from benchmarks.plans import table
from benchmarks.timing import ROOT

LENGTHS, STEPS = (25_600, 51_200, 102_400), 4
SEGMENT = 1024


def one(length: int, steps: int) -> dict[str, Any]:
    """Trains for ``steps`` rows of ``length`` tokens, each one document, and reads a held-out one."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from benchmarks.kept_bits import BASE, DATA, OPTIM, model_config
    from dsjax.data.batch import Batch
    from dsjax.data.prepare import prepare
    from dsjax.models.decoder import ComputeConfig, Decoder
    from dsjax.nn.losses import token_losses
    from dsjax.nn.masks import Documents, Segmented
    from dsjax.runs import cache_dir
    from dsjax.sharding import MeshConfig, make_mesh
    from dsjax.train.step import make_trainer

    corpus = prepare(DATA, cache_dir() / "data")
    config = model_config("full")
    attention = dataclasses.replace(BASE, segmented=Segmented(SEGMENT, SEGMENT // 4, "heads"))
    config = dataclasses.replace(config, groups=(dataclasses.replace(config.groups[0], attention=attention),))
    compute = ComputeConfig(unroll=False, loss_chunk=512, remat="full")
    trainer = make_trainer(
        lambda rngs: Decoder(config, compute, rngs=rngs), OPTIM, make_mesh(MeshConfig(), jax.devices()[:1])
    )
    number: Any = np.uint32(0)
    state = trainer.init(number)
    tokens = np.concatenate([np.asarray(store.tokens) for store in corpus.stores]).astype(np.int32)
    documents = Documents.single(jnp.zeros((1, length), jnp.int32))
    losses, seconds = [], []
    for step in range(steps):
        row = tokens[step * length : (step + 1) * length + 1][None]
        batch = Batch(jnp.asarray(row[:, :-1]), jnp.asarray(row[:, 1:]), jnp.ones((1, length)), documents)
        begin = time.perf_counter()
        state, metrics = trainer.step(state, batch, jnp.int32(steps))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - begin)

    text = corpus.held_out
    ids = np.concatenate([d.ids for d in text])[: length + 1][None]

    @jax.jit
    def nats(variables: Any, row: Any) -> Any:
        model = nnx.merge(trainer.graph, variables)
        out = model(row[:, :-1], documents)
        chunks = [
            jnp.mean(token_losses(out.hidden_BTD[:, at : at + 512], model.output_weights(), row[:, at + 1 : at + 513]))
            for at in range(0, length, 512)
        ]
        return jnp.stack(chunks)

    held_out = np.asarray(nats(state.variables, jnp.asarray(ids))) if ids.shape[1] == length + 1 else None
    return {
        "length": length,
        "steps": steps,
        "loss": losses,
        "held_out_nats": None if held_out is None else float(held_out.mean()),
        "seconds_a_step": min(seconds),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "visible_positions": attention.visible_positions(length),
        "cache_bytes": config.kv_bytes(length, "float32"),
        "cache_bytes_full": model_config("full").kv_bytes(length, "float32"),
    }


def run() -> list[dict[str, Any]]:
    """All lengths, one process after the other."""
    found = []
    for length in LENGTHS:
        command = [sys.executable, "-m", "benchmarks.long_row", str(length), str(STEPS)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    return found


def tables(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ("tokens in the row", "peak memory", "a step", "tokens/s", "decode cache", "of full attention's")
    lines = [
        (
            f"{row['length']:,}",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
            f"{row['seconds_a_step']:.1f} s",
            f"{row['length'] / row['seconds_a_step']:,.0f}",
            f"{row['cache_bytes'] / 2**20:.0f} MiB",
            f"{row['cache_bytes'] / row['cache_bytes_full']:.0%}",
        )
        for row in found
    ]
    return table(head, lines)


if __name__ == "__main__":
    print(json.dumps(one(int(sys.argv[1]), int(sys.argv[2]))))
