"""The command line: typed sub-commands, one sentence and exit code 2 for a user's mistake.

Nothing heavy is imported before a command runs, so that ``dsjax --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import io
import os
import pathlib
import re
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from dsjax import hosts
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
    coordinator: Annotated[str, arg(metavar="HOST:PORT", help="of process 0, where a cluster is not detected")] = "",
    num_processes: Annotated[int | None, arg(metavar="N", help="of the whole run; with --coordinator")] = None,
    process_id: Annotated[int | None, arg(metavar="I", help="this process, from 0; with --coordinator")] = None,
    join_timeout: Annotated[float, arg(metavar="SECONDS", help="for all processes to come")] = 300.0,
    stall_timeout: Annotated[
        float, arg(metavar="SECONDS", help="a process without a step for so long ends all")
    ] = 1800,
) -> int:
    """Train what CONFIG describes; an existing run goes on where it stopped. Ctrl-C saves.

    Example: dsjax train configs/quickstart.py train.steps=500 mesh=fsdp=2,tensor=2 --run runs/mine
    """
    import json

    from dsjax.config import apply_overrides, load_config, to_dict, validate

    resolved = apply_overrides(load_config(config), overrides)
    recipe = sys.modules[type(resolved).__module__]  # a config's module runs it
    if not hasattr(recipe, "run"):
        kind = type(resolved).__name__
        raise UserError(f"get_config() of {config} returned a {kind}, which is no recipe such as Pretrain")
    validate(resolved)
    for flag, seconds in {"--join-timeout": join_timeout, "--stall-timeout": stall_timeout}.items():
        if not 0 < seconds < float("inf"):
            raise UserError(f"{flag} is {seconds:g}; it must be a number of seconds above 0")
    limits = hosts.HostsConfig(join=join_timeout, stall_after=stall_timeout)
    start_jax(lambda: hosts.start(coordinator, num_processes, process_id, limits))
    if print_config:
        recipe.check(resolved)
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
    run: Annotated[
        Positional[str],
        arg(metavar="DIR", help="a RUN; for programs and exercises also a folder of Hugging Face's layout"),
    ],
    /,
    *,
    task: Annotated[
        Literal["", "report", "exercises", "needle", "repair", "humaneval", "mbpp", "tasks"],
        arg(help="default: exercises if the run learned from some, else report (bits per byte)"),
    ] = "",
    samples: Annotated[
        int | None,
        arg(metavar="N", help="bodies for parse_share or needles (64); for each problem (the largest k) or exercise"),
    ] = None,
    length: Annotated[int, arg(metavar="TOKENS", help="of a row with needles; 0: as in training")] = 0,
    k: Annotated[str, arg(metavar="N[,N...]", help="of programs and exercises: pass@k")] = "1",
    problems: Annotated[str, arg(metavar="FILE", help="of programs: JSON lines of HumanEval, MBPP or tasks")] = "",
    exercises: Annotated[str, arg(metavar="RUN", help="ask those of another run; default: the run's own")] = "",
    limit: Annotated[
        int,
        arg(metavar="N", help="the first N problems, or repairs; 0: all (tasks, repairs: 200); exercises of a level"),
    ] = 0,
    max_tokens: Annotated[
        int | None, arg(metavar="N", help="of a text; default: 384 of a program, of an exercise the run's")
    ] = None,
    temperature: Annotated[
        float | None, arg(metavar="X", help="default: of programs 0 for one sample, else 0.8; of exercises the run's")
    ] = None,
    grammar: Annotated[Literal["", "python"], arg(help="python: only what Python parses is written")] = "",
    chat: Annotated[bool, arg(help="problems are a user's messages; the model's chat template is used")] = False,
    seed: Annotated[int | None, arg(metavar="N", help="default: 0; of the texts of exercises the run's")] = None,
    output: Annotated[str, arg(metavar="FILE", help="of these: JSON; default: TASK.json in the run's folder")] = "",
    quiet: Annotated[bool, arg(help="print only the report")] = False,
) -> int:
    """Held-out bits per byte beside its baselines, and sampled function bodies; writes report.md and report.json.

    With --task exercises: pass@k of held-out exercises by family and level; writes exercises.json. As many exercises
    of a level, and texts for each, as the report of the run has, if --limit and --samples do not say.
    With --task needle: facts hidden in held-out text and asked for at its end; writes needle.json and needle.png.
    With --task humaneval, mbpp or tasks (held-out compositions): the model's programs are run in the sandbox.
    With --task repair: broken functions of held-out files, and the share that a model trained on repairs mends.
    Example: dsjax eval runs/coder --task tasks --k 1,10 --samples 20
    """
    from dsjax.evals import command

    file = pathlib.Path(output) if output else None
    ks = tuple(whole_numbers("--k", k))
    request = command.Request(
        pathlib.Path(run), task, samples, length, ks, problems, exercises, limit, max_tokens, temperature,
        bool(grammar), chat, seed, file, quiet,
    )  # fmt: skip
    request.check()
    start_jax()
    return command.run(request)


def generate(
    folder: Annotated[Positional[str], arg(metavar="DIR", help="a RUN, or a folder of Hugging Face's layout")],
    /,
    *,
    prompt: Annotated[str, arg(help="text to continue; '-': read it from standard input")] = "",
    chat: Annotated[bool, arg(help="the prompt is a user's message; the model's chat template is used")] = False,
    system: Annotated[str, arg(metavar="TEXT", help="with --chat: a system message in front")] = "",
    max_tokens: Annotated[int, arg(metavar="N", help="new tokens at the most")] = 128,
    n: Annotated[int, arg(metavar="N", help="samples; their seeds follow one another")] = 1,
    stop: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help="end in front of this text; may be given again")
    ] = (),
    temperature: Annotated[float, arg(metavar="X", help="0: always the likeliest token")] = 0.8,
    top_k: Annotated[int, arg(metavar="N", help="sample from the N likeliest tokens; 0: from all")] = 0,
    top_p: Annotated[float, arg(metavar="X", help="sample from the likeliest tokens of this total probability")] = 0.95,
    min_p: Annotated[
        float, arg(metavar="X", help="sample from tokens of at least this share of the likeliest one's probability")
    ] = 0.0,
    seed: Annotated[int, arg(metavar="N", help="the same seed, the same samples")] = 0,
    draft: Annotated[
        int, arg(metavar="N", help="tokens that the model's own MTP modules draft in a step; the text is the same")
    ] = 0,
    grammar: Annotated[
        Literal["", "python"], arg(help="python: the prompt with its continuation is a program that Python parses")
    ] = "",
    mesh: Annotated[str, arg(metavar="AXIS=N,...", help="devices along each mesh axis; default: one device")] = "",
    dtype: Annotated[
        Literal["", "float32", "bfloat16"], arg(help="of weights and activations; default: as they are stored")
    ] = "",
    json: Annotated[
        bool, arg(help="print a JSON object a sample: text, tokens, log-probabilities, and why it ended")
    ] = False,
    quiet: Annotated[bool, arg(help="no speed on standard error")] = False,
) -> int:
    """Continue a prompt, or answer with --chat; the text is printed as it comes, and at the end how fast it came.

    Example: dsjax generate DeepSeek-V2-Lite-Chat --chat --prompt 'Who are you?' --temperature 0.3
    """
    begin = time.perf_counter()
    from dsjax.infer.command import Options, run
    from dsjax.infer.sampling import SamplingConfig

    text = read_prompt(sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt))
    is_run = (pathlib.Path(folder) / "checkpoints").is_dir()
    sampling = SamplingConfig(temperature, top_k, top_p, min_p)
    options = Options(text, chat, system, max_tokens, n, stop, sampling, seed, is_run, json, quiet, draft, grammar)
    options.check()
    start_jax()
    from dsjax.loaded import load

    run(load(folder, dtype=dtype or None, mesh=mesh or None), options, begin)
    return 0


def convert(
    source: Annotated[Positional[str], arg(metavar="SRC", help="folder of Hugging Face's layout, or a run")],
    target: Annotated[Positional[str], arg(metavar="[DST]", help="new folder: a run, or the other way round")] = "",
    /,
    *,
    check: Annotated[bool, arg(help="compare SRC and DST, tensors and logits; exit code 3: they differ")] = False,
    mesh: Annotated[str, arg(metavar="AXIS=N,...", help="cut a run's arrays for the devices of this mesh")] = "",
    keep_fp8: Annotated[bool, arg(help="keep the scales of 8-bit weights: the way back gives them again")] = False,
    dtype: Annotated[
        Literal["", "float32", "bfloat16", "float16"], arg(help="of exported weights; default: as they are")
    ] = "",
    max_shard_size: Annotated[str, arg(metavar="SIZE", help="of exported files, e.g. 5GB; default: as before")] = "",
    quiet: Annotated[bool, arg(help="print nothing but errors and the report")] = False,
) -> int:
    """Convert a model of Hugging Face's layout to a run of dsjax, or a run to it; a killed conversion goes on.

    Example: dsjax convert DeepSeek-V2-Lite runs/v2_lite; dsjax convert runs/v2_lite exported
    """
    start_jax()
    from dsjax.convert.command import Request, run

    paths = pathlib.Path(source), pathlib.Path(target) if target else None
    return run(Request(*paths, check, mesh, keep_fp8, dtype or None, max_shard_size, quiet))


def data(
    what: Annotated[
        Positional[Literal["build", "tasks"]], arg(metavar="build|tasks", help="a corpus, or a folder of tasks")
    ],
    words: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[SRC] DST [KEY=VALUE ...]", help="build: SRC and DST; tasks: DST")
    ] = (),
    /,
    *,
    workers: Annotated[int, arg(metavar="N", help="processes of build; no effect on what is written")] = 1,
    quiet: Annotated[bool, arg(help="print nothing but the report")] = False,
) -> int:
    """Build a corpus of code from SRC (a repository, a folder of them, or "stdlib"), or write programming tasks.

    Example: dsjax data build stdlib corpora/stdlib fim.rate=0.5; dsjax data tasks tasks training=10000
    """
    from dsjax.data.command import run

    return run(what, words, workers=workers, quiet=quiet)


def plan(
    config: Annotated[Positional[str], arg(metavar="CONFIG", help="Python file with get_config()")],
    overrides: Positional[Overrides] = (),
    /,
    *,
    topology: Annotated[
        str, arg(metavar="CHIP:SHAPE", help="e.g. v5p:4x8x8, v5e:4x4, h100:8, cpu:8; several, by commas, make a curve")
    ],
    mode: Annotated[Literal["train", "prefill", "decode"], arg(help="which step")] = "train",
    mesh: Annotated[str, arg(metavar="AXIS=N,...", help="devices along each mesh axis; default: the config's")] = "",
    batch: Annotated[str, arg(metavar="N[,N...]", help="sequences of a step; several make a curve")] = "",
    rows_per_chip: Annotated[
        int | None, arg(metavar="N", help="instead of --batch: as many for each chip (weak scaling)")
    ] = None,
    length: Annotated[int | None, arg(metavar="N", help="tokens of a sequence; default: data.seq_len")] = None,
    search: Annotated[bool, arg(help="try meshes, remat policies and (inference) batch sizes")] = False,
    limit: Annotated[int, arg(metavar="N", help="compilations of --search at the most")] = 8,
    json: Annotated[str, arg(metavar="FILE", help="write the plan there")] = "",
    plot: Annotated[str, arg(metavar="FILE", help="draw curves, or the candidates of --search, as PNG")] = "",
    fresh: Annotated[bool, arg(help="compile again what was asked before")] = False,
    quiet: Annotated[bool, arg(help="no progress on standard error")] = False,
) -> int:
    """Compile the real step for chips that are not there: does it fit, what bounds it, how fast at best.

    Exit code 3: it does not fit. Example: dsjax plan configs/seed_moe_175b.py --topology v5p:4x8x8
    """
    from dsjax.config import apply_overrides, load_config, validate

    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here; libtpu is asked in a process of its own
    resolved = apply_overrides(load_config(config), overrides)
    validate(resolved)
    from dsjax.plan.command import Request, run

    sizes = whole_numbers("--batch", batch)
    for flag, number in {"--length": length, "--rows-per-chip": rows_per_chip, "--limit": limit}.items():
        if number is not None and not 1 <= number < 2**31:
            raise UserError(f"{flag} is {number}; it must be a whole number from 1 to 2147483647")
    if sizes and rows_per_chip is not None:
        raise UserError("--batch and --rows-per-chip exclude each other; give one of them")
    return run(
        resolved,
        Request(
            topologies=[t for t in topology.split(",") if t.strip()] or [topology],
            mode=mode,
            mesh=mesh,
            batch_sizes=sizes,
            rows_per_chip=rows_per_chip,
            length=length,
            search=search,
            limit=limit,
            json=json,
            plot=plot,
            fresh=fresh,
            quiet=quiet,
        ),
    )


def kernels(
    kernel: Annotated[Positional[str], arg(metavar="KERNEL", help="e.g. segmented_attention")],
    /,
    *,
    chip: Annotated[str, arg(metavar="CHIP", help="v4, v5e, v5p, v6e or tpu7x")],
    json: Annotated[str, arg(metavar="FILE", help="write ratios, counts and regions there")] = "",
    search: Annotated[bool, arg(help="try tiles, and write the best into the table that the kernel reads")] = False,
    peer_preparation: Annotated[bool, arg(help="measure splash attention's mask at 131,072 too (2 minutes)")] = False,
    fresh: Annotated[bool, arg(help="compile again what was compiled before")] = False,
    quiet: Annotated[bool, arg(help="no progress on standard error")] = False,
) -> int:
    """Count the cycles of a TPU kernel and of its peers in the compiler's schedules; no TPU is needed.

    Example: dsjax kernels segmented_attention --chip v5e --json counts.json
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here; libtpu is asked in processes of its own
    from dsjax.plan.kernels_command import Request, run

    return run(Request(kernel, chip, json, search, peer_preparation, fresh, quiet))


def whole_numbers(flag: str, text: str) -> list[int]:
    """Positive numbers separated by commas.

    Raises:
        UserError: something else.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(re.fullmatch("[1-9][0-9]{0,8}", word) for word in words):
        raise UserError(f"{flag} is {text!r}; it must be whole numbers from 1, separated by commas")
    return [int(word) for word in words]


def start_jax(join: Callable[[], None] = lambda: None) -> None:
    """Settings of JAX that every command shares; the first import of it. ``join`` connects to other processes."""
    from dsjax.runtime import configure

    configure(join)


def read_prompt(content: bytes) -> str:
    """The text of a prompt.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with its code; without ``arguments``, the command of this process."""
    if arguments is not None:
        raise SystemExit(run(arguments))
    gc.disable()  # the imports ahead make no garbage; `configure` turns it on again
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    try:
        code = run(sys.argv[1:])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    # The interpreter would take a second to free what the process gives back anyway, and it aborts on a compilation
    # that nobody waits for any more. Whatever must be closed has been closed by the command.
    os._exit(code)


def run(arguments: list[str]) -> int:
    """The exit code of a command; its error, if any, is one line on standard error.

    Processes of one run end together: with the code of the first that ends by an error, or all normally.
    """
    try:
        with left_together():
            code = parse(arguments)()
            sys.stdout.flush()
            hosts.finish()
    except hosts.HostLost as error:
        print(f"dsjax: {one_line(str(error))}", file=sys.stderr)
        code = hosts.EXIT_HOST_LOST
    except UserError as error:
        print(f"dsjax: {one_line(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("dsjax: interrupted", file=sys.stderr)
        code = 130
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"dsjax: {OUT_OF_MEMORY}: {one_line(str(error))[:200]}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"dsjax: output can not be written: {error.strerror}", file=sys.stderr)
        code = 2
    return code


@contextlib.contextmanager
def left_together() -> Iterator[None]:
    """Tells the other processes, if there are any, of the error that ends this one; or who of them is to blame."""
    try:
        yield
    except BaseException as error:
        hosts.blame(error)
        out_of_memory = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
        code, sentence = 1, f"internal error: {type(error).__name__}: {error}"
        if isinstance(error, hosts.HostLost):
            code, sentence = hosts.EXIT_HOST_LOST, str(error)
        elif isinstance(error, UserError):
            code, sentence = 2, str(error)
        elif out_of_memory:
            code, sentence = 2, OUT_OF_MEMORY
        elif isinstance(error, KeyboardInterrupt):
            code, sentence = 130, "interrupted"
        hosts.leave(code, one_line(sentence)[:500])
        raise


def parse(arguments: list[str]) -> Callable[[], int]:
    """The command that ``arguments`` ask for, ready to run.

    Raises:
        UserError: there is no such command or option, or a value is missing or wrong.
    """
    app = tyro.extras.SubcommandApp()
    commands = {"train": train, "eval": evaluate, "generate": generate, "plan": plan, "kernels": kernels}
    commands |= {"inspect": inspect, "convert": convert, "data": data}
    for name, command in commands.items():
        app.command(name=name)(deferred(command))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return app.cli(
                prog="dsjax", description=DESCRIPTION, args=gather_overrides(arguments), config=(FlagCreatePairsOff,)
            )
    except SystemExit as stop:
        if not stop.code:  # help, printed
            return lambda: 0
        raise UserError(unboxed(said.getvalue())) from None


def unboxed(said: str) -> str:
    """What Tyro says in a box with rules between its parts, as one sentence."""
    rows = [row.strip("│| ") for row in said.splitlines()[1:-1]]
    text = " ".join(";" if set(row) <= set("─-") else row for row in rows)
    text = re.sub(r"[.]? ;", ";", re.sub(r"For full helptext, (run|see):?", "see", text)).strip(" ;")
    return text[:1].lower() + text[1:]


def deferred(command: Any) -> Callable[..., Callable[[], int]]:
    """As ``command``, but returns what is left to call."""

    @functools.wraps(command)
    def prepare(*args: object, **options: object) -> Callable[[], int]:
        return functools.partial(command, *args, **options)

    return prepare


def one_line(text: str) -> str:
    """``text`` with line breaks as spaces and other unprintable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.splitlines()))


OUT_OF_MEMORY = "out of memory; a smaller data.batch_size or data.seq_len, or a larger train.accumulate needs less"

DESCRIPTION = """The DeepSeek lineage in JAX: train, evaluate, sample and plan language models from one config.

Start with: dsjax train configs/quickstart.py"""


def gather_overrides(arguments: list[str]) -> list[str]:
    """Puts the ``key=value`` words together behind CONFIG, wherever among the options they stand."""
    command: Any = {"train": train, "plan": plan, "data": data}.get(arguments[0] if arguments else "")
    if command is None:
        return arguments
    kinds = typing.get_type_hints(command)  # of each option; behind one that is no bool its value stands
    words, options, takes_value = [], [], False
    for word in arguments[1:]:
        if takes_value or word.startswith("-"):
            takes_value = not takes_value and kinds.get(word.removeprefix("--").replace("-", "_"), bool) is not bool
            options.append(word)
        else:
            words.append(word)
    return [arguments[0], *words, *options]
