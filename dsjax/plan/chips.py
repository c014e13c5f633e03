"""Chips that a plan may be made for: what each can do, where each figure comes from, and how chips are joined.

python -m dsjax.plan.chips                   # prints the tables of docs/chips.md
python -m dsjax.plan.chips docs/chips.md     # writes them between the markers of the file
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from dsjax.config import UserError

GIB = 2**30
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"

CLOUD = "https://docs.cloud.google.com/tpu/docs"
BOOK = "https://jax-ml.github.io/scaling-book/tpus/"
LIBTPU = "libtpu 0.0.42, message of a program that is too large (tests/test_plan_chips.py)"
TPU_INFO = "jax 0.10.2, jax/_src/pallas/mosaic/tpu_info.py"
XLA_H100 = "https://github.com/openxla/xla/blob/main/xla/backends/gpu/target_config/specs/h100_sxm.txtpb"
NVIDIA_H100 = "https://www.nvidia.com/en-us/data-center/h100/ (not re-read here)"

# Energy of an operation, not of a chip: nobody publishes it per chip. Jouppi et al. 2021, table 2, for 7 nm.
BF16_MULTIPLY_PJ, F32_ADD_PJ = 0.21, 0.38
HBM2_PJ_PER_64_BITS = (250.0, 450.0)
LINK_PJ_PER_BIT = 8.0
ENERGY_SOURCES = {
    "pj_per_flop": "bf16 multiply 0.21 pJ and f32 add 0.38 pJ in 7 nm, two FLOPs: Jouppi et al., Ten Lessons From "
    "Three Generations Shaped Google's TPUv4i, ISCA 2021, table 2, which brings Horowitz, ISSCC 2014, up to date "
    "(https://gwern.net/doc/ai/scaling/hardware/2021-jouppi.pdf, not re-read here)",
    "pj_per_hbm_byte": "HBM2, 250 to 450 pJ for 64 bits, the middle taken: the same table (the range was found again "
    "in a text that quotes it)",
    "pj_per_ici_byte": "8 pJ for a bit over an electrical NVLink 2: https://www.techpowerup.com/276139/ (quoted at "
    "https://hardforum.com/threads/2005302/); no figure for a TPU's link is public, optical links of the same text "
    "aim at 4",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do at most, in bytes, seconds and picojoules; None where no figure is meant.

    Attributes:
        peak_flops: dense FLOPs (or integer operations) a second, by type: bf16, int8, fp8.
        hbm_bytes: what a program may use of the chip's memory, as the compiler says; ``hbm_nominal_bytes`` is built in.
        hbm_bandwidth: bytes a second between memory and chip.
        ici_link_bandwidth: bytes a second over one link in one direction; ``ici_links`` of them leave a chip.
        torus_dims: dimensions of the grid that the links form; 0 for a switch or for nothing.
        max_chips: in one slice (TPU), or behind one switch (GPU).
        devices_per_chip: as jax lists them with :func:`topology_options`.
        tensor_cores: of one chip; ``vmem_bytes`` is for one of them.
        sources: for each figure, where it stands.
    """

    name: str
    peak_flops: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    hbm_bytes: int | None = None
    hbm_nominal_bytes: int | None = None
    hbm_bandwidth: float | None = None
    ici_link_bandwidth: float | None = None
    ici_links: int = 0
    torus_dims: int = 0
    max_chips: int = 1
    devices_per_chip: int = 1
    tensor_cores: int = 1
    vmem_bytes: int | None = None
    pj_per_flop: float | None = (BF16_MULTIPLY_PJ + F32_ADD_PJ) / 2
    pj_per_hbm_byte: float | None = sum(HBM2_PJ_PER_64_BITS) / 2 / 8
    pj_per_ici_byte: float | None = LINK_PJ_PER_BIT * 8
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def hbm_bytes_per_device(self) -> int | None:
        """What a program may use of the memory of one device, the unit of ``memory_analysis``."""
        return None if self.hbm_bytes is None else self.hbm_bytes // self.devices_per_chip

    def peak(self, dtype: str = "bf16") -> float | None:
        """Operations a second of the chip in ``dtype`` (bf16, int8, fp8); None where the chip has no such figure."""
        return self.peak_flops.get(dtype)


def _tpu(name: str, page: str, *, bandwidth: str = "", links: str = BOOK, **figures: Any) -> Chip:
    """A TPU whose figures stand on one page of Google's, but for those with a source of their own."""
    own = {"hbm_bytes": LIBTPU, "vmem_bytes": TPU_INFO, "ici_link_bandwidth": links, "devices_per_chip": LIBTPU}
    own["hbm_bandwidth"] = f"{CLOUD}/{page}{bandwidth}"
    names = ("peak_flops", "hbm_nominal_bytes", "ici_links", "max_chips", "tensor_cores")
    sources = dict.fromkeys(names, f"{CLOUD}/{page}") | own | ENERGY_SOURCES
    if name == "v5p":
        sources["peak_flops"] += f"; int8: {BOOK}"
    if name == "v6e":
        sources["peak_flops"] += f"; fp8: {CLOUD}/tpu7x"
    return Chip(name, sources=sources, **figures)


V4 = _tpu(
    "v4",
    "v4",
    peak_flops={"bf16": 275e12, "int8": 275e12},
    hbm_bytes=int(30.75 * GIB),
    hbm_nominal_bytes=32 * GIB,
    hbm_bandwidth=1200e9,
    ici_link_bandwidth=45e9,
    ici_links=6,
    torus_dims=3,
    max_chips=4096,
    tensor_cores=2,
    vmem_bytes=16 * 2**20,
)
V5E = _tpu(
    "v5e",
    "v5e",
    bandwidth=" (819 GB/s; a later version of the page has 800 GiB/s, which jax, with 820 GB/s, does not follow)",
    peak_flops={"bf16": 197e12, "int8": 393e12},
    hbm_bytes=int(15.75 * GIB),
    hbm_nominal_bytes=16 * GIB,
    hbm_bandwidth=819e9,
    ici_link_bandwidth=45e9,
    ici_links=4,
    torus_dims=2,
    max_chips=256,
    vmem_bytes=128 * 2**20,
)
V5P = _tpu(
    "v5p",
    "v5p",
    peak_flops={"bf16": 459e12, "int8": 918e12, "fp8": 459e12},
    hbm_bytes=int(95.74 * GIB),
    hbm_nominal_bytes=96 * GIB,
    hbm_bandwidth=2765e9,
    ici_link_bandwidth=90e9,
    ici_links=6,
    torus_dims=3,
    max_chips=6144,
    tensor_cores=2,
    vmem_bytes=64 * 2**20,
)
V6E = _tpu(
    "v6e",
    "v6e",
    peak_flops={"bf16": 918e12, "int8": 1836e12, "fp8": 918e12},
    hbm_bytes=int(31.25 * GIB),
    hbm_nominal_bytes=32 * GIB,
    hbm_bandwidth=1638e9,
    ici_link_bandwidth=90e9,
    ici_links=4,
    torus_dims=2,
    max_chips=256,
    vmem_bytes=128 * 2**20,
)
TPU7X = _tpu(
    "tpu7x",
    "tpu7x",
    links=f"{CLOUD}/tpu7x has 1200 GB/s for a chip, 100 for a link and direction; times 0.9, as {BOOK} does for v5p",
    peak_flops={"bf16": 2307e12, "fp8": 4614e12},
    hbm_bytes=2 * int(94.75 * GIB),
    hbm_nominal_bytes=192 * GIB,
    hbm_bandwidth=7380e9,
    ici_link_bandwidth=90e9,
    ici_links=6,
    torus_dims=3,
    max_chips=9216,
    devices_per_chip=2,
    tensor_cores=2,
    vmem_bytes=64 * 2**20,
)
H100 = Chip(
    "h100",
    peak_flops={"bf16": 989.4e12, "int8": 1978.9e12, "fp8": 1978.9e12},
    hbm_bytes=84_942_979_072,
    hbm_nominal_bytes=80 * GIB,
    hbm_bandwidth=3.35e12,
    ici_link_bandwidth=25e9,
    ici_links=18,
    max_chips=8,
    sources={
        "peak_flops": f"132 cores x 4 units x 512 multiply-adds (1024 in 8 bits) at 1.83 GHz: {XLA_H100}; "
        f"{NVIDIA_H100} has twice as much, with sparsity",
        "hbm_bytes": f"{XLA_H100} (jax takes 75 % of it unless told otherwise: "
        "https://docs.jax.dev/en/latest/gpu_memory_allocation.html)",
        "hbm_nominal_bytes": NVIDIA_H100,
        "hbm_bandwidth": f"{XLA_H100}, {NVIDIA_H100}",
        "ici_link_bandwidth": f"NVLink 4, 900 GB/s for a GPU in both directions, over 18 links: {NVIDIA_H100}",
        "ici_links": XLA_H100,
        "max_chips": f"one node of 8 behind NVSwitch: {NVIDIA_H100}",
        "devices_per_chip": "a GPU is one device",
        **ENERGY_SOURCES,
    },
)
# One "chip" is one device that XLA is told to make of the host. Its times are not meant: nothing says what it can do.
CPU = Chip("cpu", max_chips=256, pj_per_flop=None, pj_per_hbm_byte=None, pj_per_ici_byte=None)

CHIPS: dict[str, Chip] = {chip.name: chip for chip in (V4, V5E, V5P, V6E, TPU7X, H100, CPU)}

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
CUBE = 4  # chips along an edge of the block that optical switches join to others


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips joined in a shape: ``dims`` is the grid of a TPU slice, or a count of GPUs or forced CPU devices."""

    chip: Chip
    dims: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.dims)

    @property
    def num_devices(self) -> int:
        """Devices that jax lists."""
        return self.num_chips * self.chip.devices_per_chip

    def __str__(self) -> str:
        return f"{self.chip.name}:{_shape(self.dims)}"


def parse_topology(text: str) -> Topology:
    """``v5p:4x8x8``, ``h100:8`` or ``cpu:8`` as :class:`Topology`; UserError names what was given and what there is."""
    given = text if len(text) <= 40 and text.isprintable() else repr(text[:40])
    name, colon, shape = text.strip().lower().partition(":")
    if not colon or name not in CHIPS:
        raise UserError(
            f"topology is {given}; it is CHIP:SHAPE, for example v5e:4x4 or v5p:4x4x8, where the chip is one of "
            f"{', '.join(CHIPS)}"
        )
    number = "[1-9][0-9]{0,4}"
    dims = tuple(int(n) for n in shape.split("x")) if re.fullmatch(f"{number}(x{number}){{0,2}}", shape) else ()
    chip = CHIPS[name]
    if dims in _all_dims(chip):
        return Topology(chip, dims)
    # A grid too large to be named helps nobody: with few, the list says it all.
    near = f"the nearest are {', '.join(_nearest(chip, dims))}; " if dims and len(_all_dims(chip)) > 8 else ""
    raise UserError(f"topology is {given}; {near}{name} has {_compact(chip)}")


def valid_topologies(chip_name: str) -> list[str]:
    """Every topology of a chip, smallest first, for example ``["v5e:1x1", "v5e:2x2", ...]``; UserError if unknown."""
    if chip_name not in CHIPS:
        raise UserError(f"chip is {chip_name}; chips are {', '.join(CHIPS)}")
    return [str(Topology(CHIPS[chip_name], dims)) for dims in _all_dims(CHIPS[chip_name])]


def topology_options(topology: Topology) -> dict[str, Any]:
    """Keyword arguments for ``jax.experimental.topologies.get_topology_desc``; ValueError if it is no TPU's.

    Makes jax list what a Cloud TPU lists: a v4 is one device there, although libtpu by itself describes two of half
    the memory; a tpu7x is two.
    """
    if not topology.chip.torus_dims:
        raise ValueError(f"{topology} has no description that libtpu makes")
    options: dict[str, Any] = {"platform": "tpu", "topology_name": str(topology)}
    if topology.num_chips == 1:  # libtpu takes a host for 2x2x1 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"
    return options


def larger(topology: Topology) -> list[Topology]:
    """The next sizes up, each about twice the one before and the most compact of its size, up to the largest."""
    found, chip = [topology], topology.chip
    while found[-1].num_chips < max(map(math.prod, _all_dims(chip))):
        have = found[-1].num_chips
        above = [dims for dims in _all_dims(chip) if math.prod(dims) > have]
        count = max((math.prod(d) for d in above if math.prod(d) <= 2 * have), default=math.prod(above[0]))
        found.append(Topology(chip, min((d for d in above if math.prod(d) == count), key=sum)))
    return found[1:]


def wraps(topology: Topology, dim: int) -> bool:
    """Whether the links close a ring along a dimension.

    v5e and v6e: only along 16 chips (libtpu: "All wrap-around dimensions must be of length 16"). v4, v5p and tpu7x:
    along every dimension of a slice of whole 4x4x4 blocks, along none of a smaller one (2x4x4 too), because the
    optical switches that close a ring join blocks: jax-ml.github.io/scaling-book/tpus.
    """
    size = topology.dims[dim]
    if topology.chip.torus_dims == 2:
        return size == max(max(dims) for dims in _FLAT)
    return topology.chip.torus_dims == 3 and all(n % CUBE == 0 for n in topology.dims)


def ici_bandwidth(topology: Topology, dims: Iterable[int]) -> float | None:
    """Bytes a second that one device can send into a collective that spans these physical dimensions.

    The sum over dimensions of more than one chip of a link's bandwidth, twice where the ring is closed: a ring sends
    both ways, while a line's end has one link. The devices of a chip share its links. Behind a switch all links serve
    every collective. 0 where no link is used (one chip: tpu7x's two devices talk inside it), None for the CPU.
    """
    link = topology.chip.ici_link_bandwidth
    if link is None:
        return None
    if not topology.chip.torus_dims:
        return link * topology.chip.ici_links if topology.num_chips > 1 else 0.0
    links = sum(2 if wraps(topology, dim) else 1 for dim in set(dims) if topology.dims[dim] > 1)
    return link * links / topology.chip.devices_per_chip


def energy_joules(chip: Chip, flops: float, hbm_bytes: float, ici_bytes: float) -> dict[str, float] | None:
    """Dynamic energy of bf16 FLOPs, of bytes to and from HBM and of bytes over links, and its sum; None for the CPU.

    Left out: leakage and clocks (a chip that waits uses energy too), vector units, VMEM and registers (every operand
    passes them), the host, network cards, fans, power supplies. A byte that crosses several links counts once for
    each. The figures are of operations in 7 nm, not measurements of this chip: compare two programs on one chip with
    them, not two chips.
    """
    if chip.pj_per_flop is None or chip.pj_per_hbm_byte is None or chip.pj_per_ici_byte is None:
        return None
    parts = {
        "mxu": flops * chip.pj_per_flop * 1e-12,
        "hbm": hbm_bytes * chip.pj_per_hbm_byte * 1e-12,
        "ici": ici_bytes * chip.pj_per_ici_byte * 1e-12,
    }
    return {**parts, "total": sum(parts.values())}


def _shape(dims: tuple[int, ...]) -> str:
    return "x".join(map(str, dims))


def _all_dims(chip: Chip) -> list[tuple[int, ...]]:
    """Shapes that Google documents and libtpu takes, smallest first, the most compact first among equals."""
    if chip.torus_dims == 2:
        return list(_FLAT)
    if chip.torus_dims == 0:
        counts = range(1, chip.max_chips + 1)
        return [(n,) for n in counts if chip.name == "cpu" or n & (n - 1) == 0]
    blocks = chip.max_chips // CUBE**3
    cubes = [
        (CUBE * a, CUBE * b, CUBE * c)
        for a in range(1, blocks + 1)
        for b in range(a, blocks // a + 1)
        for c in range(b, blocks // (a * b) + 1)
    ]
    one = [] if chip.name == "v4" else [(1, 1, 1)]
    return [*one, *_SMALL, *sorted(cubes, key=lambda dims: (math.prod(dims), sum(dims)))]


def _nearest(chip: Chip, dims: tuple[int, ...]) -> list[str]:
    """Three topologies like the one that was asked for: the same in order, else of about as many chips."""

    def distance(other: tuple[int, ...]) -> tuple[float, ...]:
        ratio = abs(math.log(math.prod(other) / math.prod(dims)))
        padded = (*sorted(dims), 0, 0)[: len(other)]
        return (sorted(other) != sorted(dims), ratio, math.dist(other, padded))

    return [str(Topology(chip, other)) for other in sorted(_all_dims(chip), key=distance)[:3]]


def _compact(chip: Chip) -> str:
    """All shapes of a chip in one line."""
    if chip.name == "cpu":
        return f"every count of devices from 1 to {chip.max_chips}"
    if chip.torus_dims < 3:
        return ", ".join(map(_shape, _all_dims(chip)))
    small = ", ".join(_shape(dims) for dims in _all_dims(chip) if dims < (CUBE,))
    return f"{small} and every AxBxC of multiples of {CUBE} with A <= B <= C and at most {chip.max_chips} chips"


def generated() -> str:
    """What stands between the markers of docs/chips.md, which are included."""
    figures = _table(
        ["chip", "bf16", "int8", "fp8", "HBM, usable / built in", "HBM", "link, one way", "links", "devices", "VMEM"],
        [
            [
                f"`{chip.name}`",
                *(_scaled(chip.peak(dtype), 1e12) for dtype in ("bf16", "int8", "fp8")),
                f"{_scaled(chip.hbm_bytes, GIB)} / {_scaled(chip.hbm_nominal_bytes, GIB)}",
                _scaled(chip.hbm_bandwidth, 1e9),
                _scaled(chip.ici_link_bandwidth, 1e9),
                str(chip.ici_links or "–"),
                str(chip.devices_per_chip),
                _scaled(chip.vmem_bytes, 2**20) + (f" x {chip.tensor_cores}" if chip.tensor_cores > 1 else ""),
            ]
            for chip in CHIPS.values()
        ],
    )
    shapes = _table(["chip", "topologies"], [[f"`{chip.name}`", _compact(chip)] for chip in CHIPS.values()])
    energy = _table(
        ["", "pJ", "source"],
        [
            ["bf16 FLOP", f"{V5P.pj_per_flop:g}", ENERGY_SOURCES["pj_per_flop"]],
            ["HBM byte", f"{V5P.pj_per_hbm_byte:g}", ENERGY_SOURCES["pj_per_hbm_byte"]],
            ["link byte", f"{V5P.pj_per_ici_byte:g}", ENERGY_SOURCES["pj_per_ici_byte"]],
        ],
    )
    parts = ("### Figures", figures, "### Topologies", shapes, "### Energy", energy, "### Sources", _source_table())
    return "\n\n".join((BEGIN, *parts, END))


def _source_table() -> str:
    """One row for each source of a chip, with the figures that it gives; energy has a table of its own."""
    rows = []
    for chip in CHIPS.values():
        own = {figure: source for figure, source in chip.sources.items() if figure not in ENERGY_SOURCES}
        for source in dict.fromkeys(own.values()):
            given = ", ".join(f"`{figure}`" for figure in own if own[figure] == source)
            rows.append([f"`{chip.name}`", given, source])
    return _table(["chip", "figures", "source"], rows)


def replace_section(text: str) -> str:
    """``text`` with what stands between its markers made anew."""
    before, rest = text.split(BEGIN, 1)
    return before + generated() + rest.split(END, 1)[1]


def _scaled(value: float | None, unit: float) -> str:
    """A figure in a unit, without needless digits."""
    return "–" if value is None else f"{round(value / unit, 2):g}" if value / unit < 1000 else f"{value / unit:,.0f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        page = pathlib.Path(sys.argv[1])
        page.write_text(replace_section(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(generated())
