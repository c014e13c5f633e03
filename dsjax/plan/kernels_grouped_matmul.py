"""Grouped matmul and what it is compared with, for ``dsjax kernels grouped_matmul``.

8,192 rows of 2,048 bfloat16 numbers and 16 matrices of 2,048 x 2,048. ``balanced``: each group has 512 rows.
``skewed``: one has half of all rows, and no size is a multiple of a tile. Beside ours:

- ``megablox``: jax's ``gmm``, the best of a few tiles. Its metadata is computed before, so that its grid is as long as
  it has steps with rows.
- ``layer``: the feed-forward of experts with all three matrices, rows gathered from 4,096 tokens, two experts each.
- ``dispatch``: what else such a layer does: select experts, plan, and combine (forward).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from dsjax.config import UserError
from dsjax.metrics import write_atomic
from dsjax.plan.chips import CHIPS
from dsjax.plan.kernels import Case, Program, cores_of, hbm_cycles, matmul_cycles
from pallas_kernels.expert_dispatch import Plan, combine, plan_dispatch, top_k_route
from pallas_kernels.grouped_matmul import expert_swiglu, grouped_matmul, tpu
from pallas_kernels.grouped_matmul.tiles import Tiles
from pallas_kernels.grouped_matmul.tpu_outer import sum_outer
from pallas_kernels.grouped_matmul.tpu_rows import multiply

NAME, PEERS = "grouped_matmul", ("megablox",)
TABLE = pathlib.Path("pallas_kernels", "grouped_matmul", "tile_table.py")  # in the repository
ROWS, WIDTH, HIDDEN, EXPERTS, TOP = 8192, 2048, 2048, 16, 2
SIZES = {
    "balanced": (512,) * EXPERTS,
    "skewed": (273, 281, 4103, 262, 290, 255, 301, 277, 266, 284, 270, 279, 259, 287, 275, 230),
}
MEGABLOX_TILES = ((128, 2048, 1024), (256, 2048, 1024), (512, 1024, 1024), (512, 2048, 512), (1024, 1024, 512))
CALLS = {
    "matmul": tpu.MATMUL,
    "matmul_transposed": tpu.TRANSPOSED,
    "swiglu": tpu.FORWARD_KEEPING,
    "swiglu_backward": tpu.BACKWARD,
    "swiglu_dx": tpu.BACKWARD_DX,
    "outer": None,
}  # kernels whose tiles are searched


def cases(chip: str) -> list[Case]:
    """All that one report needs."""
    found = []
    for sizes in SIZES:
        found.append(Case(NAME, "ours", chip, ROWS, variant=sizes))
        for tiles in MEGABLOX_TILES:
            named = tuple(zip(("rows", "contracted", "columns"), tiles, strict=True))
            found.append(Case(NAME, "megablox", chip, ROWS, tiles=named, variant=sizes))
        found += [Case(NAME, "layer", chip, ROWS, backward, variant=sizes) for backward in (False, True)]
    routing = (("experts", EXPERTS), ("top", TOP))
    return [*found, Case(NAME, "dispatch", chip, ROWS, tiles=routing, variant="skewed")]


# ---------------------------------------------------------------- programs


def build(case: Case) -> Program:
    """What a case compiles.

    Raises:
        UserError: the kernel can not do it.
    """
    makers = {"ours": _ours, "megablox": _megablox, "layer": _layer, "dispatch": _dispatch, "tiles": _tiled}
    return makers[case.implementation](case)


def sizes_of(case: Case) -> jax.Array:
    """Rows of the groups."""
    return jnp.asarray(SIZES[case.variant.split(", ")[0]], jnp.int32)


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ours(case: Case) -> Program:
    def product(x_RD: jax.Array, w_EDF: jax.Array) -> jax.Array:
        return grouped_matmul(x_RD, w_EDF, sizes_of(case), implementation="tpu")

    return Program(product, [_array(ROWS, WIDTH), _array(EXPERTS, WIDTH, HIDDEN)])


def _megablox(case: Case) -> Program:
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")  # the package hides it
    rows, contracted, columns = (size for _, size in case.tiles)
    prepared, steps = module.make_group_metadata(
        group_sizes=sizes_of(case),
        m=ROWS,
        tm=rows,
        start_group=jnp.int32(0),
        num_nonzero_groups=EXPERTS,
        visit_empty_groups=False,
    )
    metadata = tuple(np.asarray(x) for x in prepared)

    def product(x_RD: jax.Array, w_EDF: jax.Array) -> jax.Array:
        known = tuple(map(jnp.asarray, metadata)), int(steps)
        named = functools.partial(pl.pallas_call, name="megablox")
        with (
            mock.patch.object(module, "make_group_metadata", return_value=known),
            mock.patch.object(module.pl, "pallas_call", named),
        ):
            return module.gmm.__wrapped__(x_RD, w_EDF, sizes_of(case), jnp.bfloat16, tiling=(rows, contracted, columns))

    return Program(product, [_array(ROWS, WIDTH), _array(EXPERTS, WIDTH, HIDDEN)])


def _layer(case: Case) -> Program:
    def forward(x_TD: jax.Array, token_R: jax.Array, *weights: jax.Array) -> jax.Array:
        plan, (w_gate, w_up, w_down) = Plan(token_R.reshape(-1, TOP), token_R * TOP, sizes_of(case)), weights
        return expert_swiglu(x_TD, w_gate, w_up, w_down, plan, implementation="tpu")

    def both(x_TD: jax.Array, token_R: jax.Array, dy_RD: jax.Array, *weights: jax.Array) -> Any:
        y, pull = jax.vjp(lambda *given: forward(given[0], token_R, *given[1:]), x_TD, *weights)
        return y, pull(dy_RD)

    weights = [_array(EXPERTS, WIDTH, HIDDEN)] * 2 + [_array(EXPERTS, HIDDEN, WIDTH)]
    given = [_array(ROWS // TOP, WIDTH), _array(ROWS, dtype=jnp.int32)]
    if case.backward:
        return Program(both, [*given, _array(ROWS, WIDTH), *weights])
    return Program(forward, [*given, *weights])


def _dispatch(case: Case) -> Program:
    def around(scores_TE: jax.Array, y_RD: jax.Array) -> Any:
        choice = top_k_route(scores_TE, TOP)
        plan = plan_dispatch(
            choice.experts_TX, EXPERTS, position_TX=choice.position_TX, counts_E=choice.counts_E, num_rows=ROWS
        )
        return combine(y_RD, choice.scores_TX, plan, implementation="tpu"), plan.token_R

    return Program(around, [_array(ROWS // TOP, EXPERTS, dtype=jnp.float32), _array(ROWS, WIDTH)])


def _tiled(case: Case) -> Program:
    """One of our kernels with given tiles."""
    name, tiles = case.variant.split(", ")[1], tiles_of(case)
    call, x_RD, w_EDF = CALLS[name], _array(ROWS, WIDTH), _array(EXPERTS, WIDTH, HIDDEN)
    if call is None:
        return Program(lambda x, dy: sum_outer(x, dy, sizes_of(case), num_rows=ROWS, tiles=tiles), [x_RD, x_RD])
    wide = 2 if name == "swiglu_dx" else 1
    matrices, beside = (2 if name in ("swiglu", "swiglu_dx") else 1), (2 if name == "swiglu_backward" else 0)

    def product(*given: jax.Array) -> Any:
        rows, stacks, others = given[:wide], given[wide : wide + matrices], given[wide + matrices :]
        return multiply(call, rows, stacks, sizes_of(case), 0, num_rows=ROWS, beside=others, tiles=tiles)

    return Program(product, [*[x_RD] * wide, *[w_EDF] * matrices, *[x_RD] * beside])


# ---------------------------------------------------------------- the tile search


def tiles_of(case: Case) -> Tiles:
    """The tiles of our kernels that a case tries."""
    return Tiles(**dict(case.tiles))


def search(chip: str) -> list[Case]:
    """Tiles to be tried, of one kernel at a time, with groups that are no multiples of them."""
    found = []
    for kernel in CALLS:
        for least, step, inner in itertools.product((64, 128), (32, 64), (256, 512, 1024, 2048)):
            columns = 1024 if kernel == "outer" else 2048
            if (least, step) != (64, 64) and inner <= columns:
                sizes = {"rows": 512, "least": least, "step": step, "columns": columns, "inner": inner}
                variant = f"skewed, {kernel}"
                found.append(Case(NAME, "tiles", chip, ROWS, tiles=tuple(sizes.items()), variant=variant))
    return found


def write_table(path: pathlib.Path, results: Sequence[dict[str, Any]]) -> None:
    """Puts the best tiles of each kernel on a chip into the table that the kernels read; other lines stay."""
    table: dict[tuple[str, str, int], tuple[int, ...]] = runpy.run_path(str(path))["TABLE"]
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for result in results:
        key = (result["device_kind"], result["case"]["variant"].split(", ")[1], jnp.bfloat16.dtype.itemsize)
        if key not in best or result["cycles"] < best[key]["cycles"]:
            best[key] = result
    table |= {key: dataclasses.astuple(tiles_of(Case.from_json(result["case"]))) for key, result in best.items()}
    head, _, _ = path.read_text(encoding="utf-8").partition("TABLE:")
    lines = [
        f'    ("{kind}", "{kernel}", {size}): {table[kind, kernel, size]},' for kind, kernel, size in sorted(table)
    ]
    write_atomic(path, head + "\n".join(["TABLE: dict[tuple[str, str, int], tuple[int, ...]] = {", *lines, "}", ""]))


# ---------------------------------------------------------------- what is reported


def mxu_floor(chip: str, products: int) -> float:
    """Cycles of so many products of all rows, at the peak of the units."""
    return products * matmul_cycles(chip, ROWS, WIDTH, HIDDEN) / cores_of(CHIPS[chip])


def peer_preparation() -> float:
    """Megablox prepares nothing.

    Raises:
        UserError: always.
    """
    raise UserError("megablox prepares nothing on the host; leave --peer-preparation out")


def best_peer(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fewest cycles of megablox."""
    best = min(results, key=lambda result: result["cycles"])
    tiles = ", ".join(f"{name} {size}" for name, size in best["case"]["tiles"])
    return {"cycles": best["cycles"], "passes": {"gmm": {"cycles": best["cycles"], "tiles": tiles}}}


def summary(chip: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios and rows of the table, from the results of :func:`cases`."""
    peers: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result["case"]["implementation"] == "megablox":
            peers.setdefault(result["case"]["variant"], []).append(result)
    rows, around = [], None
    for result in results:
        case = Case.from_json(result["case"])
        if case.implementation == "dispatch":
            around = result["cycles"] + result["outside_cycles_by_compiler"]
        if case.implementation not in ("ours", "layer"):
            continue
        layer = case.implementation == "layer"
        peer = None if layer or case.variant not in peers else best_peer(peers[case.variant])
        memory = hbm_cycles(CHIPS[chip], result["kernel_hbm_bytes"], result["outside_hbm_bytes"])
        row = {
            "measured": f"layer_{case.measured}" if layer else case.measured,
            "cycles": result["cycles"],
            "mxu_floor_cycles": mxu_floor(chip, (9 if case.backward else 3) if layer else 1),
            "kernel_hbm_bytes": result["kernel_hbm_bytes"],
            "outside_hbm_bytes": result["outside_hbm_bytes"],
            "outside_cycles_by_compiler": result["outside_cycles_by_compiler"],
            "hbm_cycles": memory,
            "bound_cycles": None if memory is None else max(memory, result["cycles"]),
            "dense_cycles": None,
            "peer": peer,
            "temporary_bytes": result["temporary_bytes"],
            "peer_temporary_bytes": min(p["temporary_bytes"] for p in peers[case.variant]) if peer else None,
            "seconds": result["prepare_seconds"] + result["compile_seconds"],
        }
        rows.append(row)
    by_name = {row["measured"]: row for row in rows}
    layer_cycles = by_name["layer_forward_skewed"]["cycles"] if around is not None else 0
    return {
        "ratio_to_peer": {r["measured"]: r["cycles"] / r["peer"]["cycles"] for r in rows if r["peer"]},
        "ratio_to_peer_with_its_skipped_steps": {},
        "ratio_to_dense": {},
        "ratio_to_mxu_floor": {r["measured"]: r["cycles"] / r["mxu_floor_cycles"] for r in rows},
        "dispatch_and_combine": None
        if around is None
        else {"cycles": around, "share_of_layer_forward": around / (around + layer_cycles)},
        "rows": rows,
    }
