"""Scores of written code: the share that parses, the share of tests passed, both in one number, and BLEU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dsjax.config import UserError
from dsjax.data.build.syntax import parsed

SYNTAX_WEIGHT, FUNCTIONAL_WEIGHT = 0.7, 0.3


@dataclasses.dataclass(frozen=True)
class CodeScores:
    """Means over programs, in [0, 1].

    syntax: share that parses as Python and is not empty.
    functional: share of a program's tests that it passes; none if it does not parse or end.
    """

    syntax: float
    functional: float
    num_programs: int

    @property
    def combined_score(self) -> float:
        """0.7 syntax + 0.3 functional."""
        return combined_score(self.syntax, self.functional)


def combined_score(syntax: float, functional: float) -> float:
    """0.7 of the share that parses and 0.3 of the share of tests passed: what parses is worth much already."""
    return SYNTAX_WEIGHT * syntax + FUNCTIONAL_WEIGHT * functional


def parses(code: str) -> bool:
    """Whether a program parses as Python, and is not empty."""
    return bool(code.strip()) and not isinstance(parsed(code), str)


def score(codes: Sequence[str], tests: Sequence[tuple[int, int]]) -> CodeScores:
    """The scores of programs.

    Args:
        codes: whole programs.
        tests: (passed, all) of each.

    Raises:
        UserError: no program, not one pair for each, a pair that is not possible, or a program without a test.
    """
    if not codes or len(codes) != len(tests):
        raise UserError(f"{len(codes)} programs have {len(tests)} results; there must be one for each, at least one")
    for passed, total in tests:
        if not 0 <= passed <= total or not total:
            raise UserError(
                f"{passed} of {total} tests are said to be passed; there must be one at least, no more passed"
            )
    return CodeScores(
        syntax=sum(map(parses, codes)) / len(codes),
        functional=sum(passed / total for passed, total in tests) / len(tests),
        num_programs=len(codes),
    )


def bleu(candidates: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU by sacrebleu with its usual settings (13a, exponential smoothing), in [0, 1].

    Raises:
        UserError: sacrebleu is not there, or not one reference for each candidate.
    """
    check_pairs(candidates, references)
    return _sacrebleu().corpus_bleu(list(candidates), [list(references)]).score / 100


def sentence_bleu(candidate: str, reference: str) -> float:
    """BLEU of one text, of as many orders as it has, in [0, 1]; what sequence-level training takes as a reward."""
    return _sacrebleu().sentence_bleu(candidate, [reference]).score / 100


def check_pairs(candidates: Sequence[str], references: Sequence[str]) -> None:
    """Raises:
    UserError: there is not one reference for each candidate, or there is none at all.
    """
    if not candidates or len(candidates) != len(references):
        raise UserError(
            f"{len(candidates)} candidates are compared with {len(references)} references; there must be one for each,"
            " and at least one"
        )


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise UserError('BLEU needs the package sacrebleu; install the extra: pip install "dsjax[code]"') from None
    return sacrebleu
