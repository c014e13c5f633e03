"""Layers, and how a stack of them is run: written out, or as a scan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.nn.attention import AttentionConfig
from dsjax.nn.cache import GroupCache, Made, slots_by_head, written
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.masks import AttentionMask, Documents
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.nn.norm import RMSNorm
from dsjax.sharding import shard


class Block(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward or experts."""

    def __init__(
        self,
        attention: AttentionConfig | LatentAttentionConfig,
        ffn: MLPConfig | MoEConfig,
        d_model: int,
        *,
        num_layers: int,
        norm_eps: float,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = RMSNorm(d_model, eps=norm_eps, rngs=rngs)
        # Each of the model's layers adds to the residual stream twice; so its variance does not grow with depth
        # (GPT-2).
        out_scale = (2 * num_layers) ** -0.5
        self.attention = attention.make(d_model, out_scale=out_scale, rngs=rngs)
        self.ffn_norm = RMSNorm(d_model, eps=norm_eps, rngs=rngs)
        self.ffn = ffn.make(d_model, out_scale=out_scale, rngs=rngs)
        self.is_moe = isinstance(ffn, MoEConfig)

    def __call__(
        self,
        x_BTD,
        *,
        documents,
        positions_BT,
        rope,
        depth,
        cache=None,
        lengths_B=None,
        experts_BTX=None,
        tell_experts=False,
    ):
        """One layer.

        Of the model's layers it is number ``depth``, or one that sees the same. With a cache, which has the pages of
        the whole stack of layers, the experts' weights are given for the whole stack, too. The last two are for its
        router (:class:`dsjax.nn.moe.MoE`).
        """
        number = None if cache is None else cache.number
        with jax.named_scope("attention"):
            y_BTD, cache = self.attention(
                self.attention_norm(x_BTD),
                documents=documents,
                positions_BT=positions_BT,
                rope=rope,
                cache=cache,
                lengths_B=lengths_B,
                layer=depth,
            )
            x_BTD = shard(x_BTD + y_BTD, "batch", "length", None)
        with jax.named_scope("ffn"):
            h_BTD, stats = self.ffn_norm(x_BTD), None
            if self.is_moe:
                counted_BT = (documents.ids_BT > 0).astype(jnp.float32)
                y_BTD, stats = self.ffn(
                    h_BTD, counted_BT, layer=number, experts_BTX=experts_BTX, tell_experts=tell_experts
                )
            else:
                y_BTD = self.ffn(h_BTD)
            x_BTD = shard(x_BTD + y_BTD, "batch", "length", None)
        return x_BTD, cache, stats


REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

Layer = Callable[[Any, Any], tuple[Any, Any]]  # (x, its part of a stack) -> (x, what it makes)


def unrolled(layers: Sequence[Layer], x: Any, stacked: Any, num_layers: int, wrap: Any) -> tuple[Any, Any]:
    """``layers`` in turn, ``num_layers`` in all, written out: each has its weights cut from the stack once."""
    outputs, functions = [], [jax.jit(wrap(layer)) for layer in layers]  # so that each is traced once
    for number, weights in enumerate(_unstack(stacked, num_layers)):
        x, y = functions[number % len(layers)](x, weights)
        outputs.append(y)
    return x, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)


def scanned(
    layers: Sequence[Layer], x: Any, stacked: Any, num_layers: int, wrap: Any, *, differentiable: bool
) -> tuple[Any, Any]:
    """The same as a scan over the turns of ``layers``; those of a turn that is not full are written out behind it."""
    if len(layers) == 1:
        return jax.lax.scan(wrap(layers[0]), x, stacked)
    turns = num_layers // len(layers)
    in_turns = turns * len(layers)

    def part(place: int, turn: Any) -> Any:
        if differentiable:
            return jax.tree.map(lambda x: x[place], turn)
        # By its number out of the whole: if there is a rest, what goes into a scan is a copy without it.
        number = turn * len(layers) + place
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stacked)

    def one_turn(x: Any, turn: Any) -> tuple[Any, Any]:
        outputs = []
        for place, layer in enumerate(layers):
            # Within what is computed again: so the stack itself is kept for it, and no part of it.
            x, y = wrap(lambda x, turn, place=place, layer=layer: layer(x, part(place, turn)))(x, turn)
            outputs.append(y)
        return x, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)

    xs = jnp.arange(turns)
    if differentiable:
        xs = jax.tree.map(lambda x: x[:in_turns].reshape(turns, len(layers), *x.shape[1:]), stacked)
    x, made = jax.lax.scan(one_turn, x, xs)
    made = jax.tree.map(lambda y: y.reshape(in_turns, *y.shape[2:]), made)
    if num_layers == in_turns:
        return x, made
    rest = jax.tree.map(lambda x: x[in_turns:], stacked)
    x, more = unrolled(layers, x, rest, num_layers - in_turns, wrap)
    return x, jax.tree.map(lambda *ys: jnp.concatenate(ys), made, more)


def kept(
    old: GroupCache,
    made: Made,
    masks: Sequence[AttentionMask],
    documents: Documents,
    lengths_B: Int[Array, B],
    x_BTD: Float[Array, "B T D"],
    *,
    in_order: bool,
) -> GroupCache:
    """The cache of a group of layers, which see ``masks`` in turn, with what they made of T new positions.

    ``in_order``: not before they have put out ``x_BTD``. If layers are written out, XLA:CPU must see that, or it copies
    the cache: so the slots depend on the output, by a number that is 0.
    """
    new_B, T = jnp.sum(documents.ids_BT > 0, axis=1), x_BTD.shape[1]
    slots_NBTn = jnp.stack([slots_by_head(mask, lengths_B, T, new_B) for mask in masks])
    if in_order:
        one = x_BTD.reshape(-1)[0]
        slots_NBTn += ((one != one) & (one > 0)).astype(jnp.int32)
    return written(old, made, slots_NBTn)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _unstack(stacked: Any, num_layers: int) -> tuple[Any, ...]:
    """The layers of a stack; its gradient is one stack instead of a sum of padded slices."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_layers))


def _stacked_gradient(*layers: Any) -> Any:
    """Of whole numbers (what routers decided) there is none, which JAX has a type of its own for."""
    if layers[0].dtype == jax.dtypes.float0:
        return np.zeros((len(layers), *layers[0].shape), jax.dtypes.float0)
    return jnp.stack(layers)


_unstack.defvjp(
    lambda stacked, num_layers: (_unstack(stacked, num_layers), None),
    lambda num_layers, _, layers: (jax.tree.map(_stacked_gradient, *layers),),
)
