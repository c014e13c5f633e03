"""Kernels of which it is known how often each part runs, compiled and counted: python tests/schedule_kernels.py v5e."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.plan import schedule
from dsjax.plan.kernels import topology_of
from dsjax.plan.measure import devices_of
from dsjax.plan.prefetch import prefetched

SIZE, TILE = 2048, 512
TRIPS = (3, 0, 5, 1)
BLOCK = (256, 128)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """bfloat16, a whole row of blocks against a whole column."""

    def kernel(a_ref: Any, b_ref: Any, out_ref: Any) -> None:
        out_ref[...] = jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32).astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(SIZE // TILE, SIZE // TILE),
        in_specs=[pl.BlockSpec((TILE, SIZE), lambda i, j: (i, 0)), pl.BlockSpec((SIZE, TILE), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((TILE, TILE), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16),
        name="matmul",
    )(a, b)


def _looping(trips_ref: Any, x_ref: Any, out_ref: Any, *, by_index: bool) -> None:
    """A product for each trip; exponentials in the third step of the grid only."""
    i = pl.program_id(0)

    def trip(_: Any, total: jax.Array) -> jax.Array:
        return jnp.dot(total, x_ref[:128], preferred_element_type=jnp.float32)

    out_ref[...] = jax.lax.fori_loop(0, i + 1 if by_index else trips_ref[i], trip, x_ref[...])

    @pl.when(i == 2)
    def _() -> None:
        out_ref[...] = jnp.exp(out_ref[...])


def looping(x: jax.Array, by_index: bool, name: str) -> jax.Array:
    """Trip counts that are prefetched, or computed from the place in the grid."""
    block = pl.BlockSpec(BLOCK, lambda i, _: (i, 0))
    return pl.pallas_call(
        lambda *refs: _looping(*refs, by_index=by_index),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(len(TRIPS),), in_specs=[block], out_specs=block
        ),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        name=name,
    )(jnp.asarray(TRIPS, jnp.int32), x)


def main(chip: str) -> None:
    """Prints the counts as JSON, by kernel."""
    scalars = {}
    with tempfile.TemporaryDirectory(prefix="dsjax-test-") as folder:
        os.environ["LIBTPU_INIT_ARGS"] = schedule.dump_flags(pathlib.Path(folder))  # before libtpu starts
        mesh = Mesh(np.array(devices_of(topology_of(chip))[:1]), ("device",))
        place = NamedSharding(mesh, PartitionSpec())
        square = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16, sharding=place)
        rows = jax.ShapeDtypeStruct((len(TRIPS) * BLOCK[0], BLOCK[1]), jnp.float32, sharding=place)
        programs: list[Any] = [
            (matmul, (square, square)),
            (lambda x: looping(x, False, "prefetched"), (rows,)),
            (lambda x: looping(x, True, "by_index"), (rows,)),
        ]
        for function, arguments in programs:
            traced = jax.jit(function).trace(*arguments)
            traced.lower().compile()
            scalars |= {kernel.name: kernel.words() for kernel in prefetched(traced.jaxpr)}
        kernels = schedule.read_kernels(pathlib.Path(folder))
    counts = [schedule.count(kernel, chip, scalars[kernel.name]) for kernel in kernels]
    found = {}
    for count in counts:
        regions = [dataclasses.asdict(region) | {"cycles": region.cycles} for region in count.regions]
        found[count.name] = dataclasses.asdict(count) | {"regions": regions}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
