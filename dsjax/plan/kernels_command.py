"""``dsjax kernels``: static schedules of a kernel and of its peers, one process each, as a table and JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dsjax.config import UserError
from dsjax.metrics import write_atomic
from dsjax.plan.command import Say, progress
from dsjax.plan.kernels import Case, module_of, topology_of
from dsjax.plan.measure import versions
from dsjax.plan.process import ROOT, answer_of
from dsjax.plan.report import size_of
from dsjax.runs import cache_dir

COMMAND = ("-m", "dsjax.plan.kernels")
SOURCES = (
    "kernels.py",
    "kernels_attention.py",
    "kernels_grouped_matmul.py",
    "prefetch.py",
    "schedule.py",
    "scalar_unit.py",
)  # that a count depends on


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        kernel: segmented_attention, grouped_matmul.
        chip: v5e, v6e ...
        json: file to write.
        search: try tiles instead, and write the best into the table that the kernel reads.
        peer_preparation: also measure how long the peer prepares itself at the largest length.
        fresh: compile again what was compiled before.
        quiet: nothing on standard error.
    """

    kernel: str
    chip: str
    json: str = ""
    search: bool = False
    peer_preparation: bool = False
    fresh: bool = False
    quiet: bool = False


def run(request: Request) -> int:
    """Compiles, prints, writes; returns the exit code.

    Raises:
        UserError: an unknown kernel or chip, no compiler, or a program that it refuses.
    """
    module, topology = module_of(request.kernel), topology_of(request.chip)
    if request.json and not pathlib.Path(request.json).absolute().parent.is_dir():
        raise UserError(f"--json is {request.json}: there is no folder {pathlib.Path(request.json).absolute().parent}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"to compile for {topology} the TPU compiler must be installed: pip install 'dsjax[plan]'")
    out = Console()
    if not out.is_terminal:
        out.width = 160  # a table in a file need not fit a screen
    if request.search:
        return _search(module, request, out)
    results, refused = compile_all(module.cases(request.chip), request)
    report = {
        "kernel": request.kernel,
        "chip": request.chip,
        "peer": module.PEERS[0],
        **module.summary(request.chip, results),
    }
    if request.peer_preparation:
        with progress(module.PEERS[0], request.quiet) as say:
            say("preparing itself")
            report["peer_preparation_seconds"] = module.peer_preparation()
    report |= {"versions": versions(), "refused": refused, "results": results}
    show(report, out)
    _write(request, report)
    return 0


def compile_all(cases: Sequence[Case], request: Request) -> tuple[list[dict[str, Any]], list[str]]:
    """Results, and what was not compiled: tiles that do not fit are passed over.

    Raises:
        UserError: the compiler refuses what has no tiles to choose from, or all that have.
    """
    results, refused = [], []
    for number, case in enumerate(cases, 1):
        with progress(f"{number}/{len(cases)} {case}", request.quiet) as say:
            result = ask(case, say, fresh=request.fresh)
        if "error" not in result:
            results.append(result)
        elif case.tiles:
            refused.append(f"{case}: {result['error']}")
        else:
            raise UserError(f"{case}, for {case.chip}: {result['error']}")
    if not results:
        raise UserError(f"nothing could be compiled for {request.chip}; first {refused[0]}")
    return results, refused


def _search(module: Any, request: Request, out: Console) -> int:
    results, refused = compile_all(module.search(request.chip), request)
    table = Table(box=None, padding=(0, 1), title=f"{request.kernel} on {request.chip}: cycles in millions")
    for head in ("tiles", "cycles", "HBM", "compile s"):
        table.add_column(head, justify="left" if head == "tiles" else "right")
    for result in sorted(results, key=lambda r: (r["case"]["backward"], r["cycles"])):
        case = Case.from_json(result["case"])
        moved = "?" if result["kernel_hbm_bytes"] is None else size_of(result["kernel_hbm_bytes"])
        seconds = f"{result['compile_seconds']:.1f}"
        table.add_row(str(case), _millions(result["cycles"]), moved, seconds)
    out.print(table)
    for line in refused:
        out.print(f"not compiled: {line}", highlight=False)
    module.write_table(ROOT / module.TABLE, results)
    out.print(f"the best are in {module.TABLE}", highlight=False)
    _write(request, {"kernel": request.kernel, "chip": request.chip, "refused": refused, "results": results})
    return 0


def _write(request: Request, report: dict[str, Any]) -> None:
    if request.json:
        write_atomic(pathlib.Path(request.json), json.dumps(report, indent=1) + "\n")


def show(report: dict[str, Any], out: Console) -> None:
    """Prints the table."""
    out.print(
        f"{report['kernel']} on {report['chip']}: cycles of the compiler's schedule, in millions", highlight=False
    )
    table = Table(box=None, padding=(0, 1))
    for head in (
        "",
        "ours",
        report["peer"],
        "ratio",
        "with skipped",
        "dense",
        "ratio",
        "MXU floor",
        "ratio",
        "HBM bound",
    ):
        table.add_column(head, justify="right" if head else "left")
    for head in ("temporaries", f"{report['peer']}'s", "compile s"):
        table.add_column(head, justify="right")
    for row in report["rows"]:
        name, peer = row["measured"], row["peer"]
        table.add_row(
            name.replace("_", " "),
            _millions(row["cycles"]),
            _millions(peer and peer["cycles"]),
            _ratio(report["ratio_to_peer"].get(name)),
            _ratio(report["ratio_to_peer_with_its_skipped_steps"].get(name)),
            _millions(row["dense_cycles"]),
            _ratio(report["ratio_to_dense"].get(name)),
            _millions(row["mxu_floor_cycles"]),
            _ratio(report["ratio_to_mxu_floor"].get(name)),
            _millions(row["hbm_cycles"]),
            size_of(row["temporary_bytes"]),
            "" if row["peer_temporary_bytes"] is None else size_of(row["peer_temporary_bytes"]),
            f"{row['seconds']:.1f}",
        )
    out.print(table)
    for row in report["rows"]:
        if row["peer"]:
            best = "; ".join(f"{part} {found['tiles']}" for part, found in row["peer"]["passes"].items())
            out.print(f"{report['peer']}, {row['measured'].replace('_', ' ')}: {best}", highlight=False)
    for line in report["refused"]:
        out.print(f"not compiled: {line}", highlight=False)
    if "peer_preparation_seconds" in report:
        seconds = report["peer_preparation_seconds"]
        out.print(f"{report['peer']} prepared itself in {seconds:.1f} s", highlight=False)


def _millions(cycles: float | None) -> str:
    return "" if cycles is None else f"{cycles / 1e6:,.3f}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


# ---------------------------------------------------------------- asking


def ask(case: Case, say: Say = lambda text: None, *, fresh: bool = False) -> dict[str, Any]:
    """The result of :func:`dsjax.plan.kernels.measure`, from the cache if the same was compiled before.

    ``{"error": sentence}`` where the kernel or the compiler refuses the case.

    Raises:
        UserError: the compiler's process dies.
    """
    text = json.dumps(dataclasses.asdict(case), sort_keys=True)
    name = hashlib.sha256((text + fingerprint(case)).encode()).hexdigest()[:32]
    kept = cache_dir() / "kernels" / f"{name}.json"
    if not fresh:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(kept.read_bytes())
            if isinstance(found, dict):
                return found
    result = _run(case, text, say)
    with contextlib.suppress(OSError, UserError):  # a full disk is no reason to fail
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(result))
    return result


def fingerprint(case: Case) -> str:
    """Hash of what a count depends on beside the case: the compiler, our kernels if it has one, how it is counted."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    kernels = (
        [] if case.implementation in module_of(case.kernel).PEERS else sorted((ROOT / "pallas_kernels").rglob("*.py"))
    )
    for path in [*kernels, *(ROOT / "dsjax" / "plan" / name for name in SOURCES)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _run(case: Case, text: str, say: Say) -> dict[str, Any]:
    found, died, last = answer_of(COMMAND, text, topology_of(case.chip), say)
    if found is not None:
        return found
    if died:
        raise UserError(f"the compiler died ({died}) over {case}; it said: {last}")
    raise UserError(f"{case} can not be compiled for {case.chip}: {last}")
