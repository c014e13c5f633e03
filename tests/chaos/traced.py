"""Runs functions in forked, traced children; see :mod:`chaos.syscalls`.

A tracer waits for all children of its process, so it gets one to itself (``python -m chaos.traced MODULE``). That
process imports MODULE, forks a child for each request, and lets it call a function of MODULE: what is slow to import is
imported once. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback
import warnings
from typing import Any

from chaos.syscalls import Call, Fault, Trace, Tracer, watch_me

TESTS = pathlib.Path(__file__).parent.parent


def command(words: list[str], cwd: str | None = None) -> int:
    """A program instead of a function."""
    if cwd:
        os.chdir(cwd)
    os.execvp(words[0], words)


class Traced:
    """A process that forks and traces.

    Args:
        module: whose functions the children call.
        env: more variables of their environment.
    """

    def __init__(self, module: str = "chaos.traced", env: dict[str, str] | None = None):
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chaos.traced", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path} | (env or {}),
        )

    def run(
        self,
        function: str,
        folder: pathlib.Path,
        fault: Fault | None = None,
        /,
        *,
        seconds: float = 60,
        **arguments: Any,
    ) -> Trace:
        """Calls ``function(**arguments)`` in a child, its changes in ``folder`` watched; the result is the exit code.

        Args:
            function: name of a function of the module.
            folder: what changes here is recorded.
            fault: done to one of those calls.
            seconds: then the child is killed.
            arguments: plain data.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        fault_fields = dataclasses.asdict(fault) if fault else None
        request = {"function": function, "arguments": arguments, "folder": str(folder), "fault": fault_fields}
        self._process.stdin.write(json.dumps(request | {"seconds": seconds}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the tracing process ended with {self._process.wait()}")
        fields = json.loads(answer)
        if "error" in fields:
            raise RuntimeError(f"the tracing process: {fields['error']}")
        return Trace(**fields | {"calls": [Call(**call) for call in fields["calls"]]})

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def __enter__(self) -> Traced:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# ---------------------------------------------------------------- in the tracing process


def serve(module_name: str) -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the module prints is no answer
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX has started no thread yet
    module = importlib.import_module(module_name)
    for line in sys.stdin:
        try:
            answer = dataclasses.asdict(_traced(module, json.loads(line)))
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _traced(module: Any, request: dict[str, Any]) -> Trace:
    folder = pathlib.Path(request["folder"])
    fault = Fault(**request["fault"] | {"names": tuple(request["fault"]["names"])}) if request["fault"] else None
    waits, goes = os.pipe()
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if not pid:
            os.close(goes)
            os.read(waits, 1)  # until the tracer is there
            _call(getattr(module, request["function"]), request["arguments"], said.fileno())
        os.close(waits)
        trace = Tracer(pid, folder, fault, request["seconds"]).follow(lambda: os.close(goes))
        said.seek(0)
        trace.said = said.read().decode(errors="replace")
    return trace


def _call(function: Any, arguments: dict[str, Any], said: int) -> None:
    """In the child: the function's result is the exit code."""
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        watch_me()
        code = function(**arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
