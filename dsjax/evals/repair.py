"""Repair accuracy: broken functions of held-out files, and the line that a model writes to mend each."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from dsjax.config import UserError
from dsjax.data.prepare import HeldOut, prepare
from dsjax.data.structure.errors import BROKEN, REPAIR, Broken, RepairConfig, parsed
from dsjax.data.structure.repair import repair_tokens, repairs
from dsjax.evals.functions import wilson_interval
from dsjax.infer.batching import Engine
from dsjax.infer.requests import Request
from dsjax.infer.sampling import SamplingConfig
from dsjax.metrics import write_atomic
from dsjax.runs import LoadedModel, RunFolder, cache_dir, load_model

LINE_TOKENS = 64  # the most that is written of a line
ROWS = 32
NUM_FUNCTIONS = 200  # if not said


def evaluate_repair(
    folder: pathlib.Path, *, limit: int = 0, seed: int = 0, output: pathlib.Path | None = None
) -> dict[str, Any]:
    """``dsjax eval RUN --task repair``: prints the figures of a run, and writes them into its folder or to ``output``.

    Raises:
        UserError: no run, no checkpoint; it knows no repairs, or its held-out files have no function to break.
    """
    if limit < 0:
        raise UserError(f"--limit is {limit}; it must be at least 0")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output is {output}; there is no folder {output.parent}")
    model = load_model(RunFolder(folder))
    if not {BROKEN, REPAIR} <= set(model.tokenizer.special_ids):
        raise UserError(f"{folder} was not trained on repairs: its tokenizer has no token {BROKEN!r} (see data.repair)")
    corpus = prepare(model.config.data, cache_dir() / "data")
    if corpus.tokenizer.to_json() != model.tokenizer.to_json():
        raise UserError(f"the data of {folder} changed since it was trained: its tokenizer is another one now")
    figures = repair_figures(model, corpus.held_out, limit=limit or NUM_FUNCTIONS, seed=seed)
    if not figures["samples"]:
        raise UserError(f"no function of the held-out files of {folder} can be broken within data.seq_len tokens")
    print(markdown(figures))
    write_atomic(output or folder / "repair.json", json.dumps(figures, indent=1) + "\n")
    return figures


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
    if not prompts:
        return []
    engine = Engine(
        model.graph,
        model.params,
        end_ids=[model.tokenizer.end_id],
        max_length=model.config.data.seq_len,
        batch_size=min(ROWS, len(prompts)),
        tokenizer=model.tokenizer,
    )
    numbers = [engine.submit(Request(prompt, LINE_TOKENS, SamplingConfig(temperature=0.0))) for prompt in prompts]
    got = engine.run()
    return [got[number][0].text for number in numbers]


def markdown(figures: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"# repair: {figures['samples']} broken functions of held-out files", "", "| | |", "|---|---|"]
    for text, name in (("the line is what it was", "exact"), ("the function parses with it", "parses")):
        low, high = figures[f"{name}_interval"]
        lines.append(f"| {text} | {figures[name]:.1%} ({low:.1%} to {high:.1%}) |")
    lines += ["", "| error | functions | the line is what it was |", "|---|---|---|"]
    lines += [f"| {kind} | {n} | {mended / n:.1%} |" for kind, (mended, n) in figures["exact_by_kind"].items()]
    return "\n".join(lines) + "\n"


def _whole(line: str) -> str:
    """A line with its end."""
    return line if line.endswith("\n") else f"{line}\n"


def _by_kind(cases: Sequence[Broken], exact: Sequence[bool]) -> dict[str, tuple[int, int]]:
    """Of each kind of error how many were mended, and how many there were."""
    kinds = sorted({case.kind for case in cases})
    of = {kind: [right for case, right in zip(cases, exact, strict=True) if case.kind == kind] for kind in kinds}
    return {kind: (sum(found), len(found)) for kind, found in of.items()}
