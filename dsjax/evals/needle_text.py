"""``dsjax eval --task needle``: facts hidden in held-out text, asked for at its end, for a model of real text.

A fact is a line of code, put between two lines of what the model was never trained on:

    one    `amber_key = 4821`                             asked: `assert amber_key == `            [4821]
    two    two such lines                                 asked: `assert (amber_key, birch_key) == (`     [4821, 1970]
    hops   `amber_key = birch_key`, `birch_key = 4821`    asked: `assert amber_key == `            [birch_key == 4821]

Answers are judged as the likeliest tokens (what greedy generation writes), and by the bits that the facts save: those
of the answer where the facts are missing, less those where they are there. Models with ``structure`` are not asked.
For the task that models are trained on, see :mod:`dsjax.evals.needle`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import UserError
from dsjax.data.prepare import HeldOut, prepare
from dsjax.data.tokenizer import Tokenizer
from dsjax.evals.functions import wilson_interval
from dsjax.evals.needle import KINDS, Kind
from dsjax.metrics import Progress, write_atomic
from dsjax.nn.losses import token_losses
from dsjax.nn.masks import Documents
from dsjax.runs import LoadedModel, RunFolder, cache_dir, load_model

NAMES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "ivory", "jasper", "koala", "lotus")
DEPTHS = 5  # parts of the row that shares are given for


@dataclasses.dataclass(frozen=True)
class Needle:
    """One question.

    Attributes:
        facts: lines that tell the answer.
        question: what stands before the answer.
        answer: the text to be given.
    """

    facts: tuple[str, ...]
    question: str
    answer: str


def make_needle(kind: Kind, rng: np.random.Generator) -> Needle:
    """A question of one kind about names and numbers drawn anew."""
    a, b = (f"{NAMES[i]}_key" for i in rng.permutation(len(NAMES))[:2])
    x, y = (str(n) for n in rng.integers(1000, 10_000, 2))
    if kind == "one":
        return Needle((f"{a} = {x}\n",), f"\nassert {a} ==", f" {x}\n")
    if kind == "two":
        return Needle((f"{a} = {x}\n", f"{b} = {y}\n"), f"\nassert ({a}, {b}) ==", f" ({x}, {y})\n")
    return Needle((f"{a} = {b}\n", f"{b} = {x}\n"), f"\nassert {a} ==", f" {b} == {x}\n")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A needle in its haystack, with and without the facts, as rows of equal length.

    Attributes:
        with_facts, without: token ids; the last ``num_answer`` are the answer.
        num_answer: tokens of the answer.
        depth: where the farthest fact stands, as a share of the row.
    """

    with_facts: np.ndarray
    without: np.ndarray
    num_answer: int
    depth: float


def hide(needle: Needle, lines: Sequence[np.ndarray], tokenizer: Tokenizer, length: int, rng: Any) -> Sample:
    """Puts a needle into ``length`` + 1 tokens of ``lines`` (ids of lines of text, in their order and over again).

    Raises:
        UserError: it does not fit.
    """
    question, whole = (tokenizer.encode(t) for t in (needle.question, needle.question + needle.answer))
    facts = [tokenizer.encode("\n" + fact) for fact in needle.facts]
    extra = sum(map(len, facts))
    room = length + 1 - len(whole) - extra
    if room < 0:
        raise UserError(f"--length is {length}; facts and question alone take {length - room} tokens")
    first = int(rng.integers(len(lines)))
    once = [*lines[first:], *lines[:first]]
    enough = once * (1 + (room + extra) // sum(map(len, once)))
    text = np.concatenate(enough)
    bounds = [0, *np.cumsum([len(line) for line in enough]).tolist()]
    cuts = sorted(rng.choice([at for at in bounds if at <= room], len(facts)).tolist())
    parts = np.split(text[:room], cuts)
    order = rng.permutation(len(facts))
    filled = [parts[0], *(x for which, part in zip(order, parts[1:], strict=True) for x in (facts[which], part))]
    # An answer begins where the tokens of the question end; a token that holds the end of one and the start of the
    # other belongs to the answer.
    shared = next((i for i, (x, y) in enumerate(zip(question, whole, strict=False)) if x != y), len(question))
    with_facts, without = np.concatenate([*filled, whole]), np.concatenate([text[: room + extra], whole])
    return Sample(with_facts, without, len(whole) - shared, cuts[0] / length)


@functools.partial(jax.jit, static_argnames=("graph", "last"))
def _score(graph: Any, params: Any, tokens_BT: Any, last: int) -> tuple[Any, Any]:
    """Bits of each of the last tokens, and whether it was the likeliest one."""
    model = nnx.merge(graph, params)
    out = model(tokens_BT[:, :-1], Documents.single(tokens_BT[:, :-1]))
    out = dataclasses.replace(
        out,
        hidden_BTD=out.hidden_BTD[:, -last:],
        copy=None if out.copy is None else jax.tree.map(lambda x: x[:, -last:], out.copy),
    )
    targets = tokens_BT[:, -last:]
    nats = token_losses(out.hidden_BTD, model.output_weights(), targets, out.copy)
    return nats / jnp.log(2), jnp.argmax(model.logits(out), axis=-1) == targets


def evaluate_needle(
    folder: pathlib.Path, *, length: int = 0, num_samples: int = 64, batch_size: int = 8, quiet: bool = False
) -> dict[str, Any]:
    """Asks the latest checkpoint of a run; prints a table, writes needle.json and needle.png into the run folder.

    Args:
        folder: the run.
        length: tokens in a row; 0: as many as it was trained on.
        num_samples: questions of each kind.
        batch_size: rows at a time.
        quiet: no progress.

    Raises:
        UserError: no run, no checkpoint, a model with ``structure``, or rows too short for a question.
    """
    say = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    run = RunFolder(folder)
    if run.read_config().model.structure is not None:
        raise UserError(f"{folder} has model.structure; --task needle asks only models that are told no structure")
    model = load_model(run)
    length = length or model.config.data.seq_len
    corpus = prepare(model.config.data, cache_dir() / "data", progress=say)
    lines = text_lines(corpus.held_out, model.tokenizer)
    report: dict[str, Any] = {"step": model.step, "length": length, "samples": num_samples, "kinds": {}}
    with Progress(len(KINDS) * num_samples, label="asking", every=1, quiet=quiet) as progress:
        for number, kind in enumerate(KINDS):
            rng = np.random.default_rng([number, length])
            samples = [hide(make_needle(kind, rng), lines, model.tokenizer, length, rng) for _ in range(num_samples)]
            results = []
            for start in range(0, num_samples, batch_size):
                results += ask(model, samples[start : start + batch_size])
                progress.update(number * num_samples + len(results), len(KINDS) * num_samples, kind)
            report["kinds"][kind] = summary(samples, results)
    write_atomic(folder / "needle.json", json.dumps(report, indent=1) + "\n")
    write_atomic(folder / "needle.png", picture(report, run.name))
    print(table(report, run.name))
    return report


def text_lines(documents: Sequence[HeldOut], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Ids of the lines of held-out documents, in their order."""
    texts = [line for document in documents for line in document.text.splitlines(keepends=True) if line.strip()]
    if not texts:
        raise UserError("no text is held out; a needle needs a haystack: set data.held_out_share")
    return tokenizer.encode_many(texts)


def ask(model: LoadedModel, samples: Sequence[Sample]) -> list[tuple[bool, float]]:
    """Whether each answer is the likeliest one, and the bits that the facts save."""
    last = max(sample.num_answer for sample in samples)
    rows = {name: np.stack([getattr(s, name) for s in samples]).astype(np.int32) for name in ("with_facts", "without")}
    bits, right = map(np.asarray, _score(model.graph, model.params, rows["with_facts"], last))
    plain, _ = map(np.asarray, _score(model.graph, model.params, rows["without"], last))
    found = []
    for row, sample in enumerate(samples):
        answer = slice(last - sample.num_answer, None)
        found.append((bool(right[row, answer].all()), float((plain - bits)[row, answer].sum())))
    return found


def summary(samples: Sequence[Sample], results: Sequence[tuple[bool, float]]) -> dict[str, Any]:
    """Shares with 95 % intervals, in all and by depth (of the fact that lies farthest from the question)."""
    right = np.array([r for r, _ in results])
    place = np.minimum([int(s.depth * DEPTHS) for s in samples], DEPTHS - 1)
    low, high = wilson_interval(int(right.sum()), len(right))
    by_depth = [float(right[place == d].mean()) if (place == d).any() else None for d in range(DEPTHS)]
    return {
        "right": float(right.mean()),
        "interval": [low, high],
        "right_by_depth": by_depth,
        "bits_saved": float(np.mean([saved for _, saved in results])),
    }


def table(report: dict[str, Any], title: str) -> str:
    """For people."""
    rows = [
        f"# {title}: needles in {report['length']:,} tokens, {report['samples']} questions of each kind",
        "",
        "| kind | right | 95 % interval | bits that the facts save |",
        "|---|---|---|---|",
    ]
    for kind, r in report["kinds"].items():
        low, high = r["interval"]
        rows.append(f"| {kind} | {r['right']:.0%} | {low:.0%} to {high:.0%} | {r['bits_saved']:.1f} |")
    return "\n".join(rows)


def picture(report: dict[str, Any], title: str) -> bytes:
    """Share of right answers by depth and kind, as PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    shares = np.array([[np.nan if x is None else x for x in r["right_by_depth"]] for r in report["kinds"].values()])
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, "" if np.isnan(share) else f"{share:.0%}", ha="center", va="center")
    axes.set_yticks(range(len(shares)), list(report["kinds"]))
    axes.set_xticks(range(DEPTHS), [f"{d / DEPTHS:.0%} to {(d + 1) / DEPTHS:.0%}" for d in range(DEPTHS)])
    axes.set_xlabel("where the farthest fact stands in the row")
    axes.set_title(f"{title}: right answers in {report['length']:,} tokens", parse_math=False)
    figure.colorbar(image)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()
