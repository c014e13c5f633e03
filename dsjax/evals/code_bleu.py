"""CodeBLEU (Ren et al. 2020): how much of a reference program is in a candidate, as text, as a tree and as data flow.

    score = 0.25 ngram + 0.25 weighted_ngram + 0.25 syntax + 0.25 dataflow

    ngram           BLEU of code tokens, 1- to 4-grams
    weighted_ngram  the same, with keywords counting five times as much as other tokens among the 1-grams
    syntax          share of the reference's subtrees that the candidate has, each as often
    dataflow        share of the reference's edges of data flow that the candidate has, variables renamed to fit

All are counted over the corpus. A component for which the references have nothing to match (no data flow) is left out,
and the others share its weight. docs/tasks.md says in what this differs from the published programs, and why.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
from collections import Counter
from collections.abc import Sequence

from dsjax.config import UserError
from dsjax.evals.code_flow import Edge, data_flow
from dsjax.evals.code_scores import check_pairs
from dsjax.evals.code_trees import Node, parse, shapes, tokens

ORDERS = 4
KEYWORD_WEIGHT = 5.0
WEIGHTS = (0.25, 0.25, 0.25, 0.25)
_KEYWORDS = frozenset((*keyword.kwlist, "match", "case"))
_SMOOTHING = 0.1  # matches, where an order has none (Chen & Cherry 2014, method 1)


@dataclasses.dataclass(frozen=True)
class CodeBleu:
    """The score and its components, in [0, 1]; None where the references have nothing to match."""

    score: float
    ngram: float
    weighted_ngram: float
    syntax: float | None
    dataflow: float | None


def code_bleu(
    candidates: Sequence[str], references: Sequence[str], weights: tuple[float, float, float, float] = WEIGHTS
) -> CodeBleu:
    """CodeBLEU of Python programs, whole or broken.

    Args:
        candidates: what was written.
        references: one for each.
        weights: of the four components, not negative, not all zero.

    Raises:
        UserError: not one reference for each candidate, a reference without code, bad weights, no tree-sitter.
    """
    check_pairs(candidates, references)
    if min(weights) < 0 or not sum(weights) > 0:
        raise UserError(f"the weights are {weights}; they must be at least 0, and not all 0")
    pairs = [(parse(candidate), parse(reference)) for candidate, reference in zip(candidates, references, strict=True)]
    texts = [(tokens(a), tokens(b)) for a, b in pairs]
    if not all(reference for _, reference in texts):
        raise UserError("a reference holds no code; CodeBLEU compares with what there is in it")
    parts = (
        _bleu(texts, 1.0),
        _bleu(texts, KEYWORD_WEIGHT),
        _share(_matched_shapes(pairs)),
        _share([_matched_flow(a, b) for a, b in pairs]),
    )
    counted = [(weight, part) for weight, part in zip(weights, parts, strict=True) if part is not None and weight > 0]
    total = sum(weight for weight, _ in counted)
    score = sum(weight * part for weight, part in counted) / total if total else 0.0
    return CodeBleu(score, *parts)


def _bleu(texts: Sequence[tuple[list[str], list[str]]], keyword_weight: float) -> float:
    """BLEU (Papineni et al. 2002) over a corpus; 1-grams that are keywords count ``keyword_weight`` times.

    Orders that no reference is long enough for are left out, so that what is equal to its reference has 1.
    """
    logarithms = []
    for order in range(1, ORDERS + 1):
        matched = total = longest = 0.0
        for candidate, reference in texts:
            ours, theirs = _ngrams(candidate, order), _ngrams(reference, order)
            for gram, count in ours.items():
                weight = keyword_weight if order == 1 and gram[0] in _KEYWORDS else 1.0
                matched += weight * min(count, theirs[gram])
                total += weight * count
            longest = max(longest, len(reference))
        if longest >= order:
            logarithms.append(math.log((matched or _SMOOTHING) / max(total, 1.0)))
    lengths = [sum(map(len, side)) for side in zip(*texts, strict=True)]
    if not lengths[0]:
        return 0.0
    brevity = min(1.0, math.exp(1 - lengths[1] / lengths[0]))
    return brevity * math.exp(sum(logarithms) / len(logarithms))


def _ngrams(sequence: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(sequence[i : i + order]) for i in range(len(sequence) - order + 1))


def _share(counts: Sequence[tuple[int, int]]) -> float | None:
    """Matched of all, over the corpus; None of nothing."""
    matched, total = (sum(side) for side in zip(*counts, strict=True))
    return matched / total if total else None


def _matched_shapes(pairs: Sequence[tuple[Node, Node]]) -> list[tuple[int, int]]:
    known: dict = {}
    counts = [(shapes(a, known), shapes(b, known)) for a, b in pairs]
    return [((ours & theirs).total(), theirs.total()) for ours, theirs in counts]


def _matched_flow(candidate: Node, reference: Node) -> tuple[int, int]:
    """Edges matched under the better of two ways to make the candidate's variables those of the reference.

    Both in order of their definition, which is right if all were renamed; or equal names first, and the rest in order,
    which is right if the candidate defines another variable in front.
    """
    ours, our_names = data_flow(candidate)
    theirs, their_names = data_flow(reference)
    same = [name for name in our_names if name in their_names]
    rest = [name for name in our_names if name not in same], [name for name in their_names if name not in same]
    renamings = (
        dict(zip(our_names, their_names, strict=False)),
        dict(zip(same, same, strict=True)) | dict(zip(*rest, strict=False)),
    )
    return max((_renamed(ours, names) & theirs).total() for names in renamings), theirs.total()


def _renamed(edges: Counter[Edge], names: dict[str, str]) -> Counter[Edge]:
    """The edges whose variables all have a counterpart."""
    found: Counter[Edge] = Counter()
    for edge, count in edges.items():
        if edge.target in names and edge.source in names:
            found[Edge(names[edge.target], edge.relation, names[edge.source])] += count
    return found
