"""Eight forced CPU devices, run-time checks of jaxtyping shapes, and what tests share."""

from __future__ import annotations

import gc
import itertools
import os
import pathlib
import signal
from collections.abc import Iterator

import xla_flags

# A job in the background of a shell ignores Ctrl-C, and so would the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags.EIGHT_DEVICES} {xla_flags.QUICK}"

# Each of pytest-xdist's workers has a core of its own, and with it the processes that its tests start: programs of
# eight devices would fight for all of them otherwise, and the pinned processes of all workers would share the first.
if worker := os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["dsjax", "pallas_kernels"], "typecheck.check")
# What an example takes tells of the machine, and of what was compiled for it.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

SLOW = pathlib.Path(__file__).with_name("slow.txt")


@pytest.hookimpl(tryfirst=True)  # before -m leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that ``slow.txt`` names."""
    names = {line for line in SLOW.read_text().splitlines() if line and not line.startswith("#")}
    for item in items:
        case = f"{item.path.name}::{item.name}"
        if not names.isdisjoint((case, case.partition("[")[0])):
            item.add_marker(pytest.mark.slow)


# Linux ends a process that wants more than 65,530 mappings. Programs of a module are let go of behind it, or in it.
MOST_MAPPINGS, MOST_WITHIN = 25_000, 45_000


def forget_programs(most: int) -> None:
    """Every program compiled for the CPU maps some memory, and a worker runs thousands: it must let go of them."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > most:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def forgets_programs() -> Iterator[None]:
    yield
    forget_programs(MOST_MAPPINGS)


_ended = itertools.count()


def pytest_runtest_teardown() -> None:
    if next(_ended) % 8 == 0:  # reading how many there are takes as long as a small test
        forget_programs(MOST_WITHIN)
