"""The specification of dispatch and combine, in numpy loops."""

from __future__ import annotations

import numpy as np


def dispatch_reference(x_TD: np.ndarray, experts_TX: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all pairs (token, expert) with 0 <= expert < E, by expert, token, choice; and each expert's count."""
    pairs = [
        (expert, token, choice)
        for token, chosen in enumerate(experts_TX)
        for choice, expert in enumerate(chosen)
        if 0 <= expert < num_experts
    ]
    rows = [x_TD[token] for _, token, _ in sorted(pairs)]
    sizes = np.bincount([expert for expert, _, _ in pairs], minlength=num_experts)
    return np.array(rows).reshape(-1, x_TD.shape[1]), sizes


def combine_reference(y_RD: np.ndarray, weights_TX: np.ndarray, experts_TX: np.ndarray, num_experts: int) -> np.ndarray:
    """The weighted sum over each token's pairs of their rows."""
    out = np.zeros((len(weights_TX), y_RD.shape[1]), y_RD.dtype)
    pairs = [
        (expert, token, choice)
        for token, chosen in enumerate(experts_TX)
        for choice, expert in enumerate(chosen)
        if 0 <= expert < num_experts
    ]
    for row, (_, token, choice) in enumerate(sorted(pairs)):
        out[token] += weights_TX[token, choice] * y_RD[row]
    return out
