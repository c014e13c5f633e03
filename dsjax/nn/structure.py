"""What a model makes of the features of its tokens: embeddings, look-ups, heads that see what is still open.

    x_t  =  embedding[token_t] + sum_c table_c[feature_tc] + sum_p [e(a_tp); e(a_tp + 1)] w_p

for the features c that are categories and the tokens a_tp that features point to (:mod:`dsjax.nn.fields`), with e the
embedding of the token at a position. All tables and w_p are zero at the start of training.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeFloat, UserError
from dsjax.nn.cache import append
from dsjax.nn.fields import CATEGORIES, COLUMN, DEPTHS, FLOOR, LEAVES, POINTERS
from dsjax.nn.history import History, last_same
from dsjax.nn.linear import project
from dsjax.nn.masks import Leaf
from dsjax.sharding import param

NEVER = 2**30  # a position that is never reached
LEVELS = 2 * DEPTHS
NUM_CATEGORIES = sum(CATEGORIES.values())


@dataclasses.dataclass(frozen=True)
class StructureConfig:
    """What a model is given of the syntax around its tokens.

    Attributes:
        language: that a text is read as.
        embed: an embedding for each value of each feature that is a category.
        pointers: the tokens that are looked up, each with the one behind it: the ``block``'s and the ``bracket``'s
            opener, where the ``name`` was bound last; and, which needs no syntax and shows what that adds, where the
            ``same`` token stood last.
        next_leaf: weight of a further loss in training, that of the leaf which the next token ends in; 0: none.
    """

    language: Literal["python", "c"] = "python"
    embed: bool = True
    pointers: tuple[Literal["block", "bracket", "name", "same"], ...] = ()
    next_leaf: NonNegativeFloat = 0.0

    def validate(self) -> None:
        if len(set(self.pointers)) < len(self.pointers):
            raise UserError(f"pointers is {self.pointers}; each can be there once")

    def num_params(self, d_model: int) -> int:
        head = len(LEAVES) * d_model if self.next_leaf else 0
        return self.embed * NUM_CATEGORIES * d_model + self.num_matmul_params(d_model) + head

    def num_matmul_params(self, d_model: int) -> int:
        """Weights of products at inference; tables are looked up, though one product does it."""
        return 2 * d_model * d_model * len(self.pointers)


class Structure(nnx.Module):
    """The weights for it."""

    def __init__(self, cfg: StructureConfig, d_model: int, *, rngs: nnx.Rngs):
        self.cfg, D = cfg, d_model
        if cfg.embed:
            self.table = param(rngs, (NUM_CATEGORIES, D), ("lengths", "embed"), value=0.0)
        for pointer in cfg.pointers:
            setattr(self, f"w_{pointer}", param(rngs, (2, D, D), ("halves", "embed", "mlp"), value=0.0))
        if cfg.next_leaf:
            self.w_leaf = param(rngs, (D, len(LEAVES)), ("embed", "lengths"), value=0.0)

    def __call__(
        self, features_BTC: Int[Array, "B T C"], history: History, embedding: Float[Array, "V D"], dtype
    ) -> Float[Array, "B T D"]:
        """What is added to the embedding of each position."""
        features_BTC = features_BTC.astype(jnp.int32)
        x_BTD = jnp.zeros((*features_BTC.shape[:2], embedding.shape[1]), dtype)
        if self.cfg.embed:
            # One product with ones and zeros: its gradient is another one, where that of look-ups would be a scatter.
            ones = [jax.nn.one_hot(features_BTC[..., COLUMN[name]], n, dtype=dtype) for name, n in CATEGORIES.items()]
            x_BTD += project(jnp.concatenate(ones, axis=-1), self.table[...])
        for pointer in self.cfg.pointers:
            back_BT = last_same(history) if pointer == "same" else features_BTC[..., POINTERS[pointer]]
            slots_BT2 = jnp.maximum(history.slots_BT - back_BT, 0)[..., None] + jnp.arange(2)
            tokens_BT2 = jnp.take_along_axis(history.tokens_BS[:, None], slots_BT2, axis=2)
            inside_BT = (back_BT > 0) & (back_BT <= history.positions_BT)
            found_BT2D = jnp.where(inside_BT[..., None, None], embedding[tokens_BT2].astype(dtype), 0)
            x_BTD += project(found_BT2D, getattr(self, f"w_{pointer}")[...], num_inputs=2)
        return x_BTD


# ---------------------------------------------------------------- what is still open


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scopes:
    """How long the positions of rows can be seen from where they stand.

    Attributes:
        levels_BS: how deep each position stands: 2 for each open block, and 1 in a bracket.
        closes_BS: the first position behind it at which that has ended, :data:`NEVER` if it has not yet. So position i
            stands in what position j stands in if and only if j <= i < closes[j].
    """

    levels_BS: Leaf
    closes_BS: Leaf

    @classmethod
    def none(cls, batch: int, slots: int) -> Scopes:
        """Of rows that hold nothing."""
        return cls(jnp.zeros((batch, slots), jnp.int32), jnp.full((batch, slots), NEVER, jnp.int32))


def with_new_scopes(
    scopes: Scopes, features_BTC: Int[Array, "B T C"], ids_BT: Int[Array, "B T"], lengths_B: Int[Array, B]
) -> Scopes:
    """The scopes of rows with T positions behind the first ``lengths_B``; those with id 0 end nothing.

    What a statement has in brackets ends with it, and of a header with its block.
    """
    features_BTC = features_BTC.astype(jnp.int32)
    in_brackets_BT = features_BTC[..., COLUMN["brackets"]] > 0
    level_BT = 2 * features_BTC[..., COLUMN["depth"]] + in_brackets_BT
    floor_BT = features_BTC[..., FLOOR] - 1
    ends_BT = (floor_BT >= 0) & (ids_BT > 0)
    position_BT = lengths_B[:, None] + jnp.arange(level_BT.shape[1], dtype=jnp.int32)
    ended_BTL = ends_BT[..., None] & (floor_BT[..., None] < jnp.arange(LEVELS))
    # The first position from each one on at which something of a level ends, and behind the last one: none yet.
    first_BTL = jax.lax.cummin(jnp.where(ended_BTL, position_BT[..., None], NEVER), axis=1, reverse=True)
    behind_BTL = jnp.pad(first_BTL[:, 1:], ((0, 0), (0, 1), (0, 0)), constant_values=NEVER)
    new_BT = jnp.take_along_axis(behind_BTL, level_BT[..., None], axis=2)[..., 0]
    old_BS = jnp.minimum(scopes.closes_BS, jnp.take_along_axis(first_BTL[:, 0], scopes.levels_BS, axis=1))
    closes_BS = append(old_BS, new_BT, lengths_B)
    return Scopes(append(scopes.levels_BS, level_BT, lengths_B), closes_BS)
