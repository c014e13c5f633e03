"""Some tokens of the requests of an engine: freely, all steps in one call; or with the host, step by step.

With a grammar the host has to say before each token which ones may come, and a model with structure is told by it where
in the text each token stands. On one CPU the program asks the host in each step: that is cheap there. Elsewhere a step
is two programs: one that chooses, and one that computes what comes behind. The host starts both (with structure it must
see between them what was chosen), and finds out what may come next while the device still computes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
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
from dsjax.nn.fields import NUM_FIELDS
from dsjax.nn.masks import Documents
from dsjax.nn.structure import Scopes
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
    if engine.reads or any(r.constraint is not None for r in active):
        return _decode_with_host(engine, active, steps, (left_B, index_B, seeds_B, RowSampling.of(configs)))
    put = functools.partial(host_array_to_global, mesh=engine.mesh, spec=engine.rules.spec("batch"))
    rows = jax.tree.map(put, (left_B, known_B, seeds_B, index_B, RowSampling.of(configs)))
    made, engine.behind, engine.cache = engine.programs.decode(
        engine.params, engine.behind, engine.current(), *rows, np.int32(steps), width=engine.steps * (1 + engine.draft),
        num_top=engine.top_log_probs,
    )  # fmt: skip
    tokens, count_B, taken = jax.tree.map(np.asarray, made)
    told, tokens = tokens.experts_BTLK, dataclasses.replace(tokens, experts_BTLK=None)
    by_row = []
    for r in active:
        all_of_it = jax.tree.map(lambda x, row=r.row: x[row, : count_B[row]].tolist(), tokens)
        best = zip(all_of_it.top_BTX, all_of_it.top_log_prob_BTX, strict=True)
        top = [list(zip(*pair, strict=True)) for pair in best]
        experts = None if told is None else told[r.row, : count_B[r.row]]
        by_row.append(Decoded(all_of_it.token_BT, all_of_it.log_prob_BT, top, all_of_it.drafted_BT, experts))
    return by_row, int(taken)


def warm_up(engine: Engine) -> None:
    """Compiles what :func:`decode` can need. Nothing may be running."""
    if not engine.reads:
        decode(engine, [], 0)
    if not engine.draft:
        nobody = [np.zeros(len(engine.rows), dtype) for dtype in (np.int32, np.int32, np.uint32)]
        _decode_with_host(engine, [], 1, (*nobody, RowSampling.of([SamplingConfig(0.0)] * len(engine.rows))))


class Rows:
    """The rows of a batch that the host follows while some tokens are decoded.

    Attributes:
        going: rows that have not ended.
        counts: how many tokens each got, the one that ended it included.
        features_BC: of the last token of each, as far as the model is told those.
    """

    def __init__(self, engine: Engine, active: list[Running], left_B: np.ndarray):
        self.going, self.left_B = {r.row: r for r in active}, left_B
        self.counts = {r.row: 0 for r in active}
        self.allowed_BP = np.full((len(engine.rows), -(-engine.behind.logits_BV.shape[1] // 8)), 255, np.uint8)
        self.features_BC = np.zeros((len(engine.rows), NUM_FIELDS), np.int16)

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, a bit each: (B, P) uint8. A row without a grammar may have any."""
        P = self.allowed_BP.shape[1]
        for row, r in self.going.items():
            if r.constraint is not None:
                own = r.constraint.row(int(self.left_B[row]) - self.counts[row])
                if len(own) < P:
                    self.allowed_BP[row, len(own) :] = 0
                self.allowed_BP[row, : len(own)] = own[:P]
        return self.allowed_BP.copy()

    def take(self, token_B: Sequence[int]) -> None:
        """One more token of each row."""
        for row, r in list(self.going.items()):
            token = token_B[row]
            ended = token in r.end_ids
            if ended and r.constraint is not None and not r.constraint.ends_well():
                del self.going[row]  # it is computed again up to here, to go on with another token
                continue
            self.counts[row] += 1
            if r.constraint is not None and not ended:
                r.constraint.add(token)
            if ended or self.counts[row] == self.left_B[row]:
                del self.going[row]
            elif r.reading is not None:
                self.features_BC[row] = r.reading.feed(token)


_ASKED: dict[int, Rows] = {}  # by a number that a program is given, what answers it
_NUMBERS = itertools.count()


def _ask(asked: Any) -> np.ndarray:
    """Behind one more token of each row: its features, what may come next, and whether any row goes on.

    One array each way, of bytes: what JAX does for each of them takes longer than most answers.
    """
    key, *token_B = np.asarray(asked).tolist()
    rows = _ASKED[key]
    rows.take(token_B)
    goes_on_B1 = np.full((len(token_B), 1), bool(rows.going), np.uint8)
    return np.concatenate([rows.features_BC.view(np.uint8), rows.allowed(), goes_on_B1], axis=1)


def _decode_with_host(engine: Engine, active: list[Running], steps: int, given: Any) -> tuple[list[Decoded], int]:
    """The same, where a request has a grammar or the model structure. Nobody active: what can be needed is compiled."""
    left_B, index_B, *own = given
    put = functools.partial(host_array_to_global, mesh=engine.mesh, spec=engine.rules.spec("batch"))
    index_B, seeds_B, settings = jax.tree.map(put, (index_B, *own))
    rows, cache = Rows(engine, active, left_B), engine.current()
    num_groups, tells = len(engine.tables.layouts), engine.tell_experts
    programs = make_programs(engine.graph, engine.mesh, engine.rules, num_groups, engine.scoped, tells)
    if is_better(engine.mesh):
        _ASKED[key := next(_NUMBERS) % 2**31] = rows
        try:
            made, taken, engine.behind, cache = programs.loop(
                engine.params, engine.behind, cache, np.int32(key), rows.allowed(), left_B, index_B, seeds_B, settings,
                np.int32(steps), width=engine.steps, num_top=engine.top_log_probs,
            )  # fmt: skip
            made, taken = jax.tree.map(np.asarray, made), int(taken)
        finally:
            del _ASKED[key]
    else:
        parts = list[Any]()
        while not parts or (len(parts) < steps and rows.going):
            active_B = put(np.isin(np.arange(len(engine.rows)), list(rows.going)))
            chosen = programs.choose(
                engine.behind, put(rows.allowed()), index_B, seeds_B, settings, np.int32(len(parts)),
                num_top=engine.top_log_probs,
            )  # fmt: skip
            told = _told(rows, chosen, put) if engine.reads else None
            engine.behind, cache, experts = programs.follow(
                engine.params, engine.behind, cache, chosen[0], active_B, told
            )
            parts.append([np.asarray(x)[:, None] for x in (*chosen, *([experts] if tells else []))])
            if not engine.reads:
                rows.take(parts[-1][0][:, 0].tolist())
        made, taken = [np.concatenate(x, axis=1) for x in zip(*parts, strict=True)], len(parts)
    engine.cache, by_row = cache, []
    token_BT, log_prob_BT, top_BTX, best_BTX = made[:4]
    for row, count in rows.counts.items():
        pairs = zip(top_BTX[row, :count].tolist(), best_BTX[row, :count].tolist(), strict=True)
        top = [list(zip(*pair, strict=True)) for pair in pairs]
        of_tokens = (token_BT[row, :count].tolist(), log_prob_BT[row, :count].tolist(), top, [False] * count)
        by_row.append(Decoded(*of_tokens, made[4][row, :count] if tells else None))
    return by_row, taken


def _told(rows: Rows, chosen: Any, put: Any) -> jax.Array:
    """The features of tokens that were just chosen."""
    rows.take(np.asarray(chosen[0]).tolist())
    return put(rows.features_BC.copy())


@dataclasses.dataclass(frozen=True)
class Programs:
    """Decode steps in which the host has a say.

    Attributes:
        choose: (behind, allowed_BP, index_B, seeds_B, settings, number, num_top=) -> (token_B, log_prob_B, top_BX,
            top_log_prob_BX): token number ``index_B + number`` of each row, of those whose bits are set; the likeliest
            ones, and all probabilities, are those of the model, whatever is allowed.
        follow: (params, behind, cache, token_B, active_B, features_BC) -> (behind, cache, experts_BLK): what comes
            behind those, in rows that are active. A model without structure takes no features. Experts that the tokens
            went to: if they are told, else None.
        loop: (params, behind, cache, key, allowed_BP, left_B, index_B, seeds_B, settings, steps, width=, num_top=) ->
            (those of ``choose`` of all steps, the steps in dimension 1 of ``width``, and the experts if they are told;
            how many steps; behind, cache):
            up to ``steps`` steps of both, in rows until they have ``left_B`` tokens, that ask the host behind each
            choice, until it says that no row goes on.
    """

    choose: Any
    follow: Any
    loop: Any


@functools.lru_cache(maxsize=64)
def make_programs(
    graph: Any, mesh: Mesh, rules: Rules, num_groups: int, scoped: bool = False, tell_experts: bool = False
) -> Programs:
    """The functions for one model on one mesh; ``scoped``: of a cache with scopes."""
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

    def follow(params: Any, behind: Behind, cache: Cache, token_B: Int[Array, " B"], active_B: Bool[Array, " B"],
               features_BC: Any):  # fmt: skip
        with within():
            model = nnx.merge(graph, stacked(params))
            ids_B1 = active_B.astype(jnp.int32)[:, None]
            told = None if model.cfg.structure is None else features_BC[:, None]
            documents = Documents(ids_B1, jnp.zeros_like(ids_B1))
            out = model(token_B[:, None], documents, features_BTC=told, cache=cache, tell_experts=tell_experts)
            logits_BV = jnp.where(active_B[:, None], model.logits(out)[:, 0], behind.logits_BV)
            num_B = active_B.astype(jnp.int32)
            new = Behind(logits_BV, with_hidden(behind.hidden_BWD, out.hidden_BTD, num_B))
        experts_BLK = out.experts_BTLK[:, 0] if tell_experts else None
        return new, dataclasses.replace(out.cache, lengths_B=cache.lengths_B + num_B), experts_BLK

    def loop(params: Any, behind: Behind, cache: Cache, key: Int[Array, ""], allowed_BP: UInt8[Array, "B P"],
             left_B: Int[Array, " B"], index_B: Int[Array, " B"], seeds_B: UInt[Array, " B"], settings: RowSampling,
             steps: Int[Array, ""], width: int, num_top: int):  # fmt: skip
        (B, P), size = allowed_BP.shape, 2 * NUM_FIELDS  # of features as bytes
        answer = jax.ShapeDtypeStruct((B, size + P + 1), jnp.uint8)

        def one(carry: Any) -> Any:
            (made, told), number, allowed_BP, _, behind, cache = carry
            chosen = choose(behind, allowed_BP, index_B, seeds_B, settings, number, num_top)
            answer_BX = io_callback(_ask, answer, jnp.concatenate([key[None], chosen[0]]))
            features_BC = jax.lax.bitcast_convert_type(answer_BX[:, :size].reshape(B, NUM_FIELDS, 2), jnp.int16)
            allowed_BP, goes_on = answer_BX[:, size:-1], answer_BX[0, -1] > 0
            made = jax.tree.map(lambda all_BS, x_B: all_BS.at[:, number].set(x_B), made, chosen)
            behind, cache, experts_BLK = follow(params, behind, cache, chosen[0], number < left_B, features_BC)
            told = [all_BSLK.at[:, number].set(experts_BLK) for all_BSLK in told]
            return (made, told), number + 1, allowed_BP, goes_on, behind, in_order(cache)

        shapes = (((B, width), jnp.int32), ((B, width), jnp.float32), ((B, width, num_top), jnp.int32))
        made = tuple(jnp.zeros(*shape) for shape in (*shapes, ((B, width, num_top), jnp.float32)))
        cfg = nnx.merge(graph, stacked(params)).cfg if tell_experts else None
        told = [] if cfg is None else [jnp.zeros((B, width, *cfg.decisions), cfg.decision_dtype)]
        begin = ((made, told), jnp.int32(0), allowed_BP, jnp.array(True), behind, cache)
        found, number, _, _, behind, cache = jax.lax.while_loop(lambda carry: (carry[1] < steps) & carry[3], one, begin)
        return (*found[0], *found[1]), number, behind, cache

    whole = replicated(mesh)  # every process reads them
    there = behind_shardings(mesh, rules), cache_shardings(num_groups, mesh, rules, Scopes(0, 0) if scoped else None)
    return Programs(
        choose=jax.jit(choose, static_argnames="num_top", out_shardings=whole),
        follow=jax.jit(follow, donate_argnames=("behind", "cache"), out_shardings=(*there, whole)),
        loop=jax.jit(
            loop,
            donate_argnames=("behind", "cache"),
            static_argnames=("width", "num_top"),
            out_shardings=(whole, whole, *there),
        ),
    )
