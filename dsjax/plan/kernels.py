"""Kernels whose static schedules are counted (``dsjax kernels``), and one count, in a process of its own.

python -m dsjax.plan.kernels CASE.json RESULT.json     # called by dsjax.plan.kernels_command

Such a process compiles one program for one chip, with libtpu's dump of schedules, counts the Pallas kernels in it
(:mod:`dsjax.plan.schedule`), and deletes the dump. Another kernel is a module with the functions that KERNELS names.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.config import UserError
from dsjax.plan import schedule
from dsjax.plan.chips import Chip, Topology, parse_topology, valid_topologies
from dsjax.plan.hlo import Instruction, parse
from dsjax.plan.measure import devices_of
from dsjax.plan.prefetch import calls_of_each, prefetched
from dsjax.plan.traffic import hbm_bytes

KERNELS = {
    "segmented_attention": "dsjax.plan.kernels_attention",
    "grouped_matmul": "dsjax.plan.kernels_grouped_matmul",
}  # modules like KernelModule
# Edge of a matrix unit, and multiplications with an addition of all units of a core in a cycle. The evidence: the clock
# that follows from these and a chip's peak is the known one, and a product of matrices takes a little more than its
# floor on every chip (tests/test_plan_schedule.py).
MXU_SIZE = {"v4": 128, "v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}
MXU_OPERATIONS = {"v4": 4 * 128**2, "v5e": 4 * 128**2, "v5p": 4 * 128**2, "v6e": 4 * 256**2, "tpu7x": 4 * 256**2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to be compiled.

    Attributes:
        kernel: a key of KERNELS.
        implementation: ours, or what it is compared with.
        chip: v4, v5e, v5p, v6e, tpu7x.
        length: of the sequence, or of all rows.
        backward: forward and backward instead of forward.
        tiles: of the implementation; empty: what it chooses.
        variant: what else is told apart, instead of lengths.
    """

    kernel: str
    implementation: str
    chip: str
    length: int
    backward: bool = False
    tiles: tuple[tuple[str, int], ...] = ()
    variant: str = ""

    @property
    def measured(self) -> str:
        """``forward_4096``, ``forward_backward_16384``, ``forward_skewed``."""
        return f"forward_{'backward_' if self.backward else ''}{self.variant or self.length}"

    @staticmethod
    def from_json(case: dict[str, Any]) -> Case:
        """Of what ``dataclasses.asdict`` gave, through JSON."""
        return Case(**case | {"tiles": tuple((name, size) for name, size in case["tiles"])})

    def __str__(self) -> str:
        tiles = " " + ", ".join(f"{name} {size}" for name, size in self.tiles) if self.tiles else ""
        return f"{self.implementation}, {self.measured.replace('_', ' ')}{tiles}"


@dataclasses.dataclass(frozen=True)
class Program:
    """What a case compiles.

    Attributes:
        function: of arrays like ``arguments``.
        seconds: that the host needed to prepare it.
    """

    function: Callable[..., Any]
    arguments: Sequence[jax.ShapeDtypeStruct]
    seconds: float = 0.0


class KernelModule(Protocol):
    """What ``dsjax kernels`` asks of a kernel.

    Attributes:
        PEERS: implementations that are not ours.
        TABLE: the file of tiles that the kernel reads, in the repository.
    """

    PEERS: tuple[str, ...]
    TABLE: pathlib.Path

    def cases(self, chip: str) -> list[Case]:
        """What a report needs."""

    def build(self, case: Case) -> Program:
        """What is compiled."""

    def summary(self, chip: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What is reported: ratios, and ``rows`` of the table."""

    def peer_preparation(self) -> float:
        """Seconds of the host that the first peer needs before it can be compiled, at the largest length."""

    def search(self, chip: str) -> list[Case]:
        """Tiles to be tried."""

    def write_table(self, path: pathlib.Path, results: Sequence[dict[str, Any]]) -> None:
        """Keeps the best of a search."""


def module_of(kernel: str) -> Any:
    """The :class:`KernelModule` of a kernel.

    Raises:
        UserError: there is none.
    """
    if kernel not in KERNELS:
        raise UserError(f"there is no kernel {kernel!r}; those whose schedules are counted are {', '.join(KERNELS)}")
    return importlib.import_module(KERNELS[kernel])


def topology_of(chip: str) -> Topology:
    """The smallest topology of a chip; one of its devices is compiled for.

    Raises:
        UserError: there is no TPU of that name.
    """
    if chip not in schedule.DELAY_SLOTS:
        raise UserError(f"--chip is {chip!r}; it is one of {', '.join(schedule.DELAY_SLOTS)}")
    return parse_topology(valid_topologies(chip)[0])


def clock(chip: Chip) -> float:
    """Cycles a second: what the chip's peak makes of the size of its matrix units."""
    return chip.peak_flops["bf16"] / (chip.tensor_cores * 2 * MXU_OPERATIONS[chip.name])


def cores_of(chip: Chip) -> int:
    """Cores that share the grid of a kernel on one device; what is counted is the part of one."""
    return chip.tensor_cores // chip.devices_per_chip


def hbm_cycles(chip: Chip, kernel_bytes: int | None, outside_bytes: int) -> float | None:
    """Cycles in which a device's memory moves what its cores copy, and what XLA moves around their kernels."""
    if kernel_bytes is None or chip.hbm_bandwidth is None:
        return None
    moved = kernel_bytes * cores_of(chip) + outside_bytes
    return moved / (chip.hbm_bandwidth / chip.devices_per_chip) * clock(chip)


def matmul_cycles(chip: str, rows: int, contracted: int, columns: int) -> float:
    """Least cycles of a matrix product with one operand of contracted x columns held in the matrix units."""
    size = MXU_SIZE[chip]
    padded = -(-contracted // size) * -(-columns // size) * size**2
    return rows * padded / MXU_OPERATIONS[chip]


# ---------------------------------------------------------------- one case


def measure(case: Case, folder: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Compiles a case and counts its kernels; ``LIBTPU_INIT_ARGS`` must tell libtpu to dump into ``folder``."""
    say("tracing")
    program = module_of(case.kernel).build(case)
    mesh = Mesh(np.array(devices_of(topology_of(case.chip))[:1]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in program.arguments]
    begin = time.monotonic()
    with jax.set_mesh(mesh):  # a kernel asks it for the chip
        traced = jax.jit(program.function).trace(*arguments)
        lowered = traced.lower()
        prepared = time.monotonic()
        say("compiling")
        compiled = lowered.compile()
    done = time.monotonic()
    say("counting")
    scalars: dict[str, dict[int, list[int]]] = {}
    calls = prefetched(traced.jaxpr)
    for called in calls:
        if scalars.setdefault(called.name, called.words()) != called.words():
            raise schedule.ScheduleError(f"two kernels are called {called.name} and prefetch different scalars")
    kernels = schedule.read_kernels(folder)
    times = calls_of_each(calls, [kernel.name for kernel in kernels])
    counts = [schedule.count(k, case.chip, scalars.get(k.name)).times(times[k.name]) for k in kernels]
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    return {
        "case": dataclasses.asdict(case),
        "device_kind": mesh.devices.flat[0].device_kind,
        "kernels": [_to_json(count) for count in counts],
        "cycles": sum(count.cycles for count in counts),
        "skipped_cycles": sum(count.skipped_cycles for count in counts),
        "kernel_hbm_bytes": _sum(count.hbm_bytes for count in counts),
        "outside_hbm_bytes": _outside(text),
        "outside_cycles_by_compiler": sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "prepare_seconds": program.seconds + prepared - begin,
        "compile_seconds": done - prepared,
    }


def _sum(values: Any) -> int | None:
    found = list(values)
    return None if None in found else sum(found)


def _outside(text: str) -> int:
    """Bytes that XLA moves around the kernels."""

    def of_kernel(instruction: Instruction) -> tuple[int, int] | None:
        return (0, 0) if instruction.target == "tpu_custom_call" else None

    moved = hbm_bytes(parse(text), of_kernel)
    return moved.read + moved.written


def _to_json(count: schedule.Count) -> dict[str, Any]:
    regions = [dataclasses.asdict(region) | {"cycles": region.cycles} for region in count.regions]
    return dataclasses.asdict(count) | {"regions": regions}


def main(arguments: list[str]) -> None:
    """Reads a case, writes its result, or ``{"error": sentence}``."""
    question, answer = map(pathlib.Path, arguments)
    case = Case.from_json(json.loads(question.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(prefix="dsjax-kernels-") as folder:
        os.environ["LIBTPU_INIT_ARGS"] = schedule.dump_flags(pathlib.Path(folder))
        try:
            result = measure(case, pathlib.Path(folder), _say)
        except (UserError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            sentence = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            result = {"error": sentence[:300]}
    answer.write_text(json.dumps(result), encoding="utf-8")


def _say(text: str) -> None:
    print(f"phase: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
