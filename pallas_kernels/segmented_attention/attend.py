"""The public call: what is asked for, which backend computes it, and one gradient for all of them.

A backend is a file with four functions and a word on what it can do. Over whole rows, all tails seen:

    forward(q_BTNH, k_BTKH, v_BTKU, ids_BT, segments, scale) -> (out_BTNU, log_BTN)
    backward(q, k, v, ids, out, log, dout, segments, scale) -> (dq, dk, dv), like q, k, v

and over rows gathered by the segment that they look at (:mod:`pallas_kernels.segmented_attention.selection`):

    forward_rows(q_BKRGH, ids_BKR, segment_BKI, k_BKJwH, v_BKJwU, ids_BJw, scale) -> (out_BKRGU, log_BKRG), float32
    backward_rows(q, ids, segment, k, v, tail_ids, log, along_BKRG, dout_BKRGU, scale) -> (dq, dk, dv), float32

``log`` is the natural logarithm of the sum of exp(scaled score), float32, and ``along`` the sum of dout * out of a
query. ``ids_BT`` is None for one document. Documents are compared by id alone: padding sees padding, so what stands
there is finite; it is replaced here. Rows of a block whose segment is -1 hold nothing, and what comes out of them is
not read.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.platforms import by_platform
from pallas_kernels.segmented_attention import gpu, tpu, xla
from pallas_kernels.segmented_attention.far import Tails, add_before, add_chosen, chosen_gradients, gradients_before
from pallas_kernels.segmented_attention.reference import segmented_attention_reference
from pallas_kernels.segmented_attention.segments import Segments
from pallas_kernels.segmented_attention.selection import tails

Backend = Literal["xla", "tpu", "gpu"]
Implementation = Literal["reference", Backend]


def segmented_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    *,
    segment_size: int,
    window: int | None = None,
    shift: int = 0,
    top_segments: int | None = None,
    documents: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N U"]:
    """softmax(scale q k) v over a query's own segment (causal) and the last positions of each earlier segment.

    Position t of a row lies in segment ``(t + shift) // segment_size``; see :class:`Segments`. Differentiable in q, k
    and v, once. Within `jax.shard_map` with `check_vma=False`. Cost and memory: docs/segmented_attention.md.

    Args:
        q_BTNH: queries; heads n = k * (N / K) + g share key/value head k.
        k_BTKH: keys.
        v_BTKU: values; their width U may differ from H.
        segment_size: W.
        window: w, the positions at the end of a segment that later ones see; None: half of it.
        shift: moves the cuts towards the start; counted modulo ``segment_size``.
        top_segments: of the earlier segments, look at the first, the previous and this many best; None: at all.
        documents: id of each position's document, from 1; nothing is seen across documents, and 0 is padding, whose
            output is 0. With ``top_segments`` a document is a run of neighbours. None: each row is one document.
        scale: of the scores; None: 1 / sqrt(H).
        implementation: None: the best one for the platform that the program is compiled for. A named one runs or
            raises; away from its own platform a kernel is interpreted.

    Raises:
        ValueError: sizes out of range, arrays that do not go together, or a kernel that can not do what is asked.
    """
    B, T, N, H, U = sizes(q_BTNH, k_BTKH, v_BTKU, documents)
    W, window = operator.index(segment_size), operator.index(segment_size // 2 if window is None else window)
    top = None if top_segments is None else operator.index(top_segments)
    segments = Segments(W, window, operator.index(shift) % max(W, 1), top)
    scale = H**-0.5 if scale is None else float(scale)
    check_name(implementation, get_args(Implementation))
    if 0 in (B, T, N, U):
        return jnp.zeros((B, T, N, U), q_BTNH.dtype)
    segments = without_choice(segments, T).within(-(-T // gpu.TILE) * gpu.TILE)  # the GPU's take whole tiles
    if implementation == "reference":
        ids_BT = jnp.ones((B, T), jnp.int32) if documents is None else documents
        return segmented_attention_reference(q_BTNH, k_BTKH, v_BTKU, ids_BT, segments, scale)
    if segments.top is None:
        return attend(q_BTNH, k_BTKH, v_BTKU, documents, None, segments, scale, implementation)
    documents = jnp.ones((B, T), jnp.int32) if documents is None else documents
    k_BJwKH, v_BJwKU, ids_BJw = (tails(x, segments) for x in (k_BTKH, v_BTKU, documents))
    behind = Tails(k_BJwKH, v_BJwKU, ids_BJw, before=jnp.int32(0))
    return attend(q_BTNH, k_BTKH, v_BTKU, documents, behind, segments, scale, implementation)


def check_name(implementation: str | None, names: tuple[str, ...]) -> None:
    """ValueError if it is neither None nor one of the names."""
    if implementation not in (None, *names):
        known = ", ".join(map(repr, names[:-1]))
        raise ValueError(f"implementation is {implementation!r}; it is None, {known} or {names[-1]!r}")


def without_choice(segments: Segments, length: int) -> Segments:
    """No ``top`` where it is all segments that ``length`` positions have; they are seen whatever the documents."""
    if segments.top is not None and (segments.window == 0 or segments.top + 2 >= segments.count(length) - 1):
        return dataclasses.replace(segments, top=None)
    return segments


def sizes(q_BTNH: Any, k_BTKH: Any, v_BTKU: Any, documents: Any) -> tuple[int, int, int, int, int]:
    """B, T, N, H and U of arrays that go together; else ValueError."""
    given = {"q": q_BTNH, "k": k_BTKH, "v": v_BTKU} | ({} if documents is None else {"documents": documents})
    for name, x in given.items():
        if not hasattr(x, "dtype"):
            raise ValueError(f"{name} is a {type(x).__name__}; it must be an array")
        kind = jax.dtypes.canonicalize_dtype(x.dtype)
        if name != "documents" and (not jnp.issubdtype(kind, jnp.floating) or kind == jnp.float64):
            raise ValueError(f"{name} is {x.dtype}; it must be floating point, as bfloat16 or float32")
    shapes = [x.shape for x in given.values()]
    if [len(shape) for shape in shapes] != [4, 4, 4, 2][: len(shapes)]:
        raise ValueError(f"q, k and v have 4 dimensions, documents 2; their shapes are {', '.join(map(str, shapes))}")
    (B, T, N, H), K, U = shapes[0], shapes[1][2], shapes[2][3]
    if shapes[1:] != [(B, T, K, H), (B, T, K, U), (B, T)][: len(shapes) - 1]:
        raise ValueError(f"shapes do not go together: q, k, v and documents are {', '.join(map(str, shapes))}")
    if H == 0 or K == 0 or N % K:
        raise ValueError(f"q has {N} heads, k and v {K}, of width {H}; the second must divide the first, and none be 0")
    if documents is not None and not jnp.issubdtype(documents.dtype, jnp.integer) and documents.dtype != bool:
        raise ValueError(f"documents are {documents.dtype}; they must be whole numbers")
    return B, T, N, H, U


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    ids_BT: Int[Array, "B T"] | None,
    tails: Tails | None,
    segments: Segments,
    scale: float,
    implementation: Backend | None,
) -> Float[Array, "B T N U"]:
    """Rows, and what they see through gathered tails: the chosen ones with ``top``, else those before the row."""
    return _forward(q_BTNH, k_BTKH, v_BTKU, ids_BT, tails, segments, scale, implementation)[0]


def _own(segments: Segments) -> Segments:
    """What is seen in the row itself."""
    return segments if segments.top is None else dataclasses.replace(segments, window=0, top=None)


@jax.custom_jvp
def _once(*arrays):
    """The same; what is differentiated again says that it can not be, where kernels and loops would not say why."""
    return arrays


@_once.defjvp
def _once_more(arrays, tangents):
    raise NotImplementedError("segmented_attention has a first derivative in reverse mode, and no other")


def _forward(q_BTNH, k_BTKH, v_BTKU, ids_BT, tails, segments, scale, implementation):
    q_BTNH, k_BTKH, v_BTKU = _once(q_BTNH, k_BTKH, v_BTKU)
    run = functools.partial(_run, implementation, scale=scale)
    out_BTNU, log_BTN = run("forward", q_BTNH, k_BTKH, v_BTKU, ids_BT, segments=_own(segments))
    if tails is not None:
        assert ids_BT is not None
        if segments.top is None:
            out_BTNU, log_BTN = add_before(run, q_BTNH, ids_BT, tails, out_BTNU, log_BTN)
        else:
            out_BTNU, log_BTN = add_chosen(run, q_BTNH, ids_BT, tails, segments, out_BTNU, log_BTN)
    if ids_BT is not None:
        out_BTNU = jnp.where((ids_BT > 0)[:, :, None, None], out_BTNU, 0)
    return out_BTNU, (q_BTNH, k_BTKH, v_BTKU, ids_BT, tails, out_BTNU, log_BTN)


def _backward(segments, scale, implementation, saved, dout_BTNU):
    q_BTNH, k_BTKH, v_BTKU, ids_BT, tails, out_BTNU, log_BTN = saved
    run = functools.partial(_run, implementation, scale=scale)
    if ids_BT is not None:
        dout_BTNU = jnp.where((ids_BT > 0)[:, :, None, None], dout_BTNU, 0)
    arrays = (q_BTNH, k_BTKH, v_BTKU, ids_BT, out_BTNU, log_BTN, dout_BTNU)
    dq_BTNH, dk_BTKH, dv_BTKU = run("backward", *arrays, segments=_own(segments))
    if tails is None:
        return dq_BTNH, dk_BTKH, dv_BTKU, None, None
    along_BTN = jnp.sum(dout_BTNU.astype(jnp.float32) * out_BTNU.astype(jnp.float32), axis=-1)
    if segments.top is None:
        more, dk, dv = gradients_before(run, q_BTNH, ids_BT, tails, log_BTN, along_BTN, dout_BTNU)
    else:
        more, dk, dv = chosen_gradients(run, q_BTNH, ids_BT, tails, segments, log_BTN, along_BTN, dout_BTNU)
    dq_BTNH = (dq_BTNH.astype(jnp.float32) + more).astype(dq_BTNH.dtype)
    dtails = Tails(dk.astype(tails.k_BJwKH.dtype), dv.astype(tails.v_BJwKU.dtype), None, None)
    return dq_BTNH, dk_BTKH, dv_BTKU, None, dtails


attend.defvjp(_forward, _backward)


def _run(implementation: Backend | None, function: str, *arrays: Any, **static: Any) -> Any:
    """``function`` of the backend that is asked for, or of the best one for the platform that is compiled for."""

    def of(backend: ModuleType, **more: Any) -> Any:
        return functools.partial(getattr(backend, function), **static, **more)

    if implementation == "xla":
        return of(xla)(*arrays)
    kernels = {"tpu": ("tpu", tpu), "gpu": ("cuda", gpu)}
    if implementation is not None:
        platform, backend = kernels[implementation]
        if (reason := backend.why_not(function, *arrays, **static)) is not None:
            raise ValueError(f"implementation {implementation!r}: {reason}")
        return by_platform(*arrays, **{platform: of(backend)}, default=of(backend, interpret=True))
    choices = {"default": of(xla)}
    for platform, backend in kernels.values():
        if backend.why_not(function, *arrays, **static) is None:
            choices[platform] = of(backend)
    return by_platform(*arrays, **choices)
