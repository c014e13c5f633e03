"""Prefill a batch of prompts, then decode it token by token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer
from dsjax.infer.sampling import SamplingConfig, sample
from dsjax.nn.cache import Cache
from dsjax.nn.masks import Documents


@functools.partial(jax.jit, static_argnames=("graph", "slots"))
def prefill(
    graph: Any, params: Any, tokens_BT: Int[Array, "B T"], ids_BT: Int[Array, "B T"], slots: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits behind the last real token of each row, and a cache of ``slots`` positions that holds the prompts.

    Rows end in padding (id 0).
    """
    model = nnx.merge(graph, params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    out = model(tokens_BT, Documents(ids_BT, positions_BT), cache=model.empty_cache(tokens_BT.shape[0], slots))
    last_B = out.cache.lengths_B - 1
    last = jax.tree.map(lambda x: x[jnp.arange(len(x)), last_B][:, None], (out.hidden_BTD, out.copy))
    logits_B1V = model.logits(dataclasses.replace(out, hidden_BTD=last[0], copy=last[1]))
    return logits_B1V[:, 0], out.cache


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "steps"), donate_argnames=("cache",))
def decode(
    graph: Any,
    params: Any,
    logits_BV: Float[Array, "B V"],
    cache: Cache,
    key: jax.Array,
    *,
    sampling: SamplingConfig,
    steps: int,
) -> tuple[Int[Array, "B steps"], Float[Array, "B V"], Cache]:
    """Samples ``steps`` tokens for each row; returns them, the logits behind the last, and the cache."""
    model = nnx.merge(graph, params)

    def one(carry: tuple[Any, Cache], key: jax.Array) -> tuple[tuple[Any, Cache], Any]:
        logits_BV, cache = carry
        token_B = sample(logits_BV, key, sampling)
        out = model(token_B[:, None], cache=cache)
        return (model.logits(out)[:, 0], out.cache), token_B

    (logits_BV, cache), tokens_SB = jax.lax.scan(one, (logits_BV, cache), jax.random.split(key, steps))
    return tokens_SB.T, logits_BV, cache


def generate(
    graph: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end_id: int,
    max_length: int,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    steps: int = 16,
    first_tokens: Sequence[np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Continues each prompt, yielding (B, n) new tokens at a time until all rows have ended.

    Behind a row's end token stand only end tokens.

    Args:
        graph, params: the model.
        prompts: token ids, at least one each.
        max_tokens: new tokens at the most.
        end_id: ends a row.
        max_length: positions that the model can hold, prompt included.
        sampling: how to choose.
        seed: of the choices.
        steps: tokens decoded between two yields.
        first_tokens: for each prompt a mask of the V tokens that may come first (see :func:`heal`).

    Raises:
        UserError: a prompt is empty or leaves no room.
    """
    longest = max(len(p) for p in prompts)
    if min(len(p) for p in prompts) == 0:
        raise UserError("a prompt is empty; give at least one token")
    if longest >= max_length:
        raise UserError(f"a prompt has {longest} tokens; the model holds {max_length} with what it generates")
    max_tokens = min(max_tokens, max_length - longest)
    width = min(-(-longest // 32) * 32, max_length)  # few distinct shapes, few compilations
    slots = -(-(width + max_tokens + steps) // 64) * 64
    tokens_BT = np.full((len(prompts), width), end_id, np.int32)
    ids_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)], ids_BT[row, : len(prompt)] = prompt, 1
    logits_BV, cache = prefill(graph, params, jnp.asarray(tokens_BT), jnp.asarray(ids_BT), slots)
    if first_tokens is not None:
        allowed_BV = np.stack(first_tokens)
        allowed_BV = np.pad(allowed_BV, ((0, 0), (0, logits_BV.shape[1] - allowed_BV.shape[1])))
        logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
    key, ended_B, left = jax.random.key(seed), np.zeros(len(prompts), bool), max_tokens
    while left > 0 and not ended_B.all():
        key, now = jax.random.split(key)
        new_BS, logits_BV, cache = decode(graph, params, logits_BV, cache, now, sampling=sampling, steps=steps)
        new_BS = np.asarray(new_BS)[:, :left].copy()
        for row, tokens in enumerate(new_BS):
            ends = np.flatnonzero(tokens == end_id)
            if ended_B[row]:
                tokens[:] = end_id
            elif ends.size:
                tokens[ends[0] :] = end_id
                ended_B[row] = True
        left -= new_BS.shape[1]
        yield new_BS


def heal(tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """A prompt without its last token, and a mask of the tokens that may stand in its place: those that extend it.

    A text may end where the tokenizer would not have cut it: "):" and a newline are one token together with the
    indentation that follows. So the last token is chosen again, with what comes behind it. A prompt of one token stays.
    """
    if len(prompt) < 2:
        return list(prompt), np.ones(tokenizer.vocab_size, bool)
    return list(prompt[:-1]), tokenizer.extensions(prompt[-1])


def complete(
    graph: Any, params: Any, prompts: Sequence[Sequence[int]], *, end_id: int, **options: Any
) -> list[list[int]]:
    """The whole continuation of each prompt, without its end token (see :func:`generate`)."""
    parts = list(generate(graph, params, prompts, end_id=end_id, **options))
    rows = np.concatenate(parts, axis=1) if parts else np.zeros((len(prompts), 0), np.int32)
    return [row[: np.flatnonzero(row == end_id)[0]].tolist() if (row == end_id).any() else row.tolist() for row in rows]
