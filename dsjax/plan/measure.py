"""What the compiler says of one step on one topology; runs in a process of its own, which an impossible one may kill.

python -m dsjax.plan.measure JOB.json RESULT.json     # called by dsjax.plan.command, which sets the environment
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import re
import sys
import time
from typing import Any

import jax
import numpy as np

from dsjax.config import UserError, from_dict, to_dict
from dsjax.plan.chips import Topology, energy_joules, parse_topology, topology_options
from dsjax.plan.flops import Flops, count_flops
from dsjax.plan.hlo import HBM, Instruction, Module, Shape, parse
from dsjax.plan.programs import Mode, Program, make_program
from dsjax.plan.roofline import make_roofline
from dsjax.plan.traffic import (
    Collective,
    HbmTraffic,
    bytes_by_axis,
    collectives,
    hbm_bytes,
    loops_of_unknown_length,
    stacked_bytes,
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One question: the step of ``mode`` of a config on a topology.

    Attributes:
        config: a recipe's config; its mesh is the mesh.
        topology: for example ``v5p:4x8x8``.
        mode: train, prefill or decode.
        batch_size: sequences; None: the config's (training), 1 (inference).
        length: tokens of a sequence; None: the config's.
    """

    config: Any
    topology: str
    mode: Mode
    batch_size: int | None = None
    length: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "config": to_dict(self.config)}


def devices_of(topology: Topology) -> list[Any]:
    """The devices of a topology: a TPU's as libtpu describes them, or of this process for h100 and cpu."""
    if topology.chip.torus_dims:
        from jax.experimental import topologies

        options = topology_options(topology)
        platform, name = options.pop("platform"), options.pop("topology_name")
        return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
    return jax.devices()[: topology.num_devices]


def platform_of(topology: Topology) -> str:
    """What JAX calls the platform of a topology's chips."""
    return {"h100": "cuda", "cpu": "cpu"}.get(topology.chip.name, "tpu")


def places_of(mesh: Any, topology: Topology) -> np.ndarray | None:
    """Grid coordinates of each device of the flattened mesh; None without a grid."""
    if not topology.chip.torus_dims:
        return None
    return np.array([device.coords[: len(topology.dims)] for device in mesh.devices.flat])


def measure(job: Job, say: Any = lambda text: None) -> dict[str, Any]:
    """Traces, lowers and compiles the step, and reads what it takes; see docs/plan.md for the keys.

    Raises:
        UserError: mesh, batch or model do not fit the devices.
    """
    topology = parse_topology(job.topology)
    say("tracing")
    program = make_program(job.config, job.mode, devices_of(topology), batch_size=job.batch_size, length=job.length)
    platform = platform_of(topology)
    flops = count_flops(program.traced.jaxpr, platform=platform, ragged_share=program.ragged_share)
    begin = time.perf_counter()
    say("lowering")
    if platform == "cuda":  # does it lower for it at all?
        program.traced.lower(lowering_platforms=("cuda",))
    lowered = program.traced.lower()
    say("compiling")
    compiled, needed = compile_or_need(lowered)
    seconds = time.perf_counter() - begin
    say("reading the program")
    return report(job, topology, program, flops, compiled, needed, seconds)


def compile_or_need(lowered: Any) -> tuple[Any, int]:
    """The executable and 0, or None and the bytes that it would need of each device.

    Raises:
        RuntimeError: the compiler failed for another reason.
    """
    try:
        return lowered.compile(), 0
    except RuntimeError as error:
        # What libtpu 0.0.42 calls temporaries holds the arguments too.
        found = re.search(
            r"\(([0-9.]+)([KMGT])\) exceeds available HBM|Used ([0-9.]+)([KMGT]) of [^ ]+ hbm", str(error)
        )
        if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
            raise
        number, unit = found[1] or found[3], found[2] or found[4]
        return None, int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit])


def report(
    job: Job, topology: Topology, program: Program, flops: Flops, compiled: Any, needed: int, seconds: float
) -> dict[str, Any]:
    """The result as JSON holds it."""
    chip, mesh = topology.chip, program.mesh
    notes = [f"FLOPs of the kernel {kernel}" for kernel in dict.fromkeys(flops.kernels)]
    notes += [f"the loop {name} does not tell its length; counted once" for name in flops.unknown_loops]
    moved: list[Collective] | None = None
    traffic: HbmTraffic | None = None
    if compiled is not None:
        module = parse(compiled.as_text())
        moved = collectives(module, dict(mesh.shape))
        traffic = hbm_bytes(module, cost_of=functools.partial(kernel_traffic, module, program))
        notes += [f"the loop {name} does not tell its length; counted once" for name in loops_of_unknown_length(module)]
        notes += custom_calls(module)
        saved = stacked_bytes(module, program.parameter_shapes)
        breakdown, buffers = memory(compiled, program, saved, peak=platform_of(topology) == "tpu")
    else:
        breakdown, buffers = dict(program.bytes_by_part), needed
        breakdown["temporaries"] = max(needed - sum(breakdown.values()), 0)
    breakdown = {name: size * chip.devices_per_chip for name, size in breakdown.items()}
    total = sum(breakdown.values())
    if chip.name in ("h100", "cpu"):
        notes += [NOTES[chip.name]]
    roofline = make_roofline(
        topology,
        flops=flops.executed,
        hbm_bytes=traffic.read + traffic.written if traffic else None,
        collectives=moved,
        places=places_of(mesh, topology),
    )
    fast, peak = roofline.seconds if compiled is not None else None, chip.peak("bf16")
    sent = None if moved is None else sum(c.bytes * c.times for c in moved)
    energy = None
    if traffic is not None and sent is not None:
        energy = energy_joules(
            chip,
            flops.executed,
            (traffic.read + traffic.written) * topology.num_devices,
            sent * topology.num_devices,
        )
    config = job.config
    return {
        "mode": job.mode,
        "topology": str(topology),
        "chip": chip.name,
        "num_chips": topology.num_chips,
        "num_devices": topology.num_devices,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "batch_size": job.batch_size or (config.data.batch_size if job.mode == "train" else 1),
        "length": job.length or config.data.seq_len,
        "remat": config.compute.remat,
        "dtype": config.compute.dtype,
        "num_params": config.model.num_params(),
        "num_active_params": config.model.num_active_params(),
        "tokens_per_step": program.tokens,
        "hbm_bytes_per_chip": total,
        "hbm_breakdown_bytes": breakdown,
        "hbm_sum_of_buffers_bytes": buffers * chip.devices_per_chip,
        "hbm_capacity_bytes": chip.hbm_bytes,
        "fits": None if chip.hbm_bytes is None else compiled is not None and total <= chip.hbm_bytes,
        "flops_per_step": flops.model,
        "flops_of_config": program.model_flops,
        "flops_recomputed": flops.recomputed,
        "flops_wasted": flops.wasted,
        "flops_optimizer": flops.optimizer,
        "collective_bytes": None if moved is None else bytes_by_axis(moved),
        "hbm_traffic_bytes": None if traffic is None else dataclasses.asdict(traffic),
        "roofline_seconds": {name: getattr(roofline, name) for name in ("mxu", "hbm", "ici")},
        "bound": roofline.bound if compiled is not None else None,
        "best_mfu": None if fast is None or peak is None else flops.model / (fast * topology.num_chips * peak),
        "tokens_per_second_bound": None if fast is None else program.tokens / fast,
        "energy_joules_per_token": energy and {k: v / program.tokens for k, v in energy.items()},
        "compile_seconds": seconds,
        "versions": versions(),
        "notes": notes,
    }


def memory(compiled: Any, program: Program, saved: int, *, peak: bool) -> tuple[dict[str, int], int]:
    """Bytes that one device needs by what they are for, and the sum of all buffers.

    What the step takes is exact. Of the compiler's temporaries, gradients and saved activations are told apart by
    arithmetic: a gradient is as large as its parameter, an activation is stacked over the layers of a loop.

    Args:
        compiled: the executable.
        program: what was compiled.
        saved: bytes of the activations that wait for the backward pass.
        peak: count what lives at the same time at most, as libtpu does when it refuses a program, not the sum of all
            buffers, which on a TPU may be more than there is (MaxText's log of DeepSeek-V2-Lite on v5p has 100.4 GiB
            of 95.7, and it ran).
    """
    stats, parts = compiled.memory_analysis(), dict(program.bytes_by_part)
    kept = stats.output_size_in_bytes - stats.alias_size_in_bytes
    sum_of_buffers = stats.argument_size_in_bytes + stats.temp_size_in_bytes + kept
    total = min(stats.peak_memory_in_bytes or sum_of_buffers, sum_of_buffers) if peak else sum_of_buffers
    left = max(total - sum(parts.values()), 0)
    if "optimizer" in parts:
        parts["gradients_and_activations"] = min(parts["parameters"] + saved, left)
        left -= parts["gradients_and_activations"]
    parts["temporaries"] = left
    parts["program"] = stats.generated_code_size_in_bytes
    return parts, sum_of_buffers + stats.generated_code_size_in_bytes


def kernel_traffic(module: Module, program: Program, instruction: Instruction) -> tuple[int, int] | None:
    """HBM bytes (read, written) of a kernel that does not read all of its operands; None: it does, or is no kernel."""
    if instruction.target == "tpu_custom_call" and instruction.name.startswith("paged_attention"):
        # Of a pool it reads the pages of some rows: as it states itself, for rows that are full.
        stated = re.search(r'"bytes_accessed":"?(\d+)', instruction.attributes.get("backend_config", ""))
        written = sum(shape.num_bytes for shape in instruction.shapes if shape.space == HBM)
        return None if stated is None else (max(int(stated[1]) - written, 0), written)
    return ragged_traffic(module, instruction, program)


def ragged_traffic(module: Module, instruction: Instruction, program: Program) -> tuple[int, int] | None:
    """HBM bytes (read, written) of a product by experts, XLA's kernel or one of `grouped_matmul`; None: not one.

    It visits the experts that have rows. With balanced routing those are, of a device's E experts,
    E (1 - (1 - 1/E)^rows): all of them in training, few when one token is decoded; in inference the operand holds the
    experts of all layers, of which one layer's have rows. Rows that belong to no group are not read, and written only
    where they must become 0. Rows that are gathered, (T, 1, words), are read once for each that there is.
    """
    if instruction.target != "tpu_custom_call" or not instruction.name.startswith(("ragged-dot", "grouped_")):
        return None
    operands = [shape for operand in module.operands(instruction) for shape in operand.shapes if len(shape.dims) > 1]
    if not operands:  # which rows are whose: counts only
        return 0, 0
    flat = [shape.dims[0] for shape in (*operands, *instruction.shapes) if len(shape.dims) == 2]
    rows = min(max(flat) * program.ragged_share, program.pairs_of_device)  # kernels round few rows up

    def moved(shape: Shape) -> float:
        if shape.space != HBM:
            return 0.0
        if len(shape.dims) == 2:
            return shape.num_bytes * program.ragged_share
        if shape.dims[1] == 1:
            return shape.num_bytes / shape.dims[0] * rows
        experts = min(program.experts_of_device or shape.dims[0], shape.dims[0])
        visited = 1.0 if experts == 1 else -experts * math.expm1(rows * math.log1p(-1 / experts))
        return shape.num_bytes * visited / shape.dims[0]

    if instruction.name.startswith(("grouped_matmul", "grouped_swiglu_dx")):
        written = sum(shape.num_bytes for shape in instruction.shapes if shape.space == HBM)
    else:
        written = int(sum(map(moved, instruction.shapes)))
    return int(sum(map(moved, operands))), written


def custom_calls(module: Module) -> list[str]:
    """What the program holds that the compiler does not look into."""
    found = collections.Counter(
        re.sub(r"[.\d]+$", "", i.name)
        for computation in module.computations.values()
        for i in computation.instructions.values()
        if i.target == "tpu_custom_call" and "metadata" not in i.name
    )
    by_rows = "stated by rows at balanced routing"
    stated = {"ragged-dot": by_rows, "grouped_": by_rows, "paged_attention": "those of rows that are full"}

    def bytes_of(name: str) -> str:
        return next((text for start, text in stated.items() if name.startswith(start)), "its operands and results")

    return [
        f"{name} ({count} in the program): a kernel; its HBM bytes are {bytes_of(name)}"
        for name, count in sorted(found.items())
    ]


NOTES = {
    "h100": "no GPU compiler is here: the step lowers for cuda, memory, collectives and HBM bytes are those of XLA:CPU"
    " for the same mesh, where less is fused; FLOPs are exact",
    "cpu": "times are not meant for a CPU: nothing says what this one can do",
}


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu", "flax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def main(arguments: list[str]) -> None:
    """Reads a job, writes its result, or ``{"error": sentence}`` for a user's mistake."""
    source, target = map(pathlib.Path, arguments)
    given = json.loads(source.read_text())
    job = Job(**{**given, "config": from_dict(given["config"])})
    try:
        result = measure(job, say=lambda text: print(f"phase: {text}", file=sys.stderr, flush=True))
    except UserError as error:
        result = {"error": str(error)}
    target.write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
