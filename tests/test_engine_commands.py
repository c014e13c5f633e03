"""What commands make of a run whose model is told the structure of its text: generate, programs, repairs."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from small_runs import ATTENTION, changed, home, small
from structure_cases import library

import dsjax
from dsjax.cli import main
from dsjax.config import UserError
from dsjax.data.prepare import prepare
from dsjax.data.structure.errors import BROKEN, REPAIR, RepairConfig
from dsjax.data.structure.repair import repair_tokens, repairs
from dsjax.data.structure.stored import scanner
from dsjax.evals import repair
from dsjax.evals.repair import evaluate_repair
from dsjax.evals.written_programs import WrittenPrograms, problems_of, written_programs
from dsjax.infer.engine import complete
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import LayerGroup
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.structure import StructureConfig
from dsjax.runs import RunFolder, cache_dir, load_model
from dsjax.train.pretrain import run as train


@pytest.fixture(scope="module")
def run() -> pathlib.Path:
    """Trained on repairs, too; rows of 160 tokens."""
    code, folder = home() / "code", home() / "structured"
    code.mkdir()
    for number, (_, content) in enumerate(library(20, 15_000)):
        (code / f"{number:02}.py").write_bytes(content)
    config = changed(
        small(str(code)),
        data={"special_tokens": (BROKEN, REPAIR), "repair": RepairConfig(), "seq_len": 160, "vocab_size": 400},
        train={"steps": 4},
    )
    group = LayerGroup(MLPConfig(d_ff=16), dataclasses.replace(ATTENTION, scope_heads=1))
    model = dataclasses.replace(
        config.model, vocab_size=400, groups=(group,), structure=StructureConfig(pointers=("name",))
    )
    assert train(dataclasses.replace(config, model=model), folder, quiet=True) == 0
    return folder


def answer(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words])
    assert stop.value.code == 0


def test_a_model_with_structure_generates_freely_and_within_the_grammar(
    run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "def f(x):\n    return (", "--n", "3", "--max-tokens", "40", "--json", "--quiet"]
    found = {}
    for grammar in ("", "python"):
        answer("generate", str(run), *options, "--grammar", grammar)
        found[grammar] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert sorted(sample["sample"] for sample in found[grammar]) == [0, 1, 2]
    ended = [sample for sample in found["python"] if sample["finish"] == "end"]
    assert ended
    for sample in ended:
        ast.parse("def f(x):\n    return (" + sample["text"])


def test_programs_are_written_within_the_grammar_also_behind_prompts_that_are_cut(run: pathlib.Path) -> None:
    model, cfg = dsjax.load(run), WrittenPrograms("tasks", k=(2,), limit=3, max_tokens=80, grammar=True)
    problems = [asked.problem for asked in problems_of(cfg)]
    assert model.tokenizer is not None
    assert max(len(model.tokenizer.encode(p.prefix)) for p in problems) > 80  # the model sees the last 80 alone
    written = list(written_programs(model, problems, cfg))
    codes = [code for of_one in written for code in of_one]
    assert len(codes) == 6
    parsed = [code for code in codes if not isinstance(_parsed(code), SyntaxError)]
    assert len(parsed) >= 4  # an untrained model: the rest ran out of tokens and lost the last line


def _parsed(code: str) -> Any:
    try:
        return ast.parse(code)
    except SyntaxError as error:
        return error


def test_repairs_are_counted(run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for _ in range(2):
        answer("eval", str(run), "--task", "repair", "--limit", "7", "--quiet")
        found.append(json.loads((run / "repair.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["samples"] == 7 == sum(n for _, n in found[0]["exact_by_kind"].values())
    assert found[0]["exact"] <= found[0]["parses"] <= 1
    assert "# repair: 7 broken functions of held-out files" in capsys.readouterr().out


def test_the_lines_are_those_of_generation_in_batches(run: pathlib.Path) -> None:
    model = load_model(RunFolder(run))
    held_out = prepare(model.config.data, cache_dir() / "data").held_out
    cases = itertools.islice(repairs([document.text for document in held_out], RepairConfig(), 0), 20)
    both = [repair_tokens(model.tokenizer, case) for case in cases]
    prompts = [[model.tokenizer.end_id, *tokens[:given]] for tokens, given in both if given < 80][:5]
    rows = complete(
        model.graph, model.params, prompts, end_id=model.tokenizer.end_id, max_tokens=repair.LINE_TOKENS,
        max_length=160, sampling=SamplingConfig(temperature=0.0),
        scanners=[scanner("python", model.tokenizer)] * len(prompts),
    )  # fmt: skip
    assert prompts
    assert repair._written(model, prompts) == [model.tokenizer.decode(row) for row in rows]
    assert any(np.ptp(row) for row in rows)


def test_what_no_repairs_can_be_asked_of_is_told(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert train(small(), home() / "no_repairs", quiet=True) == 0
    with pytest.raises(UserError, match=r"was not trained on repairs: its tokenizer has no token '<\|broken\|>'"):
        evaluate_repair(home() / "no_repairs")
    with pytest.raises(UserError, match="--limit is -1; it must be at least 0"):
        evaluate_repair(run, limit=-1)
    with pytest.raises(UserError, match=r"--output is .*; there is no folder"):
        evaluate_repair(run, output=tmp_path / "none" / "x.json")
    with pytest.raises(UserError, match=r"checkpoint|no run|config\.json"):
        evaluate_repair(tmp_path)
