"""Prefill a batch of prompts, then decode it token by token."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from dsjax.config import UserError
from dsjax.data.structure.scanner import Scanner
from dsjax.data.tokenizer import Tokenizer
from dsjax.infer.sampling import SamplingConfig, sample
from dsjax.models.decoder import without_values
from dsjax.nn.cache import PAGE_SIZE, Cache, cache_shardings
from dsjax.nn.fields import NUM_FIELDS
from dsjax.nn.masks import Documents
from dsjax.nn.structure import Scopes
from dsjax.sharding import (
    INFERENCE,
    MeshConfig,
    Rules,
    host_array_to_global,
    inference_layout,
    joined,
    logical_axes,
    make_mesh,
    replicated,
    shardings,
    split_variables,
    use_mesh,
)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A model on devices: abstract variables with shardings, each in the dtype that it is used in; mesh and rules.

    What makes values is not placed: ``graph``, ``model`` and ``shapes`` are without it.
    """

    graph: Any
    model: Any
    shapes: Any
    mesh: Mesh
    rules: Rules
    dtype: Any

    def place(self, params: Any) -> Any:
        """``params``, buffers included, on their devices, cast once to the dtype that each is used in.

        What is there already, in that dtype, is not copied. Those of values are left out.
        """

        def put(x: Any, like: Any) -> jax.Array:
            return jax.device_put(x if x.dtype == like.dtype else x.astype(like.dtype), like.sharding)

        return jax.tree.map(put, {name: params[name] for name in self.shapes}, self.shapes)


@dataclasses.dataclass(frozen=True)
class Generator:
    """The pure functions of inference on one mesh, for one batch size, and where weights and cache live.

    Attributes:
        prefill: (params, tokens_BT, ids_BT, features_BTC=None) -> (logits_BV behind each row's last real token, cache
            that holds the prompts). Rows end in padding (id 0).
        decode_step: (params, token_B, cache, features_BC=None) -> (logits_BV, cache); the given cache is donated.
            Features are those of the tokens, of a model with ``structure``.
        decode: (params, logits_BV, cache, key, sampling=, steps=) -> (tokens_BS, logits_BV behind the last, cache):
            ``steps`` times a token sampled, and ``decode_step``; the given cache is donated. Not of a model with
            ``structure``.
        placed: where the model lies.
        cache_shapes: the abstract cache with shardings.
    """

    prefill: Any  # jitted functions: also lowered and compiled ahead of time
    decode_step: Any
    decode: Any
    placed: Placed
    cache_shapes: Cache

    @property
    def shapes(self) -> Any:
        """Abstract parameters and buffers with shardings."""
        return self.placed.shapes

    @property
    def mesh(self) -> Mesh:
        """The devices, as :func:`dsjax.sharding.inference_layout` shares them out."""
        return self.placed.mesh

    @property
    def rules(self) -> Rules:
        """Logical axis -> mesh axes."""
        return self.placed.rules

    def place(self, params: Any) -> Any:
        """See :meth:`Placed.place`."""
        return self.placed.place(params)

    def place_rows(self, x: np.ndarray) -> jax.Array:
        """An array whose first dimension is the batch, on the devices."""
        return host_array_to_global(x, self.mesh, self.rules.spec("batch"))

    def prefill_shapes(self, length: int) -> tuple[Any, ...]:
        """The abstract arguments of ``prefill`` for rows of ``length`` positions."""
        lengths_B = self.cache_shapes.lengths_B
        rows = jax.ShapeDtypeStruct((*lengths_B.shape, length), jnp.int32, sharding=lengths_B.sharding)
        return self.shapes, rows, rows, *self._features((*rows.shape, NUM_FIELDS))

    def decode_shapes(self) -> tuple[Any, ...]:
        """The abstract arguments of ``decode_step``."""
        lengths_B = self.cache_shapes.lengths_B
        return self.shapes, lengths_B, self.cache_shapes, *self._features((*lengths_B.shape, NUM_FIELDS))

    def _features(self, shape: tuple[int, ...]) -> list[Any]:
        """Those of some tokens, of a model that is told them."""
        if self.placed.model.cfg.structure is None:
            return []
        return [jax.ShapeDtypeStruct(shape, jnp.int16, sharding=self.cache_shapes.lengths_B.sharding)]


def make_generator(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    mesh: Mesh,
    *,
    batch_size: int,
    slots: int,
    dtype: Any = None,
    rules: Rules = INFERENCE,
) -> Generator:
    """Builds the jitted functions of inference; nothing is computed yet.

    Args:
        make_model: builds the model from random keys.
        mesh: devices.
        batch_size: sequences at a time.
        slots: positions that a sequence may reach, at least: rounded up to whole pages on each device.
        dtype: of the weights of matmuls and of the cache; None: that of the model's activations.
        rules: logical axis -> mesh axes.

    Raises:
        UserError: batch, heads or weights do not divide over the mesh.
    """
    graph, params, buffers = split_variables(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))
    return _generator(graph, joined(params, buffers), mesh, batch_size, slots, dtype, rules)


def placed(
    graph: Any, variables: Any, mesh: Mesh, batch_size: int, dtype: Any = None, rules: Rules = INFERENCE
) -> Placed:
    """Where a model lies that works on ``batch_size`` rows at a time, and in what dtype (None: of its activations).

    Raises:
        UserError: batch, heads or weights do not divide over the mesh.
    """
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    graph, abstract = without_values(graph, abstract)
    model = nnx.merge(graph, abstract)
    dtype = jnp.dtype(dtype or model.compute.dtype)
    heads = [g.attention.inference_heads for g in model.cfg.groups]
    mesh, rules = inference_layout(mesh, heads, batch_size, rules)
    axes = logical_axes(model)
    shapes = jax.tree.map(
        lambda s, place, names: jax.ShapeDtypeStruct(s.shape, used_dtype(names, dtype), sharding=place),
        abstract,
        shardings(abstract, axes, mesh, rules),
        axes,
    )
    return Placed(graph, model, shapes, mesh, rules, dtype)


def _generator(graph, variables, mesh, batch_size, slots, dtype=None, rules=INFERENCE) -> Generator:
    there = placed(graph, variables, mesh, batch_size, dtype, rules)
    model, mesh, rules, dtype = there.model, there.mesh, there.rules, there.dtype
    layout, num_groups = page_layout(mesh, rules, slots), len(model.cfg.groups)
    cache = jax.eval_shape(lambda: model.empty_cache(batch_size, slots, dtype, **layout))
    cache_shapes = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        cache,
        cache_shardings(num_groups, mesh, rules, cache.scopes),
    )
    programs = _programs(there.graph, mesh, rules, slots, dtype, num_groups, model.cfg.scoped)
    return Generator(*programs, placed=there, cache_shapes=cache_shapes)


def page_layout(mesh: Mesh, rules: Rules, slots: int) -> dict[str, Any]:
    """How a cache for rows of ``slots`` positions is laid out on a mesh; few positions, small pages."""
    parts = tuple(math.prod(mesh.shape[axis] for axis in axes) for axes in (rules.batch, rules.slots))
    # A row wastes less than a page: at most a sixteenth of what it has, but that tiles of a TPU in bfloat16 hold 16.
    part = 1 << (slots // (16 * parts[1])).bit_length() >> 1
    return {"page_size": min(PAGE_SIZE, max(part, 16)), "parts": parts, "lanes": lanes_of(mesh)}


def lanes_of(mesh: Mesh) -> int:
    """What the width of a head is filled up to a multiple of, in a cache."""
    return 128 if mesh.devices.flat[0].platform == "tpu" else 1


def used_dtype(axes: tuple[str, ...], dtype: Any) -> Any:
    """The dtype to keep an array of these logical axes in: float32 for norms, routers and biases, else ``dtype``.

    That is the dtype to which the model casts it at its use. (Only where embeddings of several kinds are added up in
    float32 does it round once more than there.)
    """
    return jnp.dtype(jnp.float32) if {"norm", "router", "lengths"} & set(axes) else jnp.dtype(dtype)


@functools.lru_cache(maxsize=64)  # a jitted function holds its programs: who asks again compiles nothing
def _programs(
    graph: Any, mesh: Mesh, rules: Rules, slots: int, dtype: Any, num_groups: int, scoped: bool
) -> tuple[Any, Any, Any]:
    """Prefill, decode step and decode, jitted."""

    def prefill(
        params: Any, tokens_BT: Int[Array, "B T"], ids_BT: Int[Array, "B T"], features_BTC: Any = None
    ) -> tuple[Any, Cache]:
        B, T = tokens_BT.shape
        over = math.prod(mesh.shape[axis] for axis in rules.length)
        with use_mesh(mesh, rules if T % over == 0 else dataclasses.replace(rules, length=())):
            model = nnx.merge(graph, params)
            documents = Documents(ids_BT, jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)))
            empty = model.empty_cache(B, slots, dtype, **page_layout(mesh, rules, slots))
            out = model(tokens_BT, documents, features_BTC=features_BTC, cache=empty, cache_is_empty=True)
            last_B = out.cache.lengths_B - 1
            last = jax.tree.map(lambda x: x[jnp.arange(len(x)), last_B][:, None], (out.hidden_BTD, out.copy))
        with use_mesh(mesh, dataclasses.replace(rules, length=())):
            logits_B1V = model.logits(dataclasses.replace(out, hidden_BTD=last[0], copy=last[1]))
        return logits_B1V[:, 0], out.cache

    def decode_step(params: Any, token_B: Int[Array, " B"], cache: Cache, features_BC: Any = None) -> tuple[Any, Cache]:
        with use_mesh(mesh, dataclasses.replace(rules, length=())):  # one position can not be cut
            model = nnx.merge(graph, params)
            features_B1C = None if features_BC is None else features_BC[:, None]
            out = model(token_B[:, None], features_BTC=features_B1C, cache=cache)
            return model.logits(out)[:, 0], out.cache

    def decode(
        params: Any, logits_BV: Float[Array, "B V"], cache: Cache, key: jax.Array, sampling: SamplingConfig, steps: int
    ) -> tuple[Any, Any, Cache]:
        def one(carry: tuple[Any, Cache], key: jax.Array) -> tuple[tuple[Any, Cache], Any]:
            logits_BV, cache = carry
            token_B = sample(logits_BV, key, sampling)
            return decode_step(params, token_B, cache), token_B

        (logits_BV, cache), tokens_SB = jax.lax.scan(one, (logits_BV, cache), jax.random.split(key, steps))
        return tokens_SB.T, logits_BV, cache

    logits = NamedSharding(mesh, rules.spec("batch", "vocab"))
    cache = cache_shardings(num_groups, mesh, rules, Scopes(0, 0) if scoped else None)
    return (
        jax.jit(prefill, out_shardings=(logits, cache)),
        jax.jit(decode_step, donate_argnames="cache", out_shardings=(logits, cache)),
        jax.jit(
            decode,
            donate_argnames="cache",
            static_argnames=("sampling", "steps"),
            out_shardings=(replicated(mesh), logits, cache),  # every process reads the tokens
        ),
    )


_sample = jax.jit(sample, static_argnums=2)


def generate(
    graph: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end_id: int,
    max_length: int,
    end_ids: Collection[int] | None = None,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    steps: int = 16,
    first_tokens: Sequence[np.ndarray] | None = None,
    mesh: Mesh | None = None,
    scanners: Sequence[Scanner] = (),
) -> Iterator[np.ndarray]:
    """Continues each prompt, yielding (B, n) new tokens at a time until all rows have ended.

    Behind the token that ends a row stands only ``end_id``.

    Args:
        graph, params: the model; ``params`` may be numpy arrays.
        prompts: token ids, at least one each.
        max_tokens: new tokens at the most.
        end_id: ends a row, and fills it up behind its end.
        end_ids: what ends a row, if not ``end_id`` alone; empty: nothing does.
        max_length: positions that the model can hold, prompt included.
        sampling: how to choose.
        seed: of the choices.
        steps: tokens decoded between two yields.
        first_tokens: for each prompt a mask of the tokens that may come first (:func:`heal`), cut or filled up to V.
        mesh: devices; None: the first one of this process.
        scanners: of a model with ``structure``, one for each prompt, where that begins. It is told the features of each
            token as it comes, so that all yields are of one token.

    Raises:
        UserError: a prompt is empty or leaves no room; the number of prompts does not divide over the mesh.
    """
    longest = max(len(p) for p in prompts)
    if min(len(p) for p in prompts) == 0:
        raise UserError("a prompt is empty; give at least one token")
    if longest >= max_length:
        raise UserError(f"a prompt has {longest} tokens; the model holds {max_length} with what it generates")
    max_tokens = min(max_tokens, max_length - longest)
    width = min(-(-longest // 32) * 32, max_length)  # few distinct shapes, few compilations
    slots = -(-(width + max_tokens + steps) // 64) * 64
    scanners = [scanner.copy() for scanner in scanners]
    rows = _rows(prompts, width, end_id, scanners)
    mesh = mesh or make_mesh(MeshConfig(), jax.local_devices()[:1])
    generator = _generator(graph, params, mesh, len(prompts), slots)
    params = generator.place(params)
    logits_BV, cache = generator.prefill(params, *map(generator.place_rows, rows))
    if first_tokens is not None:
        V = logits_BV.shape[1]
        allowed_BV = np.stack(first_tokens)[:, :V]
        allowed_BV = np.pad(allowed_BV, ((0, 0), (0, V - allowed_BV.shape[1])))
        logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
    key, ended_B, left = jax.random.key(seed), np.zeros(len(prompts), bool), max_tokens
    ending = [end_id] if end_ids is None else list(end_ids)
    while left > 0 and not ended_B.all():
        key, now = jax.random.split(key)
        if scanners:
            token_B = np.array(_sample(logits_BV, now, sampling))
            features_BC = np.stack([own.feed(int(token)) for own, token in zip(scanners, token_B, strict=True)])
            placed_B, placed_BC = map(generator.place_rows, (token_B, features_BC))
            logits_BV, cache = generator.decode_step(params, placed_B, cache, placed_BC)
            new_BS = token_B[:, None].copy()  # what is placed may be this very array
        else:
            new_BS, logits_BV, cache = generator.decode(params, logits_BV, cache, now, sampling=sampling, steps=steps)
            new_BS = np.asarray(new_BS)[:, :left].copy()
        for row, tokens in enumerate(new_BS):
            ends = np.flatnonzero(np.isin(tokens, ending))
            if ended_B[row]:
                tokens[:] = end_id
            elif ends.size:
                tokens[ends[0] + 1 :] = end_id
                ended_B[row] = True
        left -= new_BS.shape[1]
        yield new_BS


def _rows(prompts: Sequence[Sequence[int]], width: int, end_id: int, scanners: Sequence[Scanner]) -> list[np.ndarray]:
    """Tokens and document ids of prompts, and their features if there are scanners, which go on behind them."""
    tokens_BT, ids_BT = (np.full((len(prompts), width), fill, np.int32) for fill in (end_id, 0))
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)], ids_BT[row, : len(prompt)] = prompt, 1
    if not scanners:
        return [tokens_BT, ids_BT]
    features_BTC = np.zeros((len(prompts), width, NUM_FIELDS), np.int16)
    for row, (own, prompt) in enumerate(zip(scanners, prompts, strict=True)):
        features_BTC[row, : len(prompt)] = own.scan(prompt)
    return [tokens_BT, ids_BT, features_BTC]


def heal(tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """A prompt without its last token, and a mask of the tokens that may stand in its place: those that extend it.

    A text may end where the tokenizer would not have cut it: "):" and a newline are one token together with the
    indentation that follows. So the last token is chosen again, with what comes behind it. A prompt of one token stays.
    """
    if len(prompt) < 2:
        return list(prompt), np.ones(tokenizer.vocab_size, bool)
    return list(prompt[:-1]), tokenizer.extensions(prompt[-1])


def complete(
    graph: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int,
    end_ids: Collection[int] | None = None,
    **options: Any,
) -> list[list[int]]:
    """The whole continuation of each prompt, without its end token (see :func:`generate`)."""
    parts = list(generate(graph, params, prompts, end_id=end_id, end_ids=end_ids, **options))
    rows = np.concatenate(parts, axis=1) if parts else np.zeros((len(prompts), 0), np.int32)
    ending = {end_id} if end_ids is None else set(end_ids)
    return [list(itertools.takewhile(lambda token: token not in ending, row)) for row in rows.tolist()]
