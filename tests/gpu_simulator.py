"""The simulator of Mosaic GPU kernels, as the tests use it.

It runs the warpgroups of a thread block as threads, with shared memory (NaN until written), copies and barriers; only
what one wgmma instruction computes is left to XLA.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races, reset_gpu_interpret_mode_state


@pytest.fixture(autouse=True)
def compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator compiles the program of a thread for each thread of each block; here, once."""
    programs: dict[int, Any] = {}
    lock = threading.Lock()

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in programs:

                def evaluate(consts, *args):
                    jax.core.eval_jaxpr(jaxpr, consts, *args)

                programs[id(jaxpr)] = (jax.jit(evaluate).lower(consts, *args).compile(), jaxpr)
        programs[id(jaxpr)][0](consts, *args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)


@contextlib.contextmanager
def no_gpu_races() -> Iterator[None]:
    """Something was simulated with ``detect_races``, and no copy can overtake a read, or be overtaken by one."""
    reset_gpu_interpret_mode_state()
    try:
        yield
        assert not get_races().races_found, "a race"
    finally:
        reset_gpu_interpret_mode_state()  # an error leaves it unusable
