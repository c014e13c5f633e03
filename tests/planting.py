"""Copies of a package in which something is changed: smaller pieces, a simulator, or a fault to be caught."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import pathlib
import shutil
import sys
from collections.abc import Iterator
from types import ModuleType

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

NUMBERS = itertools.count()
Change = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Fault:
    """``old`` of ``file`` becomes ``new``; ``case`` is the case that shows it, computed by ``variant``."""

    what: str
    file: str
    old: str
    new: str
    case: str
    variant: str = "xla"


@contextlib.contextmanager
def altered(package: ModuleType, folder: pathlib.Path, *changes: Change) -> Iterator[ModuleType]:
    """A copy of the package, imported anew, in which (file, old, new) snippets are replaced; each stands there once.

    Where ``old`` is empty, ``new`` is added to the end of the file.
    """
    name, (source_folder,) = f"altered_{next(NUMBERS)}", package.__path__
    shutil.copytree(source_folder, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in changes:
        source = (folder / name / file).read_text(encoding="utf-8")
        assert not old or source.count(old) == 1, f"{file} has {source.count(old)} times: {old}"
        (folder / name / file).write_text(source.replace(old, new) if old else source + new, encoding="utf-8")
    for path in (folder / name).rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        path.write_text(source.replace(package.__name__, name), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, folder / name / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[loaded]


def simulated(backends: str) -> tuple[Change, ...]:
    """The change of the file that chooses a backend by which a TPU kernel runs in a simulation of a chip's memory, its
    copies and semaphores, that looks for races."""
    future = "from __future__ import annotations\n"
    parameters = 'detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"'
    simulation = f"from jax.experimental.pallas import tpu as pltpu\nSIMULATION = pltpu.InterpretParams({parameters})\n"
    return (
        (backends, future, future + simulation),
        (backends, "default=of(backend, interpret=True)", "default=of(backend, interpret=SIMULATION)"),
    )


@contextlib.contextmanager
def no_races() -> Iterator[None]:
    """Something was simulated, and no race was seen: the simulation only prints them."""
    pltpu.reset_tpu_interpret_mode_state()
    try:
        yield
        assert interpret_pallas_call.races is not None
        assert not interpret_pallas_call.races.races_found, "a race"
    finally:
        pltpu.reset_tpu_interpret_mode_state()  # an error leaves it unusable
