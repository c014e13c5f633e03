"""The public call: what is asked for, and which backend computes it.

A backend is a file with one function, ``forward``, of the same arrays and ``scale``; a kernel also says what it can not
do (``why_not``). Mosaic GPU has none: there XLA gathers the pages.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention import tpu, xla
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.platforms import by_platform

Implementation = Literal["reference", "xla", "tpu"]


def paged_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_MKPH: Float[Array, "M K P H"],
    v_MKPU: Float[Array, "M K P U"] | None,
    pages_BJ: Int[Array, "B J"],
    positions_BJP: Int[Array, "B J P"],
    first_BT: Int[Array, "B T"],
    *,
    scale: float | None = None,
    value_width: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N"]]:
    """softmax(scale q k) v over what each query sees in its row's pages, and the logarithm of the softmax' sum.

    Query t of row b sees the key in slot p of the row's j-th page if there is such a page and
    ``positions[b, j, p] >= first[b, t]``. A query that sees nothing gets 0, and the logarithm -inf: so the result can
    be merged with that over other keys. Work and traffic go with the pages that are there; in XLA, with those of the
    longest row. No gradient.

    Args:
        q_BTNH: queries; heads n = k * (N / K) + g share key/value head k.
        k_MKPH: keys, in M pages of P slots.
        v_MKPU: values; their width U may differ from H. What stands in a page that a row has must be finite. None:
            a key begins with its value (the latent of multi-head latent attention), which is read once.
        pages_BJ: numbers of each row's pages in the order in which they are visited; -1: none.
        positions_BJP: the position that each slot holds; NEVER, or ALWAYS: every query sees it.
        first_BT: the first position that each query sees, at least 0.
        scale: of the scores; None: 1 / sqrt(H).
        value_width: U, where keys begin with values.
        implementation: None: the best one for the platform that the program is compiled for. A named one runs or
            raises; away from its own platform a kernel is interpreted.

    Returns:
        Output and natural logarithm, float32.

    Raises:
        ValueError: shapes that do not go together, or a kernel that can not do what is asked.
    """
    _check(q_BTNH, k_MKPH, v_MKPU, pages_BJ, positions_BJP, first_BT, value_width)
    B, T, N, H = q_BTNH.shape
    U: Any = value_width if v_MKPU is None else v_MKPU.shape[-1]
    options: dict[str, Any] = {"scale": H**-0.5 if scale is None else float(scale), "value_width": U}
    arrays = (q_BTNH, k_MKPH, v_MKPU, pages_BJ, positions_BJP, first_BT)
    if implementation not in (None, "reference", "xla", "tpu"):
        raise ValueError(f"implementation is {implementation!r}; it is None, 'reference', 'xla' or 'tpu'")
    if 0 in (B, T, N, U, *k_MKPH.shape, *pages_BJ.shape):
        return jnp.zeros((B, T, N, U), jnp.float32), jnp.full((B, T, N), -jnp.inf, jnp.float32)
    if implementation == "reference":
        return paged_attention_reference(*arrays, **options)
    if implementation == "xla":
        return xla.forward(*arrays, **options)
    kernel, reason = functools.partial(tpu.forward, **options), tpu.why_not(*arrays, value_width=U)
    if implementation == "tpu":
        if reason is not None:
            raise ValueError(f"implementation 'tpu': {reason}")
        return by_platform(*arrays, tpu=kernel, default=functools.partial(kernel, interpret=True))
    choices: dict[str, Any] = {} if reason is not None else {"tpu": kernel}
    return by_platform(*arrays, **choices, default=functools.partial(xla.forward, **options))


def _check(
    q: Array, k: Array, v: Array | None, pages: Array, positions: Array, first: Array, value_width: int | None
) -> None:
    if (v is None) == (value_width is None):
        raise ValueError("give the values, or value_width where keys begin with them")
    if v is None:
        if not 0 <= (value_width or 0) <= k.shape[-1]:
            raise ValueError(f"value_width is {value_width}; it must be at most the width of keys, {k.shape[-1]}")
        v = k
    shapes = {"q": q, "k": k, "v": v, "pages": pages, "positions": positions, "first": first}
    said = ", ".join(f"{name} {x.shape}" for name, x in shapes.items())
    if [x.ndim for x in shapes.values()] != [4, 4, 4, 2, 3, 2]:
        raise ValueError(f"q, k and v have 4 dimensions, pages 2, positions 3, first 2; the shapes are {said}")
    (B, T, N, H), (M, K, P, _), J = q.shape, k.shape, pages.shape[1]
    if k.shape[3] != H or v.shape[:3] != (M, K, P) or pages.shape != (B, J) or positions.shape != (B, J, P):
        raise ValueError(f"shapes do not go together: {said}")
    if first.shape != (B, T):
        raise ValueError(f"shapes do not go together: {said}")
    if N % max(K, 1):
        raise ValueError(f"q has {N} heads, the pages {K}; the second must divide the first")
