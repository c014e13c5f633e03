"""The public calls: what is asked for, which backend computes it, and one gradient for all of them.

A backend is a file with five functions and a word on what it can do (``why_not(function, *arrays, **static)``: None, or
the reason in a sentence). Rows are sorted by group; group g has matrix number ``first + g`` of a stack of G (``first``,
an int32 scalar, is 0 where the stack holds these groups alone). Rows behind the last group may hold anything, NaN
included; results there are 0. Products are summed in float32.

    matmul(x_RD, w_GDF, scales_GF, sizes_E, first, transposed) -> y_RF
        ``transposed``: w is (G, F, D). ``scales_GF``: None, or factors on the columns of int8 matrices, float32.
    outer(x_RD, dy_RF, sizes_E) -> dw_EDF, in x's dtype
        ``x_g.T @ dy_g`` of each group; 0 for one without rows.
    swiglu(x_TD, token_R, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_E, first, keep) -> (y_RD, saved)
        ``(silu(x w_gate) * (x w_up)) w_down`` of ``x_TD[token_R]``, or of the rows of x where ``token_R`` is None.
        ``saved`` is None, or with ``keep`` the products ``(x w_gate, x w_up)`` for the backward pass, each
        (R + SPARE_ROWS, F) in x's dtype: whole blocks can be written to the end. What stands behind the last group is
        not read.
    swiglu_backward(x_TD, token_R, w_gate, w_up, w_down, sizes_E, first, saved, dy_RD) -> (dx_RD, *dw)
        ``dx_RD`` by row, ``dw`` of the E groups.

The kernels take ``interpret`` beside these: True, or the parameters of a simulator.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.expert_dispatch import Plan, dispatch, sum_rows
from pallas_kernels.grouped_matmul import gpu, tpu, xla
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference, grouped_swiglu_reference
from pallas_kernels.platforms import by_platform

Implementation = Literal["reference", "xla", "tpu", "gpu"]
_KERNELS: dict[str, tuple[str, ModuleType]] = {"tpu": ("tpu", tpu), "gpu": ("cuda", gpu)}


def grouped_matmul(
    rows_RD: Float[Array, "R D"],
    w_EDF: Num[Array, "*layers E D F"],
    group_sizes_E: Int[Array, " E"] | Sequence[int],
    *,
    scales_EF: Float[Array, "*layers E F"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "R F"]:
    """Each row times its group's matrix; rows of no group give 0.

    Args:
        rows_RD: those of group 0 first.
        w_EDF: one matrix for each group, in the dtype of the rows, or int8.
        group_sizes_E: rows in each group; their sum is at most R.
        scales_EF: factors on the columns of int8 matrices: the weights are ``w_EDF * scales_EF[:, None]``. Such weights
            have no gradient.
        layer: the matrices are those of a stack of layers, of which this one is meant. Nothing is cut out of the stack.
        implementation: None: the best one for the platform that the program is compiled for. A named one runs or
            raises; away from its own platform a kernel is interpreted.

    Raises:
        ValueError: shapes or dtypes that do not go together, or a kernel that can not do what is asked.
    """
    sizes_E, layer = _whole("group sizes", group_sizes_E), _whole("layer", layer)
    _check(rows_RD, (w_EDF,), sizes_E, layer, "w_EDF is (E, D, F)", ((1, rows_RD.shape[-1]),))
    if (scales_EF is None) == (w_EDF.dtype == jnp.int8) or w_EDF.dtype not in (rows_RD.dtype, jnp.int8):
        raise ValueError(
            f"w is {w_EDF.dtype} and scales are {'given' if scales_EF is not None else 'not given'}; w is "
            f"{rows_RD.dtype} as the rows, or int8 with scales"
        )
    if scales_EF is not None and scales_EF.shape != (needed := (*w_EDF.shape[:-2], w_EDF.shape[-1])):
        raise ValueError(
            f"shapes do not go together: scales are {scales_EF.shape}; of w {w_EDF.shape} they are {needed}"
        )
    w_GDF, first = _stack(w_EDF, layer)
    if implementation == "reference":
        if scales_EF is not None:
            w_EDF = (w_EDF * scales_EF[..., None, :]).astype(rows_RD.dtype)
        w_EDF = w_EDF if layer is None else w_EDF[layer]
        return grouped_matmul_reference(rows_RD, w_EDF, sizes_E)
    scales_GF = None if scales_EF is None else scales_EF.reshape(-1, scales_EF.shape[-1])
    return _matmul(rows_RD, w_GDF, scales_GF, sizes_E, first, implementation)


def grouped_swiglu(
    x_RD: Float[Array, "R D"],
    w_gate_EDF: Float[Array, "*layers E D F"],
    w_up_EDF: Float[Array, "*layers E D F"],
    w_down_EFD: Float[Array, "*layers E F D"],
    sizes_E: Int[Array, " E"] | Sequence[int],
    *,
    layer: Int[Array, ""] | int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "R D"]:
    """``(silu(x w_gate) * (x w_up)) w_down`` of each row with its group's weights; rows of no group give 0.

    Arguments and errors as in :func:`grouped_matmul`.
    """
    return _swiglu_of(x_RD, (w_gate_EDF, w_up_EDF, w_down_EFD), sizes_E, None, layer, implementation)


def expert_swiglu(
    x_TD: Float[Array, "T D"],
    w_gate_EDF: Float[Array, "*layers E D F"],
    w_up_EDF: Float[Array, "*layers E D F"],
    w_down_EFD: Float[Array, "*layers E F D"],
    plan: Plan,
    *,
    layer: Int[Array, ""] | int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "R D"]:
    """:func:`grouped_swiglu` of ``dispatch(x_TD, plan)``: where a kernel can, it gathers the rows by itself.

    Arguments and errors as in :func:`grouped_matmul`.
    """
    return _swiglu_of(x_TD, (w_gate_EDF, w_up_EDF, w_down_EFD), plan.sizes_E, plan, layer, implementation)


def _swiglu_of(x, weights, sizes_E, plan, layer, implementation):
    sizes_E, layer = _whole("group sizes", sizes_E), _whole("layer", layer)
    D, F = x.shape[-1], weights[0].shape[-1]
    _check(x, weights, sizes_E, layer, "weights are (E, D, F), (E, D, F), (E, F, D)", ((D, F), (D, F), (F, D)))
    if any(w.dtype != x.dtype for w in weights):
        raise ValueError(
            f"x is {x.dtype}, weights are {', '.join(str(w.dtype) for w in weights)}; they must be the same"
        )
    if implementation == "reference":
        w_gate, w_up, w_down = weights if layer is None else (w[layer] for w in weights)
        rows_RD = x if plan is None else dispatch(x, plan, implementation="reference")
        return grouped_swiglu_reference(rows_RD, w_gate, w_up, w_down, sizes_E)
    stacks = [_stack(w, layer) for w in weights]
    first = stacks[0][1]
    return _swiglu(x, *(w for w, _ in stacks), sizes_E, plan, first, implementation)


def _whole(name: str, x: Any) -> Any:
    """Whole numbers as int32, or None."""
    if x is None:
        return None
    if not jnp.issubdtype((x := jnp.asarray(x)).dtype, jnp.integer):
        raise ValueError(f"{name}: the dtype is {x.dtype}; it must be one of integers")
    return x.astype(jnp.int32)


def _check(x, weights, sizes_E, layer, expected: str, shapes) -> None:
    stack = 0 if layer is None else 1
    good = x.ndim == 2 and sizes_E.ndim == 1 and sizes_E.size > 0 and all(w.ndim == 3 + stack for w in weights)
    good = good and all(w.shape[stack] == len(sizes_E) and w.shape[:stack] == weights[0].shape[:stack] for w in weights)
    if good and len(weights) == 1:
        good = weights[0].shape[-2] == x.shape[1]
    elif good:
        good = all(w.shape[-2:] == shape for w, shape in zip(weights, shapes, strict=True))
    if not good:
        found = ", ".join(str(a.shape) for a in (x, *weights, sizes_E))
        raise ValueError(
            f"shapes do not go together: rows, weights and sizes are {found}; rows are (R, D), {expected}"
            f"{', behind one dimension of layers' if stack else ''}, sizes (E,), of at least one group"
        )


def _stack(w: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
    """All matrices in one dimension, and the number of group 0's."""
    if layer is None:
        return w, jnp.int32(0)
    return w.reshape(-1, *w.shape[2:]), layer * w.shape[1]


def _in_stack(dw_E: jax.Array, num: int, first: Any) -> jax.Array:
    """Gradients of the groups among those of all ``num`` matrices, which are 0."""
    if len(dw_E) == num:
        return dw_E
    return jax.lax.dynamic_update_slice_in_dim(jnp.zeros((num, *dw_E.shape[1:]), dw_E.dtype), dw_E, first, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _matmul(x_RD, w_GDF, scales_GF, sizes_E, first, implementation):
    return _run(implementation, "matmul", x_RD, w_GDF, scales_GF, sizes_E, first, transposed=False)


def _matmul_forward(x_RD, w_GDF, scales_GF, sizes_E, first, implementation):
    saved = (x_RD, w_GDF, scales_GF, sizes_E, first)
    return _matmul(*saved, implementation), saved


def _matmul_backward(implementation, saved, dy_RF):
    x_RD, w_GDF, scales_GF, sizes_E, first = saved
    if scales_GF is not None:
        w_GDF = (w_GDF * scales_GF[:, None]).astype(x_RD.dtype)
    dx_RD = _run(implementation, "matmul", dy_RF, w_GDF, None, sizes_E, first, transposed=True)
    if scales_GF is not None:
        return dx_RD, None, None, None, None
    dw_EDF = _run(implementation, "outer", x_RD, dy_RF, sizes_E)
    return dx_RD, _in_stack(dw_EDF, len(w_GDF), first), None, None, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _swiglu(x_TD, w_gate, w_up, w_down, sizes_E, plan, first, implementation):
    token_R = None if plan is None else plan.token_R
    return _run(implementation, "swiglu", x_TD, token_R, w_gate, w_up, w_down, sizes_E, first, keep=False)[0]


def _swiglu_forward(x_TD, w_gate, w_up, w_down, sizes_E, plan, first, implementation):
    token_R = None if plan is None else plan.token_R
    arrays = (x_TD, token_R, w_gate, w_up, w_down, sizes_E, first)
    y_RD, saved = _run(implementation, "swiglu", *arrays, keep=True)
    return y_RD, (arrays, saved, plan)


def _swiglu_backward(implementation, residuals, dy_RD):
    arrays, saved, plan = residuals
    first, num = arrays[6], len(arrays[2])
    dx_RD, *dw = _run(implementation, "swiglu_backward", *arrays, saved, dy_RD)
    dx_TD = dx_RD if plan is None else sum_rows(dx_RD, plan)
    return dx_TD, *(_in_stack(dw_E, num, first) for dw_E in dw), None, None, None


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _run(implementation: Implementation | None, function: str, *arrays: Any, **static: Any) -> Any:
    """``function`` of the backend that is asked for, or of the best one for the platform that is compiled for."""

    def of(backend: ModuleType, **more: Any) -> Any:
        return functools.partial(getattr(backend, function), **static, **more)

    if implementation not in (None, "xla", *_KERNELS):
        names = ", ".join(map(repr, (None, "reference", "xla", *_KERNELS)))
        raise ValueError(f"implementation is {implementation!r}; it is one of {names}")
    if implementation == "xla":
        return of(xla)(*arrays)
    if implementation is not None:
        platform, backend = _KERNELS[implementation]
        if (reason := backend.why_not(function, *arrays, **static)) is not None:
            raise ValueError(f"implementation {implementation!r}: {reason}")
        return by_platform(*arrays, **{platform: of(backend)}, default=of(backend, interpret=True))
    choices = {"default": of(xla)}
    for platform, backend in _KERNELS.values():
        if backend.why_not(function, *arrays, **static) is None:
            choices[platform] = of(backend)
    return by_platform(*arrays, **choices)
