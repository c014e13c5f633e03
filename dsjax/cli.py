"""The command line: typed sub-commands, one sentence and exit code 2 for a user's mistake.

Nothing heavy is imported before a command runs, so that ``dsjax --help`` answers at once.
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from dsjax.config import UserError

Overrides = Annotated[tuple[str, ...], arg(metavar="[KEY=VALUE ...]", help="dotted overrides, e.g. train.steps=100")]


def train(
    config: Annotated[Positional[str], arg(metavar="CONFIG", help="Python file with get_config()")],
    overrides: Positional[Overrides] = (),
    /,
    *,
    run: Annotated[str, arg(metavar="DIR", help="run folder; default: runs/NAME of the config")] = "",
    print_config: Annotated[bool, arg(help="print the resolved config as JSON and stop")] = False,
    quiet: Annotated[bool, arg(help="print nothing but errors")] = False,
) -> int:
    """Train what CONFIG describes; an existing run goes on where it stopped. Ctrl-C saves.

    Example: dsjax train configs/quickstart.py train.steps=500 mesh=fsdp=2,tensor=2 --run runs/mine
    """
    import importlib
    import json

    from dsjax.config import apply_overrides, load_config, to_dict, validate

    resolved = apply_overrides(load_config(config), overrides)
    validate(resolved)
    start_jax()
    recipe = importlib.import_module(type(resolved).__module__)  # a config's module runs it
    recipe.check(resolved)
    if print_config:
        print(json.dumps(to_dict(resolved), indent=1))
        return 0
    return recipe.run(resolved, pathlib.Path(run or f"runs/{pathlib.Path(config).stem}"), quiet=quiet)


def inspect(
    run: Annotated[Positional[str], arg(metavar="RUN", help="run folder")],
    /,
    *,
    json: Annotated[bool, arg(help="print JSON")] = False,
) -> int:
    """Show what a resume would take: step, number of parameters, and a SHA-256 of every part of the state."""
    from dsjax.inspection import inspect_run

    start_jax()
    inspect_run(pathlib.Path(run), as_json=json)
    return 0


def evaluate(
    run: Annotated[Positional[str], arg(metavar="RUN", help="run folder")],
    /,
    *,
    samples: Annotated[int, arg(help="function bodies to sample for parse_share")] = 64,
    quiet: Annotated[bool, arg(help="print only the report")] = False,
) -> int:
    """Held-out bits per byte beside its baselines, and sampled function bodies; writes report.md and report.json."""
    from dsjax.evals.report import evaluate_run

    if samples < 1:
        raise UserError(f"--samples is {samples}; it must be at least 1")
    start_jax()
    evaluate_run(pathlib.Path(run), num_samples=samples, quiet=quiet)
    return 0


def generate(
    run: Annotated[Positional[str], arg(metavar="RUN", help="run folder")],
    /,
    *,
    prompt: Annotated[str, arg(help="text to continue; '-': read it from standard input")] = "",
    max_tokens: Annotated[int, arg(help="new tokens at the most")] = 128,
    temperature: Annotated[float, arg(help="0: always the likeliest token")] = 0.8,
    top_p: Annotated[float, arg(help="sample from the likeliest tokens of this total probability")] = 0.95,
    seed: int = 0,
) -> int:
    """Continue a prompt; tokens are printed as they come."""
    from dsjax.infer.command import stream

    start_jax()
    text = sys.stdin.read() if prompt == "-" else prompt
    stream(pathlib.Path(run), text, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    return 0


def start_jax() -> None:
    """Settings of JAX that every command shares; the first import of it."""
    from dsjax.runtime import configure

    configure()


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with its code."""
    app = tyro.extras.SubcommandApp()
    app.command(train)
    app.command(evaluate, name="eval")
    app.command(generate)
    app.command(inspect)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app.cli(prog="dsjax", description=DESCRIPTION, args=gather_overrides(arguments), config=(FlagCreatePairsOff,))
        sys.stdout.flush()
    except UserError as error:
        print(f"dsjax: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("dsjax: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    raise SystemExit(code)


DESCRIPTION = """The DeepSeek lineage in JAX: train, evaluate and sample language models from one config.

Start with: dsjax train configs/quickstart.py"""


def gather_overrides(arguments: list[str]) -> list[str]:
    """Puts the ``key=value`` words of ``train`` together behind CONFIG, wherever among the options they stand."""
    if not arguments or arguments[0] != "train":
        return arguments
    words, options, takes_value = [], [], False
    for word in arguments[1:]:
        if takes_value or word.startswith("-"):
            takes_value = not takes_value and word == "--run"
            options.append(word)
        else:
            words.append(word)
    return ["train", *words, *options]
