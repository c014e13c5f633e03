"""Plays the scalar instructions of a TPU schedule that decide what runs (:mod:`dsjax.plan.schedule`).

Branches, and the predicates of copies, are followed backwards to all instructions that they depend on: arithmetic of
32 bits, selections, spills, loads from scalar memory. These are written as one Python function, which is compiled and
run; of the schedule's text only names and numbers get into it. Names of a schedule are values (each is written in one
place) in registers: what ``sphi`` merges at the head of a loop shares one register, so that it takes the operand that
was written last.

What can not be known (a scalar that comes from a vector, operands that the caller did not give) is UNKNOWN and makes
what is computed from it UNKNOWN, which is an error only where a branch asks for it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ALLOCATION_WORDS = 2**18  # all of scalar memory; an address in it is allocation * this + word
MAX_TURNS = 10**8  # a schedule that jumps back more often does not end


class ScheduleError(ValueError):
    """A schedule that can not be read, or that depends on what is known at run time only."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``name = op (predicate, otherwise) arguments``, in the bundle at ``address``."""

    address: int
    name: str
    op: str
    predicate: str
    otherwise: str
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Played:
    """``blocks`` are (start, end, executions); ``granules``: of copies between HBM and the core; see ``Count``."""

    blocks: tuple[tuple[int, int, int], ...]
    turns: int
    skipped_turns: int
    skipped_cycles: int
    granules: int | None


class _Unknown:
    """A value that the schedule does not tell; what is computed from it is unknown too."""

    def _spread(self, *_: Any) -> _Unknown:
        return self

    def __and__(self, other: Any) -> Any:
        return self if other is self or other else other  # nothing and anything is nothing

    def __or__(self, other: Any) -> Any:
        return True if other is True else self

    __rand__, __ror__ = __and__, __or__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _spread
    __xor__ = __rxor__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _spread
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _spread  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise AssertionError("a choice by an unknown value")


UNKNOWN = _Unknown()


def _signed(x: Any) -> Any:
    """The low 32 bits as a signed number."""
    return ((x + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def _pick(condition: Any, one: Any, other: Any) -> Any:
    return UNKNOWN if condition is UNKNOWN else one if condition else other


# Numbers are signed, predicates bool.
_OPS = {
    **dict.fromkeys(("smov", "pmov", "int_to_ptr"), "{0}"),
    **dict.fromkeys(("sadd", "scalar_lea"), "signed({0} + {1})"),
    "ssub": "signed({0} - {1})",
    "smul": "signed({0} * {1})",
    "sshll": "signed({0} << ({1} & 31))",
    "sshra": "{0} >> ({1} & 31)",
    "sshrl": "signed(({0} & 0xFFFFFFFF) >> ({1} & 31))",
    **dict.fromkeys(("sand", "pand"), "{0} & {1}"),
    **dict.fromkeys(("sor", "por"), "{0} | {1}"),
    **dict.fromkeys(("sxor", "pxor"), "{0} ^ {1}"),
    "pnand": "({0} & {1}) ^ True",
    "pnor": "({0} | {1}) ^ True",
    "pneg": "{0} ^ True",
    "scalar_select": "pick({0}, {1}, {2})",
    **{
        f"scmp.{op}.{kind}": f"({{0}}{mask}) {sign} ({{1}}{mask})"
        for kind, mask in (("s32", ""), ("u32", " & 0xFFFFFFFF"))
        for op, sign in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
    },
}
for _name_of, _sign in (("min", "<"), ("max", ">")):
    _OPS[f"s{_name_of}.s32"] = f"pick({{0}} {_sign} {{1}}, {{0}}, {{1}})"
    _OPS[f"s{_name_of}.u32"] = f"pick(({{0}} & 0xFFFFFFFF) {_sign} ({{1}} & 0xFFFFFFFF), {{0}}, {{1}})"
_HBM_COPY = re.compile(r"^dma\.(hbm_to|\w+_to_hbm)")
_TO_SCALAR_MEMORY = re.compile(r"^dma\.\w+_to_smem")
_ADDRESS = re.compile(r"^\[smem:\[(.*?)\]\]\s*(.*)$")
_SPILL = re.compile(r"^#allocation\d+_spill$")
_THROUGH = ("int_to_ptr", "sshll", "smov")  # an operand's address stays its own


def play(
    instructions: Sequence[Instruction],
    length: int,
    delay_slots: int,
    matmul_rows: np.ndarray,
    operands: Mapping[int, Sequence[int]],
) -> Played:
    """Runs a schedule of ``length`` bundles; see :func:`dsjax.plan.schedule.count`.

    Raises:
        ScheduleError: a branch depends on what is unknown, or is not as expected.
    """
    program = _Program(instructions, length, delay_slots)
    scope: dict[str, Any] = {"UNKNOWN": UNKNOWN, "signed": _signed, "pick": _pick, "stuck": _stuck}
    exec(program.source(matmul_rows), scope)
    memory = {0: 0}  # the first word tells which core this is
    for index, words in operands.items():
        memory.update(enumerate(words, -(index + 1) * ALLOCATION_WORDS))
    executions, turns, idle, granules = scope["schedule"](memory, operands, MAX_TURNS)
    starts = program.starts
    blocks = tuple(zip(starts, [*starts[1:], length], executions, strict=True))
    skipped = len(idle) * min(idle, default=0)
    return Played(blocks, turns, len(idle), skipped, None if granules is UNKNOWN else granules)


def _stuck(address: int, why: str = "a branch depends on what is known at run time only") -> None:
    raise ScheduleError(f"bundle {address:#x}: {why}")


class _Program:
    """The instructions that matter, cut into blocks, as Python."""

    def __init__(self, instructions: Sequence[Instruction], length: int, delay_slots: int) -> None:
        self.length = length
        self.defining: dict[str, list[Instruction]] = collections.defaultdict(list)
        for i in instructions:
            for key in _written(i):
                self.defining[key].append(i)
        self.branches = {}
        for i in instructions:
            if i.op.startswith(("sbr", "scall", "sret")):
                found = re.search(r"target bundleno = (\d+)", " ".join(i.arguments))
                if i.op != "sbr.rel" or found is None:
                    raise ScheduleError(f"bundle {i.address:#x}: a jump {i.op} that can not be followed")
                self.branches[i.address + delay_slots + 1] = (i, int(found[1]))
        targets = {target for _, target in self.branches.values()}
        self.starts = sorted({0, *targets, *self.branches} - {length})
        for end, (branch, _) in self.branches.items():
            if any(branch.address < start < end for start in self.starts):
                raise ScheduleError(f"bundle {branch.address:#x}: a jump in the {delay_slots} bundles behind another")
        self.needed = self._slice(instructions)
        self.copied_to: dict[str, list[str]] = collections.defaultdict(list)
        for i in self.needed:
            if i.op == "sphi":
                for argument in i.arguments:
                    self.copied_to[argument].append(i.name)

    def _slice(self, instructions: Sequence[Instruction]) -> list[Instruction]:
        """All that branches and copies depend on, in the order of the schedule."""
        roots = [i for i in instructions if i.op.startswith("sbr") or _HBM_COPY.match(i.op)]
        found, wanted = set[Instruction](), list[Instruction](roots)
        while wanted:
            i = wanted.pop()
            if i not in found:
                found.add(i)
                wanted += itertools.chain.from_iterable(self.defining.get(key, ()) for key in _read(i))
        return [i for i in instructions if i in found]

    def source(self, matmul_rows: np.ndarray) -> str:
        """Of a function ``schedule(memory, operands, fuel)``."""
        loops = [(target, end) for end, (i, target) in self.branches.items() if target <= i.address]
        head, _ = max(loops, key=lambda loop: loop[1] - loop[0], default=(-1, -1))
        names = {_name(i.name) for i in self.needed} | {_name(k) for i in self.needed for k in _read(i)}
        names |= {f"{_name(i.name)}_next" for i in self.needed if i.op == "sphi"}
        lines = ["def schedule(memory, operands, fuel):"]
        lines += [f" {name} = UNKNOWN" for name in sorted(names)]
        lines += [f" ran = [0] * {len(self.starts)}"]
        lines += [" at = cycles = since = turns = granules = 0", " idle, busy = [], False"]
        lines += [f" while at < {self.length}:", "  fuel -= 1", "  if fuel < 0: stuck(at, 'it does not end')"]
        by_address = collections.defaultdict(list)
        for i in self.needed:
            by_address[i.address].append(i)
        for number, (start, end) in enumerate(zip(self.starts, [*self.starts[1:], self.length], strict=True)):
            lines.append(f"  if at == {start}:")
            if start == head:  # the first turn and the last, which fill and empty the pipeline of copies, are not idle
                lines += ["   if turns > 1 and not busy: idle.append(cycles - since)"]
                lines += ["   turns, busy, since = turns + 1, False, cycles"]
            lines += [f"   ran[{number}] += 1", f"   cycles += {end - start}"]
            lines += ["   busy = True"] if matmul_rows[start:end].any() else []
            for address in range(start, end):
                lines += [f"   {line}" for line in self._bundle(by_address[address])]
            lines += [f"   {line}" for line in self._leave(end)]
        return "\n".join([*lines, " return ran, turns, idle, granules"])

    def _bundle(self, instructions: list[Instruction]) -> list[str]:
        """Merges come first, all at a time: other instructions of the bundle read what they give."""
        merged = [i for i in instructions if i.op == "sphi"]
        lines = []
        if merged:
            lines.append("; ".join(f"old_{n} = {_name(i.name)}_next" for n, i in enumerate(merged)))
            for n, i in enumerate(merged):
                lines += self._assign(i.name, f"old_{n}")
        for i in instructions:
            if i.op != "sphi":
                lines += self._statement(i)
        return lines

    def _assign(self, name: str, value: str) -> list[str]:
        return [" = ".join([_name(name), *(f"{_name(to)}_next" for to in self.copied_to.get(name, ())), value])]

    def _statement(self, i: Instruction) -> list[str]:
        condition = _value(i.predicate) if i.predicate else "True"
        if i.op.startswith("sbr"):
            return []  # at the end of the block
        if _TO_SCALAR_MEMORY.match(i.op):
            return self._prefetch(i)
        if _HBM_COPY.match(i.op):
            return [f"granules += pick({condition}, {_value(i.arguments[1])}, 0)"]
        if i.op == "sst":
            where, what = _memory(i)
            if where is None:
                return []
            value, old = _value(what), where if where.startswith("m_") else f"memory.get({where}, UNKNOWN)"
            target = where if where.startswith("m_") else f"memory[{where}]"
            return [f"{target} = " + (value if condition == "True" else f"pick({condition}, {value}, {old})")]
        value = self._expression(i)
        if condition != "True":
            value = f"pick({condition}, {value}, {_value(i.otherwise) if i.otherwise else 'UNKNOWN'})"
        return self._assign(i.name, value)

    def _expression(self, i: Instruction) -> str:
        if i.op == "sld":
            where, _ = _memory(i)
            if where is None:
                return "UNKNOWN"
            return where if where.startswith("m_") else f"memory.get({where}, UNKNOWN)"
        if i.op.startswith("inlined_call_operand"):
            return self._operand(i)
        op = _OPS.get(i.op.removesuffix(".totalorder")) or _OPS.get(i.op.split(".")[0])
        if op is None:
            return "UNKNOWN"
        return op.format(*(f"({_value(argument)})" for argument in [*i.arguments, "0"]))

    @staticmethod
    def _operand(i: Instruction) -> str:
        """A single scalar is given as itself, others by their address: in scalar memory, or elsewhere."""
        text = " ".join(i.arguments)
        index = int(re.search(r"index: (\d+)", text)[1])  # type: ignore[index]
        if "<no memory space>" in text:
            return f"(operands.get({index}) or [UNKNOWN])[0]"
        return str(-(index + 1) * ALLOCATION_WORDS) if i.op.endswith(".smem") else "UNKNOWN"

    def _prefetch(self, i: Instruction) -> list[str]:
        """Scalar memory gets the words of an operand, if they are known."""
        source = i.arguments[0]
        while True:
            found = self.defining.get(source, [])
            if len(found) != 1:
                return []
            if found[0].op.startswith("inlined_call_operand"):
                break
            if not found[0].op.startswith(_THROUGH) and found[0].op != "sld":
                return []
            source = _read(found[0])[0]
        index = re.search(r"index: (\d+)", " ".join(found[0].arguments))
        assert index is not None
        return [f"memory.update(enumerate(operands.get({index[1]}, ()), {_value(i.arguments[2])}))"]

    def _leave(self, end: int) -> list[str]:
        """The jump, if one ends here, or on to the next block."""
        if end not in self.branches:
            return [f"at = {end}"]
        branch, target = self.branches[end]
        if not branch.predicate:
            return [f"at = {target}"]
        lines = [f"taken = {_value(branch.predicate)}", f"if taken is UNKNOWN: stuck({branch.address})"]
        return [*lines, f"at = {target} if taken else {end}"]


# ---------------------------------------------------------------- names


def _name(key: str) -> str:
    """A Python name for a value (``%s12_s3``) or a spilled one (``#allocation7_spill``)."""
    return f"m_{key[1:]}" if key.startswith("#") else f"x_{key.lstrip('%')}".replace(".", "_")


def _value(text: str) -> str:
    """A Python expression for an argument."""
    text = text.strip()
    if text.startswith("!"):
        return f"({_value(text[1:])} ^ True)"
    if text.startswith("%"):
        return _name(text)
    if re.fullmatch(r"\$?(-?\d+|0x[0-9a-f]+)", text):
        return str(_signed(int(text.lstrip("$"), 0)))
    found = re.fullmatch(r"\[?#allocation(\d+)(?:_spill)?(?: \+ ([^\]]*))?\]?", text)
    return f"({int(found[1]) * ALLOCATION_WORDS} + {_value(found[2] or '0')})" if found else "UNKNOWN"


def _memory(i: Instruction) -> tuple[str | None, str]:
    """Where a load or a store goes, a variable or an address in scalar memory, and what is stored."""
    found = _ADDRESS.match(", ".join(i.arguments))
    if found is None:
        return None, ""
    if _SPILL.match(found[1]):
        return _name(found[1]), found[2]
    return " + ".join(_value(part) for part in found[1].split(" + ")), found[2]


def _read(i: Instruction) -> list[str]:
    """Keys of all that an instruction reads: values, spilled values, scalar memory."""
    words = [i.predicate.lstrip("!"), i.otherwise, *i.arguments]
    keys = list(itertools.chain.from_iterable(re.findall(r"%[\w.]+", word) for word in words))
    if i.op == "sld":
        place = _ADDRESS.match(", ".join(i.arguments))
        if place is not None:
            keys.insert(0, place[1] if _SPILL.match(place[1]) else "memory")
    return keys


def _written(i: Instruction) -> list[str]:
    """Keys of what an instruction writes."""
    if _TO_SCALAR_MEMORY.match(i.op):
        return ["memory"]
    if i.op == "sst":
        place = _ADDRESS.match(", ".join(i.arguments))
        return [] if place is None else [place[1] if _SPILL.match(place[1]) else "memory"]
    return [i.name]
