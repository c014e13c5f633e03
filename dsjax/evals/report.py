"""``dsjax eval``: held-out bits per byte beside xz and a 5-gram, sampled function bodies; report.md, report.json."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dsjax.config import UserError
from dsjax.data.prepare import Corpus, HeldOut
from dsjax.data.structure.stored import prepared, scanner
from dsjax.evals.bits import bits_per_byte, document_bits
from dsjax.evals.compressors import xz_bits
from dsjax.evals.functions import FunctionPrompt, function_prompts, parses, wilson_interval
from dsjax.evals.ngram import KneserNey
from dsjax.infer.engine import complete, heal
from dsjax.infer.sampling import SamplingConfig
from dsjax.metrics import Progress, plot_loss, read_metrics, write_atomic
from dsjax.rl.completions import cut_body
from dsjax.runs import LoadedModel, RunFolder, cache_dir, load_model

NGRAM_ORDER = 5
BODY_TOKENS = 96  # the most that is sampled of a body
SHOWN_SAMPLES = 3
SAMPLING = SamplingConfig(temperature=0.6, top_p=0.95)


def evaluate_run(folder: pathlib.Path, *, num_samples: int = 64, quiet: bool = False) -> dict[str, Any]:
    """Evaluates the latest checkpoint of a run; prints the report and writes it into the run folder.

    Raises:
        UserError: no run, no checkpoint, or the data is not what the run was trained on.
    """
    begin = time.perf_counter()
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    run = RunFolder(folder)
    model = load_model(run)
    corpus = prepared(model.config.data, model.config.model.structure, cache_dir() / "data", progress=say)
    if corpus.tokenizer.to_json() != model.tokenizer.to_json():
        raise UserError(f"the data of {folder} changed since it was trained: its tokenizer is another one now")
    if changes := run.changed_data(corpus):
        raise UserError(f"the data of {folder} changed since it was trained: {changes}")

    say("scoring held-out documents with the model, the 5-gram and xz")
    with Progress(1, label="scoring", every=50, quiet=quiet) as progress:
        bits = document_bits(
            model.graph,
            model.params,
            corpus.held_out,
            seq_len=model.config.data.seq_len,
            end_id=corpus.tokenizer.end_id,
            progress=progress.update,
        )
    tokens, offsets = corpus.training_documents()
    ngram = KneserNey.fit(
        tokens, offsets, order=NGRAM_ORDER, vocab_size=corpus.tokenizer.vocab_size, end_id=corpus.tokenizer.end_id
    )
    ngram_bits = np.array([ngram.bits(d.ids).sum() for d in corpus.held_out])
    compressed = np.array(xz_bits(d.text for d in corpus.held_out), np.float64)

    say(f"sampling {num_samples} function bodies")
    prompts = function_prompts(corpus.held_out, num_samples)
    bodies = sample_bodies(model, prompts) if prompts else []
    report = _figures(model, corpus, bits, ngram_bits, compressed)
    report |= _parse_figures(model, prompts, bodies, ngram)
    records = list(read_metrics(run.metrics))
    report |= _training_figures(records, time.perf_counter() - begin)
    report["samples"] = [
        {"name": prompt.name, "prompt": prompt.head, "body": body}
        for prompt, (body, _) in list(zip(prompts, bodies, strict=True))[:SHOWN_SAMPLES]
    ]
    write_atomic(folder / "report.json", json.dumps(report, indent=1) + "\n")
    text = markdown(report, run.name)
    write_atomic(folder / "report.md", text)
    names = {"xz -9e, all files": "xz_", "5-gram, all files": "ngram_", "model at the end, all files": ""}
    levels = {name: report[f"{key}bits_per_byte"] for name, key in names.items()}
    plot_loss(records, folder / "loss.png", title=run.name, lines=levels)
    print(text)
    return report


def _figures(
    model: LoadedModel, corpus: Corpus, bits: np.ndarray, ngram_bits: np.ndarray, compressed: np.ndarray
) -> dict[str, Any]:
    documents = corpus.held_out
    figures: dict[str, Any] = {
        "step": model.step,
        "num_params": model.config.model.num_params(),
        "vocab_size": corpus.tokenizer.vocab_size,
        "held_out_documents": len(documents),
        "held_out_bytes": sum(d.num_bytes for d in documents),
    }
    for name, values in (("", bits), ("ngram_", ngram_bits), ("xz_", compressed)):
        value, half = bits_per_byte(values, documents)
        figures |= {f"{name}bits_per_byte": value, f"{name}bits_per_byte_half_interval": half}
    gain, half = _paired_gain(bits, ngram_bits, documents)
    return figures | {"gain_over_ngram": gain, "gain_over_ngram_half_interval": half}


def _paired_gain(bits: np.ndarray, baseline: np.ndarray, documents: tuple[HeldOut, ...]) -> tuple[float, float]:
    """1 - bits / baseline bits, and the half-width of its 95 % interval over documents (bootstrap, paired)."""
    picks = np.random.default_rng(0).integers(0, len(documents), (1000, len(documents)))
    low, high = np.percentile(1 - bits[picks].sum(1) / baseline[picks].sum(1), [2.5, 97.5])
    return float(1 - bits.sum() / baseline.sum()), float((high - low) / 2)


def sample_bodies(model: LoadedModel, prompts: list[FunctionPrompt], batch_size: int = 32) -> list[tuple[str, bool]]:
    """For each prompt the body that the model writes, and whether it is finished."""
    tokenizer, length, structure = model.tokenizer, model.config.data.seq_len, model.config.model.structure
    new = min(BODY_TOKENS, length // 2)
    at_start = None if structure is None else scanner(structure.language, tokenizer)
    bodies = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        whole = [_context_ids(tokenizer, p.context) for p in part]
        ids = [tokens[-(length - new - 1) :] for tokens in whole]
        scanners = [] if at_start is None else [at_start.copy() for _ in part]
        for own, tokens, kept in zip(scanners, whole, ids, strict=False):
            own.scan(tokens[: len(tokens) - len(kept)])
        healed, first_tokens = zip(*(heal(tokenizer, i) for i in ids), strict=True)
        rows = complete(
            model.graph,
            model.params,
            healed,
            max_tokens=new,
            end_id=tokenizer.end_id,
            max_length=length,
            sampling=SAMPLING,
            seed=first,
            first_tokens=first_tokens,
            scanners=scanners,
        )
        for prompt, tokens, row in zip(part, whole, rows, strict=True):
            text = tokenizer.decode(row, behind=tokens[:-1])[len(tokenizer.decode(tokens[-1:], behind=tokens[:-1])) :]
            bodies.append(cut_body(text, prompt.indent, ended=len(row) < new))
    return bodies


def _context_ids(tokenizer: Any, context: str) -> list[int]:
    return [tokenizer.end_id, *tokenizer.encode(context).tolist()]


def _parse_figures(
    model: LoadedModel, prompts: list[FunctionPrompt], bodies: list[tuple[str, bool]], ngram: KneserNey
) -> dict[str, Any]:
    """Share of bodies that parse: the model's, the 5-gram's, and the real ones cut at the same length."""
    if not prompts:
        return {"parse_share": None, "parse_samples": 0}
    tokenizer, new = model.tokenizer, min(BODY_TOKENS, model.config.data.seq_len // 2)
    rng = np.random.default_rng(0)

    def ngram_body(prompt: FunctionPrompt) -> str:
        whole = _context_ids(tokenizer, prompt.context)
        ids, behind = whole[-16:], whole[:-1]
        last = tokenizer.decode(ids[-1:], behind=behind)
        healed, first = heal(tokenizer, ids)
        p = ngram.distribution(np.array(healed)) * first
        ids[-1] = int(rng.choice(len(p), p=p / p.sum()))
        row = [ids[-1], *ngram.sample(rng, np.array(ids), new - 1).tolist()]
        text = tokenizer.decode(row, behind=behind)[len(last) :]
        return cut_body(text, prompt.indent, ended=len(row) < new)[0]

    def real_body(prompt: FunctionPrompt) -> str:
        row = tokenizer.encode(prompt.body)
        return cut_body(tokenizer.decode(row[:new]), prompt.indent, ended=len(row) < new)[0]

    def share(make: Callable[[FunctionPrompt], str]) -> float:
        return sum(parses(p, make(p)) for p in prompts) / len(prompts)

    good = sum(parses(p, body) for p, (body, _) in zip(prompts, bodies, strict=True))
    return {
        "parse_share": good / len(prompts),
        "parse_share_interval": wilson_interval(good, len(prompts)),
        "parse_samples": len(prompts),
        "finished_share": sum(done for _, done in bodies) / len(prompts),
        "ngram_parse_share": share(ngram_body),
        "real_parse_share": share(real_body),
    }


def _training_figures(records: list[dict[str, Any]], evaluation_seconds: float) -> dict[str, Any]:
    rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    trained = records[-1]["seconds"] if records else 0.0
    return {
        "tokens_seen": records[-1]["tokens_seen"] if records else 0,
        "tokens_per_second": float(np.median(rates)) if rates else None,
        "training_seconds": trained,
        "evaluation_seconds": evaluation_seconds,
        "seconds": trained + evaluation_seconds,
    }


def markdown(report: dict[str, Any], title: str) -> str:
    """The report for people."""
    fence = "```"
    r = report
    lines = [
        f"# {title}: step {r['step']}",
        "",
        f"{r['num_params']:,} parameters, {r['tokens_seen']:,} tokens seen, "
        f"{r['held_out_documents']} held-out documents of {r['held_out_bytes']:,} bytes in all.",
        "",
        "| held-out bits per byte | | 95 % interval over documents |",
        "|---|---|---|",
    ]
    for name, key in (("this model", ""), ("Kneser-Ney 5-gram, same tokens", "ngram_"), ("xz -9e, each file", "xz_")):
        value, half = r[f"{key}bits_per_byte"], r[f"{key}bits_per_byte_half_interval"]
        lines.append(f"| {name} | {value:.4f} | ± {half:.3f} |")
    gain, half = r["gain_over_ngram"], r["gain_over_ngram_half_interval"]
    lines += ["", f"The model is {gain:.1%} below the 5-gram (± {half:.1%}, paired over documents).", ""]
    if r["parse_share"] is not None:
        low, high = r["parse_share_interval"]
        lines += [
            f"Of {r['parse_samples']} sampled function bodies {r['parse_share']:.0%} parse ({low:.0%} to {high:.0%}); "
            f"the 5-gram's: {r['ngram_parse_share']:.0%}, the real ones cut at the same length: "
            f"{r['real_parse_share']:.0%}.",
            "",
        ]
    rate = r["tokens_per_second"]
    lines += [
        f"Training took {r['training_seconds']:.0f} s" + (f" at {rate:,.0f} tokens/s" if rate else "")
        + f", evaluation {r['evaluation_seconds']:.0f} s.",
        "",
    ]  # fmt: skip
    for sample in r["samples"]:
        lines += [f"{fence}python", f"# {sample['name']}", sample["prompt"] + sample["body"].rstrip(), fence, ""]
    return "\n".join(lines)
