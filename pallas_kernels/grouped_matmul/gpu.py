"""Grouped matmul on Hopper GPUs (Pallas Mosaic GPU): the functions of a backend, and what they can not do.

Float32, which the tensor cores would round to tf32, and widths that are no multiples of 64 are left to XLA. So is the
gather of rows: Hopper's copies take rows that follow each other (a gathering copy came with Blackwell), and one copy
for each row would be 128 small ones for every block. Gathered once, rows are written and read once more.

Mosaic GPU is loaded when a kernel is traced, not before: other platforms ask :func:`why_not` only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.grouped_matmul.xla import SPARE_ROWS
from pallas_kernels.hopper import simulated, wrong_device

TILE = 128  # rows of a tile of the result
ALIGNED = 8  # a tile begins at a multiple of so many rows
WIDTH = 64  # D and F are multiples of it
ROW, BEGIN, END, MATRIX_NUMBER, COUNT = range(5)  # columns of the tables
assert SPARE_ROWS >= TILE


def why_not(function: str, *arrays: Any, **static: Any) -> str | None:
    """Why ``function`` can not take these arrays, in a sentence; None: it can."""
    x = arrays[0]
    weights = arrays[2:5] if function.startswith("swiglu") else arrays[1:2]
    scaled = function == "matmul" and arrays[2] is not None
    if scaled and static["transposed"]:
        return "int8 matrices are (G, F, D); the kernel takes them as (G, D, F)"
    of_products = (x,) if scaled else (x, *weights)
    if any(a.dtype != jnp.bfloat16 for a in of_products):
        dtypes = ", ".join(str(a.dtype) for a in of_products)
        return f"dtypes are {dtypes}; the kernel takes bfloat16 (wgmma has no float32)"
    widths = sorted({x.shape[1], *(width for w in weights for width in w.shape[1:])})
    if any(width == 0 or width % WIDTH for width in widths):
        return f"rows are {' and '.join(map(str, widths))} wide; the kernel takes multiples of {WIDTH}"
    if len(x) == 0:
        return "there are no rows"
    return wrong_device()


# ---------------------------------------------------------------- the functions of a backend


def matmul(x_RD, w_GDF, scales_GF, sizes_E, first, *, transposed: bool, interpret: Any = False):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`; ``interpret`` may be the parameters of the simulator."""
    from pallas_kernels.grouped_matmul import gpu_int8, gpu_rows

    if interpret is True:
        return _simulated(matmul, x_RD, w_GDF, scales_GF, sizes_E, first, transposed=transposed)
    name = "grouped_matmul_transposed" if transposed else "grouped_matmul"
    product = gpu_rows.Product(name, finish=lambda y: (y,), transposed=transposed)
    visits, R = visits_of(sizes_E, first, len(x_RD)), len(x_RD)
    setting = _setting(R, w_GDF, 1, interpret)
    if scales_GF is not None:
        return gpu_int8.multiply_int8(setting, visits, whole(x_RD), w_GDF, scales_GF)[:R]
    return gpu_rows.multiply(product, setting, visits, whole(x_RD), w_GDF, out_rows=whole_rows(R))[0][:R]


def outer(x_RD, dy_RF, sizes_E, *, interpret: Any = False):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    from pallas_kernels.grouped_matmul import gpu_outer, gpu_tiles

    if interpret is True:
        return _simulated(outer, x_RD, dy_RF, sizes_E)
    setting = gpu_tiles.Setting(2 * x_RD.size * dy_RF.shape[1], interpret or None)
    return gpu_outer.outer(setting, spans_of(sizes_E), whole(x_RD), whole(dy_RF))


def swiglu(x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, *, keep: bool, interpret: Any = False):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    from pallas_kernels.grouped_matmul import gpu_rows

    if interpret is True:
        return _simulated(swiglu, x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, keep=keep)
    x_RD = x_TD if token_R is None else x_TD[token_R]
    R = len(x_RD)
    visits, rows = visits_of(sizes_E, first, R), whole_rows(R)

    def finish(gate, up):
        h = gate * jax.nn.sigmoid(gate) * up
        return (h, gate, up) if keep else (h,)

    product = gpu_rows.Product("grouped_swiglu_hidden", finish, outputs=3 if keep else 1, sums=2)
    setting, weights = _setting(R, w_gate_GDF, 2, interpret), (w_gate_GDF, w_up_GDF)
    out_rows = rows + SPARE_ROWS if keep else rows
    h, *saved = gpu_rows.multiply(product, setting, visits, whole(x_RD), *weights, out_rows=out_rows)
    product = gpu_rows.Product("grouped_swiglu_down", finish=lambda y: (y,))
    setting = _setting(R, w_down_GFD, 1, interpret)
    (y_RD,) = gpu_rows.multiply(product, setting, visits, h, w_down_GFD, out_rows=rows)
    return y_RD[:R], tuple(a[: R + SPARE_ROWS] for a in saved) if keep else None


def swiglu_backward(
    x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, saved, dy_RD, *, interpret: Any = False
):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    from pallas_kernels.grouped_matmul import gpu_rows

    arrays = (x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, saved, dy_RD)
    if interpret is True:
        return _simulated(swiglu_backward, *arrays)
    x_RD = x_TD if token_R is None else x_TD[token_R]
    R = len(x_RD)
    visits, rows = visits_of(sizes_E, first, R), whole_rows(R)

    def finish(dh, gate, up):
        s = jax.nn.sigmoid(gate)
        act = gate * s
        return dh * up * (s + act * (1 - s)), dh * act, act * up

    product = gpu_rows.Product("grouped_swiglu_dhidden", finish, outputs=3, beside=2, transposed=True)
    setting, beside = _setting(R, w_down_GFD, 1, interpret), [whole(a) for a in saved]
    hidden = gpu_rows.multiply(product, setting, visits, whole(dy_RD), w_down_GFD, *beside, out_rows=rows)
    dgate, dup, h = hidden
    product = gpu_rows.Product("grouped_swiglu_dx", finish=lambda dx: (dx,), terms=2, transposed=True)
    setting, weights = _setting(R, w_gate_GDF, 2, interpret), (w_gate_GDF, w_up_GDF)
    (dx_RD,) = gpu_rows.multiply(product, setting, visits, dgate, dup, *weights, out_rows=rows)
    dw_gate, dw_up, dw_down = (
        outer(a, b, sizes_E, interpret=interpret) for a, b in ((x_RD, dgate[:R]), (x_RD, dup[:R]), (h[:R], dy_RD))
    )
    return dx_RD[:R], dw_gate, dw_up, dw_down


def _setting(num_rows: int, w_GDF: Array, products: int, interpret: Any) -> Any:
    from pallas_kernels.grouped_matmul.gpu_tiles import Setting

    return Setting(2 * products * num_rows * w_GDF.shape[1] * w_GDF.shape[2], interpret or None)


def _simulated(f: Any, *arrays: Any, **static: Any) -> Any:
    """What is copied from behind the last row or column is NaN in the simulator; on a chip it is 0."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return simulated(f, InterpretGPUParams(out_of_bounds_reads="uninitialized"), *arrays, **static)


# ---------------------------------------------------------------- rows, and which tiles are visited


def whole_rows(num: int) -> int:
    """Rows that an array of ``num`` is lengthened to: whole copies, and a tile at least."""
    return max(-(-num // ALIGNED) * ALIGNED, TILE)


def whole(x_RD: Array) -> Array:
    """Lengthened to whole tiles of 8 rows, and to one tile of the result; where rows come in eights, nothing is."""
    return jnp.pad(x_RD, ((0, whole_rows(len(x_RD)) - len(x_RD)), (0, 0)))


def spans_of(sizes_E: Int[Array, " E"]) -> Int[Array, "E 3"]:
    """Of each group: the multiple of 8 rows at which its first tile begins, its first row and its end."""
    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    begins_E = ends_E - sizes_E
    return jnp.stack([begins_E // ALIGNED * ALIGNED, begins_E, ends_E], axis=1)


def visits_of(sizes_E: Int[Array, " E"], first: Int[Array, ""], num_rows: int) -> Int[Array, "V 5"]:
    """Tiles of rows: where each begins, the first row and the end of its group, the number of its matrix.

    Rows of no group come last; their matrix is -1. The last column says how many tiles there are; those behind them
    hold nothing of use.
    """
    E = len(sizes_E)
    spans = spans_of(jnp.append(sizes_E, num_rows - jnp.sum(sizes_E)).astype(jnp.int32))
    row_G, begin_G, end_G = spans.T
    tiles_G = jnp.where(end_G > begin_G, -(-(end_G - row_G) // TILE), 0)
    last_G = jnp.cumsum(tiles_G)
    most = (num_rows + (ALIGNED - 1) * (E + 1)) // TILE + E + 1
    visit_V = jnp.arange(most, dtype=jnp.int32)
    group_V = jnp.minimum(jnp.sum(visit_V[:, None] >= last_G, axis=1), E)
    row_V = row_G[group_V] + (visit_V - (last_G - tiles_G)[group_V]) * TILE
    matrix_V = jnp.where(group_V < E, first + group_V, -1)
    columns = (row_V, begin_G[group_V], end_G[group_V], matrix_V, jnp.broadcast_to(last_G[-1], most))
    return jnp.stack(columns, axis=1).astype(jnp.int32)
