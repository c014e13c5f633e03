"""Advantages: by how much a text, or each token of it, was better than what was to be expected."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Integer

from dsjax.config import Share
from dsjax.rl.experience import Mask

EPSILON = 1e-6  # beside a standard deviation that is divided by

Rewards = Float[Array | np.ndarray, "P K"]
Numbers = Float[Array | np.ndarray, "B T"]
Number = float | Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """What a text is compared with.

    Attributes:
        kind: ``group``: the mean of its prompt's texts, in standard deviations (GRPO); ``group_mean``: that mean alone
            (Dr.GRPO); ``leave_one_out``: the mean of the others (RLOO); ``gae``: a critic, token by token (PPO).
        discount: of a later token, gamma, for ``gae``.
        gae_lambda: how far what is to come counts as it came, and not as the critic says (1: alone).
        whiten: for ``gae``: advantages of all texts get mean 0 and variance 1.
    """

    kind: Literal["group", "group_mean", "leave_one_out", "gae"] = "group"
    discount: Share = 1.0
    gae_lambda: Share = 0.95
    whiten: bool = True


# ---------------------------------------------------------------- of texts in a group


def counted(reward_PK: Rewards) -> Bool[Array, "P K"]:
    """Of which texts something is known. A reward that is NaN is unknown."""
    return jnp.isfinite(jnp.asarray(reward_PK))


def alive(reward_PK: Rewards) -> Bool[Array, " P"]:
    """Whether a group has two different rewards: the others teach nothing (DAPO's dynamic sampling leaves them out)."""
    counts_PK = counted(reward_PK)
    least_P = jnp.min(jnp.where(counts_PK, reward_PK, jnp.inf), axis=-1)
    return jnp.max(jnp.where(counts_PK, reward_PK, -jnp.inf), axis=-1) > least_P


@functools.partial(jax.jit, static_argnames="kind")
def group_advantages(
    reward_PK: Rewards, kind: Literal["group", "group_mean", "leave_one_out"] = "group"
) -> Float[Array, "P K"]:
    """Of K texts for each prompt, see :class:`AdvantageConfig`. Unknown rewards have no part, and 0 themselves.

    ``group``: (r - mean) / (standard deviation of those that count + 1e-6). A group in which all rewards that count
    are equal has exactly 0.
    """
    counts_PK = counted(reward_PK)
    known_PK = jnp.where(counts_PK, jnp.asarray(reward_PK, jnp.float32), 0)
    num_P1 = jnp.maximum(jnp.sum(counts_PK, axis=-1, keepdims=True), 1)
    mean_P1 = jnp.sum(known_PK, axis=-1, keepdims=True) / num_P1
    # Equal numbers may differ from their mean by rounding, which dividing by its size would make a signal of.
    teaches_PK = counts_PK & alive(reward_PK)[:, None]
    off_PK = jnp.where(teaches_PK, known_PK - mean_P1, 0)
    if kind == "group":
        return off_PK / (jnp.sqrt(jnp.sum(off_PK**2, axis=-1, keepdims=True) / num_P1) + EPSILON)
    # r - mean of the others = n / (n - 1) (r - mean of all)
    return off_PK * num_P1 / jnp.maximum(num_P1 - 1, 1) if kind == "leave_one_out" else off_PK


# ---------------------------------------------------------------- of tokens


def token_rewards(
    reward_B: Float[Array | np.ndarray, " B"], mask_BT: Mask, penalty_BT: Numbers | None = None
) -> Float[Array, "B T"]:
    """The reward of each text at its last token, less what each token costs; 0 outside of ``mask_BT``.

    With ``penalty_BT`` = beta (log p - log p_ref) of the policy that wrote, it is the reward with a KL of Ziegler et
    al. 2019 (arXiv 1909.08593).
    """
    mask_BT = jnp.asarray(mask_BT) > 0
    is_last_BT = mask_BT & (jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1] == 1)
    of_texts_BT = jnp.where(is_last_BT, jnp.asarray(reward_B, jnp.float32)[:, None], 0)
    return of_texts_BT if penalty_BT is None else of_texts_BT - jnp.where(mask_BT, penalty_BT, 0)


@jax.jit
def gae(
    reward_BT: Numbers, value_BT: Numbers, mask_BT: Mask, *, discount: Number, gae_lambda: Number
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalized advantage estimates (Schulman et al. 2016, arXiv 1506.02438), and the returns a critic learns.

    A_t = d_t + gamma lambda A_t+1,   d_t = r_t + gamma V_t+1 - V_t,   R_t = A_t + V_t

    t + 1 is the next token of ``mask_BT``; behind the last one nothing is to come, also where a text was cut off.

    Args:
        reward_BT: for the token that is written at a position.
        value_BT: what a critic says before it is.
        mask_BT: the tokens of the text.
        discount, gae_lambda: see :class:`AdvantageConfig`.
    """
    mask_BT = jnp.asarray(mask_BT) > 0
    reward_BT, value_BT = (jnp.where(mask_BT, jnp.asarray(x, jnp.float32), 0) for x in (reward_BT, value_BT))

    def back(later: Any, at: Any) -> tuple[Any, Array]:
        reward_B, value_B, mask_B = at
        value_later_B, advantage_later_B = later
        advantage_B = reward_B + discount * value_later_B - value_B + discount * gae_lambda * advantage_later_B
        own = (jnp.where(mask_B, value_B, value_later_B), jnp.where(mask_B, advantage_B, advantage_later_B))
        return own, jnp.where(mask_B, advantage_B, 0)

    nothing_B = jnp.zeros(len(mask_BT), jnp.float32)
    steps = jax.tree.map(jnp.transpose, (reward_BT, value_BT, mask_BT))
    advantage_BT = jax.lax.scan(back, (nothing_B, nothing_B), steps, reverse=True)[1].T
    return advantage_BT, advantage_BT + value_BT


@jax.jit
def whitened(x_BT: Numbers, mask_BT: Mask) -> Float[Array, "B T"]:
    """With mean 0 and variance 1 over ``mask_BT``, 0 outside of it; exactly 0 where all are equal."""
    mask_BT, x_BT = jnp.asarray(mask_BT) > 0, jnp.asarray(x_BT, jnp.float32)
    num = jnp.maximum(jnp.sum(mask_BT), 1)
    differ = jnp.max(x_BT, where=mask_BT, initial=-jnp.inf) > jnp.min(x_BT, where=mask_BT, initial=jnp.inf)
    off_BT = jnp.where(mask_BT & differ, x_BT - jnp.sum(x_BT, where=mask_BT) / num, 0)
    return off_BT / (jnp.sqrt(jnp.sum(off_BT**2) / num) + EPSILON)


# ---------------------------------------------------------------- of an iteration


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Of B = P K texts, prompt after prompt.

    advantage_BT: of each token; 0 where a text does not count, and outside of the texts.
    return_BT: what a critic is to say; none: there is no critic.
    counts_B: whether the reward of the text is known.
    """

    advantage_BT: Float[Array, "B T"]
    return_BT: Float[Array, "B T"] | None
    counts_B: Bool[Array, " B"]


def advantages(
    cfg: AdvantageConfig,
    reward_PK: Rewards,
    mask_BT: Mask,
    *,
    penalty_BT: Numbers | None = None,
    value_BT: Numbers | None = None,
) -> Advantages:
    """The advantages of all texts of an iteration.

    Args:
        cfg: which.
        reward_PK: of K texts for each of P prompts; NaN: unknown.
        mask_BT: the tokens of the P K texts, prompt after prompt.
        penalty_BT: what is taken off a token's reward (:func:`token_rewards`); groups compare what is left of a text's.
        value_BT: what the critic says, for ``gae``.
    """
    counts_B = counted(reward_PK).reshape(-1)
    mask_BT = (jnp.asarray(mask_BT) > 0) & counts_B[:, None]
    reward_BT = token_rewards(jnp.asarray(reward_PK).reshape(-1), mask_BT, penalty_BT)
    if cfg.kind == "gae":
        if value_BT is None:
            raise ValueError("kind gae needs value_BT, what a critic says")
        found, returns = gae(reward_BT, value_BT, mask_BT, discount=cfg.discount, gae_lambda=cfg.gae_lambda)
        return Advantages(whitened(found, mask_BT) if cfg.whiten else found, returns, counts_B)
    if penalty_BT is not None:
        costs_B = jnp.sum(jnp.where(mask_BT, penalty_BT, 0), axis=1)
        reward_PK = jnp.asarray(reward_PK, jnp.float32) - costs_B.reshape(reward_PK.shape)
    advantage_B1 = group_advantages(reward_PK, cfg.kind).reshape(-1, 1)
    return Advantages(jnp.where(mask_BT, advantage_B1, 0), None, counts_B)


def overlong_penalty(
    length_N: Integer[Array | np.ndarray, " N"], max_tokens: int, buffer: int
) -> Float64[np.ndarray, " N"]:
    """What is added to the reward of a text for its length, from 0 to -1 (DAPO, arXiv 2503.14476, equation 13).

    0 up to ``max_tokens`` - ``buffer`` tokens, from there down to -1 at ``max_tokens`` in equal steps.
    """
    over_N = np.asarray(length_N) - (max_tokens - buffer)
    return np.where(over_N > 0, -np.minimum(over_N / max(buffer, 1), 1.0), 0.0)
