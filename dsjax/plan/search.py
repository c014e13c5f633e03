"""Which mesh, remat policy and batch size: all that make sense, ranked by arithmetic, the best ones compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dsjax.config import UserError
from dsjax.nn.moe import MoEConfig
from dsjax.plan.chips import Topology, ici_bandwidth
from dsjax.plan.measure import Job
from dsjax.plan.process import ask
from dsjax.plan.report import NAMES, roofline_cells
from dsjax.sharding import MESH_AXES, MeshConfig, training_rules

DECODE_BATCHES = (1, 4, 16, 64, 256)
# Beyond one host's links, tensor parallelism waits for its all-reduces.
MOST_TENSOR = 16
ROOM = 1.15  # arithmetic may be this far off before it rules a candidate out


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A job, and what arithmetic expects of it: bytes of a chip, and seconds of a step."""

    job: Job
    bytes: float
    seconds: float

    @property
    def mesh(self) -> dict[str, int]:
        """Axes of more than one device."""
        sizes = {axis: getattr(self.job.config.mesh, axis) for axis in MESH_AXES}
        return {axis: size for axis, size in sizes.items() if size > 1}

    def __str__(self) -> str:
        return self.override()

    def override(self) -> str:
        """The words that make ``dsjax train`` or ``dsjax plan`` take it."""
        config, batch, length = self.job.config, self.job.batch_size, self.job.length
        mesh = mesh_words({"data": 1} | self.mesh, config.mesh)
        if self.job.mode != "train":
            return f"--mesh {mesh} --batch {batch}" + (f" --length {length}" if length else "")
        asked = {"batch_size": batch, "seq_len": length}
        words = [f"data.{key}={n}" for key, n in asked.items() if n and n != getattr(config.data, key)]
        return " ".join([f"mesh={mesh}", f"compute.remat={config.compute.remat}", *words])


def mesh_words(sizes: Mapping[str, int], mesh: MeshConfig) -> str:
    """Axes with these sizes and what else ``mesh`` says, as a user writes them."""
    words = [f"{axis}={size}" for axis, size in sizes.items()]
    return ",".join(words + ["expert_over_data=true"] * mesh.expert_over_data)


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate, and the compiler's answer, or why there is none."""

    candidate: Candidate
    answer: dict[str, Any] | None
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether it can be run."""
        return self.answer is not None and self.answer["fits"] is not False

    @property
    def seconds(self) -> float:
        """The roofline of a token: of steps with different batches the smaller is the better."""
        if self.answer is None or not self.answer["tokens_per_second_bound"]:
            return math.inf
        return 1 / self.answer["tokens_per_second_bound"]


def candidates(base: Job, topology: Topology, batch_sizes: Sequence[int] = ()) -> list[Candidate]:
    """All that arithmetic does not rule out, best first.

    Args:
        base: the job; the sizes of its mesh, its remat policy and its batch are replaced.
        topology: the chips.
        batch_sizes: to try; empty: the config's when training, :data:`DECODE_BATCHES` in inference.

    Raises:
        UserError: nothing is left.
    """
    config, training = base.config, base.mode == "train"
    sizes = batch_sizes or ((config.data.batch_size,) if training else DECODE_BATCHES)
    policies = ("none", "dots", "full") if training else (config.compute.remat,)
    found = []
    for mesh, size, remat in itertools.product(meshes(base, topology), sizes, policies):
        if not divides(base, mesh, size):
            continue
        placed = dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, **mesh),
            compute=dataclasses.replace(config.compute, remat=remat),
        )
        job = dataclasses.replace(base, config=placed, batch_size=size)
        found.append(Candidate(job, *estimate(job, topology, mesh)))
    capacity = topology.chip.hbm_bytes
    fitting = [c for c in found if capacity is None or c.bytes <= capacity * ROOM]
    if not found:
        raise UserError(f"no mesh divides batch, heads and widths of this job over the {topology.num_devices} devices")
    if not fitting:
        least = min(found, key=lambda c: c.bytes)
        raise UserError(
            f"nothing fits on {topology}: even {least} needs about {least.bytes / 2**30:,.1f} GiB a chip,"
            f" {topology.chip.name} has {(capacity or 0) / 2**30:,.2f}"
        )
    return sorted(fitting, key=lambda c: (c.seconds / (c.job.batch_size or 1), c.bytes))


def meshes(job: Job, topology: Topology) -> Iterator[dict[str, int]]:
    """Ways to share the devices out among the axes."""
    n, model = topology.num_devices, job.config.model
    experts = [g.ffn.num_experts for g in model.groups if isinstance(g.ffn, MoEConfig)]
    most_experts = math.gcd(n, *experts) if experts else 1
    for expert, tensor in itertools.product(_divisors(most_experts), _divisors(n)):
        if n % (expert * tensor) or (job.mode == "train" and tensor > MOST_TENSOR):
            continue
        rest = n // (expert * tensor)
        for fsdp in _divisors(rest) if job.mode == "train" else [1]:
            for context in _divisors(rest // fsdp) if job.mode == "train" else [1]:
                data = rest // fsdp // context
                yield {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor, "context": context}


def divides(job: Job, mesh: dict[str, int], batch_size: int) -> bool:
    """Whether batch, heads and widths can be cut so, and the context need be."""
    config, model = job.config, job.config.model
    attention = [g.attention for g in model.groups]
    widths = [g.ffn.d_ff for g in model.groups] + [model.vocab_size]
    if any(width % mesh["tensor"] for width in widths):
        return False
    if job.mode != "train":
        return batch_size % mesh["data"] == 0 and all(a.num_heads % mesh["tensor"] == 0 for a in attention)
    micro = batch_size // config.train.accumulate
    rows = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    length = job.length or config.data.seq_len
    over = math.prod(mesh[axis] for axis in training_rules(config.mesh).expert)
    return (
        micro % rows == 0
        and all(moe.num_experts % over == 0 for moe in model.experts().values())
        and (mesh["context"] == 1 or (micro == rows and length % mesh["context"] == 0))
        and model.d_model % mesh["fsdp"] == 0
        and all(a.training_heads % mesh["tensor"] == 0 for a in attention)
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# ---------------------------------------------------------------- arithmetic


def estimate(job: Job, topology: Topology, mesh: dict[str, int]) -> tuple[float, float]:
    """Bytes of a chip and seconds of a step, by hand; good enough to rank, not to rely on."""
    return (_training if job.mode == "train" else _inference)(job, topology, mesh)


def _parameters(model: Any, mesh: dict[str, int]) -> tuple[float, float]:
    """Parameters that a device would have with ``fsdp`` undone: of experts, and all others."""
    experts = 0
    for group, num_layers in model.sized_groups():
        if isinstance(group.ffn, MoEConfig):
            experts += num_layers * 3 * model.d_model * group.ffn.d_ff * group.ffn.num_experts
    others = model.num_params() - experts
    return experts / mesh["expert"] / mesh["tensor"], others / mesh["tensor"]


def _kept_widths(model: Any, remat: str) -> float:
    """Channels that the layers keep of each position for the backward pass, all layers together."""
    total = 0.0
    for group, num_layers in model.sized_groups():
        a, moe = group.attention, isinstance(group.ffn, MoEConfig)
        inner = group.ffn.d_ff * ((group.ffn.top_k + group.ffn.num_shared_experts) if moe else 1)
        products = a.product_channels + 2 * inner + model.d_model
        total += num_layers * (model.d_model + {"full": 0, "dots": products, "none": 2 * products}[remat])
    return total


def _training(job: Job, topology: Topology, mesh: dict[str, int]) -> tuple[float, float]:
    config, chip = job.config, topology.chip
    model, length = config.model, job.length or config.data.seq_len
    batch, n = job.batch_size or config.data.batch_size, topology.num_devices
    experts, others = _parameters(model, mesh)
    experts /= mesh["data"] if config.mesh.expert_over_data else 1
    held = (experts + others) / mesh["fsdp"]
    tokens = batch * length / n * mesh["tensor"]  # of a device, whose tensor neighbours have the same ones
    width = 2 if config.compute.dtype == "bfloat16" else 4
    kept = tokens / config.train.accumulate * _kept_widths(model, config.compute.remat) * width / mesh["tensor"]
    size = 16 * held + kept

    again = 1 if config.compute.remat == "full" else 0
    flops = model.flops_per_token(length) * batch * length * (3 + again) / 3
    peak, link = chip.peak("bf16"), ici_bandwidth(topology, [0])
    if peak is None or not link:
        return size * chip.devices_per_chip, flops
    sent = (experts + others) * (mesh["fsdp"] > 1) * width * (2 + again + 1)  # gathers, and the gradients' scatter
    sent += held * 4 * 2 * (mesh["data"] > 1)
    stream = tokens * model.d_model * width * model.num_layers * (2 + again)
    sent += stream * 2 * 2 * (mesh["tensor"] > 1)
    sent += stream * (mesh["expert"] - 1) * 2
    sent += stream * mesh["context"] * (mesh["context"] > 1)
    return size * chip.devices_per_chip, max(flops / topology.num_chips / peak, sent / link)


def _inference(job: Job, topology: Topology, mesh: dict[str, int]) -> tuple[float, float]:
    config, chip = job.config, topology.chip
    model, length = config.model, job.length or config.data.seq_len
    batch = job.batch_size or 1
    experts, others = _parameters(model, mesh)
    cache = model.kv_bytes(length, config.compute.dtype) * batch / topology.num_devices
    width = 2 if config.compute.dtype == "bfloat16" else 4
    size = (experts + others) * width + cache
    tokens = batch * (length if job.mode == "prefill" else 1)
    flops = model.flops_per_token(length, training=False) * tokens
    peak, link = chip.peak("bf16"), ici_bandwidth(topology, [0])
    if peak is None or chip.hbm_bandwidth is None:
        return size * chip.devices_per_chip, flops
    top = [g.ffn.top_k / g.ffn.num_experts for g in model.groups if isinstance(g.ffn, MoEConfig)]
    visited = 1 - (1 - top[0]) ** tokens if top else 1.0
    read = (experts * visited + others) * width + cache
    sent = tokens / mesh["data"] * model.d_model * width * model.num_layers * 4 * (topology.num_devices > 1)
    hbm = chip.hbm_bandwidth / chip.devices_per_chip
    seconds = max(flops / topology.num_chips / peak, read / hbm, sent / link if link else 0.0)
    return size * chip.devices_per_chip, seconds


# ---------------------------------------------------------------- trying, showing


def try_one(candidate: Candidate, say: Callable[[str], None], *, fresh: bool = False) -> Tried:
    """Asks the compiler."""
    try:
        return Tried(candidate, ask(candidate.job, say, fresh=fresh))
    except UserError as error:
        return Tried(candidate, None, str(error))


def ranked(tried: Sequence[Tried]) -> list[Tried]:
    """What fits first, the fastest of it first."""
    return sorted(tried, key=lambda t: (not t.fits, t.seconds))


def show(tried: Sequence[Tried], count: int, out: Console) -> None:
    """Prints a table, and the words to use the best."""
    table = Table(box=None, padding=(0, 1))
    for head in ("candidate", "GiB/chip", "guessed", "fits", *NAMES, "bound", "MFU", "tokens/s"):
        table.add_column(head, justify="left" if head == "candidate" else "right", overflow="fold")
    for one in ranked(tried):
        guessed, answer = f"{one.candidate.bytes / 2**30:,.1f}", one.answer
        if answer is None:
            table.add_row(str(one.candidate), "", guessed, one.error[:60])
            continue
        table.add_row(
            str(one.candidate),
            f"{answer['hbm_bytes_per_chip'] / 2**30:,.1f}",
            guessed,
            {True: "yes", False: "no", None: "?"}[answer["fits"]],
            *roofline_cells(answer),
        )
    out.print(table)
    best = ranked(tried)[0]
    if best.fits:
        out.print(f"best of the {len(tried)} compiled ({count} candidates): {best.candidate.override()}", style="bold")
    else:
        out.print(f"none of the {len(tried)} compiled fits ({count} candidates); try a higher --limit", style="bold")


def to_json(tried: Sequence[Tried], count: int) -> dict[str, Any]:
    """What ``--json`` writes: the best override, and every candidate with its plan."""
    best = ranked(tried)[0]
    rows = [
        {
            "override": t.candidate.override(),
            "guessed_bytes_per_chip": t.candidate.bytes,
            "error": t.error,
            "plan": t.answer,
        }
        for t in ranked(tried)
    ]
    return {"best": best.candidate.override() if best.fits else None, "candidates": count, "compiled": rows}


def picture(tried: Sequence[Tried]) -> Any:
    """Memory against roofline time of each candidate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = {"mxu": "tab:blue", "hbm": "tab:orange", "ici": "tab:green", None: "tab:gray"}
    seen: set[Any] = set()
    for one in ranked(tried):
        answer = one.answer
        if answer is None or answer["tokens_per_second_bound"] is None:
            continue
        bound, x = answer["bound"], answer["hbm_bytes_per_chip"] / 2**30
        label = None if bound in seen else NAMES.get(bound, "?")
        seen.add(bound)
        axes.plot(x, one.seconds * 1e6, "o" if one.fits else "x", color=colors[bound], label=label)
        note = str(one.candidate).replace("mesh=", "").replace("--mesh ", "").replace(" ", "\n")
        axes.annotate(note, (x, one.seconds * 1e6), fontsize=6, xytext=(4, 2), textcoords="offset points")
    capacity = next((t.answer["hbm_capacity_bytes"] for t in tried if t.answer), None)
    if capacity:
        axes.axvline(capacity / 2**30, color="gray", linestyle="--", label="memory of a chip")
    axes.set(xlabel="GiB of a chip", ylabel="microseconds of a token, at best", yscale="log")
    axes.grid(alpha=0.3)
    if seen or capacity:
        axes.legend(title="bound by")
    return figure
