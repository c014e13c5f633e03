"""Times a checkpoint: how long a save holds up training, when it is committed, how long a restore takes.

The peer is Orbax's own `CheckpointManager` with the same arrays, which verifies nothing. Both take turns in one
process, on the same disk.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

HOST = {"data": {"rows_taken": 0, "fingerprint": ""}, "loop": {}}


def make_state(megabytes: int) -> dict[str, Any]:
    """Random float32 arrays of so many megabytes in all: twelve layers of three kinds of state."""
    import jax

    width = int((megabytes * 1e6 / 4 / 36) ** 0.5)
    keys = iter(jax.random.split(jax.random.key(0), 36))
    return {
        part: {f"layer_{i}": jax.random.normal(next(keys), (width, width)) for i in range(12)}
        for part in ("params", "mu", "nu")
    }


def ours(folder: pathlib.Path) -> tuple[Callable[..., None], Callable[[], None], Callable[[Any], Any], Any]:
    """Save, wait, restore and close of `dsjax.checkpoint`."""
    from dsjax.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder)
    return (
        lambda step, state: checkpoints.save(step, state, HOST),
        checkpoints.wait,
        lambda shapes: checkpoints.restore(shapes)[0],
        checkpoints.close,
    )


def orbax(folder: pathlib.Path) -> tuple[Callable[..., None], Callable[[], None], Callable[[Any], Any], Any]:
    """The same of Orbax's manager."""
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True))
    return (
        lambda step, state: manager.save(step, args=ocp.args.StandardSave(state)),
        manager.wait_until_finished,
        lambda shapes: manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(shapes)),
        manager.close,
    )


def measure(megabytes: int, rounds: int) -> dict[str, Any]:
    """Medians, in seconds, of both."""
    import jax

    state = make_state(megabytes)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders = {make.__name__: make(pathlib.Path(folder).resolve() / make.__name__) for make in (ours, orbax)}
        for step in range(rounds + 1):
            for name, (save, wait, restore, _) in contenders.items():
                begin = time.perf_counter()
                save(step, state)
                held_up = time.perf_counter() - begin
                wait()
                committed = time.perf_counter() - begin
                begin = time.perf_counter()
                jax.block_until_ready(restore(shapes))
                restored = time.perf_counter() - begin
                if step:  # the first warms up
                    times = seconds.setdefault(name, {"holds_up": [], "committed": [], "restored": []})
                    for key, value in zip(times, (held_up, committed, restored), strict=True):
                        times[key].append(value)
        for _, _, _, close in contenders.values():
            close()
    return {
        "bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "rounds": rounds,
        **{name: {key: statistics.median(v) for key, v in times.items()} for name, times in seconds.items()},
    }
