"""Which file computes what.

A backend is a file with four functions and a word on what it can do (``why_not(function, *arrays, **static)``: None, or
the reason in a sentence). R in ``row_TX`` means nowhere; what stands there reads as 0.

    select(choice_TE, counted_T, spec) -> (experts_TX, position_TX, counts_E)
        ``choice_TE`` is float32 without NaN and without -0, ``spec`` a TopK; see :class:`Choice` for the results.
    gather(x_TD, token_R, weight_R) -> x_RD
        Row r is ``weight_R[r] * x_TD[token_R[r]]``; None: weights are 1. Tokens are in range.
    gather_sum(y_RD, row_TX, weights_TX) -> out_TD
        ``sum_x weights_TX[t, x] * y_RD[row_TX[t, x]]``, summed in float32, in the order of x; None: weights are 1.
        What stands in a row that no pair has may be NaN; weights of pairs that go nowhere are 0.
    gather_dot(y_RD, row_TX, dout_TD) -> dot_TX, float32
        ``y_RD[row_TX[t, x]] . dout_TD[t]``.

No array that they get is empty. The kernels take ``interpret`` beside these: True, or the parameters of a simulator.
GPUs have no kernel: ``gpu`` has the word alone, and says why of each function.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, Literal

import jax.numpy as jnp

from pallas_kernels.expert_dispatch import gpu, reference, tpu, xla
from pallas_kernels.platforms import by_platform

Implementation = Literal["reference", "xla", "tpu", "gpu"]
_PLAIN: dict[str, ModuleType] = {"reference": reference, "xla": xla}
_KERNELS: dict[str, tuple[str, ModuleType]] = {"tpu": ("tpu", tpu), "gpu": ("cuda", gpu)}
# What there is where an array is empty.
_OF_NOTHING = {
    "select": lambda choice_TE, _, spec: (
        *(jnp.zeros((choice_TE.shape[0], spec.top_k), jnp.int32) for _ in range(2)),
        jnp.zeros(choice_TE.shape[1], jnp.int32),
    ),
    "gather": lambda x_TD, token_R, _: jnp.zeros((token_R.shape[0], x_TD.shape[1]), x_TD.dtype),
    "gather_sum": lambda y_RD, row_TX, _: jnp.zeros((row_TX.shape[0], y_RD.shape[1]), y_RD.dtype),
    "gather_dot": lambda _, row_TX, dout_TD: jnp.zeros(row_TX.shape, jnp.float32),
}


def run(implementation: Implementation | None, function: str, *arrays: Any, **static: Any) -> Any:
    """``function`` of the backend that is asked for, or of the best one for the platform that is compiled for.

    Raises:
        ValueError: there is no such implementation, or it can not do what is asked.
    """

    def of(backend: ModuleType, **more: Any) -> Any:
        return functools.partial(getattr(backend, function), **static, **more)

    if implementation not in (names := (None, *_PLAIN, *_KERNELS)):
        raise ValueError(f"implementation is {implementation!r}; it is one of {', '.join(map(repr, names))}")
    if any(0 in a.shape for a in arrays if a is not None):
        return _OF_NOTHING[function](*arrays, **static)
    if implementation in _PLAIN:
        return of(_PLAIN[implementation])(*arrays)
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
