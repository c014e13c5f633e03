"""Segmented attention and what it is compared with, for ``dsjax kernels segmented_attention``.

Eight heads of 128, bfloat16, one causal sequence, segments of 1024 with tails of 512. Beside ours:

- ``dense``: our kernel with one segment as long as the sequence, which makes it plain causal attention.
- ``splash``: jax's splash attention with a causal mask, the best of a few block sizes for each length. Its block
  lists are given as its own preparation makes them, by arithmetic: at 131,072 that preparation takes a minute and a
  half. Its grid is not shrunk for a causal mask; what it is charged leaves out the steps that compute nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import runpy
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.metrics import write_atomic
from dsjax.plan.chips import CHIPS
from dsjax.plan.kernels import MXU_SIZE, Case, Program, cores_of, hbm_cycles, matmul_cycles
from pallas_kernels.segmented_attention import Segments, segmented_attention, tpu
from pallas_kernels.segmented_attention.tiles import Tiles

HEADS, WIDTH, SEGMENT, WINDOW = 8, 128, 1024, 512
FLOOR_BLOCK = 512  # of the blocks of queries and keys whose products are the floor
LENGTHS = (4096, 16384, 131072)
BACKWARD_LENGTH, LONG = 16384, 131072
PEERS = ("splash",)  # implementations that are not ours
TABLE = pathlib.Path("pallas_kernels", "segmented_attention", "tile_table.py")  # in the repository
SPLASH_TILES = (
    {"query": 1024, "key": 1024, "compute": 512},
    {"query": 1024, "key": 1024, "compute": 512, "key_transposed": 1},
    {"query": 1024, "key": 2048, "compute": 512},
    {"query": 2048, "key": 2048, "compute": 512},
)
SPLASH_BACKWARD_TILES = (
    {"query": 1024, "key": 2048, "compute": 512, "query_backward": 1024, "key_backward": 1024},
    {"query": 2048, "key": 2048, "compute": 512, "query_backward": 2048, "key_backward": 1024},
)
# Forward and backward at 131,072 is compiled for its memory: the one backward kernel would keep dq once for each block
# of keys.
SPLASH_LONG_TILES = {
    "query": 1024,
    "key": 1024,
    "compute": 512,
    "query_backward": 1024,
    "key_backward": 1024,
    "apart": 1,
}


def cases(chip: str) -> list[Case]:
    """All that one report needs."""
    name = "segmented_attention"
    found = []
    for implementation in ("ours", "dense"):
        found += [Case(name, implementation, chip, length) for length in LENGTHS]
        found += [Case(name, implementation, chip, BACKWARD_LENGTH, backward=True)]
    found += [Case(name, "ours", chip, LONG, backward=True)]
    for length in LENGTHS:
        fitting = [tiles for tiles in SPLASH_TILES if tiles["key"] <= length]
        found += [Case(name, "splash", chip, length, tiles=tuple(tiles.items())) for tiles in fitting]
    for tiles in SPLASH_BACKWARD_TILES:
        found += [Case(name, "splash", chip, BACKWARD_LENGTH, True, tuple(tiles.items()))]
    return [*found, Case(name, "splash", chip, LONG, True, tuple(SPLASH_LONG_TILES.items()))]


# ---------------------------------------------------------------- programs


def build(case: Case) -> Program:
    """What a case compiles.

    Raises:
        UserError: the kernel can not do it.
    """
    makers = {"ours": _ours, "dense": _ours, "splash": _splash, "tiles": _tiled}
    return makers[case.implementation](case)


def _ours(case: Case) -> Program:
    segment = SEGMENT if case.implementation == "ours" else case.length

    def attend(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
        window = WINDOW if case.implementation == "ours" else 0
        return segmented_attention(q_BTNH, k_BTNH, v_BTNH, segment_size=segment, window=window, implementation="tpu")

    shape = jax.ShapeDtypeStruct((1, case.length, HEADS, WIDTH), jnp.bfloat16)
    return _with_gradients(attend, shape, case)


def tiles_of(case: Case) -> Tiles:
    """The tiles of our kernels that a case tries."""
    sizes = dict(case.tiles)
    return Tiles(sizes["queries"], sizes["keys"], sizes["part"], sizes.get("span", 0), bool(sizes.get("ones")))


def _tiled(case: Case) -> Program:
    """One pass of our kernels with given tiles."""
    static = {"segments": Segments(SEGMENT, WINDOW), "scale": WIDTH**-0.5, "tiles": tiles_of(case)}
    x_BTNH = jax.ShapeDtypeStruct((1, case.length, HEADS, WIDTH), jnp.bfloat16)
    log_BTN = jax.ShapeDtypeStruct((1, case.length, HEADS), jnp.float32)
    if case.backward:
        return Program(
            lambda q, k, v, *saved: tpu.backward(q, k, v, None, *saved, **static), [*[x_BTNH] * 4, log_BTN, x_BTNH]
        )
    return Program(lambda q, k, v: tpu.forward(q, k, v, None, **static), [x_BTNH] * 3)


def _with_gradients(
    attend: Callable[..., Any], shape: jax.ShapeDtypeStruct, case: Case, seconds: float = 0.0
) -> Program:
    if not case.backward:
        return Program(attend, [shape] * 3, seconds)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    return Program(both, [shape] * 4, seconds)


def _splash(case: Case) -> Program:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks

    begin = time.monotonic()
    sizes = dict(case.tiles)
    layout = splash.QKVLayout.SEQ_MINOR if sizes.get("key_transposed") else splash.QKVLayout.HEAD_DIM_MINOR
    backward: dict[str, Any] = {}
    if case.backward:
        q, kv = sizes["query_backward"], sizes["key_backward"]
        backward = {"block_q_dkv": q, "block_kv_dkv": kv, "block_kv_dkv_compute": min(sizes["compute"], kv)}
        backward |= {"block_q_dq": q, "block_kv_dq": kv} if sizes.get("apart") else {"use_fused_bwd_kernel": True}
    blocks = splash.BlockSizes(sizes["query"], sizes["key"], sizes["compute"], k_layout=layout, **backward)
    lists = {"fwd": causal_lists(case.length, sizes["query"], sizes["key"], "forward")}
    if case.backward:
        lists["dkv"] = causal_lists(case.length, q, kv, "dkv")
    if sizes.get("apart"):
        lists["dq"] = causal_lists(case.length, q, kv, "forward")
    ids = np.arange(case.length, dtype=np.int32)
    info = {part: masks.MaskInfo(fetch, None, run, None, ids) for part, (fetch, run) in lists.items()}
    attend = splash.SplashAttentionKernel(
        info["fwd"],
        info.get("dq"),
        info.get("dkv"),
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=lambda query, key: query >= key,
        interpret=False,
    )
    seconds = time.monotonic() - begin
    shape = jax.ShapeDtypeStruct((HEADS, case.length, WIDTH), jnp.bfloat16)
    return _with_gradients(attend, shape, case, seconds)


def causal_lists(
    length: int, block_q: int, block_k: int, kernel: Literal["forward", "dkv"]
) -> tuple[np.ndarray, np.ndarray]:
    """Splash attention's two lists for a causal mask, (1, queries, keys) in blocks: what to fetch, what to run.

    ``run`` is 2 for a block that is seen in full, 1 in part, 0 not at all. ``fetch`` is the block of keys (of queries,
    for dk and dv) of a step, and of one that does not run what the next one needs.
    """
    query, key = np.mgrid[: length // block_q, : length // block_k]
    runs = (query + 1) * block_q > key * block_k
    whole = query * block_q >= (key + 1) * block_k - 1
    fetch = np.where(runs, key, 0) if kernel == "forward" else np.maximum(query, np.argmax(runs, axis=0))
    small = np.int8 if fetch.max() < 128 else np.int16
    return fetch[None].astype(small), (runs.astype(np.int8) + whole).astype(np.int8)[None]


def peer_preparation(length: int = LONG) -> float:
    """Seconds in which splash attention prepares its causal mask."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    begin = time.monotonic()
    causal = mask.MultiHeadMask([mask.CausalMask((length, length))] * HEADS)
    splash.make_splash_mha_single_device(causal, block_sizes=splash.BlockSizes(1024, 1024, 512))
    return time.monotonic() - begin


# ---------------------------------------------------------------- the tile search


def search(chip: str) -> list[Case]:
    """Tiles to be tried, one pass at a time."""
    found = []
    spare = (0, 1) if MXU_SIZE[chip] > WIDTH else (0,)  # columns of the matrix units, for sums
    for queries, keys, part, ones in itertools.product((1024, 2048), (512, 1024, 2048), (256, 512, 1024), spare):
        if part <= keys and (queries, part) not in ((2048, 1024), (1024, 256)):  # these spill, those starve the units
            sizes = (("queries", queries), ("keys", keys), ("part", part), ("ones", ones))
            found.append(Case("segmented_attention", "tiles", chip, BACKWARD_LENGTH, tiles=sizes))
    # Blocks of 2,048 rows take seconds longer to compile; on small matrix units they win next to nothing.
    rows = (512, 1024, 2048) if MXU_SIZE[chip] > WIDTH else (512, 1024)
    for queries, keys, span in itertools.product(rows, (512, 1024), (4096, 8192)):
        backward = (("queries", queries), ("keys", keys), ("part", 512), ("span", span))
        found.append(Case("segmented_attention", "tiles", chip, BACKWARD_LENGTH, True, backward))
    return found


def write_table(path: pathlib.Path, results: Sequence[dict[str, Any]]) -> None:
    """Puts the best tiles of each pass on a chip into the table that the kernels read; other lines stay."""
    table: dict[tuple[str, str, int], tuple[int, ...]] = runpy.run_path(str(path))["TABLE"]
    for backward in (False, True):
        own = [result for result in results if result["case"]["backward"] == backward]
        if own:
            best = min(own, key=lambda result: result["cycles"])
            key = (best["device_kind"], "backward" if backward else "forward", jnp.bfloat16.dtype.itemsize)
            table[key] = dataclasses.astuple(tiles_of(Case.from_json(best["case"])))
    head, _, _ = path.read_text(encoding="utf-8").partition("TABLE:")
    lines = [
        f'    ("{kind}", "{kernel}", {size}): {table[kind, kernel, size]},' for kind, kernel, size in sorted(table)
    ]
    text = "\n".join(["TABLE: dict[tuple[str, str, int], tuple[int, ...]] = {", *lines, "}", ""])
    write_atomic(path, head + text)


# ---------------------------------------------------------------- what is reported


def mxu_floor(chip: str, segment: int, window: int, length: int, backward: bool) -> float:
    """Cycles of the matrix products of all blocks of 512 x 512 that hold a visible pair, at the peak of the units.

    With the head width held in the matrix units or contracted over: on units of 256, half of which a width of 128
    leaves empty, that is twice the arithmetic at peak. Two products forward, five more backward.
    """
    block = FLOOR_BLOCK
    per_segment, per_tail = segment // block, window // block
    segments = length // segment
    own = segments * per_segment * (per_segment + 1) // 2
    blocks = HEADS * (own + segments * (segments - 1) // 2 * per_segment * per_tail)
    products = 7 if backward else 2
    return blocks * products * matmul_cycles(chip, block, WIDTH, block)


def best_peer(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fewest cycles with splash attention, without its steps that compute nothing: of each pass the best."""
    passes: dict[str, dict[str, Any]] = {}
    for result in results:
        tiles = ", ".join(f"{name} {size}" for name, size in result["case"]["tiles"])
        for part in ("forward", "backward"):
            own = [k for k in result["kernels"] if ("_fwd" in k["name"]) == (part == "forward")]
            cycles = sum(k["cycles"] - k["skipped_cycles"] for k in own)
            if own and (part not in passes or cycles < passes[part]["cycles"]):
                steps = sum(k["skipped_cycles"] for k in own)
                passes[part] = {"cycles": cycles, "with_skipped_steps": cycles + steps, "tiles": tiles}
    totals = {key: sum(p[key] for p in passes.values()) for key in ("cycles", "with_skipped_steps")}
    return totals | {"passes": passes}


def summary(chip: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios and rows of the table, from the results of :func:`cases`."""
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        case = Case.from_json(result["case"])
        by.setdefault((case.implementation, case.measured), []).append(result)
    rows = []
    for implementation, measured in by:
        if implementation != "ours":
            continue
        (ours,) = by["ours", measured]
        dense, peers = by.get(("dense", measured)), by.get(("splash", measured))
        length, backward = ours["case"]["length"], ours["case"]["backward"]
        floor = mxu_floor(chip, SEGMENT, WINDOW, length, backward) / cores_of(CHIPS[chip])
        memory = hbm_cycles(CHIPS[chip], ours["kernel_hbm_bytes"], ours["outside_hbm_bytes"])
        row = {
            "measured": measured,
            "cycles": ours["cycles"],
            "mxu_floor_cycles": floor,
            "kernel_hbm_bytes": ours["kernel_hbm_bytes"],
            "outside_hbm_bytes": ours["outside_hbm_bytes"],
            "hbm_cycles": memory,
            "bound_cycles": None if memory is None else max(memory, ours["cycles"]),
            "dense_cycles": dense[0]["cycles"] if dense else None,
            "peer": best_peer(peers) if peers else None,
            "temporary_bytes": ours["temporary_bytes"],
            "peer_temporary_bytes": min(p["temporary_bytes"] for p in peers) if peers else None,
            "seconds": ours["prepare_seconds"] + ours["compile_seconds"],
        }
        rows.append(row)
    tuned = [r for r in rows if r["peer"] and r["measured"] != f"forward_backward_{LONG}"]
    return {
        "ratio_to_peer": {r["measured"]: r["cycles"] / r["peer"]["cycles"] for r in tuned},
        "ratio_to_peer_with_its_skipped_steps": {
            r["measured"]: r["cycles"] / r["peer"]["with_skipped_steps"] for r in tuned
        },
        "ratio_to_dense": {r["measured"]: r["cycles"] / r["dense_cycles"] for r in rows if r["dense_cycles"]},
        "ratio_to_mxu_floor": {r["measured"]: r["cycles"] / r["mxu_floor_cycles"] for r in rows},
        "rows": rows,
    }
