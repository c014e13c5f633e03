"""``dsjax plan``: questions, answers, and what to do when a job does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from dsjax.config import UserError, apply_overrides
from dsjax.metrics import write_atomic
from dsjax.models.decoder import DecoderConfig
from dsjax.nn.moe import MoEConfig
from dsjax.plan import report, search
from dsjax.plan.chips import Topology, larger, parse_topology
from dsjax.plan.measure import Job
from dsjax.plan.process import ask
from dsjax.plan.programs import Mode
from dsjax.runs import RunFolder
from dsjax.sharding import MESH_AXES, MeshConfig
from dsjax.train.pretrain import Pretrain
from dsjax.train.r1 import R1, of_updates

EXIT_DOES_NOT_FIT = 3
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for; several topologies or batch sizes make a curve.

    Attributes:
        topologies: for example ``("v5p:4x8x8",)``.
        mode: train, prefill or decode.
        mesh: overrides of a mesh that is all 1 otherwise, ``fsdp=32,expert=8``; empty: the config's, or for inference
            one made for the model.
        batch_sizes: sequences; empty: the config's, or 1.
        rows_per_chip: instead: sequences for each chip (weak scaling).
        length: tokens of a sequence; None: the config's.
        search: try meshes, remat policies and batch sizes.
        limit: compilations of a search at the most.
        json, plot: files to write.
        fresh: ask the compiler even what it was asked before.
        quiet: nothing on standard error.
    """

    topologies: Sequence[str]
    mode: Mode = "train"
    mesh: str = ""
    batch_sizes: Sequence[int] = ()
    rows_per_chip: int | None = None
    length: int | None = None
    search: bool = False
    limit: int = 8
    json: str = ""
    plot: str = ""
    fresh: bool = False
    quiet: bool = False


def run(config: Any, request: Request) -> int:
    """Answers, prints, writes; returns the exit code.

    Raises:
        UserError: a wrong topology, mesh, batch or file.
    """
    if not isinstance(config, Pretrain):
        raise UserError(f"a {type(config).__name__} can not be planned; it is no recipe such as Pretrain")
    for flag, name in {"--json": request.json, "--plot": request.plot}.items():
        if name and not pathlib.Path(name).absolute().parent.is_dir():
            raise UserError(f"{flag} is {name}: there is no folder {pathlib.Path(name).absolute().parent}")
    if request.plot:
        report.check(request.plot)
    topologies = [parse_topology(text) for text in request.topologies]
    config = begun(config)
    if isinstance(config, R1) and request.mode == "train":
        config = of_updates(config)  # the rows of an update are what it learns from at a time
    out = Console()
    if not out.is_terminal:
        out.width = 160  # a table in a file need not fit a screen
    if request.search:
        if len(topologies) > 1:
            raise UserError(f"--search takes one topology, but --topology names {len(topologies)}")
        if request.mesh:
            raise UserError(f"--search tries meshes, but --mesh names {request.mesh}; give one of them")
        return _search(config, request, topologies[0], out)

    answers = []
    for job in jobs(config, request, topologies):
        with progress(f"{job.mode} step for {job.topology}", request.quiet) as say:
            answers.append(ask(job, say, fresh=request.fresh))
    if len(answers) == 1:
        report.show(answers[0], out)
    else:
        report.show_several(answers, out)
    _write(request, answers[0] if len(answers) == 1 else answers, lambda: report.curves(answers))
    if len(answers) == 1 and answers[0]["fits"] is False:
        print(f"dsjax: {too_big(config, request, answers[0], topologies[0])}", file=sys.stderr)
        return EXIT_DOES_NOT_FIT
    return 0


def _search(config: Any, request: Request, topology: Topology, out: Console) -> int:
    base = Job(config, str(topology), request.mode, length=request.length)
    space = search.candidates(base, topology, sizes_of(request, topology))
    say_count = f"{len(space)} candidates; the compiler tries the {min(request.limit, len(space))} that look best"
    if not request.quiet:
        print(say_count, file=sys.stderr)
    tried = []
    for number, candidate in enumerate(space[: request.limit], 1):
        with progress(f"{number}/{min(request.limit, len(space))} {candidate}", request.quiet) as say:
            tried.append(search.try_one(candidate, say, fresh=request.fresh))
    search.show(tried, len(space), out)
    _write(request, search.to_json(tried, len(space)), lambda: search.picture(tried))
    return 0 if any(t.fits for t in tried) else EXIT_DOES_NOT_FIT


def _write(request: Request, result: Any, draw: Callable[[], Any]) -> None:
    if request.json:
        write_atomic(pathlib.Path(request.json), json.dumps(result, indent=1) + "\n")
    if request.plot:
        report.save(draw(), pathlib.Path(request.plot))


# ---------------------------------------------------------------- which questions


def begun(config: Any) -> Any:
    """The config with the model of the run that ``train.start_from`` names, as training takes it.

    If that run is not here, a config that gives a model itself is planned with that.

    Raises:
        UserError: neither is there.
    """
    run = RunFolder(pathlib.Path(config.train.start_from))
    if config.train.start_from and (run.config.exists() or config.model == DecoderConfig()):
        return config.begins(run)[0]
    return config


def sizes_of(request: Request, topology: Topology) -> Sequence[int]:
    """The batch sizes that are asked for; empty: none is."""
    if request.rows_per_chip is not None:
        return [request.rows_per_chip * topology.num_chips]
    return request.batch_sizes


def jobs(config: Any, request: Request, topologies: Sequence[Topology]) -> Iterator[Job]:
    """A question for each topology and batch size.

    Raises:
        UserError: the mesh does not fit a topology.
    """
    for topology in topologies:
        mesh = mesh_for(config, request, topology)
        sizes: Sequence[int | None] = sizes_of(request, topology) or [None]
        for size in sizes:
            placed = dataclasses.replace(config, mesh=mesh)
            yield Job(placed, str(topology), request.mode, size, request.length)


def mesh_for(config: Any, request: Request, topology: Topology) -> MeshConfig:
    """The mesh of a question.

    Raises:
        UserError: it does not fit the number of devices.
    """
    if request.mesh:
        words = request.mesh.split(",")
        free = any(word.split("=")[-1].strip() == "-1" for word in words)
        mesh = apply_overrides(MeshConfig(data=1 if free else -1), words)
    elif request.mode == "train":
        mesh = config.mesh
    else:
        mesh = inference_mesh(config.model, topology.num_devices)
    mesh.shape(topology.num_devices)
    return mesh


def inference_mesh(model: Any, num_devices: int) -> MeshConfig:
    """Experts over as many devices as divide their number, heads and widths over the rest; what is left takes rows."""
    experts = [g.ffn.num_experts for g in model.groups if isinstance(g.ffn, MoEConfig)]
    expert = math.gcd(num_devices, *experts) if experts else 1
    cut = [model.vocab_size, *(n for g in model.groups for n in (g.attention.num_heads, g.ffn.d_ff))]
    tensor = math.gcd(num_devices // expert, *cut)
    return MeshConfig(data=-1, expert=expert, tensor=tensor)


# ---------------------------------------------------------------- too big


def too_big(config: Any, request: Request, answer: dict[str, Any], topology: Topology) -> str:
    """The sentence for a job that does not fit, with the size from which it does, found by trying."""
    chip, capacity = topology.chip.name, answer["hbm_capacity_bytes"]
    needs = f"needs {gib(answer['hbm_bytes_per_chip'])} GiB a chip, {chip} has {gib(capacity)}"
    least = sum(answer["hbm_breakdown_bytes"].get(part, 0) for part in ("parameters", "optimizer"))
    before = answer["mesh"]
    config = dataclasses.replace(config, mesh=mesh_for(config, request, topology))
    for bigger in larger(topology):
        factor = bigger.num_devices / topology.num_devices
        if least / factor > capacity:  # even if everything were cut: not worth a compilation
            continue
        try:
            job = grown(config, request, before, bigger)
            with progress(f"{needs}; trying {bigger}", request.quiet) as say:
                found = ask(job, say, fresh=request.fresh)
        except UserError as error:
            if not request.quiet:
                print(f"{bigger}: {error}", file=sys.stderr)
            continue
        if found["fits"]:
            mesh = search.mesh_words(found["mesh"], job.config.mesh)
            rows = f", data.batch_size={found['batch_size']}" if found["batch_size"] != answer["batch_size"] else ""
            return f"{needs}; fits from {bigger} (--mesh {mesh}{rows})"
    return f"{needs}; no {chip} topology was found on which it fits; try --search, or another mesh"


def grown(config: Any, request: Request, mesh: dict[str, int], topology: Topology) -> Job:
    """The same question on a larger topology: ``fsdp`` (training) or ``tensor`` (inference) takes the new devices.

    A batch with fewer rows than there are devices to cut it over is raised to one row each.
    """
    axis = "fsdp" if request.mode == "train" else "tensor"
    sizes: dict[str, Any] = dict.fromkeys(MESH_AXES, 1) | mesh
    sizes[axis] *= topology.num_devices // math.prod(sizes.values())
    rows = math.prod(sizes[a] for a in ("data", "fsdp", "expert")) if request.mode == "train" else sizes["data"]
    size = request.batch_sizes[0] if request.batch_sizes else (config.data.batch_size if request.mode == "train" else 1)
    micro = config.train.accumulate if request.mode == "train" else 1
    size = math.ceil(size / (rows * micro)) * rows * micro
    placed = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))
    return Job(placed, str(topology), request.mode, size, request.length)


def gib(size: float) -> str:
    """Bytes as GiB with two digits behind the point, trailing zeros cut."""
    return f"{size / 2**30:.2f}".rstrip("0").rstrip(".")


# ---------------------------------------------------------------- progress


@contextlib.contextmanager
def progress(title: str, quiet: bool) -> Iterator[Say]:
    """Shows what is being compiled and for how long; without a terminal, a line now and then."""
    begin = time.monotonic()
    if quiet:
        yield lambda text: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(f"{title}: {text} ({time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title)
        yield lambda text: bar.update(task, description=f"{title}: {text}")
