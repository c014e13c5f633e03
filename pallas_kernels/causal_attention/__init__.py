"""Causal attention within the documents of a packed row."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float, Int

from pallas_kernels.causal_attention.reference import causal_attention_reference
from pallas_kernels.causal_attention.xla import Tiles, causal_attention_xla

__all__ = ["Tiles", "causal_attention", "causal_attention_reference", "causal_attention_xla"]


def causal_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKU: Float[Array, "B T K U"],
    ids_BT: Int[Array, "B T"],
    window: int | None = None,
    *,
    scale: float | None = None,
    closes_BTK: Int[Array, "B T K"] | None = None,
    implementation: Literal["reference", "xla"] | None = None,
) -> Float[Array, "B T N U"]:
    """softmax(scale q k) v over the keys at or before the query, in its document and ``window``.

    Args:
        q_BTNH: queries; heads n = k * (N / K) + g share key/value head k.
        k_BTKH: keys.
        v_BTKU: values; their width U may differ from H.
        ids_BT: document of each position.
        window: positions that a query sees, itself included; None: all.
        scale: of the scores; None: 1 / sqrt(H).
        closes_BTK: the position of the row, behind the key's own, from which on a key is not seen any more; None: all
            are seen to the end.
        implementation: None takes the best one for the backend.
    """
    if implementation == "reference":
        return causal_attention_reference(q_BTNH, k_BTKH, v_BTKU, ids_BT, window, scale, closes_BTK)
    return causal_attention_xla(q_BTNH, k_BTKH, v_BTKU, ids_BT, window, scale, None, closes_BTK)
