"""Plain XLA: `jax.lax.ragged_dot`, of which nothing is cut out of a stack of layers; on the CPU, blocks of rows.

XLA:CPU computes a ragged dot as a masked product over all groups, E times the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.blocks import over_groups
from pallas_kernels.platforms import by_platform

SPARE_ROWS = 128  # behind what is saved


def matmul(x_RD, w_GDF, scales_GF, sizes_E, first, *, transposed: bool):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    return _by_platform(_matmul_blocks, _matmul_ragged, x_RD, w_GDF, scales_GF, sizes_E, first, transposed=transposed)


def outer(x_RD, dy_RF, sizes_E):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    return _by_platform(_outer_blocks, _outer_ragged, x_RD, dy_RF, sizes_E)


def swiglu(x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, *, keep: bool):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    return _by_platform(
        _swiglu_blocks, _swiglu_ragged, x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, keep=keep
    )


def swiglu_backward(x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, saved, dy_RD):
    """See :mod:`pallas_kernels.grouped_matmul.multiply`."""
    arrays = (x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, saved, dy_RD)
    return _by_platform(_swiglu_backward_blocks, _swiglu_backward_ragged, *arrays)


def _by_platform(blocks: Callable[..., Any], ragged: Callable[..., Any], *arrays: Any, **static: Any) -> Any:
    forms = {"cpu": functools.partial(blocks, **static), "default": functools.partial(ragged, **static)}
    return by_platform(*arrays, **forms)


# ---------------------------------------------------------------- blocks of rows


def _matmul_blocks(x_RD, w_GDF, scales_GF, sizes_E, first, *, transposed: bool):
    def block(weights, x_bRD):
        w_bDF, scales_bF = weights
        y_bRF = _dot("brd,bfd->brf" if transposed else "brd,bdf->brf", x_bRD, w_bDF.astype(x_bRD.dtype))
        return (y_bRF if scales_bF is None else y_bRF * scales_bF[:, None],), ()

    return over_groups(block, (w_GDF, scales_GF), [(x_RD, None)], len(x_RD), sizes_E, first)[0][0]


def _outer_blocks(x_RD, dy_RF, sizes_E):
    def block(_, x_bRD, dy_bRF):
        return (), (_dot("brd,brf->bdf", x_bRD, dy_bRF),)

    return over_groups(block, (), [(x_RD, None), (dy_RF, None)], len(x_RD), sizes_E, 0, spare=())[1][0]


def _swiglu_blocks(x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, *, keep: bool):
    def block(weights, x_bRD):
        w_gate, w_up, w_down = weights
        gate, up = (_dot("brd,bdf->brf", x_bRD, w).astype(x_bRD.dtype) for w in (w_gate, w_up))
        y_bRD = _dot("brf,bfd->brd", jax.nn.silu(gate) * up, w_down)
        return (y_bRD, gate, up) if keep else (y_bRD,), ()

    R = len(x_TD if token_R is None else token_R)
    weights, spare = (w_gate_GDF, w_up_GDF, w_down_GFD), (0, SPARE_ROWS, SPARE_ROWS)
    (y_RD, *saved), _ = over_groups(block, weights, [(x_TD, token_R)], R, sizes_E, first, spare if keep else spare[:1])
    return y_RD, tuple(saved) if keep else None


def _swiglu_backward_blocks(x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, saved, dy_RD):
    def block(weights, x_bRD, gate, up, dy_bRD):
        w_gate, w_up, w_down = weights
        h, dgate, dup = _swiglu_gradients(gate, up, _dot("brd,bfd->brf", dy_bRD, w_down))
        dx_bRD = _dot("brf,bdf->brd", dgate, w_gate) + _dot("brf,bdf->brd", dup, w_up)
        outers = ((x_bRD, dgate), (x_bRD, dup), (h, dy_bRD))
        return (dx_bRD,), tuple(_dot("bra,brc->bac", a, c) for a, c in outers)

    rows = [(x_TD, token_R), (saved[0], None), (saved[1], None), (dy_RD, None)]
    (dx_RD,), dw = over_groups(block, (w_gate_GDF, w_up_GDF, w_down_GFD), rows, len(dy_RD), sizes_E, first)
    return dx_RD, *dw


def _dot(dims: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(dims, a, b, preferred_element_type=jnp.float32)


def _swiglu_gradients(gate: jax.Array, up: jax.Array, dh: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``h = silu(gate) * up``, and the gradients of ``gate`` and ``up``, in their dtype."""
    s = jax.nn.sigmoid(gate)
    act = gate * s
    dgate, dup = dh * up * (s + act * (1 - s)), dh * act
    return act * up, dgate.astype(gate.dtype), dup.astype(up.dtype)


# ---------------------------------------------------------------- ragged dots


def _matmul_ragged(x_RD, w_GDF, scales_GF, sizes_E, first, *, transposed: bool):
    y_RF = _ragged(x_RD, w_GDF.astype(x_RD.dtype), sizes_E, first, transposed=transposed)
    row_R, ends_E = jnp.arange(len(x_RD)), jnp.cumsum(sizes_E)
    if scales_GF is not None:
        group_R = first + jnp.searchsorted(ends_E, row_R, side="right")
        y_RF = y_RF * scales_GF[group_R]
    return jnp.where(row_R[:, None] < ends_E[-1], y_RF, 0).astype(x_RD.dtype)


def _outer_ragged(x_RD, dy_RF, sizes_E):
    inside_R = jnp.arange(len(x_RD)) < jnp.sum(sizes_E)
    x_RD, dy_RF = (jnp.where(inside_R[:, None], a, 0) for a in (x_RD, dy_RF))
    rows_are_summed = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(x_RD, dy_RF, sizes_E, rows_are_summed, preferred_element_type=jnp.float32).astype(
        x_RD.dtype
    )


def _swiglu_ragged(x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, *, keep: bool):
    x_RD = x_TD if token_R is None else x_TD[token_R]
    saved = tuple(_ragged(x_RD, w, sizes_E, first).astype(x_RD.dtype) for w in (w_gate_GDF, w_up_GDF))
    gate, up = saved
    y_RD = _matmul_ragged(jax.nn.silu(gate) * up, w_down_GFD, None, sizes_E, first, transposed=False)
    return y_RD, tuple(jnp.pad(a, ((0, SPARE_ROWS), (0, 0))) for a in saved) if keep else None


def _swiglu_backward_ragged(x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, saved, dy_RD):
    x_RD = x_TD if token_R is None else x_TD[token_R]
    gate, up = (a[: len(x_RD)] for a in saved)
    dh = _ragged(dy_RD, w_down_GFD, sizes_E, first, transposed=True)
    h, dgate, dup = _swiglu_gradients(gate, up, dh)
    back = functools.partial(_ragged, sizes_E=sizes_E, first=first, transposed=True)
    dx_RD = back(dgate, w_gate_GDF) + back(dup, w_up_GDF)
    dx_RD = jnp.where(jnp.arange(len(x_RD))[:, None] < jnp.sum(sizes_E), dx_RD, 0).astype(x_RD.dtype)
    return dx_RD, *(_outer_ragged(a, b, sizes_E) for a, b in ((x_RD, dgate), (x_RD, dup), (h, dy_RD)))


def _ragged(x_RD, w_GDF, sizes_E, first, *, transposed: bool = False):
    """The product in float32. All matrices of the stack take part, those of others with no row."""
    sizes_G = jax.lax.dynamic_update_slice_in_dim(jnp.zeros(len(w_GDF), jnp.int32), sizes_E, first, axis=0)
    contracted = ((1,), (2 if transposed else 1,))
    dims = jax.lax.RaggedDotDimensionNumbers((contracted, ((), ())), [0], [0])
    return jax.lax.ragged_dot_general(x_RD, w_GDF, sizes_G, dims, preferred_element_type=jnp.float32)
