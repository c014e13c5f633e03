"""What the conversions that are killed or meet a full disk run, in a child of their own."""

from __future__ import annotations

import os

import orbax.checkpoint  # noqa: F401 - so that forked children have it
import tensorstore  # noqa: F401
from xla_flags import QUICK

from dsjax.cli import main
from dsjax.convert import check, command  # noqa: F401

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "OPENBLAS_NUM_THREADS": "1"}


def convert(source: str, target: str) -> int:
    """``dsjax convert``."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    try:
        main(["convert", source, target, "--quiet"])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
