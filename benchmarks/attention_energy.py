"""Dynamic energy of segmented against full attention at 16,384 positions, by the model of ``dsjax plan`` (chips.md).

Prefill: the FLOPs that the definition asks for, and the HBM bytes of our compiled kernel with segments and with one
segment as long as the row, which is full attention. Decoding: a token reads the cache, averaged over the place in a
segment that it may have. A whole layer adds its weights: four projections and a SwiGLU, 12 D² of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.plans import table
from dsjax.plan.chips import CHIPS, energy_joules
from dsjax.plan.kernels import Case
from dsjax.plan.kernels_attention import HEADS, SEGMENT, WIDTH, WINDOW
from dsjax.plan.kernels_command import ask
from pallas_kernels.segmented_attention import Segments

LENGTH = 16384
WIDTHS = (1024, 2048, 4096, 7168)
BATCHES = (1, 16)
BYTES = 2  # of a number in bfloat16


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and HBM bytes."""

    flops: float
    hbm_bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes)

    def __mul__(self, factor: float) -> Work:
        return Work(self.flops * factor, self.hbm_bytes * factor)

    def joules(self, chip: str) -> float:
        energy = energy_joules(CHIPS[chip], self.flops, self.hbm_bytes, 0)
        assert energy is not None
        return energy["total"]


def prefill(chip: str, implementation: str) -> Work:
    """Attention of one head over a row."""
    segments = Segments(SEGMENT, WINDOW) if implementation == "ours" else Segments(LENGTH, 0)
    counted = ask(Case("segmented_attention", implementation, chip, LENGTH))
    flops = 4 * WIDTH * segments.visible_pairs(LENGTH)
    return Work(flops, (counted["kernel_hbm_bytes"] + counted["outside_hbm_bytes"]) / HEADS)


def decode(implementation: str) -> Work:
    """Attention of one head for the token behind ``LENGTH`` positions, on average over places in a segment."""
    seen = LENGTH * WINDOW / SEGMENT + (SEGMENT - WINDOW) / 2 if implementation == "ours" else LENGTH
    return Work(4 * WIDTH * seen, 2 * WIDTH * BYTES * seen)


def layer(D: int, attention: Work, tokens: int, rows: int) -> Work:
    """With projections and feed-forward for ``tokens`` at a time, of ``rows`` rows."""
    weights, activations = 12 * D * D, 20 * D * tokens  # q, k, v, two of 8/3 D, their product, outputs: in and out
    return attention * (D // WIDTH * rows) + Work(2 * weights * tokens, BYTES * (weights + activations))


def figures(chip: str) -> dict[str, Any]:
    """Joules of both, and how much lower segmented is."""

    def compared(work: Any) -> dict[str, Any]:
        ours, full = work("ours"), work("dense")
        joules = [x.joules(chip) for x in (ours, full)]
        return {
            "flops": [ours.flops, full.flops],
            "hbm_bytes": [ours.hbm_bytes, full.hbm_bytes],
            "joules": joules,
            "lower": 1 - joules[0] / joules[1],
        }

    attention = {name: prefill(chip, name) for name in ("ours", "dense")}
    found: dict[str, Any] = {
        "chip": chip,
        "attention": {
            "prefill": compared(lambda name: attention[name] * HEADS),
            "decode": compared(lambda name: decode(name) * HEADS),
        },
        "layer": {},
    }
    for D in WIDTHS:
        row = {"prefill": compared(lambda name, D=D: layer(D, attention[name], LENGTH, 1))}
        for batch in BATCHES:
            row[f"decode, {batch} rows"] = compared(lambda name, D=D, b=batch: layer(D, decode(name), b, b))
        found["layer"][D] = row
    return found


def tables(found: dict[str, Any]) -> str:
    """Markdown."""
    columns = ["prefill", *(f"decode, {batch} rows" for batch in BATCHES)]
    operator = found["attention"]
    rows = [["attention alone", *(f"-{operator[c.split(',')[0]]['lower']:.1%}" for c in columns)]]
    rows += [
        [f"a layer, D = {D:,}", *(f"-{row[c]['lower']:.1%}" for c in columns)] for D, row in found["layer"].items()
    ]
    return table([f"energy on {found['chip']}", *columns], rows)
