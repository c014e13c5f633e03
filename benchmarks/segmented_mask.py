"""Draws what a query sees: ``python -m benchmarks.segmented_mask docs/images/segmented_mask.png``."""

from __future__ import annotations

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.segmented_attention import Segments
from pallas_kernels.segmented_attention.reference import visible

LENGTH, W, TAIL = 48, 8, 4
FUTURE, HIDDEN, OWN, SEEN = range(4)
COLOURS = ("#ffffff", "#ececec", "#e08a1e", "#2f6db3")
LEGEND = {OWN: "own segment", SEEN: "tail of an earlier segment", HIDDEN: "earlier, not seen"}


def kinds(segments: Segments) -> np.ndarray:
    """What each key (column) is to each query (row), with random queries and keys."""
    q, k = (jax.random.normal(key, (1, LENGTH, 1, 16)) for key in jax.random.split(jax.random.key(4)))
    sees = np.asarray(visible(q, k, jnp.ones((1, LENGTH), jnp.int32), segments))[0, 0]
    t, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    own = segments.of(j) == segments.of(t)
    return np.where(j > t, FUTURE, np.where(sees, np.where(own, OWN, SEEN), HIDDEN))


def draw(path: pathlib.Path) -> None:
    """Four panels: one layer, the next one, the two together, and top segments."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    even, odd = kinds(Segments(W, TAIL)), kinds(Segments(W, TAIL, shift=TAIL))
    panels = (
        ("even layers: shift = 0", even),
        ("odd layers: shift = w", odd),
        ("two layers together", np.maximum(even, odd)),
        ("shift = 0, top_segments = 1", kinds(Segments(W, TAIL, top=1))),
    )
    figure = Figure(figsize=(13.2, 4.0), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, 4), panels, strict=True):
        axes.imshow(values, cmap=ListedColormap(COLOURS), vmin=FUTURE, vmax=SEEN, interpolation="nearest")
        axes.set_xticks(np.arange(LENGTH + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(LENGTH + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
        axes.set_xticks(range(0, LENGTH, W))
        axes.set_yticks(range(0, LENGTH, W))
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("key")
    figure.axes[0].set_ylabel("query")
    patches = [Patch(facecolor=COLOURS[kind], edgecolor="#999999", label=label) for kind, label in LEGEND.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=10)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]))
