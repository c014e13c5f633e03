"""Plans for people: a table for one, a table and curves for several."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dsjax.config import UserError
from dsjax.metrics import write_atomic

NAMES = {"mxu": "matrix products", "hbm": "memory traffic", "ici": "links"}


def show(plan: dict[str, Any], out: Console) -> None:
    """Prints one plan."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items()) or "one device"
    out.print(
        f"{plan['mode']} on {plan['topology']}: {plan['num_chips']:,} chips, mesh {mesh}, {plan['batch_size']:,} x"
        f" {plan['length']:,} tokens, {plan['dtype']}" + (f", remat {plan['remat']}" if plan["mode"] == "train" else "")
    )
    out.print(f"{plan['num_params']:,} parameters, {plan['num_active_params']:,} active", highlight=False)

    memory = _table("memory of a chip")
    for name, size in plan["hbm_breakdown_bytes"].items():
        if size:
            memory.add_row(name.replace("_", " "), size_of(size))
    memory.add_row("in all", size_of(plan["hbm_bytes_per_chip"]), style="bold")
    if plan["hbm_capacity_bytes"] is not None:
        memory.add_row("there is", size_of(plan["hbm_capacity_bytes"]))
    out.print(memory)

    work = _table("FLOPs of a step, all chips")
    work.add_row("model", f"{plan['flops_per_step']:.4g}")
    for name in ("recomputed", "wasted", "optimizer"):
        work.add_row(name, f"{plan[f'flops_{name}']:.4g}")
    out.print(work)
    if plan["collective_bytes"] is not None:
        out.print(_collectives(plan["collective_bytes"]))
    if plan.get("hbm_traffic_bytes"):
        moved = _table("bytes that a device reads and writes in a step, by scope")
        for scope, size in plan["hbm_traffic_bytes"]["by_scope"].items():
            moved.add_row(scope, size_of(size))
        out.print(moved)
    out.print(_roofline(plan))
    for line in plan["notes"]:
        out.print(f"note: {line}", highlight=False)
    words = {True: "fits", False: "does not fit", None: "no capacity is known"}[plan["fits"]]
    out.print(f"{words}; compiled in {plan['compile_seconds']:.0f} s", style="bold")


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2), min_width=72)
    table.add_column(min_width=40)
    table.add_column(justify="right")
    return table


def _collectives(found: dict[str, dict[str, float]]) -> Table:
    table = _table("bytes that a device sends in a step, by mesh axis")
    for axes, kinds in sorted(found.items()):
        for kind, size in sorted(kinds.items(), key=lambda item: -item[1]):
            table.add_row(f"{axes}: {kind}", size_of(size))
    if not found:
        table.add_row("none", "")
    return table


def _roofline(plan: dict[str, Any]) -> Table:
    table = _table("at best (nothing but this took time)")
    for name, seconds in plan["roofline_seconds"].items():
        mark = "  <- bound" if name == plan["bound"] else ""
        table.add_row(NAMES[name], ("not known" if seconds is None else time_of(seconds)) + mark)
    if plan["best_mfu"] is not None:
        table.add_row("model FLOPs utilisation", f"{plan['best_mfu']:.1%}")
        table.add_row("tokens a second", f"{plan['tokens_per_second_bound']:,.0f}")
        table.add_row("energy of a token, dynamic", f"{plan['energy_joules_per_token']['total']:.3g} J")
    return table


def show_several(plans: Sequence[dict[str, Any]], out: Console) -> None:
    """Prints plans side by side."""
    table = Table(box=None, padding=(0, 1))
    for head in ("topology", "chips", "mesh", "batch", "GiB/chip", "fits", "sent/chip"):
        table.add_column(head, justify="left" if head in ("topology", "mesh") else "right")
    for head in (*NAMES, "bound", "MFU", "tokens/s"):
        table.add_column(head, justify="right")
    for plan in plans:
        table.add_row(*_cells(plan))
    out.print(table)


def _cells(plan: dict[str, Any]) -> list[str]:
    mesh = ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items()) or "1"
    return [
        plan["topology"],
        f"{plan['num_chips']:,}",
        mesh,
        f"{plan['batch_size']:,}",
        f"{plan['hbm_bytes_per_chip'] / 2**30:,.1f}",
        {True: "yes", False: "no", None: "?"}[plan["fits"]],
        "?" if plan["collective_bytes"] is None else size_of(sent(plan)),
        *roofline_cells(plan),
    ]


def roofline_cells(plan: dict[str, Any]) -> list[str]:
    """Seconds of the three, the bound, utilisation and tokens a second, for a row of a table."""
    seconds = [plan["roofline_seconds"][name] for name in NAMES]
    return [
        *("?" if s is None else time_of(s) for s in seconds),
        plan["bound"] or "?",
        "?" if plan["best_mfu"] is None else f"{plan['best_mfu']:.1%}",
        "?" if plan["tokens_per_second_bound"] is None else f"{plan['tokens_per_second_bound']:,.0f}",
    ]


def sent(plan: dict[str, Any]) -> float:
    """Bytes that a chip sends in a step."""
    per_device = sum(size for kinds in plan["collective_bytes"].values() for size in kinds.values())
    return per_device * plan["num_devices"] / plan["num_chips"]


def size_of(size: float) -> str:
    """Bytes for reading."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:,.0f} B"


def time_of(seconds: float) -> str:
    """Seconds for reading."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"


# ---------------------------------------------------------------- pictures


def curves(plans: Sequence[dict[str, Any]]) -> Any:
    """Memory, roofline and bytes sent against what differs between the plans: chips, or batch size."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    by = "num_chips" if len({plan["num_chips"] for plan in plans}) > 1 else "batch_size"
    x = [plan[by] for plan in plans]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    memory, times, links = figure.subplots(1, 3)
    memory.plot(x, [plan["hbm_bytes_per_chip"] / 2**30 for plan in plans], "o-", color="tab:blue", label="needed")
    capacity = plans[0]["hbm_capacity_bytes"]
    if capacity is not None and len({plan["chip"] for plan in plans}) == 1:
        memory.axhline(capacity / 2**30, color="gray", linestyle="--", label="there is")
    memory.set(title="memory of a chip", ylabel="GiB", ylim=(0, None))
    for name, label in NAMES.items():
        points = [(n, plan["roofline_seconds"][name]) for n, plan in zip(x, plans, strict=True)]
        points = [(n, seconds) for n, seconds in points if seconds]
        if points:
            times.plot(*zip(*points, strict=True), "o-", label=label)
    times.set(title="a step at best", ylabel="seconds")
    times.set_yscale("log")
    points = [(n, sent(plan) / 2**30) for n, plan in zip(x, plans, strict=True) if plan["collective_bytes"] is not None]
    if points:
        links.plot(*zip(*points, strict=True), "o-", color="tab:green", label="sent by a chip in a step")
    links.set(title="links", ylabel="GiB", ylim=(0, None))
    for axes in (memory, times, links):
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{n:,}" for n in x])
        axes.set_xlabel({"num_chips": "chips", "batch_size": "batch size"}[by])
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def check(plot: str) -> None:
    """Whether a picture can have this name.

    Raises:
        UserError: none is of its kind.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if _kind(pathlib.Path(plot)) not in kinds:
        raise UserError(
            f"--plot is {plot}; its name must end in one of {', '.join(f'.{kind}' for kind in sorted(kinds))}"
        )


def _kind(path: pathlib.Path) -> str:
    return path.suffix.lstrip(".").lower() or "png"


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a figure as PNG (or what the name says).

    Raises:
        UserError: it can not be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format=_kind(path), dpi=110)
    write_atomic(path, picture.getvalue())
