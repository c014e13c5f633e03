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

from dsjax.infer.sampling import RowSampling
from dsjax.infer.speculation import Behind, Tokens, behind_shardings, speculate, with_hidden
from dsjax.infer.written_out import in_order, is_better, stacked
from dsjax.nn.cache import POOL, Cache, GroupCache, Pages, RowState, cache_shardings
from dsjax.nn.masks import Documents
from dsjax.nn.structure import Scopes, with_new_scopes
from dsjax.sharding import Rules, map_shards, replicated, use_mesh


@dataclasses.dataclass(frozen=True)
class Programs:
    """Each takes the cache, and what is known behind it, and gives them back changed in place.

    Attributes:
        extend: (params, tokens_RT, real_R, known_R, rows_R, behind, cache, features_RTC, experts_RTLK) -> (behind,
            cache, experts_RTLK): the first ``real_R`` of T tokens of some rows behind what the cache holds of them, and
            what comes behind those (:class:`dsjax.infer.speculation.Behind`). What modules keep depends on further
            tokens: ``known_R`` are known, and there is room for one more of each module. Features: of a model with
            structure, else None. Experts, if they are told: those that are known already are used again.
        decode: (params, behind, cache, left_B, known_B, seeds_B, index_B, settings, steps, width=, num_top=) ->
            ((tokens, counts_B, steps), behind, cache): up to ``steps`` steps, until each row has at least ``left_B``
            tokens, number ``index_B`` and on (:class:`dsjax.infer.speculation.Tokens`, of ``width``), and how many
            they are. ``known_B``: hidden states that are known of a row.
        place: (cache, row, tokens_S, state, features_SC) -> cache: a row begins with these tokens and this state, and
            what of a text is open with these features (of a cache with scopes, else None).
        state: (cache, row) -> the row's :class:`dsjax.nn.cache.RowState` of each group.
        behind: (behind, row) -> the row's.
        set_behind: (behind, row, of_row, allowed_V, num_top=) -> (behind, (log_prob, top_X, top_log_prob_X)): a row's
            are those, logits -inf where not allowed; and what the model gives all that are allowed together, and the
            likeliest of all tokens.
        copy: (cache, sources, targets) -> cache: in each group's pools, (devices, C) pages; -1: none.
    """

    extend: Any
    decode: Any
    place: Any
    state: Any
    behind: Any
    set_behind: Any
    copy: Any


@functools.lru_cache(maxsize=64)  # a jitted function holds its programs: who asks again compiles nothing
def make_programs(graph: Any, mesh: Mesh, rules: Rules, num_groups: int, draft: int = 0, num_drafting: int = 0,
                  scoped: bool = False, tell_experts: bool = False) -> Programs:  # fmt: skip
    """The functions for one model on one mesh, with ``draft`` drafts a step, of so many of its modules.

    ``scoped``: its cache has scopes. ``tell_experts``: which experts each token went to comes out, too.
    """
    within = functools.partial(use_mesh, mesh, dataclasses.replace(rules, length=()))
    cache = cache_shardings(num_groups + num_drafting, mesh, rules, Scopes(0, 0) if scoped else None)
    behind, whole = behind_shardings(mesh, rules), replicated(mesh)

    def extend(params, tokens_RT, real_R, known_R, rows_R, behind, cache, features_RTC=None, experts_RTLK=None):
        with within():
            model, T = nnx.merge(graph, stacked(params)), tokens_RT.shape[1] - num_drafting
            positions_RT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (len(tokens_RT), T))
            ids_RT, some = (positions_RT < real_R[:, None]).astype(jnp.int32), some_rows(cache, rows_R)
            given = {"features_BTC": features_RTC, "experts_BTLK": experts_RTLK, "tell_experts": tell_experts}
            out = model(tokens_RT[:, :T], Documents(ids_RT, positions_RT), cache=some, **given)
            hidden_RTD, own = out.hidden_BTD, out.cache
            for n in range(num_drafting):
                seen_RT = (positions_RT < jnp.minimum(real_R, known_R - n - 1)[:, None]).astype(jnp.int32)
                next_RT = tokens_RT[:, n + 1 : n + 1 + T]
                hidden_RTD, own = model.draft_hidden(n, hidden_RTD, next_RT, seen_RT, some.lengths_B, own)
            pick = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, 1, axis=0))
            last = jax.tree.map(lambda x: pick(x, jnp.maximum(real_R - 1, 0)), (out.hidden_BTD, out.copy))
            new_R1V = model.logits(dataclasses.replace(out, hidden_BTD=last[0], copy=last[1]))
            old = jax.tree.map(lambda x: x[rows_R], behind)
            new_RV = jnp.where(real_R[:, None] > 0, new_R1V[:, 0], old.logits_BV)
            new = Behind(new_RV, with_hidden(old.hidden_BWD, out.hidden_BTD, real_R))
        behind = jax.tree.map(lambda x, y: x.at[rows_R].set(y), behind, new)
        return behind, with_rows(cache, rows_R, own), out.experts_BTLK

    def decode(params, behind: Behind, cache: Cache, left_B: Int[Array, B], known_B: Int[Array, B],
               seeds_B: Int[Array, B], index_B: Int[Array, B], settings: RowSampling, steps: Int[Array, ""],
               width: int, num_top: int):  # fmt: skip
        keys_B, B, W = jax.vmap(jax.random.key)(seeds_B), len(left_B), behind.hidden_BWD.shape[1]
        keys_of = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))

        def goes_on(carry: Any) -> Any:
            _, count_B, number = carry[0]
            return (number < steps) & (count_B < left_B).any()

        def one(carry: Any) -> Any:
            (tokens, count_B, number), behind, cache, known_B = carry
            with within():
                model, active_B = nnx.merge(graph, stacked(params)), count_B < left_B
                keys_BT = keys_of(keys_B, (index_B + count_B)[:, None] + jnp.arange(1 + draft))
                new, num_B, behind, cache = speculate(
                    model, behind, known_B, cache, active_B, keys_BT, settings, num_top, tell_experts
                )
                tokens, known_B = tokens.followed_by(new, count_B, num_B), jnp.minimum(known_B + num_B, W)
            cache = in_order(cache) if is_better(mesh) else cache
            return (tokens, count_B + num_B, number + 1), behind, cache, known_B

        telling = nnx.merge(graph, stacked(params)).cfg if tell_experts else None
        made = (Tokens.none(B, width, num_top, telling), jnp.zeros(B, jnp.int32), jnp.int32(0))
        return jax.lax.while_loop(goes_on, one, (made, behind, cache, known_B))[:3]

    def copy(cache, sources, targets):
        with within():
            return copied(cache, sources, targets)

    of_row = Behind(NamedSharding(mesh, rules.spec("vocab")), whole)
    return Programs(
        extend=jax.jit(extend, donate_argnames=("behind", "cache"), out_shardings=(behind, cache, whole)),
        decode=jax.jit(
            decode,
            donate_argnames=("behind", "cache"),
            static_argnames=("width", "num_top"),
            out_shardings=(whole, behind, cache),  # every process reads the tokens
        ),
        place=jax.jit(place, out_shardings=cache, donate_argnames="cache"),
        state=jax.jit(row_state),
        behind=jax.jit(lambda behind, row: jax.tree.map(lambda x: x[row], behind), out_shardings=of_row),
        set_behind=jax.jit(
            set_behind, donate_argnames="behind", static_argnames="num_top", out_shardings=(behind, whole)
        ),
        copy=jax.jit(copy, out_shardings=cache, donate_argnames="cache"),
    )


def block_widths(chunk: int) -> list[int]:
    """Of a block of prompts, up to a chunk: few shapes, few compilations."""
    widths = [16]
    while widths[-1] < chunk:
        widths.append(2 * widths[-1])
    return [min(width, chunk) for width in widths]


def row_state(cache: Cache, row: Any) -> tuple[RowState, ...]:
    """What belongs to a row beside its pages, by group."""
    return tuple(jax.tree.map(lambda x: x[:, row], group.state) for group in cache.groups)


def place(cache: Cache, row: Any, tokens_S: Int[Array, " S"], state: Any, features_SC: Any = None) -> Cache:
    """A row begins with these tokens and this state; None: an empty one.

    What is open behind them is found in their features (zeros behind the last one): the pages of a prompt can be those
    of several rows, but what one of them closes later is open to the others.
    """
    if state is None:
        state = jax.tree.map(jnp.zeros_like, row_state(cache, row))
    groups = [
        dataclasses.replace(group, state=jax.tree.map(lambda x, new: x.at[:, row].set(new), group.state, own))
        for group, own in zip(cache.groups, state, strict=True)
    ]
    scopes = cache.scopes
    if scopes is not None:
        ones_1S = jnp.ones((1, len(tokens_S)), jnp.int32)
        own = with_new_scopes(Scopes.none(*ones_1S.shape), features_SC[None], ones_1S, jnp.zeros(1, jnp.int32))
        scopes = jax.tree.map(lambda all_BS, own_1S: all_BS.at[row].set(own_1S[0]), scopes, own)
    return Cache(tuple(groups), cache.lengths_B, cache.tokens_BS.at[row].set(tokens_S), scopes)


def set_behind(
    behind: Behind, row: Any, of_row: Behind, allowed_V: Bool[Array, " V"], num_top: int
) -> tuple[Behind, tuple[Float[Array, ""], Int[Array, " X"], Float[Array, " X"]]]:
    """A row's are those, logits -inf where not allowed; and what the model says without that."""
    logits_V = of_row.logits_BV
    allowed = dataclasses.replace(of_row, logits_BV=jnp.where(allowed_V, logits_V, -jnp.inf))
    total, best = jax.nn.logsumexp(logits_V), jax.lax.top_k(logits_V, num_top)
    unrestricted = (jax.nn.logsumexp(allowed.logits_BV) - total, best[1], best[0] - total)
    return jax.tree.map(lambda x, new: x.at[row].set(new), behind, allowed), unrestricted


def copied(cache: Cache, sources: Any, targets: Any) -> Cache:
    """The cache with pages copied: in each group's pools, (devices, C) of them; -1: none."""

    def one(pool_LmkPH, source_1C, target_1C):
        def move(i, pool_LmkPH):  # page by page, in place; for none, page 0 to itself
            source, target = (jnp.where(target_1C[0, i] < 0, 0, x_1C[0, i]) for x_1C in (source_1C, target_1C))
            page = jax.lax.dynamic_slice_in_dim(pool_LmkPH, source, 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(pool_LmkPH, page, target, axis=1)

        return jax.lax.fori_loop(0, source_1C.shape[1], move, pool_LmkPH)

    run, groups = map_shards(one, (POOL, ("pages", None), ("pages", None)), POOL), []
    for group, source, target in zip(cache.groups, sources, targets, strict=True):
        k, v = (run(x, source, target) for x in (group.pages.k_LMKPH, group.pages.v_LMKPH))
        groups.append(dataclasses.replace(group, pages=Pages(k, v, group.pages.table_BJ)))
    return dataclasses.replace(cache, groups=tuple(groups))


def some_rows(cache: Cache, rows_R: Int[Array, " R"]) -> Cache:
    """A cache of some of the rows, over the same pools; of each device that rows are cut over, as many of its own."""
    groups = tuple(
        GroupCache(
            dataclasses.replace(group.pages, table_BJ=group.pages.table_BJ[rows_R]),
            jax.tree.map(lambda x: x[:, rows_R], group.state),
        )
        for group in cache.groups
    )
    rest = jax.tree.map(lambda x: x[rows_R], (cache.lengths_B, cache.tokens_BS, cache.scopes))
    return Cache(groups, *rest)


def with_rows(cache: Cache, rows_R: Int[Array, " R"], some: Cache) -> Cache:
    """The cache with what became of :func:`some_rows`."""
    groups = tuple(
        GroupCache(
            dataclasses.replace(new.pages, table_BJ=group.pages.table_BJ),
            jax.tree.map(lambda x, y: x.at[:, rows_R].set(y), group.state, new.state),
        )
        for group, new in zip(cache.groups, some.groups, strict=True)
    )
    old, new = ((x.lengths_B, x.tokens_BS, x.scopes) for x in (cache, some))
    return Cache(groups, *jax.tree.map(lambda x, y: x.at[rows_R].set(y), old, new))
