"""Asks a question of the compiler in a process of its own, and keeps the answers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

from dsjax.config import UserError, validate
from dsjax.metrics import write_atomic
from dsjax.plan.chips import Topology, parse_topology
from dsjax.plan.measure import Job, versions
from dsjax.runs import cache_dir

COMMAND = ("-m", "dsjax.plan.measure")
SHOWING = ("cli.py", "command.py", "report.py", "search.py", "process.py")
ROOT = pathlib.Path(__file__).parent.parent.parent


def ask(job: Job, say: Callable[[str], None] = lambda text: None, *, fresh: bool = False) -> dict[str, Any]:
    """The answer of :func:`dsjax.plan.measure.measure`, from the cache if the same was asked before.

    The same is: the same config, question, versions of the compiler, and source of this library.

    Args:
        job: the question.
        say: told what the process is at.
        fresh: ask again in any case.

    Raises:
        UserError: mesh, batch or model do not fit the devices; or the compiler refuses, or dies.
    """
    topology = parse_topology(job.topology)
    validate(job.config)
    if topology.chip.torus_dims and importlib.util.find_spec("libtpu") is None:
        raise UserError(f"to plan for {topology} the TPU compiler must be installed: pip install 'dsjax[plan]'")
    text = json.dumps(job.to_json(), sort_keys=True)
    kept = cache_dir() / "plan" / f"{hashlib.sha256((text + fingerprint()).encode()).hexdigest()[:32]}.json"
    if not fresh:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(kept.read_bytes())
            if isinstance(found, dict):
                return found
    result = _run(text, topology, say)
    if "error" in result:
        raise UserError(result["error"])
    with contextlib.suppress(OSError, UserError):  # a plan is worth having on a full disk too
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(result))
    return result


def fingerprint() -> str:
    """Hash of what an answer depends on beside the question: the compiler, and all of the source but what shows it."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for folder in ("dsjax", "pallas_kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name not in SHOWING:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def environment(topology: Topology) -> dict[str, str]:
    """Of the process: no real accelerator is touched; h100 and cpu get as many devices of the host."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_NUM_CPU_DEVICES")}
    env |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_TRACEBACK_FILTERING": "off",  # else JAX ends an error with a note of its own: see answer_of
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH", "")])]),
    }
    if not topology.chip.torus_dims:
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={topology.num_devices}"
    return env


def _run(job: str, topology: Topology, say: Callable[[str], None]) -> dict[str, Any]:
    found, died, last = answer_of(COMMAND, job, topology, say)
    if found is not None:
        return found
    if died:
        raise UserError(f"the compiler for {topology} died ({died}); it said: {last}")
    raise UserError(f"the step can not be compiled for {topology}: {last}")


def answer_of(
    command: Sequence[str], question: str, topology: Topology, say: Callable[[str], None]
) -> tuple[dict[str, Any] | None, str, str]:
    """Python run with ``command`` and two files: one holds the question, into the other it writes its answer as JSON.

    Returns:
        The answer, or None; then the signal that ended the process, if one did, and the last that it said.
    """
    with tempfile.TemporaryDirectory(prefix="dsjax-plan-") as folder:
        asked, answer = pathlib.Path(folder, "question.json"), pathlib.Path(folder, "answer.json")
        asked.write_text(question, encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, *command, str(asked), str(answer)],
            env=environment(topology),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert process.stderr is not None
        lines: list[str] = []
        reader = threading.Thread(target=_listen, args=(process.stderr, lines, say), daemon=True)
        reader.start()
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            reader.join(5)
            process.stderr.close()
        if code == 0 and answer.exists():
            return json.loads(answer.read_text(encoding="utf-8")), "", ""
    last = next((line for line in reversed(lines) if line and not line.startswith(" ")), "it said nothing")[:300]
    return None, signal.Signals(-code).name if code < 0 else "", last


def _listen(stream: Any, lines: list[str], say: Callable[[str], None]) -> None:
    with contextlib.suppress(ValueError):  # closed
        for line in stream:
            text = line.rstrip()
            if text.startswith("phase: "):
                say(text.removeprefix("phase: "))
            elif text:
                lines.append(text)
                del lines[:-200]
