"""What a compiled program moves: bytes over the interconnect by mesh axis, and bytes to and from HBM.

Both are lower bounds that arithmetic gives: what the program's own instructions must move at the sizes it states.
Padding of tiles, packet headers and operands that a kernel reads more than once come on top.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from dsjax.plan.hlo import HBM, Computation, Instruction, Module, executions

# Bytes that one device of a group of n sends, for each byte of operand, by ring algorithms.
SENT = {
    "all-gather": lambda n: n - 1,  # (n-1)/n of the output, which is n operands
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: (n - 1) / n,
}
COLLECTIVES = (*SENT, "collective-permute")
# Moves nothing: names for what is there already, bookkeeping, and the second half of a pair.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier",
    "optimization-barrier", "after-all", "add-dependency", "partition-id", "replica-id", "domain", "async-start",
    "async-update", "call-start", "send", "recv", "infeed", "outfeed", "get-dimension-size",
}  # fmt: skip
_FREE_TARGETS = ("AllocateBuffer", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "AsyncCollectiveDone")
# An output element of these needs one element of each operand of the same size.
_ELEMENTWISE = {
    "bitcast", "copy", "reshape", "transpose", "convert", "bitcast-convert", "abs", "add", "and", "atan2", "cbrt",
    "ceil", "clamp", "clz", "compare", "complex", "cosine", "divide", "erf", "exponential", "exponential-minus-one",
    "floor", "imag", "is-finite", "log", "log-plus-one", "logistic", "maximum", "minimum", "multiply", "negate",
    "not", "or", "popcnt", "power", "real", "reduce-precision", "remainder", "round-nearest-afz",
    "round-nearest-even", "rsqrt", "select", "shift-left", "shift-right-arithmetic", "shift-right-logical", "sign",
    "sine", "sqrt", "subtract", "tan", "tanh", "xor", "reverse",
}  # fmt: skip
_RENAMED = ("bitcast", "copy", "reshape")


@dataclass(frozen=True, eq=False)
class Collective:
    """One collective instruction of the step.

    `bytes` is what one device sends in one execution, `times` the executions in a step, `axes` the mesh axes along
    which the members of a group differ, `groups` the positions in the flattened mesh, one row a group (of a permute:
    one row a pair, and `bytes` is the mean over all devices). `name` is the instruction's.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    bytes: float
    times: int
    groups: np.ndarray
    name: str = ""


@dataclass(frozen=True)
class HbmTraffic:
    """Bytes that one device reads from and writes to HBM in a step.

    `by_kind` adds both up by kind of instruction, `by_scope` by the innermost of the model's named scopes that the
    instruction came from; what the compiler added by itself is under "other".
    """

    read: int
    written: int
    by_kind: dict[str, int] = field(default_factory=dict)
    by_scope: dict[str, int] = field(default_factory=dict)


def collectives(module: Module, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """All collectives that the step executes, with what they send.

    Bytes are those of ring algorithms, for n devices in a group: all-gather sends (n-1)/n of the output,
    reduce-scatter (n-1)/n of the input, all-reduce 2(n-1)/n of the buffer, all-to-all and broadcast (n-1)/n of the
    operand, a permute the whole operand times the share of devices that send. A ragged all-to-all is counted at the
    smaller of its buffers: all receive what all send; how full they are, the run knows. Groups of one are left out.

    An asynchronous pair counts once; so does a TPU collective that is spread over several fusions. TPU's fusion of
    an all-reduce with the slicing of its result is a reduce-scatter.
    """
    found = []
    continued = _continued(module)
    for instruction, times in executions(module):
        for item in _collectives_of(module, instruction):
            if times and (item.computation, item.name) not in continued:
                collective = _collective(module, item, times, mesh_shape)
                found += [collective] if collective else []
    return found


def bytes_by_axis(found: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """Bytes that a device sends in a step: {"fsdp": {"all-gather": ...}, "fsdp+expert": ...}."""
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for item in found:
        table["+".join(item.axes)][item.kind] += item.bytes * item.times
    return {axes: dict(kinds) for axes, kinds in table.items()}


def hbm_bytes(module: Module, cost_of: Callable[[Instruction], tuple[int, int] | None] | None = None) -> HbmTraffic:
    """Bytes that a device moves between HBM and its core in a step.

    For each executed instruction the operands and outputs that live in HBM. A slice or gather (also inside a fusion)
    reads only what it takes, an update of part of an array in place writes only that part; what is only renamed
    moves nothing. Each operand is read once: a matmul whose operands do not fit in VMEM reads more. `cost_of` states
    (bytes read, bytes written) of an instruction that the caller knows better, a kernel for example; None leaves it.
    """
    continued = _continued(module)
    read = written = 0
    by_kind: Counter[str] = Counter()
    by_scope: Counter[str] = Counter()
    for instruction, times in executions(module):
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            continue
        if instruction.target in _FREE_TARGETS:
            continue
        stated = cost_of(instruction) if cost_of else None
        taken, made = _moved(module, instruction, continued) if stated is None else stated
        read += taken * times
        written += made * times
        by_kind[_kind(module, instruction, continued)] += (taken + made) * times
        by_scope[instruction.scope] += (taken + made) * times
    kinds, scopes = ({key: total for key, total in found.most_common() if total} for found in (by_kind, by_scope))
    return HbmTraffic(read, written, kinds, scopes)


def loops_of_unknown_length(module: Module) -> list[str]:
    """Names of the executed loops that are counted once because their length does not stand in the text."""
    loops = {item.name: item for item, _ in executions(module) if item.opcode == "while"}
    return [name for name, loop in loops.items() if module.trip_count(loop) is None]


def stacked_bytes(module: Module, shapes_of_parameters: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of the activations that are saved between forward and backward pass: the largest, over the loops of the
    entry computation, of the carried arrays in HBM that are as long as the loop and are no parameter.

    `shapes_of_parameters` holds one (HLO element type, dimensions on one device) for each stacked parameter, gradient
    or other array that a loop carries and that is no activation; each excuses one carried array.
    """
    excused = Counter(shapes_of_parameters)
    largest = 0
    for loop in module.computations[module.entry].instructions.values():
        trips = module.trip_count(loop) if loop.opcode == "while" else None
        if trips is None or trips < 2:
            continue
        left, total = excused.copy(), 0
        for shape in loop.shapes:
            if shape.space == HBM and shape.dims[:1] == (trips,):
                if left[shape.dtype, shape.dims] > 0:
                    left[shape.dtype, shape.dims] -= 1
                else:
                    total += shape.num_bytes
        largest = max(largest, total)
    return largest


def device_groups(text: str, num_devices: int) -> np.ndarray:
    """The groups that `replica_groups=` states, one row each, of device positions.

    Forms: `{{0,1},{2,3}}`; `{}`, all devices in one group; `[2,4]<=[4,2]T(1,0)`, an iota reshaped and transposed;
    `mesh['x'=4,'y'=2], device_ids=([4,2]T(1,0)) {'x','y':(1)2}`, the axes of a mesh that a group spans, where `(m)k`
    is the part of size k of an axis that lies behind a part of size m.
    """
    text = text.strip()
    try:
        if text.startswith("mesh["):
            groups = _mesh_groups(text, num_devices)
        elif text.startswith("["):
            shape, _, source = text.partition("<=")
            groups = _iota(source, num_devices).reshape(_integers(shape))
        else:
            rows = [row for row in _rows(text) if row]
            groups = np.array(rows) if rows else np.arange(num_devices)[None]
        if groups.ndim != 2 or not np.array_equal(np.unique(groups), np.sort(groups, None)):
            raise ValueError("not disjoint groups of one size")
        if groups.min(initial=0) < 0 or groups.max(initial=0) >= num_devices:
            raise ValueError(f"there are {num_devices} devices")
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"replica groups {text[:80]}: {error}") from None
    return groups


def _rows(text: str) -> list[list[int]]:
    """The rows of `{{0,1},{2,3}}`."""
    return [_integers(row) for row in re.findall(r"\{([\d,\s]*)\}", text.strip().removeprefix("{"))]


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(text: str, limit: int) -> np.ndarray:
    """`[4,2]T(1,0)`: 0, 1, 2, ... shaped so, its axes then in that order; flat."""
    dims, _, order = text.partition("T")
    sizes = _integers(dims)
    values = np.arange(_at_most(limit, math.prod(sizes))).reshape(sizes)
    return (values.transpose(_integers(order)) if order else values).ravel()


def _at_most(limit: int, count: int) -> int:
    if count > limit:
        raise ValueError(f"there are {limit} devices")
    return count


def _mesh_groups(text: str, limit: int) -> np.ndarray:
    mesh, _, rest = text.removeprefix("mesh[").partition("]")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    ids, _, chosen = rest.rpartition("{")
    listed = re.search(r"device_ids=\((.*)\)", ids)
    count = _at_most(limit, math.prod(sizes.values()))
    if not listed:
        devices = np.arange(count)
    else:
        devices = _iota(listed[1], limit) if listed[1].startswith("[") else np.array(_integers(listed[1]))
    # Each axis is cut where a chosen part of it begins or ends, so that every part is an axis of its own.
    parts = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen)
    ]
    dims: list[int] = []
    places: dict[tuple[str, int, int], list[int]] = {}  # the dimensions that a part covers
    for name, size in sizes.items():
        cuts = {1, size}.union(*({before, before * part} for axis, before, part in parts if axis == name))
        edges = sorted(cuts)
        for axis, before, part in parts:
            if axis == name:
                places[name, before, part] = [
                    len(dims) + i for i, edge in enumerate(edges[:-1]) if before <= edge < before * part
                ]
        dims += [high // low for low, high in itertools.pairwise(edges)]
    chosen_dims = [place for part in parts for place in places[part]]
    others = [place for place in range(len(dims)) if place not in chosen_dims]
    group_size = math.prod(dims[place] for place in chosen_dims)
    return devices.reshape(dims).transpose(others + chosen_dims).reshape(-1, group_size)


def _base(opcode: str) -> str:
    return opcode.removesuffix("-start")


def _collectives_of(module: Module, instruction: Instruction) -> Iterator[Instruction]:
    """The instruction itself if it is a collective, or those inside it if it is a fusion."""
    if _base(instruction.opcode) in COLLECTIVES:
        yield instruction
    elif instruction.opcode == "fusion":
        for item in module.callee(instruction).instructions.values():
            yield from _collectives_of(module, item)


def _continued(module: Module) -> set[tuple[str, str]]:
    """Collectives that only go on with what another instruction of the same channel has started.

    TPU spreads one collective over a fusion that starts it, fusions that compute beside it and one that ends it; each
    of them holds the instruction, and the first holds a call of `AsyncCollectiveStart` too.
    """
    starting, holding = set(), defaultdict(list)
    for name in {module.callee(i).name for c in module.computations.values() for i in _fusions(c)}:
        items = module.computations[name].instructions.values()
        starts = any(item.target == "AsyncCollectiveStart" for item in items)
        for item in items:
            channel = item.attributes.get("channel_id", "")
            if channel and _base(item.opcode) in COLLECTIVES:
                if starts:
                    starting.add(channel)
                else:
                    holding[channel].append((item.computation, item.name))
    return {key for channel in starting for key in holding[channel]}


def _fusions(computation: Computation) -> Iterator[Instruction]:
    return (item for item in computation.instructions.values() if item.opcode == "fusion")


def _collective(module: Module, item: Instruction, times: int, mesh_shape: Mapping[str, int]) -> Collective | None:
    kind = _base(item.opcode)
    num_devices = math.prod(mesh_shape.values())
    operands = module.operands(item)
    sent = _ragged_bytes(operands) if kind == "ragged-all-to-all" else sum(o.num_bytes for o in operands)
    if kind == "collective-permute":
        pairs = [row for row in _rows(item.attributes.get("source_target_pairs", "")) if row and row[0] != row[-1]]
        groups = np.array(pairs, int).reshape(-1, 2)
        amount = sent * len(np.unique(groups[:, 0])) / num_devices
    else:
        groups = device_groups(item.attributes.get("replica_groups", ""), num_devices)
        if kind == "all-reduce" and _is_scattered(module, item):
            kind = "reduce-scatter"
        amount = sent * SENT[kind](groups.shape[1])
    if not groups.size or groups.shape[1] < 2:
        return None
    return Collective(kind, _axes(groups, mesh_shape), groups.shape[1], float(amount), times, groups, item.name)


def _ragged_bytes(operands: list[Instruction]) -> int:
    return min(operand.num_bytes for operand in operands[:2])  # what is sent, and the buffer that it is written to


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    if groups.max() >= math.prod(mesh_shape.values()):
        raise ValueError(f"device {groups.max()} is outside of the mesh {dict(mesh_shape)}")
    coordinates = np.unravel_index(groups, tuple(mesh_shape.values()))
    return tuple(axis for axis, places in zip(mesh_shape, coordinates, strict=True) if (places != places[:, :1]).any())


def _is_scattered(module: Module, item: Instruction) -> bool:
    """Whether a fusion keeps only slices of the all-reduce in it."""
    computation = module.computations[item.computation]
    if not any(caller.opcode == "fusion" for caller in module.callers.get(computation.name, [])):
        return False
    same = {item.name}
    sliced = False
    for user in computation.instructions.values():
        if same.isdisjoint(user.operands):
            continue
        if user.opcode in ("get-tuple-element", *_RENAMED):
            same.add(user.name)
        elif user.opcode == "dynamic-slice":
            sliced = True
        else:
            return False
    return sliced and computation.root.name not in same


def _kind(module: Module, instruction: Instruction, continued: set[tuple[str, str]]) -> str:
    inside = _collectives_of(module, instruction)
    if any((item.computation, item.name) not in continued for item in inside):
        return "collective"
    return _base(instruction.opcode)


def _moved(module: Module, instruction: Instruction, continued: set[tuple[str, str]]) -> tuple[int, int]:
    """Bytes that one execution reads from and writes to HBM."""
    operands = module.operands(instruction)
    if _base(instruction.opcode) == "ragged-all-to-all":
        read, written = (_ragged_bytes(operands) if o.shapes[0].space == HBM else 0 for o in operands[:2])
        return read, written
    if instruction.opcode.endswith("-start"):
        return _moved_by_start(instruction, operands)
    full = [shape.size for shape in instruction.shapes]
    if instruction.opcode == "fusion":
        inside = _Inside(module, module.callee(instruction), continued)
        needs, made = inside.needs, inside.made
    else:
        in_place = instruction.opcode in ("dynamic-update-slice", "scatter")
        needs = dict(enumerate(_needs(module, instruction, full[0] if full else 0, in_place)))
        made = [_updates(module, instruction)] if in_place else full
    read = sum(
        (math.ceil(needs.get(number, 0)) * shape.bits + 7) // 8
        for number, operand in enumerate(operands)
        for shape in operand.shapes[:1]
        if len(operand.shapes) == 1 and shape.space == HBM
    )
    read += sum(  # a tuple as an operand: rare, and read in full
        shape.num_bytes
        for operand in operands
        if len(operand.shapes) > 1
        for shape in operand.shapes
        if not shape.space
    )
    if len(made) != len(instruction.shapes):
        made = full
    written = sum(
        (size * shape.bits + 7) // 8 for size, shape in zip(made, instruction.shapes, strict=True) if shape.space == HBM
    )
    return read, written


def _moved_by_start(instruction: Instruction, operands: list[Instruction]) -> tuple[int, int]:
    """The first half of an asynchronous pair: its shape holds the operands, the outputs, and flags."""
    base, count = _base(instruction.opcode), len(operands)
    if base == "copy":
        outputs = instruction.shapes[:1]
    elif base in COLLECTIVES:
        outputs = instruction.shapes[count : 2 * count] or instruction.shapes
    else:
        outputs = instruction.shapes[count : count + 1]
    sources = [shape for operand in operands for shape in operand.shapes if shape.space == HBM]
    written = sum(shape.num_bytes for shape in outputs if shape.space == HBM)
    if base in ("slice", "dynamic-slice"):  # reads what it takes
        return sum(shape.num_bytes for shape in outputs) if sources else 0, written
    return sum(shape.num_bytes for shape in sources), written


def _updates(module: Module, instruction: Instruction) -> int:
    """Elements that an update in place writes."""
    number = 1 if instruction.opcode == "dynamic-update-slice" else len(instruction.operands) - 1
    return sum(shape.size for shape in module.operand(instruction, number).shapes)


def _needs(module: Module, item: Instruction, need: float, in_place: bool) -> list[float]:
    """How many elements of each operand it takes to make `need` elements of the output."""
    sizes = [sum(shape.size for shape in operand.shapes) for operand in module.operands(item)]
    size = sum(shape.size for shape in item.shapes)
    if item.opcode in _ELEMENTWISE:
        return [need if other == size else other for other in sizes]
    if item.opcode in ("slice", "dynamic-slice", "gather", "pad", "concatenate"):
        partial = len(sizes) if item.opcode == "concatenate" else 1
        return [min(need, other) for other in sizes[:partial]] + sizes[partial:]
    if in_place and item.opcode == "dynamic-update-slice":
        return [0.0, *sizes[1:]]
    if in_place:  # a scatter reads what it adds to
        return [float(_updates(module, item)), *sizes[1:]]
    return list(sizes)


class _Inside:
    """What a fusion reads of each parameter and makes of each output, in elements.

    Walks from the outputs back: an instruction needs of its operands only what the elements that are needed of itself
    depend on. An output that updates part of a parameter is made in place.
    """

    def __init__(self, module: Module, computation: Computation, continued: set[tuple[str, str]]):
        self.module, self.continued = module, continued
        self.wanted: dict[str, float] = defaultdict(float)
        self.in_place: set[str] = set()
        root = computation.root
        outputs = module.operands(root) if root.opcode == "tuple" else [root]
        self.made: list[int] = []
        for output in outputs:
            self.made += self.make(output)
        for item in reversed(computation.instructions.values()):
            self.spread(item)
        self.needs = {
            number: min(self.wanted[item.name], sum(shape.size for shape in item.shapes))
            for number, item in computation.parameters.items()
        }

    def make(self, output: Instruction) -> list[int]:
        """Marks an output as wanted; the elements of it that have to be written, for each of its arrays."""
        sizes = [shape.size for shape in output.shapes]
        source = output
        while source.opcode in _RENAMED:
            source = self.module.operand(source)
        if source.opcode == "parameter" or (source.computation, source.name) in self.continued:
            return [0] * len(sizes)  # handed through
        if source.target == "AsyncCollectiveDone":
            return [0] * len(sizes)
        if source.target == "AsyncCollectiveStart":  # hands its operand through and starts to fill the second
            self.wanted[source.name] = 1
            return [size if number == 1 else 0 for number, size in enumerate(sizes)]
        updated = 0
        while source.opcode in ("dynamic-update-slice", "scatter", *_RENAMED):
            if source.opcode not in _RENAMED:
                if _parameter(self.module, source) is None:
                    break
                updated += _updates(self.module, source)
                self.in_place.add(source.name)
                self.wanted[source.name] = 1
            source = self.module.operand(source)
        if updated:
            return [updated]
        if source.opcode == "fusion" and source.name == output.name:
            self.wanted[source.name] = 1
            return _Inside(self.module, self.module.callee(source), self.continued).made
        self.wanted[output.name] = sum(sizes)
        return sizes

    def spread(self, item: Instruction) -> None:
        """Passes on to the operands what is wanted of an instruction."""
        need = self.wanted[item.name]
        if not need or (item.computation, item.name) in self.continued:
            return
        operands = self.module.operands(item)
        if item.opcode == "fusion":
            inside = _Inside(self.module, self.module.callee(item), self.continued)
            share = min(1.0, need / max(1, sum(shape.size for shape in item.shapes)))
            narrow = len(operands) == 1 and operands[0].num_bytes == item.num_bytes  # a copy or a new name
            demands = [inside.needs.get(i, 0) * (share if narrow else 1) for i in range(len(operands))]
        else:
            demands = _needs(self.module, item, need, item.name in self.in_place)
        for operand, demand in zip(operands, demands, strict=True):
            self.wanted[operand.name] += demand


def _parameter(module: Module, item: Instruction) -> int | None:
    """The number of the parameter that an array is, under other names or with parts of it updated."""
    while True:
        if item.opcode == "parameter":
            return item.index
        if item.opcode in ("dynamic-update-slice", "scatter", *_RENAMED) and item.operands:
            item = module.operand(item)
        elif item.opcode == "fusion":
            number = _parameter(module, module.callee(item).root)
            if number is None or number >= len(item.operands):
                return None
            item = module.operand(item, number)
        else:
            return None
