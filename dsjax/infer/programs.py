"""The jitted functions of an engine: a chunk of prompts, a few decode steps, rows and pages that change hands."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from dsjax.infer.sampling import RowSampling, sample_rows
from dsjax.infer.written_out import in_order, is_better, stacked
from dsjax.nn.cache import POOL, Cache, GroupCache, Pages, RowState, cache_shardings
from dsjax.nn.masks import Documents
from dsjax.sharding import Rules, map_shards, replicated, use_mesh


@dataclasses.dataclass(frozen=True)
class Programs:
    """Each takes the cache, and gives it back changed in place.

    Attributes:
        extend: (params, tokens_RT, ids_RT, rows_R, logits_BV, cache) -> (logits, cache): T tokens of some rows, padded
            with id 0, behind what the cache holds of them; their logits behind the last.
        decode: (params, logits_BV, cache, active_B, seeds_B, index_B, settings, steps, width=, num_top=) ->
            ((tokens_BS, log_probs_BS, top_BSX, top_log_probs_BSX), logits, cache): ``steps`` tokens, number ``index``
            and on, of the active rows, in arrays of ``width``, and the ``num_top`` likeliest at each place.
        place: (cache, row, tokens_S, state) -> cache: a row begins with these tokens and this state.
        state: (cache, row) -> the row's :class:`dsjax.nn.cache.RowState` of each group.
        logits: (logits_BV, row) -> logits_V.
        set_logits: (logits_BV, row, logits_V, allowed_V) -> logits: a row's are those, and -inf where not allowed.
        copy: (cache, sources, targets) -> cache: in each group's pools, (devices, C) pages; -1: none.
    """

    extend: Any
    decode: Any
    place: Any
    state: Any
    logits: Any
    set_logits: Any
    copy: Any


@functools.lru_cache(maxsize=64)  # a jitted function holds its programs: who asks again compiles nothing
def make_programs(graph: Any, mesh: Mesh, rules: Rules, num_groups: int) -> Programs:
    """The functions for one model on one mesh."""
    within = functools.partial(use_mesh, mesh, dataclasses.replace(rules, length=()))
    logits, cache = NamedSharding(mesh, rules.spec("batch", "vocab")), cache_shardings(num_groups, mesh, rules)
    whole = replicated(mesh)

    def extend(params, tokens_RT, ids_RT, rows_R, logits_BV, cache):
        with within():
            model = nnx.merge(graph, stacked(params))
            positions_RT = jnp.broadcast_to(jnp.arange(tokens_RT.shape[1], dtype=jnp.int32), tokens_RT.shape)
            out = model(tokens_RT, Documents(ids_RT, positions_RT), cache=some_rows(cache, rows_R))
            real_R = jnp.sum(ids_RT > 0, axis=1)
            pick = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, 1, axis=0))
            last = jax.tree.map(lambda x: pick(x, jnp.maximum(real_R - 1, 0)), (out.hidden_BTD, out.copy))
            new_R1V = model.logits(dataclasses.replace(out, hidden_BTD=last[0], copy=last[1]))
            new_RV = jnp.where(real_R[:, None] > 0, new_R1V[:, 0], logits_BV[rows_R])
        return logits_BV.at[rows_R].set(new_RV), with_rows(cache, rows_R, out.cache)

    def decode(params, logits_BV, cache, active_B: Bool[Array, B], seeds_B: Int[Array, B], index_B: Int[Array, B],
               settings: RowSampling, steps: Int[Array, ""], width: int, num_top: int):  # fmt: skip
        keys_B, B = jax.vmap(jax.random.key)(seeds_B), len(active_B)

        def one(number: Int[Array, ""], carry: tuple[Any, Float[Array, "B V"], Cache]) -> Any:
            made, logits_BV, cache = carry
            with within():
                token_B = sample_rows(logits_BV, jax.vmap(jax.random.fold_in)(keys_B, index_B + number), settings)
                taken_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
                total_B = jax.nn.logsumexp(logits_BV, axis=-1)
                best_BX, top_BX = jax.lax.top_k(logits_BV, num_top)
                new = (token_B, taken_B - total_B, top_BX, best_BX - total_B[:, None])
                made = jax.tree.map(lambda all_BS, new_B: all_BS.at[:, number].set(new_B), made, new)
                model, ids_B1 = nnx.merge(graph, stacked(params)), active_B[:, None].astype(jnp.int32)
                out = model(token_B[:, None], Documents(ids_B1, jnp.zeros_like(ids_B1)), cache=cache)
                new_BV = jnp.where(active_B[:, None], model.logits(out)[:, 0], logits_BV)
            return made, new_BV, in_order(out.cache) if is_better(mesh) else out.cache

        made = tuple(
            jnp.zeros(shape, dtype) for shape in ((B, width), (B, width, num_top)) for dtype in (jnp.int32, jnp.float32)
        )
        return jax.lax.fori_loop(0, steps, one, (made, logits_BV, cache))

    def copy(cache, sources, targets):
        def one(pool_LmkPH, source_1C, target_1C):
            def move(i, pool_LmkPH):  # page by page, in place; for none, page 0 to itself
                source, target = (jnp.where(target_1C[0, i] < 0, 0, x_1C[0, i]) for x_1C in (source_1C, target_1C))
                page = jax.lax.dynamic_slice_in_dim(pool_LmkPH, source, 1, axis=1)
                return jax.lax.dynamic_update_slice_in_dim(pool_LmkPH, page, target, axis=1)

            return jax.lax.fori_loop(0, source_1C.shape[1], move, pool_LmkPH)

        with within():
            run, groups = map_shards(one, (POOL, ("pages", None), ("pages", None)), POOL), []
            for group, source, target in zip(cache.groups, sources, targets, strict=True):
                k, v = (run(x, source, target) for x in (group.pages.k_LMKPH, group.pages.v_LMKPH))
                groups.append(dataclasses.replace(group, pages=Pages(k, v, group.pages.table_BJ)))
        return dataclasses.replace(cache, groups=tuple(groups))

    return Programs(
        extend=jax.jit(extend, donate_argnames=("logits_BV", "cache"), out_shardings=(logits, cache)),
        decode=jax.jit(
            decode,
            donate_argnames=("logits_BV", "cache"),
            static_argnames=("width", "num_top"),
            out_shardings=(whole, logits, cache),  # every process reads the tokens
        ),
        place=jax.jit(place, out_shardings=cache, donate_argnames="cache"),
        state=jax.jit(row_state),
        logits=jax.jit(lambda logits_BV, row: logits_BV[row], out_shardings=NamedSharding(mesh, rules.spec("vocab"))),
        set_logits=jax.jit(set_logits, donate_argnames="logits_BV", out_shardings=logits),
        copy=jax.jit(copy, out_shardings=cache, donate_argnames="cache"),
    )


def row_state(cache: Cache, row: Any) -> tuple[RowState, ...]:
    """What belongs to a row beside its pages, by group."""
    return tuple(jax.tree.map(lambda x: x[:, row], group.state) for group in cache.groups)


def place(cache: Cache, row: Any, tokens_S: Int[Array, " S"], state: Any) -> Cache:
    """A row begins with these tokens and this state; None: an empty one."""
    if state is None:
        state = jax.tree.map(jnp.zeros_like, row_state(cache, row))
    groups = [
        dataclasses.replace(group, state=jax.tree.map(lambda x, new: x.at[:, row].set(new), group.state, own))
        for group, own in zip(cache.groups, state, strict=True)
    ]
    return dataclasses.replace(cache, groups=tuple(groups), tokens_BS=cache.tokens_BS.at[row].set(tokens_S))


def set_logits(
    logits_BV: Float[Array, "B V"], row: Any, logits_V: Float[Array, " V"], allowed_V: Bool[Array, " V"]
) -> Float[Array, "B V"]:
    """A row's are those, and -inf where not allowed."""
    return logits_BV.at[row].set(jnp.where(allowed_V, logits_V, -jnp.inf))


def some_rows(cache: Cache, rows_R: Int[Array, " R"]) -> Cache:
    """A cache of some of the rows, over the same pools; of each device that rows are cut over, as many of its own."""
    groups = tuple(
        GroupCache(
            dataclasses.replace(group.pages, table_BJ=group.pages.table_BJ[rows_R]),
            jax.tree.map(lambda x: x[:, rows_R], group.state),
        )
        for group in cache.groups
    )
    return Cache(groups, cache.lengths_B[rows_R], cache.tokens_BS[rows_R])


def with_rows(cache: Cache, rows_R: Int[Array, " R"], some: Cache) -> Cache:
    """The cache with what became of :func:`some_rows`."""
    groups = tuple(
        GroupCache(
            dataclasses.replace(new.pages, table_BJ=group.pages.table_BJ),
            jax.tree.map(lambda x, y: x.at[:, rows_R].set(y), group.state, new.state),
        )
        for group, new in zip(cache.groups, some.groups, strict=True)
    )
    lengths_B, tokens_BS = (
        cache.lengths_B.at[rows_R].set(some.lengths_B),
        cache.tokens_BS.at[rows_R].set(some.tokens_BS),
    )
    return Cache(groups, lengths_B, tokens_BS)
