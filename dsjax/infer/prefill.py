"""Blocks of prompts into the cache of an engine."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int16

from dsjax.infer.requests import Running
from dsjax.nn.fields import NUM_FIELDS
from dsjax.sharding import host_array_to_global

if TYPE_CHECKING:
    from dsjax.infer.batching import Engine


def extend(engine: Engine, tokens: dict[int, tuple[list[int], int]], width: int, rows: int) -> None:
    """Computes tokens of some rows, by row all that are left and how many, behind what the cache holds of them.

    Which experts they go to is kept, if that is told. Where it is known already, they go to the same ones: a request
    that had to give its row back is computed again as it was.

    Args:
        engine: whose cache it is.
        tokens: by row.
        width: of a block, at least as many as are computed of a row.
        rows: of each batch part.
    """
    own, R = engine.tables.rows_of_part, engine.parts[0] * rows
    tokens_RT, told = np.zeros((R, width + engine.num_drafting), np.int32), list[np.ndarray]()
    real_R, known_R, rows_R = (np.zeros(R, np.int32) for _ in range(3))
    sizes, dtype = engine.decisions
    experts_RTLK, places = np.full((R, width, *sizes), -1, dtype), list[np.ndarray]()  # where requests keep them
    for part in range(engine.parts[0]):
        # Where nothing is to be done, any rows, but no row twice.
        some = sorted(range(part * own, (part + 1) * own), key=lambda row: row not in tokens)[:rows]
        for i, row in enumerate(some, part * rows):
            (left, num), r = tokens.get(row, ([], 0)), engine.rows[row]
            new = left[: num + engine.num_drafting]
            tokens_RT[i, : len(new)], real_R[i], known_R[i], rows_R[i] = new, num, len(new), row
            told.append(features_of(r, len(left), num, width))
            if num and r is not None and r.experts_SLK is not None:
                places.append(r.experts_SLK[len(r.tokens) - len(left) :][:num])
                experts_RTLK[i, :num] = places[-1]
            else:
                places.append(experts_RTLK[i, :0])
    put = functools.partial(host_array_to_global, mesh=engine.mesh, spec=engine.rules.spec("batch"))
    given, told_RTC = map(put, (tokens_RT, real_R, known_R, rows_R)), put(np.stack(told)) if engine.reads else None
    known_RTLK = put(experts_RTLK) if engine.tell_experts else None
    engine.behind, engine.cache, found = engine.programs.extend(
        engine.params, *given, engine.behind, engine.current(), told_RTC, known_RTLK
    )
    if engine.tell_experts:
        for place, found_TLK in zip(places, np.asarray(found), strict=True):
            place[:] = found_TLK[: len(place)]


def features_of(r: Running | None, left: int, num: int, size: int) -> Int16[np.ndarray, "S F"]:
    """The features of the first ``num`` of the last ``left`` tokens of what has a row, and zeros behind."""
    told_SC = np.zeros((size, NUM_FIELDS), np.int16)
    if r is not None and r.reading is not None:
        told_SC[:num] = r.reading.features_SC[len(r.tokens) - left :][:num]
    return told_SC
