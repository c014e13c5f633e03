"""Memory of one attention layer at 100K tokens, as the TPU's compiler plans it: dsjax beside what people write in JAX.

The layer is the four projections and attention between them; a training step of it keeps what the backward pass needs.
Nothing here runs: programs are compiled for one chip, and what they take of its memory is read off.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

from benchmarks.plans import table
from benchmarks.timing import ROOT

LENGTH, HEADS, WIDTH = 102_400, 8, 128  # 100 segments of 1,024; 8 heads of 128
SEGMENT = 1024
CHIP = "v5p:2x2x1"  # the one with room for the others


@dataclasses.dataclass(frozen=True)
class Contender:
    """A layer: its attention, and what its decode cache holds of each position, in positions."""

    name: str
    attend: Callable[..., Any]
    cached: float


def contenders() -> list[Contender]:
    from benchmarks.sparse_layers import block_sparse, dense, sliding_global
    from dsjax.nn.masks import Documents, Segmented
    from dsjax.nn.row_attention import row_attention

    def segmented(window: int, shift: Literal["alternate", "heads"]) -> Contender:
        mask = Segmented(SEGMENT, window, shift).layers(HEADS)[0]

        def attend(q_BTNH: Any, k_BTNH: Any, v_BTNH: Any) -> Any:
            documents = Documents.single(q_BTNH[:, :, 0, 0])
            return row_attention(q_BTNH[:, :, :, None], k_BTNH, v_BTNH, documents, mask)[:, :, :, 0]

        cached = (LENGTH * window / SEGMENT + SEGMENT) / LENGTH
        by_head = ", by head" if shift == "heads" else ""
        return Contender(f"segmented, w = W/{SEGMENT // window}{by_head}", attend, cached)

    return [
        Contender("dense", dense, 1),
        Contender("block-sparse (BigBird)", block_sparse, 1),
        Contender("sliding window + global", sliding_global, (512 + 64) / LENGTH),
        *(segmented(SEGMENT // share, shift) for share in (2, 4) for shift in ("alternate", "heads")),
    ]


def layer(attend: Callable[..., Any], x_BTD: Any, w_in: Any, w_out: Any) -> Any:
    """Projections and attention."""
    import jax.numpy as jnp

    q, k, v = jnp.einsum("BTD,DiNH->iBTNH", x_BTD, w_in)
    return jnp.einsum("BTNH,NHD->BTD", attend(q, k, v), w_out)


def compile_all(length: int = LENGTH) -> list[dict[str, Any]]:
    """Bytes of a training step of each layer, in this process."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from dsjax.plan.chips import parse_topology
    from dsjax.plan.measure import compile_or_need, devices_of

    place = SingleDeviceSharding(devices_of(parse_topology(CHIP))[0])
    D = HEADS * WIDTH

    def abstract(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    arrays = (abstract(1, length, D), abstract(D, 3, HEADS, WIDTH), abstract(HEADS, WIDTH, D))
    rows = []
    for one in contenders():
        print(f"compiling {one.name}", file=sys.stderr, flush=True)

        def loss(x, w_in, w_out, dy_BTD, attend=one.attend):
            return jnp.sum(layer(attend, x, w_in, w_out).astype(jnp.float32) * dy_BTD.astype(jnp.float32))

        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        compiled, needed = compile_or_need(step.lower(*arrays, abstract(1, length, D)))
        if compiled is not None:
            stats = compiled.memory_analysis()
            needed = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
        cache = one.cached * length * 2 * HEADS * WIDTH * 2
        rows.append({"layer": one.name, "training_bytes": needed, "cache_bytes": cache, "fits": compiled is not None})
    return rows


def run() -> dict[str, Any]:
    """Bytes of training and of the decode cache of each layer; beside them what that is of the block-sparse one."""
    from dsjax.plan.chips import parse_topology
    from dsjax.plan.process import environment

    command = [sys.executable, "-m", "benchmarks.attention_memory"]
    env = environment(parse_topology(CHIP)) | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    rows = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)
    peer = next(row for row in rows if row["layer"].startswith("block-sparse"))
    for row in rows:
        for key in ("training", "cache"):
            row[f"{key}_below_block_sparse"] = 1 - row[f"{key}_bytes"] / peer[f"{key}_bytes"]
    return {"chip": CHIP, "length": LENGTH, "heads": HEADS, "head_width": WIDTH, "segment_size": SEGMENT, "rows": rows}


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    head = ("layer", "training step, GiB", "below block-sparse", "decode cache, MiB", "below block-sparse")
    rows = [
        (
            row["layer"],
            f"{row['training_bytes'] / 2**30:,.2f}" + ("" if row["fits"] else " (does not fit)"),
            f"{row['training_below_block_sparse']:.1%}",
            f"{row['cache_bytes'] / 2**20:,.1f}",
            f"{row['cache_below_block_sparse']:.1%}",
        )
        for row in found["rows"]
    ]
    return table(head, rows)


if __name__ == "__main__":
    print(json.dumps(compile_all()))
