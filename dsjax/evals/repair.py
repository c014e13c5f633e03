"""Repair accuracy: broken functions of held-out files, and the line that a model writes to mend each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsjax.data.prepare import HeldOut
from dsjax.data.structure.errors import Broken, RepairConfig, parsed
from dsjax.data.structure.repair import repair_tokens, repairs
from dsjax.data.structure.stored import scanner
from dsjax.evals.functions import wilson_interval
from dsjax.infer.engine import complete
from dsjax.infer.sampling import SamplingConfig
from dsjax.runs import LoadedModel

LINE_TOKENS = 64  # the most that is written of a line
ROWS = 32


def repair_figures(
    model: LoadedModel, documents: Sequence[HeldOut], *, limit: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Shares of broken functions that the model mends, greedily.

    Args:
        model: trained on repairs (``data.repair``).
        documents: held-out documents.
        limit: functions at most.
        seed: of the errors.

    Returns:
        ``exact``: the line is to the letter what it was; ``parses``: with it the function parses; each with its 95 %
        interval, ``samples``, and ``exact_by_kind`` of error.
    """
    cfg, tokenizer, length = model.config.data.repair or RepairConfig(), model.tokenizer, model.config.data.seq_len
    cases, prompts = list[Broken](), list[list[int]]()
    for case in repairs([document.text for document in documents], cfg, seed):
        tokens, given = repair_tokens(tokenizer, case)
        if given + 1 + LINE_TOKENS <= length and len(cases) < limit:
            cases.append(case)
            prompts.append([tokenizer.end_id, *tokens[:given]])
    lines = _written(model, prompts)
    exact = [line == case.original for case, line in zip(cases, lines, strict=True)]
    good = [parsed(case.mended(_whole(line))) is not None for case, line in zip(cases, lines, strict=True)]
    figures: dict[str, Any] = {"samples": len(cases)}
    if not cases:
        return figures
    for name, found in (("exact", exact), ("parses", good)):
        figures[name], figures[f"{name}_interval"] = sum(found) / len(cases), wilson_interval(sum(found), len(cases))
    return figures | {"exact_by_kind": _by_kind(cases, exact)}


def _written(model: LoadedModel, prompts: list[list[int]]) -> list[str]:
    structure, lines = model.config.model.structure, list[str]()
    first = None if structure is None else scanner(structure.language, model.tokenizer)
    for begin in range(0, len(prompts), ROWS):
        part = prompts[begin : begin + ROWS]
        rows = complete(
            model.graph,
            model.params,
            part,
            end_id=model.tokenizer.end_id,
            max_tokens=LINE_TOKENS,
            max_length=model.config.data.seq_len,
            sampling=SamplingConfig(temperature=0.0),
            scanners=[] if first is None else [first] * len(part),
        )
        lines += [model.tokenizer.decode(row) for row in rows]
    return lines


def _whole(line: str) -> str:
    """A line with its end."""
    return line if line.endswith("\n") else f"{line}\n"


def _by_kind(cases: Sequence[Broken], exact: Sequence[bool]) -> dict[str, tuple[int, int]]:
    """Of each kind of error how many were mended, and how many there were."""
    kinds = sorted({case.kind for case in cases})
    of = {kind: [right for case, right in zip(cases, exact, strict=True) if case.kind == kind] for kind in kinds}
    return {kind: (sum(found), len(found)) for kind, found in of.items()}
