"""Cycles of a TPU kernel without a TPU: the compiler's schedule, with its scalar unit played through.

A TPU core runs one bundle of instructions a cycle, in the order that the compiler has fixed, unless it waits for a
copy. With ``LIBTPU_INIT_ARGS`` as :func:`dump_flags` says, libtpu writes for each kernel

- ``*-packed-bundles-post-ra.txt``: the bundles, one address each, with all scalar instructions, branches and labels,
- ``*-pre-delay_hlo-static-per-bundle-utilization.txt``: a row a bundle, in the same order: slots used of each unit.

How often a bundle runs is not guessed from the shape of the code. What decides it (grid indices, trip counts, the
predicates of ``pl.when``) is computed by the scalar unit from constants alone, or from scalars that the caller knows
(prefetched block lists). :mod:`dsjax.plan.scalar_unit` plays those instructions and takes each branch as the chip
would. Executions of each region of bundles times the rows of the region are the cycles: no knowledge of the kernel is
needed, a loop counts as often as it turns, and nothing counts that a predicate skips. In the same way each copy
between HBM and the core is counted with its bytes.

What is not in it: waiting for copies (take the larger of the cycles and of the bytes over the bandwidth), what XLA
puts around the kernel, and, where two cores share a grid, the other core: core 0 is played.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dsjax.plan.scalar_unit import Instruction, ScheduleError, play

# A branch takes effect so many bundles after its own: there the dumps end the region in front of it.
DELAY_SLOTS = {"v4": 1, "v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 6}
# Bytes of the unit in which the size of a copy is written.
GRANULE_BYTES = {"v4": 512, "v5e": 32, "v5p": 32, "v6e": 32, "tpu7x": 32}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The schedule of one kernel.

    Attributes:
        labels: by address, for example ``LB`` for the body of a loop.
        instructions: all but those of the vector units, in the order of the text.
        capacity: slots of each unit in a bundle.
        used: slots that are used, a row a bundle, a column a unit.
    """

    name: str
    labels: Mapping[int, str]
    instructions: tuple[Instruction, ...]
    capacity: Mapping[str, int]
    used: np.ndarray


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles ``start`` up to ``end`` run together, ``executions`` times; ``slots``: used by all of these in all."""

    start: int
    end: int
    label: str
    executions: int
    slots: Mapping[str, int]

    @property
    def cycles(self) -> int:
        """Rows times executions."""
        return (self.end - self.start) * self.executions


@dataclasses.dataclass(frozen=True)
class Count:
    """What one run of a kernel takes.

    Attributes:
        cycles: bundles that are executed.
        turns: of the outermost loop, which goes over the steps of the grid.
        skipped_turns: those between the first and the last that run no matrix product.
        skipped_cycles: what a grid without them would save: so many times the cycles of the shortest of them.
        hbm_bytes: that the kernel copies between HBM and the core; None where that depends on unknown data.
        slots: of each unit, used in all of ``cycles``.
    """

    name: str
    cycles: int
    turns: int
    skipped_turns: int
    skipped_cycles: int
    hbm_bytes: int | None
    slots: Mapping[str, int]
    regions: tuple[Region, ...]

    def times(self, calls: int) -> Count:
        """What so many equal runs take."""

        def more(slots: Mapping[str, int]) -> dict[str, int]:
            return {unit: used * calls for unit, used in slots.items()}

        regions = tuple(
            dataclasses.replace(r, executions=r.executions * calls, slots=more(r.slots)) for r in self.regions
        )
        moved = None if self.hbm_bytes is None else self.hbm_bytes * calls
        numbers = {name: getattr(self, name) * calls for name in ("cycles", "turns", "skipped_turns", "skipped_cycles")}
        return dataclasses.replace(self, **numbers, hbm_bytes=moved, slots=more(self.slots), regions=regions)


def dump_flags(folder: pathlib.Path) -> str:
    """For ``LIBTPU_INIT_ARGS``, which libtpu reads once in a process."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


# ---------------------------------------------------------------- reading

_COMMENT = re.compile(r"/\*(?:(?!/\*).)*?\*/", re.DOTALL)  # one without another in it
_BUNDLE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+(?:([A-Z]{2}):)?[:\s>]*\{(.*)\}\s*$")
_INSTRUCTION = re.compile(r"^(%[\w.]+|\d+) = ([\w.]+)\s*(.*)$")
_PREDICATE = re.compile(r"^(?:\[thread:[^\]]*\]\s*)?(?:\((!?%p\w+)(?:, ([^)]*))?\),?)?\s*(.*)$")
_PALLAS = 'custom_call_target="tpu_custom_call"'


def read_kernels(folder: pathlib.Path) -> list[Kernel]:
    """The Pallas kernels of a dump, in the order in which they were compiled.

    Raises:
        ScheduleError: there is none, or a file is not as expected.
    """
    kernels = []
    for analysis in sorted(folder.glob("*-schedule-analysis_packed-bundles-post-ra.txt")):
        stem = re.sub(r"-\d+-schedule-analysis_.*", "", analysis.name)
        own = f"%{stem.partition('-')[2]} = "
        if not any(own in line and _PALLAS in line for line in analysis.read_text(encoding="utf-8").splitlines()):
            continue  # of something else, perhaps of what calls the kernel
        texts = []
        for end in ("packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization"):
            found = [p for p in folder.glob(f"{glob.escape(stem)}-*{end}.txt") if "schedule-analysis" not in p.name]
            if len(found) != 1:
                raise ScheduleError(f"the compiler's dump has {len(found)} files {end} for {stem}, not one")
            texts.append(found[0].read_text(encoding="utf-8"))
        kernels.append(parse(re.sub(r"\.\d+$", "", stem.partition("-")[2]), *texts))
    if not kernels:
        raise ScheduleError("the compiler dumped no schedule of a Pallas kernel")
    return kernels


def parse(name: str, bundles: str, utilization: str) -> Kernel:
    """A kernel from the texts of its two files.

    Raises:
        ScheduleError: they do not go together, or are not as expected.
    """
    labels, instructions, length = dict[int, str](), list[Instruction](), 0
    removed = 1
    while removed:
        bundles, removed = _COMMENT.subn("", bundles)
    for line in bundles.splitlines():
        match = _BUNDLE.match(line)
        if match is None:
            continue
        if int(match[1], 16) != length:
            raise ScheduleError(f"{name}: bundle {match[1]} stands where bundle {length:#x} should")
        if match[2]:
            labels[length] = match[2]
        instructions += _instructions(length, match[3])
        length += 1
    head, _, rows = utilization.partition("== UTILIZATION:")
    words = re.findall(r"[\w:]+", head.partition(":")[2])
    units = [word for word in words if not word.isdigit()]
    capacity = dict(zip(units, (int(word) for word in words if word.isdigit()), strict=True))
    used = np.array([[int(n) for n in row.split()] for row in rows.splitlines() if row.strip()], np.int64)
    if not length or used.shape != (length, len(units)):
        raise ScheduleError(f"{name}: {length} bundles, but slots of shape {used.shape} for {len(units)} units")
    return Kernel(name, labels, tuple(instructions), capacity, used)


def _instructions(address: int, text: str) -> Iterator[Instruction]:
    for part in text.split(";;"):
        match = _INSTRUCTION.match(part.strip())
        if match is None or match[2].startswith("v"):  # the vector units decide nothing
            continue
        predicate = _PREDICATE.match(match[3])
        assert predicate is not None  # all of it is optional
        rest = predicate[3].strip()
        arguments = tuple(word.strip() for word in rest.split(",")) if rest else ()
        yield Instruction(address, match[1], match[2], predicate[1] or "", predicate[2] or "", arguments)


# ---------------------------------------------------------------- counting


def count(kernel: Kernel, chip: str, operands: Mapping[int, Sequence[int]] | None = None) -> Count:
    """Plays a kernel through.

    Args:
        chip: v4, v5e, v5p, v6e or tpu7x.
        operands: for those that are prefetched into scalar memory and decide what runs, by their number in the call:
            their 32-bit words as they lie there.

    Raises:
        ScheduleError: a branch depends on something else, or the schedule is not as expected.
    """
    slots_of = list(kernel.capacity)
    matmul_rows = kernel.used[:, slots_of.index("MXU")] > 0
    played = play(kernel.instructions, len(kernel.used), DELAY_SLOTS[chip], matmul_rows, operands or {})
    total: collections.Counter[str] = collections.Counter()
    regions = []
    for start, end, executions in played.blocks:
        used = kernel.used[start:end].sum(axis=0) * executions
        slots = {unit: int(n) for unit, n in zip(slots_of, used, strict=True)}
        total.update(slots)
        regions.append(Region(start, end, kernel.labels.get(start, ""), executions, slots))
    copied = None if played.granules is None else played.granules * GRANULE_BYTES[chip]
    return Count(
        kernel.name,
        sum(region.cycles for region in regions),
        played.turns,
        played.skipped_turns,
        played.skipped_cycles,
        copied,
        dict(total),
        tuple(regions),
    )
