"""What a position can be told about the tokens before it without attention: look-ups that cost no matmul.

All of it is causal and stays within a document: a feature of position p depends on the tokens of its document at and
before p alone, whether a row is seen whole or token by token behind a cache.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import PositiveInt, UserError
from dsjax.nn.cache import Cache, append
from dsjax.nn.linear import project
from dsjax.nn.masks import Documents, Leaf
from dsjax.sharding import param


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The T positions at hand among the S tokens of their rows.

    Attributes:
        tokens_BS: token ids of whole rows (those behind the positions at hand are never looked at).
        slots_BT: index in the row of each position at hand.
        positions_BT: place of each position at hand in its document.
        starts_BS: slot at which the document of each token begins.
    """

    tokens_BS: Leaf
    slots_BT: Leaf
    positions_BT: Leaf
    starts_BS: Leaf

    def before(self, offset: int) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """Token ``offset`` places before each position, and whether the document reaches back so far."""
        slot_BT = jnp.maximum(self.slots_BT - offset, 0)
        return jnp.take_along_axis(self.tokens_BS, slot_BT, axis=1), self.positions_BT >= offset


def history_of(tokens_BT: Int[Array, "B T"], documents: Documents, cache: Cache | None) -> tuple[History, Cache | None]:
    """What is known of the tokens at and before the positions at hand; the cache with their tokens written."""
    steps_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    if cache is None:
        slots_BT = jnp.broadcast_to(steps_T, tokens_BT.shape)
        starts_BS = slots_BT - documents.positions_BT
        return History(tokens_BT, slots_BT, documents.positions_BT, starts_BS), None
    tokens_BS = append(cache.tokens_BS, tokens_BT, cache.lengths_B)
    slots_BT = cache.lengths_B[:, None] + steps_T  # a cached row is one document
    cache = dataclasses.replace(cache, tokens_BS=tokens_BS)
    return History(tokens_BS, slots_BT, slots_BT, jnp.zeros_like(tokens_BS)), cache


# ---------------------------------------------------------------- hashed n-grams


@dataclasses.dataclass(frozen=True)
class NgramConfig:
    """Embeddings of the last tokens together, in hashed tables (Engram, DeepSeek 2026).

    Attributes:
        sizes: lengths n of the n-grams, one table each.
        num_buckets: rows of a table; n-grams that hash to the same row share it.
        d_table: width of a row.
    """

    sizes: tuple[PositiveInt, ...] = (2, 3, 4)
    num_buckets: PositiveInt = 65_536
    d_table: PositiveInt = 64

    def validate(self) -> None:
        if not self.sizes:
            raise UserError("sizes is empty; give at least one n-gram length, for example 2")
        if len(set(self.sizes)) < len(self.sizes):
            raise UserError(f"sizes is {self.sizes}; the lengths must differ")

    def num_params(self, d_model: int) -> int:
        return len(self.sizes) * self.d_table * (self.num_buckets + d_model)


def ngram_buckets(history: History, n: int, num_buckets: int) -> Int[Array, "B T"]:
    """The table row of the n-gram that ends at each position (shorter at the start of a document)."""
    hash_BT = jnp.full(history.slots_BT.shape, n, jnp.uint32)
    for offset in range(n):
        token_BT, inside_BT = history.before(offset)
        # Multiply and xor-shift (the finaliser of MurmurHash3); 0 stands for what lies before the document.
        hash_BT = (hash_BT ^ jnp.where(inside_BT, token_BT + 1, 0).astype(jnp.uint32)) * jnp.uint32(0x9E3779B1)
        hash_BT = hash_BT ^ (hash_BT >> 15)
    hash_BT = hash_BT * jnp.uint32(0x85EBCA6B)
    return ((hash_BT ^ (hash_BT >> 13)) % jnp.uint32(num_buckets)).astype(jnp.int32)


class NgramEmbedding(nnx.Module):
    """The sum over n of a projected row of table n; zero at the start of training."""

    def __init__(self, cfg: NgramConfig, d_model: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        width = len(cfg.sizes) * cfg.d_table
        tables = (len(cfg.sizes), cfg.num_buckets, cfg.d_table)
        self.tables = param(rngs, tables, ("orders", "buckets", "table"), value=0.0)
        self.w = param(rngs, (width, d_model), ("table", "embed"), fan_in=width)

    def __call__(self, history: History, dtype) -> Float[Array, "B T D"]:
        tables = self.tables[...]
        rows = [
            tables[index][ngram_buckets(history, n, self.cfg.num_buckets)] for index, n in enumerate(self.cfg.sizes)
        ]
        return project(jnp.concatenate(rows, axis=-1).astype(dtype), self.w[...])


# ---------------------------------------------------------------- copying


@dataclasses.dataclass(frozen=True)
class CopyConfig:
    """Points at where the text before a position occurred last in its document, and at what followed there.

    It is what induction heads learn to do (Olsson et al. 2022), given from the first step: the match model of
    PPM and LZ77 as a feature, and as a learned bonus on one logit.

    Attributes:
        max_match: longest match that is told apart from longer ones, tokens.
    """

    max_match: PositiveInt = 8

    def num_params(self, vocab_size: int, d_model: int) -> int:
        return vocab_size * d_model + (self.max_match + 1) * (d_model + 2) + d_model


def longest_match(history: History, max_match: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The token that followed the latest of the longest earlier matches of each position's suffix, and their length.

    A match of length m ends at an earlier slot of the document whose last m tokens are the position's last m; 0: the
    token at hand is new to the document (the token returned is then 0). Lengths stop at ``max_match``. The search
    over (position, slot) pairs is one fused reduction: nothing of size T x S is stored.
    """
    S = history.tokens_BS.shape[1]
    slot_S = jnp.arange(S)
    begin_BT = history.slots_BT - history.positions_BT
    inside = (slot_S >= begin_BT[..., None]) & (slot_S < history.slots_BT[..., None])
    length = jnp.zeros(inside.shape, jnp.int32)
    running = inside
    for offset in range(max_match):
        query_BT, query_inside_BT = history.before(offset)
        key_BS = jnp.pad(history.tokens_BS, ((0, 0), (offset, 0)))[:, :S]
        key_inside_BS = slot_S - history.starts_BS >= offset
        key_BS = jnp.where(key_inside_BS, key_BS, -1)
        query_BT = jnp.where(query_inside_BT, query_BT, -2)
        running &= query_BT[..., None] == key_BS[:, None, :]
        length += running
    best_BT = jnp.max(jnp.where(length > 0, length * S + slot_S, -1), axis=-1)
    found_BT = best_BT >= 0
    next_BT = jnp.take_along_axis(history.tokens_BS, jnp.where(found_BT, best_BT % S + 1, 0), axis=1)
    return jnp.where(found_BT, next_BT, 0), jnp.where(found_BT, best_BT // S, 0)


def last_same(history: History) -> Int[Array, "B T"]:
    """How many places back the token of each position stood last in its document; 0: it did not yet."""
    slot_S = jnp.arange(history.tokens_BS.shape[1])
    token_BT, slots_BT1 = history.before(0)[0], history.slots_BT[..., None]
    earlier = (slot_S >= slots_BT1 - history.positions_BT[..., None]) & (slot_S < slots_BT1)
    same = earlier & (history.tokens_BS[:, None] == token_BT[..., None])
    at_BT = jnp.max(jnp.where(same, slot_S, -1), axis=-1)
    return jnp.where(at_BT >= 0, history.slots_BT - at_BT, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copy:
    """A bonus on the logit of one token at each position.

    Attributes:
        token_BT: which token.
        bonus_BT: what is added to its logit.
    """

    token_BT: Leaf
    bonus_BT: Leaf


class CopyHead(nnx.Module):
    """Tells a position what followed its longest match, as an embedding at the input and as a bonus at the output."""

    def __init__(self, cfg: CopyConfig, vocab_size: int, d_model: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        lengths = cfg.max_match + 1
        self.candidate = param(rngs, (vocab_size, d_model), ("vocab", "embed"), fan_in=2500)
        self.strength = param(rngs, (lengths,), ("lengths",), value=0.0)
        self.length_embedding = param(rngs, (lengths, d_model), ("lengths", "embed"), value=0.0)
        self.w_bonus = param(rngs, (d_model,), ("norm",), value=0.0)
        self.length_bonus = param(rngs, (lengths,), ("lengths",), value=0.0)

    def embed(self, token_BT: Int[Array, "B T"], length_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What is added to the embedding of each position."""
        # Longer matches speak louder from the start.
        strength = self.strength[...] + jnp.linspace(0.0, 1.0, self.cfg.max_match + 1)
        candidate_BTD = self.candidate[...][token_BT] * strength[length_BT][..., None]
        return candidate_BTD + self.length_embedding[...][length_BT]

    def bonus(
        self, hidden_BTD: Float[Array, "B T D"], token_BT: Int[Array, "B T"], length_BT: Int[Array, "B T"]
    ) -> Copy:
        """The bonus of each position's candidate, 0 where nothing matches."""
        bonus_BT = jnp.einsum("BTD,D->BT", hidden_BTD.astype(jnp.float32), self.w_bonus[...])
        bonus_BT = (bonus_BT + self.length_bonus[...][length_BT]) * (length_BT > 0)
        return Copy(token_BT, bonus_BT)


# ---------------------------------------------------------------- short convolutions


class ShortConv(nnx.Module):
    """``x_p + sum_i w_i * x_{p-i}`` per channel over the last positions of the document (Canon layers, Allen-Zhu 2025).

    Zero at the start of training. Behind a cache it needs the inputs of the last ``num_taps - 1`` positions.
    """

    def __init__(self, num_taps: int, d_model: int, *, rngs: nnx.Rngs):
        self.w = param(rngs, (num_taps, d_model), ("taps", "embed"), value=0.0)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        before_BCD: Float[Array, "B C D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """``before_BCD``: inputs of the C = num_taps - 1 positions before these; None: there are none."""
        w, T = self.w[...].astype(x_BTD.dtype), x_BTD.shape[1]
        C = w.shape[0] - 1
        if before_BCD is None:
            before_BCD = jnp.zeros((x_BTD.shape[0], C, x_BTD.shape[2]), x_BTD.dtype)
        padded = jnp.concatenate([before_BCD.astype(x_BTD.dtype), x_BTD], axis=1)
        y_BTD = x_BTD
        for offset in range(C + 1):
            inside_BT1 = (positions_BT >= offset)[..., None]
            y_BTD = y_BTD + jnp.where(inside_BT1, padded[:, C - offset : C - offset + T], 0) * w[offset]
        return y_BTD
