"""Decoding with drafts (DeepSeek-V3, arXiv 2412.19437, sections 2.2 and 5.4.3): several tokens of a row a forward pass.

The model's modules of multi-token prediction say what may come behind the next token; the model looks at all of that in
one pass, and what it would have said itself is kept. It chooses each token with the key that decoding without drafts
would use there, and a draft is accepted if it is that token. So what comes out is what comes out without drafts, at
every temperature and seed; drafts change the pace alone (docs/decisions/0021-drafts-with-the-keys-of-tokens.md).

A module's state at position i needs the model's hidden state there and the next token: it lags behind the model's by
one, that of the n-th module by n. So the hidden states of the last W positions are kept, and each step begins with the
modules on those: what lags, and what they saw as drafts, is written anew.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import UserError
from dsjax.infer.sampling import RowSampling, choose, gumbel_noise
from dsjax.models.decoder import Decoder, DecoderConfig, DecoderOutput
from dsjax.nn.cache import Cache, append
from dsjax.nn.masks import Documents, Leaf
from dsjax.sharding import Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Behind:
    """What is known behind the last token of each row.

    Attributes:
        logits_BV: scores of the next token.
        hidden_BWD: the model's hidden states of the last W positions, the last one at the end (see :func:`num_kept`).
    """

    logits_BV: Leaf
    hidden_BWD: Leaf


def behind_shardings(mesh: Mesh, rules: Rules) -> Behind:
    """Where each array of :class:`Behind` lives."""
    return Behind(*(NamedSharding(mesh, rules.spec("batch", *axes)) for axes in (("vocab",), (None, None))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What came of a step: T tokens at the most of each row, of which the first ``num_B`` count.

    Attributes:
        token_BT: ids.
        log_prob_BT: what the model gave each.
        top_BTX, top_log_prob_BTX: the likeliest ones at each place.
        drafted_BT: whether it was a draft.
        experts_BTLK: the experts that it went to, or none.
    """

    token_BT: Leaf
    log_prob_BT: Leaf
    top_BTX: Leaf
    top_log_prob_BTX: Leaf
    drafted_BT: Leaf
    experts_BTLK: Leaf = None

    @classmethod
    def none(cls, B: int, width: int, num_top: int, telling: DecoderConfig | None = None) -> Tokens:
        """Room for ``width`` tokens of each row, and for the decisions of a model that is ``telling`` them."""
        shapes = ((B, width), (B, width), (B, width, num_top), (B, width, num_top), (B, width))
        dtypes = (jnp.int32, jnp.float32, jnp.int32, jnp.float32, bool)
        told = None if telling is None else jnp.zeros((B, width, *telling.decisions), telling.decision_dtype)
        room = cls(*(jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))
        return dataclasses.replace(room, experts_BTLK=told)

    def followed_by(self, new: Tokens, count_B: Int[Array, B], num_B: Int[Array, B]) -> Tokens:
        """With the first ``num_B`` of ``new`` behind the ``count_B`` that are here; without those that have no room."""
        B, T = new.token_BT.shape
        at_BT, width = count_B[:, None] + jnp.arange(T), self.token_BT.shape[1]
        at_BT = jnp.where(jnp.arange(T) < num_B[:, None], at_BT, width)
        put = lambda all_BS, new_BT: all_BS.at[jnp.arange(B)[:, None], at_BT].set(new_BT, mode="drop")  # noqa: E731
        return jax.tree.map(put, self, new)


def num_drafting(cfg: DecoderConfig, draft: int) -> int:
    """How many modules of a model ``draft`` drafts are made with; the last one makes all that are left.

    Raises:
        UserError: there are none, or the model can not take positions back, or it has structure.
    """
    if draft < 0:
        raise UserError(f"draft is {draft}; it must be at least 0")
    if draft == 0:
        return 0
    if cfg.multi_token is None:
        raise UserError(f"draft is {draft}, but the model has no module of multi-token prediction to draft with")
    if cfg.structure is not None:
        raise UserError(
            f"draft is {draft}, but a model with structure is told of each token before the next one, by the host"
        )
    for index, group in enumerate(cfg.groups):
        a = group.attention
        kind = "segmented attention" if a.segmented is not None else "a short convolution" if a.conv_taps > 1 else None
        if kind is not None:
            raise UserError(
                f"draft is {draft}, but group_{index} of the model has {kind}, whose cache can not take back what was"
                " not accepted"
            )
    return min(draft, cfg.multi_token.num_modules)


def num_kept(draft: int, num_modules: int) -> int:
    """Positions whose hidden states are kept, W, for ``draft`` drafts of so many modules.

    A step adds up to 1 + draft, and the last module lags by ``num_modules``.
    """
    return draft + num_modules if draft else 0


def with_hidden(
    hidden_BWD: Float[Array, "B W D"], new_BTD: Float[Array, "B T D"], num_B: Int[Array, B]
) -> Float[Array, "B W D"]:
    """The last W hidden states of each row with the first ``num_B`` of T new ones."""
    both = jnp.concatenate([hidden_BWD, new_BTD.astype(hidden_BWD.dtype)], axis=1)
    return _cut(both, num_B, hidden_BWD.shape[1])


def _cut(x_BSD: Float[Array, "B S D"], start_B: Int[Array, B], size: int) -> Float[Array, "B T D"]:
    return jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size, axis=0))(x_BSD, start_B)


def drafts(
    model: Decoder,
    token_B: Int[Array, B],
    hidden_BWD: Float[Array, "B W D"],
    known_B: Int[Array, B],
    cache: Cache,
    noise_BNV: Float[Array, "B N V"],
    settings: RowSampling,
) -> tuple[Int[Array, "B N"], Cache]:
    """What may come behind the next token, and the cache with what the modules kept.

    The n-th module drafts the n-th token; the last one goes on with its own output, a position further each time.

    Args:
        model: with modules of multi-token prediction.
        token_B: the next token, which stands behind what the cache holds.
        hidden_BWD: of the last positions, the last one at the end.
        known_B: how many of those are known, at most W; 0: nothing of the row is written.
        cache: with those of the modules that draft.
        noise_BNV: by which the token in the place of each draft will be chosen.
        settings: by which it will be.
    """
    W, N, length_B = hidden_BWD.shape[1], noise_BNV.shape[1], cache.lengths_B
    num_modules = len(cache.groups) - len(model.cfg.groups)
    start_B, tokens_BS = length_B - known_B, append(cache.tokens_BS, token_B[:, None], length_B)
    hidden_BWD = _cut(jnp.pad(hidden_BWD, [(0, 0), (0, W), (0, 0)]), W - known_B, W)  # the first one first
    found: list[jax.Array] = []
    for n in range(N):
        if n < num_modules:
            ids_BW = (jnp.arange(W) < known_B[:, None]).astype(jnp.int32)
            at_BW = jnp.minimum(start_B[:, None] + jnp.arange(W) + n + 1, tokens_BS.shape[1] - 1)
            next_BW = jnp.take_along_axis(tokens_BS, at_BW, axis=1)
            hidden_BWD, cache = model.draft_hidden(n, hidden_BWD, next_BW, ids_BW, start_B, cache)
            last_B1D = _cut(hidden_BWD, jnp.maximum(known_B - 1, 0), 1)
        else:
            ids_B1, at_B = (known_B > 0).astype(jnp.int32)[:, None], length_B + n - num_modules
            last_B1D, cache = model.draft_hidden(num_modules - 1, last_B1D, found[-1][:, None], ids_B1, at_B, cache)
        logits_BV = model.logits(DecoderOutput(last_B1D, None, {}, {}, None))[:, 0]
        found.append(choose(logits_BV, noise_BNV[:, n], settings))
        tokens_BS = append(tokens_BS, found[-1][:, None], length_B + n + 1)
    return jnp.stack(found, axis=1), cache


def speculate(
    model: Decoder,
    behind: Behind,
    known_B: Int[Array, B],
    cache: Cache,
    active_B: Bool[Array, B],
    keys_BT: jax.Array,
    settings: RowSampling,
    num_top: int,
    tell_experts: bool = False,
) -> tuple[Tokens, Int[Array, B], Behind, Cache]:
    """One step of the active rows: the next token, T - 1 drafts, one forward pass over all of those.

    What is accepted of drafts is what would have been chosen, so the experts that are told are those of the tokens.

    Returns:
        The tokens that the model itself chose; how many of each row count: the next one, and as many drafts as were
        chosen, from the first on (of rows that are not active, none); and behind those what is known, and the cache.
    """
    (B, T), length_B, V = keys_BT.shape, cache.lengths_B, behind.logits_BV.shape[1]
    each = jax.tree.map(lambda x_B: jnp.repeat(x_B, T), settings)
    # The noise of a draft is that of what comes in its place.
    noise_BTV = gumbel_noise(keys_BT.reshape(-1), V, each).reshape(B, T, V)
    block_BT = choose(behind.logits_BV, noise_BTV[:, 0], settings)[:, None]
    if T > 1:
        known_B = jnp.where(active_B, known_B, 0)
        of_draft = (known_B, cache, noise_BTV[:, 1:], settings)
        draft_BN, cache = drafts(model, block_BT[:, 0], behind.hidden_BWD, *of_draft)
        block_BT = jnp.concatenate([block_BT, draft_BN], axis=1)
    ids_BT = jnp.broadcast_to(active_B[:, None], block_BT.shape).astype(jnp.int32)
    out = model(block_BT, Documents(ids_BT, jnp.zeros_like(ids_BT)), cache=cache, tell_experts=tell_experts)
    logits_BTV = model.logits(out)

    place_BTV, token_BT = behind.logits_BV[:, None], block_BT  # from what, and what was chosen
    if T > 1:
        each = jax.tree.map(lambda x_B: jnp.repeat(x_B, T - 1), settings)
        chosen = choose(logits_BTV[:, :-1].reshape(-1, V), noise_BTV[:, 1:].reshape(-1, V), each)
        token_BT = jnp.concatenate([block_BT[:, :1], chosen.reshape(B, T - 1)], axis=1)
        place_BTV = jnp.concatenate([place_BTV, logits_BTV[:, :-1]], axis=1)
    right_BT = jnp.cumprod((token_BT == block_BT).astype(jnp.int32), axis=1)  # the first one always is
    num_B = jnp.where(active_B, jnp.sum(right_BT, axis=1), 0)

    total_BT = jax.nn.logsumexp(place_BTV, axis=-1)
    taken_BT = jnp.take_along_axis(place_BTV, token_BT[..., None], axis=2)[..., 0]
    best_BTX, top_BTX = jax.lax.top_k(place_BTV, num_top)
    drafted_BT = jnp.broadcast_to(jnp.arange(T) > 0, token_BT.shape)
    best = (top_BTX, best_BTX - total_BT[..., None])
    tokens = Tokens(token_BT, taken_BT - total_BT, *best, drafted_BT, out.experts_BTLK)

    last_BV = jnp.take_along_axis(logits_BTV, jnp.maximum(num_B - 1, 0)[:, None, None], axis=1)[:, 0]
    new_BV = jnp.where(active_B[:, None], last_BV, behind.logits_BV)
    behind = Behind(new_BV, with_hidden(behind.hidden_BWD, out.hidden_BTD, num_B))
    assert out.cache is not None
    return tokens, num_B, behind, dataclasses.replace(out.cache, lengths_B=length_B + num_B)
