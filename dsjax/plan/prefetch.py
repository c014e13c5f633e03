"""The scalars that a traced program prefetches for its Pallas kernels, where they are the same in every run.

Block lists and counts that a kernel's loops and predicates read are mostly made from shapes alone. Here the parts of a
program that depend on constants only are evaluated on the way to each kernel; the rest is not touched.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from dsjax.plan.scalar_unit import ScheduleError

SMALL = 2**22  # elements; larger constants decide nothing


@dataclasses.dataclass(frozen=True)
class Prefetched:
    """A kernel that is called.

    Attributes:
        name: of the kernel.
        operands: its first, in order; None where the value is not known.
        calls: how often a loop around it calls it with these.
        kinds: shapes and types of all operands and results.
    """

    name: str
    operands: tuple[np.ndarray | None, ...]
    calls: int = 1
    kinds: tuple[str, ...] = ()

    def words(self) -> dict[int, list[int]]:
        """As they lie in scalar memory, by their number."""
        return {n: packed_words(x) for n, x in enumerate(self.operands) if x is not None and x.ndim}


def prefetched(jaxpr: Any, platform: str = "tpu") -> list[Prefetched]:
    """The kernels of a closed jaxpr (of ``jax.jit(f).trace(...)``), in the order in which they are called."""
    found: list[Prefetched] = []
    _walk(jaxpr.jaxpr, jaxpr.consts, [None] * len(jaxpr.jaxpr.invars), platform, found, 1)
    return found


def calls_of_each(called: Sequence[Prefetched], compiled: Sequence[str]) -> dict[str, int]:
    """How often each compiled kernel of a name runs. Calls of the same shapes are compiled once, others apart.

    Args:
        called: all calls of the program.
        compiled: names of kernels, one as often as it was compiled.

    Raises:
        ScheduleError: it can not be told which of the compiled ones is called how often.
    """
    found: dict[str, int] = {}
    for name, num_compiled in collections.Counter(compiled).items():
        own = [kernel for kernel in called if kernel.name == name]
        of_kind = collections.Counter[tuple[str, ...]]()
        for kernel in own:
            of_kind[kernel.kinds] += kernel.calls
        times = set(of_kind.values()) if num_compiled == len(of_kind) else {kernel.calls for kernel in own}
        if len(times) != 1 or num_compiled not in (len(of_kind), len(own)):
            raise ScheduleError(
                f"kernels called {name}: {num_compiled} are compiled, for {len(own)} calls of {len(of_kind)} kinds"
            )
        found[name] = times.pop()
    return found


def _walk(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], platform: str, found: list[Prefetched], calls: int
) -> list[Any]:
    """Values of what a jaxpr that is gone through ``calls`` times gives, None where unknown."""
    known: dict[Any, Any] = {
        var: value
        for var, value in [*zip(jaxpr.constvars, consts, strict=True), *zip(jaxpr.invars, args, strict=True)]
        if value is not None
    }

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        given = [value(atom) for atom in eqn.invars]
        made = _equation(eqn, given, platform, found, calls)
        known |= {var: x for var, x in zip(eqn.outvars, made, strict=True) if x is not None}
    return [value(atom) for atom in jaxpr.outvars]


def _equation(eqn: Any, given: list[Any], platform: str, found: list[Prefetched], calls: int) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    unknown = [None] * len(eqn.outvars)
    if name == "pallas_call":
        mapping = params["grid_mapping"]
        first = mapping.num_dynamic_grid_bounds
        scalars = given[first : first + mapping.num_index_operands]
        label = params["name"] or params["jaxpr"].debug_info.func_name
        kinds = tuple(var.aval.str_short() for var in (*eqn.invars, *eqn.outvars))
        found.append(Prefetched(label, tuple(None if x is None else np.asarray(x) for x in scalars), calls, kinds))
        return unknown
    if name == "cond":
        for branch, platforms in zip(params["branches"], params.get("branches_platforms") or (), strict=False):
            if platforms is None or platform in platforms:
                return _walk(branch.jaxpr, branch.consts, given[1:], platform, found, calls)
    inner = params.get("call_jaxpr") or params.get("jaxpr")
    if inner is not None:
        plain, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        if name == "scan":  # the same constants in each turn
            fixed = params["num_consts"]
            given = [x if i < fixed else None for i, x in enumerate(given)]
            _walk(plain, consts, given, platform, found, calls * params["length"])
            return unknown
        same = name not in ("while", "shard_map") and len(plain.invars) == len(given)
        made = _walk(plain, consts, given if same else [None] * len(plain.invars), platform, found, calls)
        return made if same and len(made) == len(unknown) else unknown
    sizes = [var.aval.size for var in (*eqn.invars, *eqn.outvars) if hasattr(var.aval, "size")]
    if any(x is None for x in given) or eqn.effects or max(sizes, default=0) > SMALL:
        return unknown
    made = eqn.primitive.bind(*given, **params)
    return list(made) if eqn.primitive.multiple_results else [made]


def packed_words(array: np.ndarray) -> list[int]:
    """The words of scalar memory that hold an array of integers.

    A word has 32 bits. One dimension lies in order; of more, each row is cut into pieces of 128 words, and 2 or 4 rows
    of a narrower type share their words.
    """
    bits = 8 * array.dtype.itemsize
    if array.ndim == 1 and bits == 32:
        return [int(x) for x in array.astype(np.int32)]
    pack, values = 32 // bits, np.atleast_2d(array).astype(np.int64)
    rows, columns = values.shape[-2:]
    padded = np.zeros((*values.shape[:-2], rows + -rows % pack, columns + -columns % 128), np.int64)
    padded[..., :rows, :columns] = values & (2**bits - 1)
    tiles = padded.reshape(-1, pack, padded.shape[-1] // 128, 128)
    words = (tiles << (bits * np.arange(pack))[:, None, None]).sum(axis=1).ravel()
    return [int(x) for x in words.astype(np.uint32).astype(np.int32)]
