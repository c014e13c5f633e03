"""Some tokens of the requests of an engine: freely, all steps in one call; or within grammars, step by step.

With a grammar the host has to say before each token which ones may come. On one CPU the program asks it in each step:
that is cheap there. Elsewhere a step is two programs: one that chooses, and one that computes what comes behind. The
host starts both, reads what was chosen as soon as that is there, and finds out what may come next while the device
still computes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import io_callback
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, UInt, UInt8

from dsjax.infer.requests import Decoded, Running
from dsjax.infer.sampling import RowSampling, SamplingConfig, sample_rows
from dsjax.infer.speculation import Behind, behind_shardings, with_hidden
from dsjax.infer.written_out import in_order, is_better, stacked
from dsjax.nn.cache import Cache, cache_shardings
from dsjax.nn.masks import Documents
from dsjax.sharding import Rules, host_array_to_global, replicated, use_mesh

if TYPE_CHECKING:
    from dsjax.infer.batching import Engine


def decode(engine: Engine, active: list[Running], steps: int) -> tuple[list[Decoded], int]:
    """What each of the active requests got in up to so many steps, and in how many."""
    B = len(engine.rows)
    left_B, known_B, index_B, seeds_B = *(np.zeros(B, np.int32) for _ in range(3)), np.zeros(B, np.uint32)
    configs = [SamplingConfig(temperature=0.0)] * B
    for r in active:
        left_B[r.row], known_B[r.row] = r.limit - len(r.tokens), min(r.filled - r.begun, engine.num_kept)
        seeds_B[r.row], index_B[r.row], configs[r.row] = r.seed, r.num_new, r.request.sampling
    if any(r.constraint is not None for r in active):
        return _decode_within(engine, active, steps, (left_B, index_B, seeds_B, RowSampling.of(configs)))
    put = functools.partial(host_array_to_global, mesh=engine.mesh, spec=engine.rules.spec("batch"))
    rows = jax.tree.map(put, (left_B, known_B, seeds_B, index_B, RowSampling.of(configs)))
    made, engine.behind, engine.cache = engine.programs.decode(
        engine.params, engine.behind, engine.current(), *rows, np.int32(steps), width=engine.steps * (1 + engine.draft),
        num_top=engine.top_log_probs,
    )  # fmt: skip
    tokens, count_B, taken = jax.tree.map(np.asarray, made)
    by_row = []
    for r in active:
        all_of_it = jax.tree.map(lambda x, row=r.row: x[row, : count_B[row]].tolist(), tokens)
        best = zip(all_of_it.top_BTX, all_of_it.top_log_prob_BTX, strict=True)
        top = [list(zip(*pair, strict=True)) for pair in best]
        by_row.append(Decoded(all_of_it.token_BT, all_of_it.log_prob_BT, top, all_of_it.drafted_BT))
    return by_row, int(taken)


class Rows:
    """The rows of a batch that have grammars, while some tokens are decoded.

    Attributes:
        going: rows that have not ended.
        counts: how many tokens each got, the one that ended it included.
    """

    def __init__(self, engine: Engine, active: list[Running], left_B: np.ndarray):
        self.going, self.left_B = {r.row: r for r in active}, left_B
        self.counts = {r.row: 0 for r in active}
        self.allowed_BP = np.full((len(engine.rows), -(-engine.behind.logits_BV.shape[1] // 8)), 255, np.uint8)

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, a bit each: (B, P) uint8. A row without a grammar may have any."""
        P = self.allowed_BP.shape[1]
        for row, r in self.going.items():
            if r.constraint is not None:
                own = r.constraint.row(int(self.left_B[row]) - self.counts[row])
                if len(own) < P:
                    self.allowed_BP[row, len(own) :] = 0
                self.allowed_BP[row, : len(own)] = own[:P]
        return self.allowed_BP

    def take(self, token_B: np.ndarray) -> None:
        """One more token of each row."""
        for row, token in [(row, int(token_B[row])) for row in self.going]:
            r = self.going[row]
            ended = token in r.end_ids
            if ended and r.constraint is not None and not r.constraint.ends_well():
                del self.going[row]  # it is computed again up to here, to go on with another token
                continue
            self.counts[row] += 1
            if r.constraint is not None and not ended:
                r.constraint.add(token)
            if ended or self.counts[row] == self.left_B[row]:
                del self.going[row]


_ASKED: dict[int, Rows] = {}  # by a number that a program is given, what answers it
_NUMBERS = itertools.count()


def _ask(key: Any, token_B: Any, number: Any) -> np.ndarray:
    rows = _ASKED[int(key)]
    if int(number):
        rows.take(np.asarray(token_B))
    return rows.allowed().copy()


def _decode_within(engine: Engine, active: list[Running], steps: int, given: Any) -> tuple[list[Decoded], int]:
    """The same, where a request has a grammar."""
    left_B, index_B, *own = given
    put = functools.partial(host_array_to_global, mesh=engine.mesh, spec=engine.rules.spec("batch"))
    index_B, seeds_B, settings = jax.tree.map(put, (index_B, *own))
    rows, cache = Rows(engine, active, left_B), engine.current()
    programs = make_programs(engine.graph, engine.mesh, engine.rules, len(engine.tables.layouts))
    taken, parts = 0, list[Any]()
    if is_better(engine.mesh):
        _ASKED[key := next(_NUMBERS) % 2**31] = rows
        try:
            made, engine.behind, cache = programs.loop(
                engine.params, engine.behind, cache, np.int32(key), left_B, index_B, seeds_B, settings,
                np.int32(steps), width=engine.steps, num_top=engine.top_log_probs,
            )  # fmt: skip
            made, taken = jax.tree.map(np.asarray, made), steps
        finally:
            del _ASKED[key]
        rows.take(made[0][:, steps - 1])
    while taken < steps and rows.going:
        active_B = np.isin(np.arange(len(engine.rows)), list(rows.going))
        chosen = programs.choose(
            engine.behind, put(rows.allowed().copy()), index_B, seeds_B, settings, np.int32(taken),
            num_top=engine.top_log_probs,
        )  # fmt: skip
        engine.behind, cache = programs.follow(engine.params, engine.behind, cache, chosen[0], put(active_B))
        parts.append([np.asarray(x)[:, None] for x in chosen])
        rows.take(parts[-1][0][:, 0])
        taken += 1
    engine.cache = cache
    token_BT, log_prob_BT, top_BTX, best_BTX = (
        (np.concatenate(x, axis=1) for x in zip(*parts, strict=True)) if parts else made
    )
    by_row = []
    for row, count in rows.counts.items():
        pairs = zip(top_BTX[row, :count].tolist(), best_BTX[row, :count].tolist(), strict=True)
        top = [list(zip(*pair, strict=True)) for pair in pairs]
        by_row.append(Decoded(token_BT[row, :count].tolist(), log_prob_BT[row, :count].tolist(), top, [False] * count))
    return by_row, taken


@dataclasses.dataclass(frozen=True)
class Programs:
    """Decode steps within grammars.

    Attributes:
        choose: (behind, allowed_BP, index_B, seeds_B, settings, number, num_top=) -> (token_B, log_prob_B, top_BX,
            top_log_prob_BX): token number ``index_B + number`` of each row, of those whose bits are set; the likeliest
            ones, and all probabilities, are those of the model, whatever is allowed.
        follow: (params, behind, cache, token_B, active_B) -> (behind, cache): what comes behind those, in rows that are
            active.
        loop: (params, behind, cache, key, left_B, index_B, seeds_B, settings, steps, width=, num_top=) -> (those of
            ``choose`` of all steps, the steps in dimension 1 of ``width``; behind, cache): steps of both, in rows until
            they have ``left_B`` tokens, that ask what may come.
    """

    choose: Any
    follow: Any
    loop: Any


@functools.lru_cache(maxsize=64)
def make_programs(graph: Any, mesh: Mesh, rules: Rules, num_groups: int) -> Programs:
    """The functions for one model on one mesh."""
    within = functools.partial(use_mesh, mesh, dataclasses.replace(rules, length=()))

    def choose(behind: Behind, allowed_BP: UInt8[Array, "B P"], index_B: Int[Array, " B"], seeds_B: UInt[Array, " B"],
               settings: RowSampling, number: Int[Array, ""], num_top: int):  # fmt: skip
        logits_BV = behind.logits_BV
        B, V = logits_BV.shape
        allowed_BV = ((allowed_BP[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)) & 1).reshape(B, -1)[:, :V] == 1
        keys_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds_B), index_B + number)
        token_B = sample_rows(jnp.where(allowed_BV, logits_BV, -jnp.inf), keys_B, settings)
        total_B = jax.nn.logsumexp(logits_BV, axis=-1)
        taken_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
        best_BX, top_BX = jax.lax.top_k(logits_BV, num_top)
        return token_B, taken_B - total_B, top_BX, best_BX - total_B[:, None]

    def follow(params: Any, behind: Behind, cache: Cache, token_B: Int[Array, " B"], active_B: Bool[Array, " B"]):
        with within():
            model = nnx.merge(graph, stacked(params))
            ids_B1 = active_B.astype(jnp.int32)[:, None]
            out = model(token_B[:, None], Documents(ids_B1, jnp.zeros_like(ids_B1)), cache=cache)
            logits_BV = jnp.where(active_B[:, None], model.logits(out)[:, 0], behind.logits_BV)
            num_B = active_B.astype(jnp.int32)
            new = Behind(logits_BV, with_hidden(behind.hidden_BWD, out.hidden_BTD, num_B))
        return new, dataclasses.replace(out.cache, lengths_B=cache.lengths_B + num_B)

    def loop(params: Any, behind: Behind, cache: Cache, key: Int[Array, ""], left_B: Int[Array, " B"],
             index_B: Int[Array, " B"], seeds_B: UInt[Array, " B"], settings: RowSampling, steps: Int[Array, ""],
             width: int, num_top: int):  # fmt: skip
        B, V = behind.logits_BV.shape
        packed = jax.ShapeDtypeStruct((B, -(-V // 8)), jnp.uint8)

        def one(carry: Any) -> Any:
            made, token_B, number, behind, cache = carry
            allowed_BP = io_callback(_ask, packed, key, token_B, number)
            chosen = choose(behind, allowed_BP, index_B, seeds_B, settings, number, num_top)
            made = jax.tree.map(lambda all_BS, x_B: all_BS.at[:, number].set(x_B), made, chosen)
            behind, cache = follow(params, behind, cache, chosen[0], number < left_B)
            return made, chosen[0], number + 1, behind, in_order(cache)

        shapes = (((B, width), jnp.int32), ((B, width), jnp.float32), ((B, width, num_top), jnp.int32))
        made = tuple(jnp.zeros(*shape) for shape in (*shapes, ((B, width, num_top), jnp.float32)))
        begin = (made, jnp.zeros(B, jnp.int32), jnp.int32(0), behind, cache)
        made, _, _, behind, cache = jax.lax.while_loop(lambda carry: carry[2] < steps, one, begin)
        return made, behind, cache

    whole = replicated(mesh)  # every process reads them
    there = behind_shardings(mesh, rules), cache_shardings(num_groups, mesh, rules)
    return Programs(
        choose=jax.jit(choose, static_argnames="num_top", out_shardings=whole),
        follow=jax.jit(follow, donate_argnames=("behind", "cache"), out_shardings=there),
        loop=jax.jit(
            loop,
            donate_argnames=("behind", "cache"),
            static_argnames=("width", "num_top"),
            out_shardings=(whole, *there),
        ),
    )
