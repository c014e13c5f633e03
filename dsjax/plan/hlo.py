"""Reads a compiled program (`compiled.as_text()`): its instructions, and how many times each of them runs.

The text is XLA's own: a computation is a block of lines `%name = shape opcode(operands), attribute=value, ...`,
operands and called computations stand before their first use, and XLA's parser refuses anything else. This parser
reads what `dsjax plan` needs and says ValueError where the text makes no sense.

A loop's length comes from `known_trip_count` where the compiler prints it (XLA:CPU), else from the loop itself: a
counter that starts at a constant, takes constant steps and is compared with a constant (TPU).
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

HBM, VMEM, HOST = 0, 1, 5  # the `S(n)` of a layout; 0 is not printed

# A quoted string is one token, closed or not: no text makes these search the same stretch twice.
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*("?)'
_BRACKET = re.compile(r"[][(){}]|" + _STRING)
_BRACKET_OR_COMMA = re.compile(r"[][(){},]|" + _STRING)
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) ?.*\{")
_METADATA = re.compile(r'(kernel_metadata=|"cost_estimate": ?)\{\n.*?\n\}', re.DOTALL)  # over several lines
_ASSIGNMENT = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'known_trip_count\\*":\s*\{\\*"n\\*":\s*\\*"(\d+)')
_CALLS = (
    ("body", "condition", "calls", "to_apply", "branch_computations", "true_computation", "false_computation")
    + ("called_computations", "select", "scatter")
)  # fmt: skip


SCOPES = ("embed", "attention", "ffn", "dispatch", "experts", "combine", "optimizer")


@dataclass(frozen=True, slots=True)
class Shape:
    """One array: element type as HLO writes it, dimensions, bits per element, memory space (HBM, VMEM, HOST ...)."""

    dtype: str
    dims: tuple[int, ...]
    bits: int
    space: int = HBM

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        return (self.size * self.bits + 7) // 8


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line. `shapes` is flat (a tuple's arrays in order); `literal` is what a constant or parameter holds."""

    name: str
    computation: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(shape.num_bytes for shape in self.shapes)

    @property
    def called(self) -> tuple[str, ...]:
        """Names of all computations that this instruction mentions, a conditional's branches in order."""
        values = (self.attributes[key] for key in _CALLS if key in self.attributes)
        return tuple(name for value in values for name in _names(value))

    @property
    def target(self) -> str:
        """A custom call's target, else the empty string."""
        return self.attributes.get("custom_call_target", "").strip('"')

    @property
    def op_name(self) -> str:
        """The JAX scope that the instruction came from, such as `jit(step)/attention/dot_general`."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return found[1] if found else ""

    @property
    def scope(self) -> str:
        """The innermost of the model's named scopes in `op_name`; "other" for what the compiler made by itself."""
        if self.name.startswith("ragged-dot"):  # its op_name is its own
            return "experts"
        inside = [name for name in self.op_name.split("/") if name in SCOPES]
        return inside[-1] if inside else "other"

    @property
    def index(self) -> int:
        """Which element a get-tuple-element takes, or which parameter a parameter is."""
        return int(self.literal if self.opcode == "parameter" else self.attributes.get("index", ""))


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text: operands before users."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by their number."""
        return {item.index: item for item in self.instructions.values() if item.opcode == "parameter"}


@dataclass(frozen=True)
class Module:
    """A compiled program: its computations by name, and the name of the one that runs."""

    computations: dict[str, Computation]
    entry: str
    _lengths: dict[tuple[str, str], int | None] = field(default_factory=dict, repr=False)

    def operand(self, instruction: Instruction, number: int = 0) -> Instruction:
        return self.computations[instruction.computation].instructions[instruction.operands[number]]

    def operands(self, instruction: Instruction) -> list[Instruction]:
        found = self.computations[instruction.computation].instructions
        return [found[name] for name in instruction.operands]

    def callee(self, instruction: Instruction, role: str = "calls") -> Computation:
        """The computation that an attribute names: `body`, `condition`, `calls` or `to_apply`."""
        return self.computations[_names(instruction.attributes[role])[0]]

    @functools.cached_property
    def callers(self) -> dict[str, list[Instruction]]:
        """For each computation the instructions that mention it."""
        found = defaultdict(list)
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for name in instruction.called:
                    found[name].append(instruction)
        return dict(found)

    def trip_count(self, loop: Instruction) -> int | None:
        """How many times a `while` runs its body; None where the text does not tell."""
        key = (loop.computation, loop.name)
        if key not in self._lengths:
            self._lengths[key] = _trip_count(self, loop)
        return self._lengths[key]


def parse(text: str) -> Module:
    """Reads the text of one compiled program. Raises ValueError where it is not one."""
    computations: dict[str, Computation] = {}
    entry = ""
    name = ""
    lines: list[tuple[int, str]] | None = None  # of the computation that is being read
    text = _METADATA.sub(lambda found: found[0].replace("\n", ""), text)
    for number, line in enumerate(text.splitlines(), 1):
        if lines is None:
            header = _HEADER.fullmatch(line.rstrip())
            if header and not line.startswith("HloModule"):
                name, lines = header[2], []
                entry = name if header[1] else entry
                if name in computations:
                    raise ValueError(f"line {number}: a second computation %{name}")
            elif _ASSIGNMENT.match(line):
                raise ValueError(f"line {number}: an instruction outside of a computation: {line[:80]}")
        elif line.startswith("}"):
            computations[name] = _computation(name, lines, computations)
            lines = None
        elif line.strip():
            lines.append((number, line))
    if lines is not None:
        raise ValueError(f"%{name} has no end")
    if entry not in computations:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    return Module(computations, entry)


def executions(module: Module) -> Iterator[tuple[Instruction, int]]:
    """Every instruction that a device executes in one call of the program, with how many times it does.

    Walks the entry computation, bodies (times the trip count) and conditions of loops, called and asynchronous
    computations, but not into fusions or reducers. A loop of unknown length counts once. Of a conditional only the
    heaviest branch counts, the one that makes most bytes: a plan is for the step that does its work.
    """
    weights: dict[str, int] = {}

    def runs(instruction: Instruction) -> list[tuple[str, int]]:
        if instruction.opcode == "while":
            trips = module.trip_count(instruction)
            trips = 1 if trips is None else trips
            body, condition = module.callee(instruction, "body").name, module.callee(instruction, "condition").name
            return [(condition, trips + 1), (body, trips)]
        if instruction.opcode == "conditional":
            return [(max(instruction.called, key=weight), 1)]
        if instruction.opcode in ("call", "call-start", "async-start"):
            return [(name, 1) for name in instruction.called]
        return []

    def weight(name: str) -> int:
        if name not in weights:
            found = module.computations[name].instructions.values()
            weights[name] = sum(
                item.num_bytes + sum(times * weight(callee) for callee, times in runs(item))
                for item in found
                if item.opcode not in ("parameter", "tuple", "get-tuple-element", "bitcast")
            )
        return weights[name]

    def walk(name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for item in module.computations[name].instructions.values():
            yield item, times
            for callee, count in runs(item):
                if count:
                    yield from walk(callee, times * count)

    yield from walk(module.entry, 1)


def _computation(name: str, lines: list[tuple[int, str]], known: dict[str, Computation]) -> Computation:
    instructions: dict[str, Instruction] = {}
    roots = []
    for number, line in lines:
        try:
            instruction, is_root = _instruction(name, line)
            for operand in instruction.operands:
                if operand not in instructions:
                    raise ValueError(f"operand %{operand} is not defined before it")
            for callee in instruction.called:
                if callee not in known:
                    raise ValueError(f"computation %{callee} is not defined before it")
            if instruction.name in instructions:
                raise ValueError(f"a second %{instruction.name}")
        except ValueError as error:
            raise ValueError(f"line {number}: {error}: {line.strip()[:80]}") from None
        instructions[instruction.name] = instruction
        if is_root:
            roots.append(instruction)
    if len(roots) != 1:
        raise ValueError(f"%{name} has {len(roots)} ROOT instructions")
    return Computation(name, instructions, roots[0])


def _instruction(computation: str, line: str) -> tuple[Instruction, bool]:
    head = _ASSIGNMENT.match(line)
    if not head:
        raise ValueError("not an instruction")
    end = _end_of_shape(line, head.end())
    opcode = _OPCODE.match(line, end)
    if not opcode:
        raise ValueError("no opcode")
    close = _close(line, opcode.end() - 1)
    inside = line[opcode.end() : close - 1]
    instruction = Instruction(
        name=head[2],
        computation=computation,
        opcode=opcode[1],
        shapes=_shapes(line[head.end() : end]),
        operands=() if opcode[1] in ("constant", "parameter") else _names(inside),
        literal=inside if opcode[1] in ("constant", "parameter") else "",
        attributes=_attributes(line[close:]),
    )
    _check(instruction)
    return instruction, bool(head[1])


# Roles without which the walks below would stumble: checked here, so that parse alone refuses a damaged text.
_NEEDS = {"while": ("body", "condition"), "fusion": ("calls",), "get-tuple-element": ("index",)}


def _check(instruction: Instruction) -> None:
    for role in _NEEDS.get(instruction.opcode, ()):
        if not _names(instruction.attributes.get(role, "")):
            raise ValueError(f"no {role}=")
    if instruction.opcode in ("parameter", "get-tuple-element") and instruction.index < 0:
        raise ValueError("a negative index")
    if instruction.opcode in ("while", "get-tuple-element") and len(instruction.operands) != 1:
        raise ValueError("one operand expected")
    if instruction.opcode == "conditional" and len(instruction.called) + 1 != len(instruction.operands):
        raise ValueError("a conditional needs one operand for each branch")


def _end_of_shape(line: str, start: int) -> int:
    if line.startswith("(", start):
        return _close(line, start)
    end = line.find("]", start) + 1
    if not end:
        raise ValueError("no shape")
    return _close(line, end) if line.startswith("{", end) else end


@functools.lru_cache(maxsize=1 << 16)
def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(_shape(*found) for found in _ARRAY.findall(text))


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    width = re.fullmatch(r"(?:bf|[fsuc])(\d+)(?:e\d+m\d+\w*|b11\w*)?", dtype)
    if not width and dtype not in ("pred", "token", "opaque"):
        raise ValueError(f"unknown element type {dtype}")
    bits = int(width[1]) if width else 8 * (dtype == "pred")
    if bits % 8:  # s4 takes a byte unless the layout packs it: E(4)
        packed = re.search(r"E\((\d+)\)", layout)
        bits = int(packed[1]) if packed else 8
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(size.strip().removeprefix("<=")) for size in dims.split(",") if size)
    return Shape(dtype, sizes, bits, int(space[1]) if space else HBM)


def _attributes(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for piece in _pieces(text):
        key, _, value = piece.partition("=")
        if key == "device_ids":  # the second half of `replica_groups=mesh[...], device_ids=(...) {...}`
            found["replica_groups"] = f"{found.get('replica_groups', '')}, {piece}"
        elif key:
            found[key] = value
    return found


def _names(text: str) -> tuple[str, ...]:
    """The names in a list of operands or computations: `%a`, `f32[2]{0} %a`, or a plain `a`."""
    if "%" in text:
        return tuple(_NAME.findall(text))
    return tuple(piece.split()[-1] for piece in _pieces(text.strip().strip("{}")))


def _pieces(text: str) -> list[str]:
    """Splits at the commas that no bracket or quote encloses; leaves out what is empty."""
    pieces, start, position = [], 0, 0
    while found := _BRACKET_OR_COMMA.search(text, position):
        mark = text[found.start()]
        if mark in "([{":
            position = _close(text, found.start())
        elif mark in ")]}":
            raise ValueError("a bracket closes that was never opened")
        elif mark == '"' and not found[1]:
            raise ValueError("a string is never closed")
        else:
            position = found.end()
            if mark == ",":
                pieces.append(text[start : found.start()].strip())
                start = position
    pieces.append(text[start:].strip())
    return [piece for piece in pieces if piece]


def _close(text: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    depth = 0
    for found in _BRACKET.finditer(text, start):
        mark = text[found.start()]
        if mark in "([{":
            depth += 1
        elif mark != '"':
            depth -= 1
            if not depth:
                return found.end()
    raise ValueError("a bracket is never closed")


# How long a loop is. A value is a symbol plus an offset: ((computation, slot), n) stands for the slot of the tuple
# that a loop's body or condition is given, plus n; (None, n) is the constant n.
_Value = tuple[tuple[str, int] | None, int]
_SAME = ("copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "opt-barrier", "optimization-barrier")
_FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


class _Scalars:
    """Follows integers through copies, tuples, fusions and loops that carry them unchanged."""

    def __init__(self, module: Module):
        self.module = module
        self.seen: dict[tuple, _Value | None] = {}

    def value(self, item: Instruction, trace: str = "", depth: int = 0) -> _Value | None:
        """What a scalar is. In computation `trace` the slots stay symbols, whatever is known of them."""
        key = (item.computation, item.name, trace)
        if key not in self.seen:
            self.seen[key] = None  # also what a value that depends on itself gets
            self.seen[key] = self._value(item, trace, depth + 1) if depth < 100 else None
        return self.seen[key]

    def _value(self, item: Instruction, trace: str, depth: int) -> _Value | None:
        module = self.module
        if item.opcode == "constant":
            return (None, int(item.literal)) if re.fullmatch(r"-?\d{1,20}", item.literal) else None
        if item.opcode in _SAME and item.operands:
            return self.value(module.operand(item), trace, depth)
        if item.opcode == "get-tuple-element":
            return self.element(module.operand(item), item.index, trace, depth)
        if item.opcode in ("fusion", "call") and item.called:
            return self.value(module.computations[item.called[0]].root, trace, depth)
        if item.opcode == "parameter":
            caller = self.caller(item)
            if caller and caller.opcode in ("fusion", "call") and item.index < len(caller.operands):
                return self.value(module.operand(caller, item.index), trace, depth)
        if item.opcode in ("add", "subtract", "multiply") and len(item.operands) == 2:
            left, right = (self.value(operand, trace, depth) for operand in module.operands(item))
            if left and right:
                return _combined(item.opcode, left, right)
        return None

    def element(self, item: Instruction, slot: int, trace: str, depth: int) -> _Value | None:
        """What stands in one slot of a tuple."""
        module = self.module
        if depth > 100:
            return None
        if item.opcode == "tuple" and slot < len(item.operands):
            return self.value(module.operand(item, slot), trace, depth)
        if item.opcode in _SAME and item.operands:
            return self.element(module.operand(item), slot, trace, depth + 1)
        if item.opcode in ("fusion", "call") and item.called:
            return self.element(module.computations[item.called[0]].root, slot, trace, depth + 1)
        if item.opcode == "while" and self.is_constant(item, slot, depth):
            return self.element(module.operand(item), slot, trace, depth + 1)
        if item.opcode != "parameter":
            return None
        here, caller = (item.computation, slot), self.caller(item)
        if caller is None or item.computation == trace:
            return here, 0
        if caller.opcode == "while":
            found = None
            if self.is_constant(caller, slot, depth):
                found = self.element(module.operand(caller), slot, trace, depth + 1)
            return found or (here, 0)
        if caller.opcode == "conditional":
            return self.element(
                module.operand(caller, 1 + caller.called.index(item.computation)), slot, trace, depth + 1
            )
        if item.index < len(caller.operands):
            return self.element(module.operand(caller, item.index), slot, trace, depth + 1)
        return None

    def is_constant(self, loop: Instruction, slot: int, depth: int = 0) -> bool:
        """Whether a loop hands this slot on as it got it."""
        body = self.module.callee(loop, "body")
        return self.element(body.root, slot, body.name, depth + 1) == ((body.name, slot), 0)

    def caller(self, item: Instruction) -> Instruction | None:
        callers = self.module.callers.get(item.computation, [])
        return callers[0] if len(callers) == 1 else None


def _combined(opcode: str, left: _Value, right: _Value) -> _Value | None:
    (symbol, a), (other, b) = left, right
    if opcode == "add" and (symbol is None or other is None):
        return symbol or other, a + b
    if opcode == "subtract" and other is None:
        return symbol, a - b
    if opcode == "multiply" and symbol is None and other is None:
        return None, a * b
    return None


def _trip_count(module: Module, loop: Instruction) -> int | None:
    if known := _KNOWN_TRIPS.search(loop.attributes.get("backend_config", "")):
        return int(known[1])
    scalars = _Scalars(module)
    condition, body = module.callee(loop, "condition"), module.callee(loop, "body")
    test = condition.root
    while test.opcode in ("fusion", "call", "copy", "bitcast"):
        test = module.computations[test.called[0]].root if test.called else module.operand(test)
    if test.opcode != "compare" or len(test.operands) != 2:
        return None
    left, right = (scalars.value(operand) for operand in module.operands(test))
    direction = test.attributes.get("direction", "")
    if left and left[0] is None:
        left, right, direction = right, left, _FLIPPED.get(direction, "")
    if not left or not right or left[0] is None or left[0][0] != condition.name or right[0] is not None:
        return None
    slot, offset = left[0][1], left[1]
    first = scalars.element(module.operand(loop), slot, "", 0)
    after = scalars.element(body.root, slot, "", 0)
    if not first or first[0] is not None or not after or after[0] != (body.name, slot):
        return None
    return _steps(first[1] + offset, after[1], right[1], direction)


def _steps(first: int, step: int, bound: int, direction: str) -> int | None:
    """How often `first`, `first + step`, ... passes the test against `bound` before it first fails."""
    if direction in ("GT", "GE"):
        first, step, bound, direction = -first, -step, -bound, {"GT": "LT", "GE": "LE"}[direction]
    distance = bound - first + (direction == "LE")
    if direction in ("LT", "LE"):
        if distance <= 0:
            return 0
        return -(-distance // step) if step > 0 else None
    if direction == "NE" and step and distance % step == 0 and distance // step >= 0:
        return distance // step
    return None
