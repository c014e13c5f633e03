"""Grouped matmul on TPU (Pallas Mosaic): the functions of a backend, and what they can not do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.expert_dispatch.backends import run
from pallas_kernels.grouped_matmul.tiles import Tiles, chip, tiles_for
from pallas_kernels.grouped_matmul.tpu_outer import room, sum_outer
from pallas_kernels.grouped_matmul.tpu_rows import Call, multiply, tiles_of
from pallas_kernels.grouped_matmul.xla import SPARE_ROWS
from pallas_kernels.platforms import NARROW

MOST_TOKENS = 65536  # whose numbers stand in scalar memory
LANE_BYTES = 512  # rows that are copied one by one are whole lanes of 32-bit words


def _activate(products: list[Array], _: list[Array]) -> list[Array]:
    gate, up = products
    return [jax.nn.silu(gate) * up]


def _activate_and_keep(products: list[Array], _: list[Array]) -> list[Array]:
    return [*_activate(products, _), *products]


def _deactivate(products: list[Array], saved: list[Array]) -> list[Array]:
    """Gradients of gate and up, and the hidden rows again."""
    (dh,), (gate, up) = products, (x.astype(jnp.float32) for x in saved)
    s = jax.nn.sigmoid(gate)
    act = gate * s
    return [dh * up * (s + act * (1 - s)), dh * act, act * up]


def _sum(products: list[Array], _: list[Array]) -> list[Array]:
    return [products[0] + products[1]]


def _same(products: list[Array], _: list[Array]) -> list[Array]:
    return products


MATMUL = Call("matmul", _same, zero=True)
TRANSPOSED = Call("matmul_transposed", _same, transposed=True, zero=True)
FORWARD = Call("swiglu", _activate)
FORWARD_KEEPING = Call("swiglu", _activate_and_keep, outs=3)
BACKWARD = Call("swiglu_backward", _deactivate, outs=3, transposed=True)
BACKWARD_DX = Call("swiglu_dx", _sum, transposed=True, zero=True)


def matmul(x_RD: Array, w_GDF: Array, scales_GF: Array | None, sizes_E: Array, first: Array, *,
           transposed: bool, interpret: Any = False) -> Array:  # fmt: skip
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    call = TRANSPOSED if transposed else MATMUL
    more = {"scales_GN": scales_GF, "num_rows": len(x_RD), "interpret": interpret}
    return multiply(call, [x_RD], [w_GDF], sizes_E, first, **more)[0]


def outer(x_RD: Array, dy_RF: Array, sizes_E: Array, *, interpret: Any = False) -> Array:
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    return sum_outer(x_RD, dy_RF, sizes_E, num_rows=len(x_RD), interpret=interpret)


def swiglu(x_TD: Array, token_R: Array | None, w_gate: Array, w_up: Array, w_down: Array, sizes_E: Array,
           first: Array, *, keep: bool, interpret: Any = False) -> tuple[Array, Any]:  # fmt: skip
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    call = FORWARD_KEEPING if keep else FORWARD
    R = len(x_TD if token_R is None else token_R)
    if token_R is not None and not _gathers(call, x_TD, token_R, w_gate, w_up):
        x_TD, token_R = run(None, "gather", x_TD, token_R, None), None
    more = {"num_rows": R, "interpret": interpret}
    h_RF, *saved = multiply(
        call, [x_TD], [w_gate, w_up], sizes_E, first, token_R=token_R, spare=SPARE_ROWS if keep else 0, **more
    )
    return multiply(MATMUL, [h_RF], [w_down], sizes_E, first, **more)[0], tuple(saved) or None


def _gathers(call: Call, x_TD: Array, token_R: Array, w_gate: Array, w_up: Array) -> bool:
    """Whether rows are gathered by the kernel that multiplies them: only where it goes over them once."""
    if len(token_R) > MOST_TOKENS or x_TD.shape[1] * x_TD.dtype.itemsize % LANE_BYTES:
        return False
    tiles = tiles_of(call, [x_TD], [w_gate, w_up], gathered=True)
    return tiles is not None and tiles.columns == w_gate.shape[2]


def swiglu_backward(x_TD: Array, token_R: Array | None, w_gate: Array, w_up: Array, w_down: Array,
                    sizes_E: Array, first: Array, saved: Any, dy_RD: Array, *,
                    interpret: Any = False) -> tuple[Array, ...]:  # fmt: skip
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    more = {"num_rows": len(dy_RD), "interpret": interpret}
    x_RD = x_TD if token_R is None else run(None, "gather", x_TD, token_R, None)
    dgate, dup, h = multiply(BACKWARD, [dy_RD], [w_down], sizes_E, first, beside=saved, **more)
    (dx_RD,) = multiply(BACKWARD_DX, [dgate, dup], [w_gate, w_up], sizes_E, first, **more)
    pairs = ((x_RD, dgate), (x_RD, dup), (h, dy_RD))
    return dx_RD, *(sum_outer(x, dy, sizes_E, **more) for x, dy in pairs)


def why_not(function: str, *arrays: Any, **static: Any) -> str | None:
    """Why ``function`` can not take these arrays, in a sentence; None: it can."""
    if jax.enable_x64.value:
        return NARROW
    calls: list[tuple[Call | None, Any, Any, Any]]
    if function.startswith("swiglu"):
        x, _, w_gate, w_up, w_down, *_ = arrays
        h = jax.ShapeDtypeStruct((1, w_gate.shape[2]), x.dtype)
        if function == "swiglu":
            calls = [(FORWARD_KEEPING, [x], [w_gate, w_up], ()), (MATMUL, [h], [w_down], ())]
        else:
            calls = [
                (BACKWARD, [x], [w_down], [h, h]),
                (BACKWARD_DX, [h, h], [w_gate, w_up], ()),
                (None, [x, h], (), ()),
            ]
    elif function == "outer":
        calls = [(None, arrays[:2], (), ())]
    else:
        x, w = arrays[:2]
        calls = [(TRANSPOSED if static["transposed"] else MATMUL, [x], [w], ())]
    dtypes = {a.dtype for _, wide, matrices, _ in calls for a in (*wide, *matrices)} - {jnp.dtype("int8")}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}:
        names = " and ".join(sorted(map(str, dtypes)))
        return f"rows and matrices are {names}; the kernel takes all bfloat16 or all float32, and int8 matrices"
    for call, wide, matrices, beside in calls:
        if _tiles(call, wide, matrices, beside) is None:
            return f"rows of {wide[0].shape[1]} numbers do not fit on a {chip()}"
    return None


def _tiles(call: Call | None, wide: Any, matrices: Any, beside: Any) -> Tiles | None:
    if call is not None:
        return tiles_of(call, wide, matrices, beside)
    (x, dy), size = wide, wide[0].dtype.itemsize
    return tiles_for("outer", size, dy.shape[1], lambda tiles: room(x.shape[1], size, tiles))
