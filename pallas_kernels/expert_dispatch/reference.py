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


@np.errstate(invalid="ignore", over="ignore")  # of infinities
def top_k_reference(
    scores_TE: np.ndarray,
    top_k: int,
    *,
    bias_E: np.ndarray | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    counted_T: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Experts, scores, positions and counts of :class:`pallas_kernels.expert_dispatch.Choice`, token by token."""
    T, E = scores_TE.shape
    experts, scores = np.full((T, top_k), E), np.zeros((T, top_k), scores_TE.dtype)
    position, counts = np.zeros((T, top_k), int), np.zeros(E, int)
    for t in range(T):
        if counted_T is not None and not counted_T[t]:
            continue
        choice = scores_TE[t] if bias_E is None else scores_TE[t] + bias_E
        choice = np.where(np.isnan(choice), -np.inf, choice)
        groups = np.split(choice, num_groups)
        judged = np.array([np.sort(g)[::-1][: 2 if group_score == "top2" else 1].sum() for g in groups])
        kept = np.argsort(-np.where(np.isnan(judged), -np.inf, judged), kind="stable")[:top_groups]
        allowed = [e for e in range(E) if e // (E // num_groups) in kept]
        for x, e in enumerate(sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]):
            experts[t, x], scores[t, x], position[t, x] = e, scores_TE[t, e], counts[e]
            counts[e] += 1
    return experts, scores, position, counts
