"""Classes to simulate: a counter or a stack that obeys commands. An operation is made for each set of methods."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Mapping, Sequence

from dsjax.data.tasks.operation import Operation, Step, pick

# method -> (what its command looks like and does, what it does in Python, what it needs)
_COUNTER: Mapping[str, tuple[str, str]] = {
    "add": ("'add N' adds N to the value", "self.value += amount"),
    "take": ("'take N' subtracts N from the value", "self.value -= amount"),
    "double": ("'double' doubles the value", "self.value *= 2"),
    "reset": ("'reset' sets the value back to where it began", "self.value = START"),
    "flip": ("'flip' changes the sign of the value", "self.value = -self.value"),
    "cap": ("'cap N' lowers the value to N if it is larger", "self.value = min(self.value, amount)"),
    "raise": ("'raise N' lifts the value to N if it is smaller", "self.value = max(self.value, amount)"),
    "halve": ("'halve' halves the value, rounding down", "self.value //= 2"),
}
_STACK: Mapping[str, tuple[str, str]] = {
    "push": ("'push N' puts N on top", "self.items.append(amount)"),
    "pop": ("'pop' removes the number on top, if there is one", "del self.items[-1:]"),
    "copy": ("'copy' puts the number on top there once more, if there is one", "self.items += self.items[-1:]"),
    "swap": ("'swap' swaps the two numbers on top, if there are two", "self.items[-2:] = self.items[-2:][::-1]"),
    "join": (
        "'join' replaces the two numbers on top by their sum, if there are two",
        "if len(self.items) > 1:\n    self.items[-2:] = [sum(self.items[-2:])]",
    ),
    "clear": ("'clear' removes all numbers", "self.items.clear()"),
    "sink": (
        "'sink' moves the number on top to the bottom, if there is one",
        "self.items = self.items[-1:] + self.items[:-1]",
    ),
    "count": ("'count' puts the number of numbers on top", "self.items.append(len(self.items))"),
}
_NEED_AMOUNT = ("add", "take", "cap", "raise", "push")
COMMANDS = tuple({**_COUNTER, **_STACK})
WITH_AMOUNT = _NEED_AMOUNT


def machine(kind: str, methods: Sequence[str], start: int) -> Operation:
    """An operation that simulates an object: commands -> what it holds after each of them.

    Args:
        kind: "counter" (a value) or "stack" (a list of numbers, of which the one on top is looked at).
        methods: the commands that it knows; it ignores others.
        start: the value of a counter in the beginning.
    """
    table = _COUNTER if kind == "counter" else _STACK
    lines = [f"class {kind.title()}:", "    def __init__(self):"]
    lines.append(f"        self.value = {start}" if kind == "counter" else "        self.items = []")
    for name in methods:
        argument = ", amount" if name in _NEED_AMOUNT else ""
        body = textwrap.indent(table[name][1].replace("START", str(start)), " " * 8)
        lines += ["", f"    def {name}_{'it' if not argument else 'by'}(self{argument}):", body]
    lines += ["", f"{kind} = {kind.title()}()", "$y = []", "for command in $x:", "    name, *rest = command.split()"]
    for number, name in enumerate(methods):
        call = f"{kind}.{name}_by(int(rest[0]))" if name in _NEED_AMOUNT else f"{kind}.{name}_it()"
        lines += [f"    {'el' if number else ''}if name == {name!r}:", f"        {call}"]
    lines += ["    else:", "        continue"]
    result = f"{kind}.value" if kind == "counter" else f"{kind}.items[-1] if {kind}.items else 0"
    lines.append(f"    $y.append({result})")
    knows = "; ".join(table[name][0] for name in methods)
    holds, after = (
        (f"a counter whose value begins at {start}", "its value")
        if kind == "counter"
        else ("a stack of numbers, empty at first", "the number on top, or 0 if it is empty")
    )
    phrases = (
        f"simulate {holds}, which obeys these commands and ignores others: {knows}; list {after} after each one obeyed",
        f"run the commands on {holds}, and list {after} after each command that it knows; it knows these: {knows}",
    )
    name = f"{kind}[{', '.join(methods)}; {start}]" if kind == "counter" else f"{kind}[{', '.join(methods)}]"
    return Operation(name, "commands", "ints", phrases, ("\n".join(lines),))


def draw_machine(draw: random.Random, num_methods: int) -> Step:
    """A machine of so many methods; a stack always knows push."""
    kind = pick(draw, ("counter", "stack"))
    pool = list(_COUNTER if kind == "counter" else _STACK)
    chosen = ["add" if kind == "counter" else "push"]
    while len(chosen) < num_methods:
        name = pick(draw, pool)
        if name not in chosen:
            chosen.append(name)
    ordered = [name for name in pool if name in chosen]
    return Step(machine(kind, ordered, pick(draw, (0, 1, 5, 10)) if kind == "counter" else 0))
