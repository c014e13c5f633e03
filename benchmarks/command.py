"""The command line of ``scripts/bench``."""

from __future__ import annotations

import json as json_format
import os
import pathlib
import subprocess
import sys
import venv
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, arg

from benchmarks.attention import compare as attention_figures
from benchmarks.attention import table
from benchmarks.checkpoints import measure
from benchmarks.moe import compare as moe_figures
from benchmarks.moe import table as moe_table
from benchmarks.timing import ROOT, compare

TORCH = "torch==2.13.0"
TRANSFORMERS = "transformers==5.24.0"
TUNIX = "google-tunix==0.1.7"


def train(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    model: Annotated[Literal["dense", "moe"], arg(help="10.5M parameters dense, or 8 experts top-2")] = "dense",
    rounds: Annotated[int, arg(help="turns of each contender")] = 5,
    steps: Annotated[int, arg(help="timed steps in a turn")] = 3,
    torch: Annotated[bool, arg(help=f"time PyTorch as well; installs {TORCH} into .venv-torch")] = False,
    compiled: Annotated[bool, arg(help="with --torch, time torch.compile too")] = False,
) -> None:
    """Time the training step of one model in dsjax and in bare JAX, in alternation, on an idle machine."""
    target = target_of(json)
    names = ["dsjax", "bare_jax", *(["torch"] if torch else []), *(["torch_compile"] if torch and compiled else [])]
    interpreter = torch_interpreter() if torch else ""
    pythons = {"torch": interpreter, "torch_compile": interpreter} if torch else None
    show(compare(names, model, rounds=rounds, steps=steps, pythons=pythons), target)


def checkpoint(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    megabytes: Annotated[int, arg(help="size of the state")] = 200,
    rounds: Annotated[int, arg(help="saves and restores of each")] = 9,
) -> None:
    """Time a save and a restore of dsjax and of Orbax's own manager, in alternation, on an idle machine."""
    target = target_of(json)
    show(measure(megabytes, rounds), target)


def attention(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    rounds: Annotated[int, arg(help="calls of each contender in each case")] = 5,
    torch: Annotated[bool, arg(help=f"time PyTorch as well; installs {TORCH} into .venv-torch")] = False,
) -> None:
    """Time segmented attention and full causal attention on this CPU, in alternation, on an idle machine."""
    target = target_of(json)
    figures = attention_figures(rounds=rounds, torch_python=torch_interpreter() if torch else "")
    print(table(figures), file=sys.stderr)
    show(figures, target)


def moe(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    rounds: Annotated[int, arg(help="calls of each contender in each case")] = 15,
    torch: Annotated[
        bool, arg(help=f"time Hugging Face's block too; installs {TRANSFORMERS} into .venv-torch")
    ] = False,
) -> None:
    """Time an MoE layer on this CPU, balanced and skewed, in alternation, on an idle machine."""
    target = target_of(json)
    figures = moe_figures(rounds=rounds, torch_python=torch_interpreter(TRANSFORMERS) if torch else "")
    print(moe_table(figures), file=sys.stderr)
    show(figures, target)


def generate(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    model: Annotated[Literal["all", "llama_100m", "v2_lite_100m"], arg(help="which")] = "all",
    rounds: Annotated[int, arg(help="turns of each contender in each case")] = 5,
    tokens: Annotated[int, arg(help="decoded behind each prompt")] = 64,
    large: Annotated[bool, arg(help="only the time to the first token of a 1.3B model; writes 5 GB beside")] = False,
    torch: Annotated[bool, arg(help=f"time transformers too; installs {TRANSFORMERS} into .venv-torch")] = False,
    drafts: Annotated[str, arg(metavar="RUN", help="only a run's decoding with drafts, beside without")] = "",
) -> None:
    """Time decoding and prefill on this CPU, and `dsjax generate` up to its first token, on an idle machine."""
    from benchmarks import generate_drafts
    from benchmarks.generate import MODELS, compare, first_token_of
    from benchmarks.generate import table as generate_table

    target = target_of(json)
    if large:
        show(first_token_of("coder_1.3b"), target)
        return
    if drafts:
        figures = generate_drafts.compare(pathlib.Path(drafts), rounds=rounds)
        print(generate_drafts.table(figures), file=sys.stderr)
        show(figures, target)
        return
    models = tuple(MODELS) if model == "all" else (model,)
    python = torch_interpreter(TRANSFORMERS) if torch else ""
    figures = compare(models=models, rounds=rounds, torch_python=python, new=tokens)
    print(generate_table(figures), file=sys.stderr)
    show(figures, target)


def attention_memory(*, json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "") -> None:
    """Compile a training step of an attention layer at 102,400 positions for a TPU, beside what people write in JAX."""
    from benchmarks.attention_memory import run, tables

    target = target_of(json)
    figures = run()
    print(tables(figures), file=sys.stderr)
    show(figures, target)


def attention_energy(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    chip: Annotated[str, arg(help="as for dsjax plan")] = "v5e",
) -> None:
    """Energy of segmented and of full attention at 16,384 positions, by the model of dsjax plan."""
    from benchmarks.attention_energy import figures, tables

    target = target_of(json)
    found = figures(chip)
    print(tables(found), file=sys.stderr)
    show(found, target)


def needles(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    seeds: Annotated[int, arg(help="models of each kind")] = 4,
    kept: Annotated[str, arg(metavar="FILE", help="a line for each trained model; it goes on from there")] = "",
    memory: Annotated[str, arg(metavar="FILE", help="figures of attention-memory, for the picture")] = "",
    picture: Annotated[str, arg(metavar="FILE", help="retention against memory; needs --memory")] = "",
) -> None:
    """Train small models that differ in attention alone to find needles; on two idle cores some minutes each."""
    from benchmarks.needles import draw, study, summary, tables

    target, lines = target_of(json), target_of(kept) or ROOT / "build" / "needles.jsonl"
    figures, drawn = target_of(memory), target_of(picture)
    if drawn is not None and (figures is None or not figures.is_file()):
        sys.exit(f"--picture needs --memory FILE, written by scripts/bench attention-memory --json; found {memory!r}")
    rows = study(seeds, lines, lambda text: print(text, file=sys.stderr, flush=True))
    if drawn is not None and figures is not None:
        draw(rows, json_format.loads(figures.read_text()), drawn)
    print(tables(rows), file=sys.stderr)
    show({"runs": rows, "summary": summary(rows)}, target)


def kept_bits(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    seeds: Annotated[int, arg(help="models of each kind")] = 4,
    kept: Annotated[str, arg(metavar="FILE", help="a line for each trained model; it goes on from there")] = "",
) -> None:
    """Train small models of code that differ in attention alone, and compare their held-out bits per byte."""
    from benchmarks.kept_bits import study, summary, tables

    target, lines = target_of(json), target_of(kept) or ROOT / "build" / "kept_bits.jsonl"
    rows = study(seeds, lines, lambda text: print(text, file=sys.stderr, flush=True))
    print(tables(rows), file=sys.stderr)
    show({"runs": rows, "summary": summary(rows)}, target)


def long_row(*, json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "") -> None:
    """Train a small model with segmented attention on rows of up to 102,400 real tokens: time and peak memory."""
    from benchmarks.long_row import run, tables

    target = target_of(json)
    found = run()
    print(tables(found), file=sys.stderr)
    show({"rows": found}, target)


def convert(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    rounds: Annotated[int, arg(help="turns of copy, import and export")] = 3,
    folder: Annotated[str, arg(metavar="DIR", help="a disk with 10 GB free; default: that of temporary files")] = "",
) -> None:
    """Convert random checkpoints of 2 GB in 10 files and back: MB/s beside a plain copy, and memory in files."""
    from benchmarks.convert import measure as measure_conversion
    from benchmarks.convert import table as conversion_table

    target = target_of(json)
    figures = measure_conversion(rounds, pathlib.Path(folder) if folder else None)
    print(conversion_table(figures), file=sys.stderr)
    show(figures, target)


def parity(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    only: Annotated[tuple[str, ...], arg(metavar="NAME", help="these models alone; none: all")] = (),
) -> None:
    """Logits, loss, gradients and greedy tokens of tiny random models beside transformers', in float32."""
    from benchmarks.parity import as_table
    from benchmarks.parity import compare as compare_models

    target = target_of(json)
    figures = compare_models(torch_interpreter(TRANSFORMERS), only)
    print(as_table(figures), file=sys.stderr)
    show(figures, target)


def sandbox(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    programs: Annotated[int, arg(help="one after another, and then with several workers")] = 200,
    workers: Annotated[int, arg(help="of the pool")] = 2,
) -> None:
    """Milliseconds that the sandbox takes for a program, at each level that works here, on an idle machine."""
    from benchmarks.sandbox import measure as measure_sandbox

    target = target_of(json)
    show(measure_sandbox(programs, workers), target)


def rewards(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    texts: Annotated[int, arg(help="judged together, no two alike")] = 64,
    rounds: Annotated[int, arg(help="times that they are judged")] = 7,
) -> None:
    """Milliseconds that a verified reward takes for a text, right or wrong, by scorer, on an idle machine."""
    from benchmarks.rewards import measure as measure_rewards
    from benchmarks.rewards import table as rewards_table

    target = target_of(json)
    figures = measure_rewards(texts, rounds)
    print(rewards_table(figures), file=sys.stderr)
    show(figures, target)


def grammar(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    run: Annotated[str, arg(metavar="RUN", help="a trained model instead of random ones")] = "",
    rounds: Annotated[int, arg(help="turns of each")] = 7,
    tokens: Annotated[int, arg(help="decoded behind each prompt")] = 128,
) -> None:
    """Time decoding within Python's grammar and freely, eight requests at a time, in alternation."""
    from benchmarks.grammar import compare_all

    target = target_of(json)
    show(compare_all(run, rounds=rounds, tokens=tokens), target)


def r1(
    *,
    json: Annotated[str, arg(metavar="FILE", help="write the figures there")] = "",
    model: Annotated[Literal["0.7M", "10M"], arg(help="parameters of the model")] = "0.7M",
    rounds: Annotated[int, arg(help="counted iterations of each contender")] = 7,
    torch: Annotated[
        bool, arg(help=f"time a loop of transformers and PyTorch too; installs {TRANSFORMERS} into .venv-torch")
    ] = False,
    tunix: Annotated[bool, arg(help=f"time Tunix's GRPO too; installs {TUNIX}, 2 GB, into .venv-tunix")] = False,
) -> None:
    """Time iterations of R1 on one core: writing, judging and learning, in alternation, on an idle machine."""
    from benchmarks.r1_speed import HUGGING_FACE, config_of, prepare
    from benchmarks.r1_speed import compare as compare_loops
    from benchmarks.r1_speed import table as r1_table

    target = target_of(json)
    folder = ROOT / "build" / f"r1_speed_{model}"
    prepare(config_of(model), folder)
    pythons = {"dsjax": sys.executable}
    if torch:
        pythons |= dict.fromkeys(HUGGING_FACE, torch_interpreter(TRANSFORMERS))
    if tunix:
        pythons["tunix"] = interpreter(".venv-tunix", TUNIX)
    figures = compare_loops(folder, pythons, rounds=rounds)
    print(r1_table(figures), file=sys.stderr)
    show(figures, target)


def plans(
    only: Annotated[Literal["all", "scaling", "presets", "inference", "published"], arg(help="which part")] = "all",
) -> None:
    """Plan the jobs of docs/plan.md, and write its tables and pictures; half an hour of compilations the first time."""
    from benchmarks.plans import PARTS, write

    write(list(PARTS) if only == "all" else [only])


def target_of(json: str) -> pathlib.Path | None:
    """Where the figures go, seen from where the command was called."""
    target = pathlib.Path(os.environ.get("DSJAX_CALLED_FROM", "."), json) if json else None
    if target is not None and not target.parent.is_dir():
        sys.exit(f"--json {json}: the folder {target.parent} does not exist")
    return target


def show(figures: dict[str, Any], target: pathlib.Path | None) -> None:
    """Prints the figures as JSON, and writes them."""
    text = json_format.dumps(figures, indent=1)
    print(text)
    if target is not None:
        target.write_text(text + "\n")


def torch_interpreter(*more: str) -> str:
    """The interpreter of an environment with PyTorch and ``more``, made if missing; the project's own never gets it."""
    return interpreter(".venv-torch", TORCH, "numpy", *more)


def interpreter(name: str, *packages: str) -> str:
    """The interpreter of the environment ``name`` beside the project's own, with packages; made if missing."""
    folder = ROOT / name
    python, done = folder / "bin" / "python", folder / "installed"
    have = done.read_text(encoding="utf-8").split() if done.exists() else []
    wanted = [package for package in packages if package not in have]
    if wanted:
        print(f"installing {' '.join(wanted)} into {folder.name}", file=sys.stderr)
        if not have:
            venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        subprocess.run(command, check=True, stdout=sys.stderr)
        done.write_text("\n".join([*have, *wanted, ""]), encoding="utf-8")
    return str(python)


def main() -> None:
    app = tyro.extras.SubcommandApp()
    app.command(train)
    app.command(checkpoint)
    app.command(attention)
    app.command(moe)
    app.command(generate)
    app.command(attention_memory)
    app.command(attention_energy)
    app.command(needles)
    app.command(kept_bits)
    app.command(long_row)
    app.command(convert)
    app.command(parity)
    app.command(sandbox)
    app.command(rewards)
    app.command(grammar)
    app.command(r1)
    app.command(plans)
    app.cli(prog="scripts/bench", description=__doc__, config=(FlagCreatePairsOff,))


if __name__ == "__main__":
    main()
