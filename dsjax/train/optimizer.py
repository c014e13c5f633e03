"""Optimizers and schedules, composed from Optax.

The transformations here have learning rate 1; the step multiplies their result by :func:`learning_rate`, which is
a function of the step and of the planned number of steps, so that a run can be planned anew without compiling anew.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dsjax.checkpoint import path_name
from dsjax.config import Bounds, NonNegativeFloat, NonNegativeInt, OpenShare, PositiveFloat, Share
from dsjax.sharding import SIDES, sides
from dsjax.train.compensation import compensate_experts


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for the matrices and AdamW for the rest.

    Attributes:
        name: ``adamw`` or ``muon``.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon's matrices; the root mean square of an update is 0.2 of it, as AdamW's
            (Liu et al. 2025), so it is of the size of ``lr``.
        muon_momentum: decay of Muon's momentum.
        table_lr: peak learning rate of hashed n-gram tables (row-wise Adagrad).
        b1, b2, eps: AdamW's moments and the term in its denominator.
        weight_decay: decoupled, scaled by the learning rate; of matrices alone.
        clip_norm: global norm that gradients are clipped to; 0: not clipped.
        expert_compensation: how much each expert's gradient makes up for its load, (mean load / load)^this, and with it
            for tokens that it dropped; 0: not at all (docs/gradient_compensation.md).
        expert_compensation_limit: its factors are at most that, and at least one over it.
        schedule: ``wsd`` (warm up, stay, decay linearly over the last ``decay_share``), ``cosine`` or ``constant``.
        warmup_steps: steps of linear warm-up from 0.
        decay_share: part of the run that ``wsd`` decays over.
        final_lr_share: the last learning rate over the peak.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 3e-3
    muon_lr: PositiveFloat = 5e-3
    muon_momentum: OpenShare = 0.95
    table_lr: PositiveFloat = 0.1
    b1: OpenShare = 0.9
    b2: OpenShare = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: NonNegativeFloat = 1.0
    expert_compensation: Share = 0.0
    expert_compensation_limit: Annotated[float, Bounds(ge=1, lt=1e38)] = 4.0
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: NonNegativeInt = 100
    decay_share: Share = 0.2
    final_lr_share: Share = 0.0


def learning_rate(cfg: OptimConfig, step: Int[Array, ""] | int, total_steps: Int[Array, ""] | int) -> Float[Array, ""]:
    """Share of the peak learning rate at ``step`` (from 0) of ``total_steps``, in [0, 1]."""
    step, total = jnp.asarray(step, jnp.float32), jnp.asarray(total_steps, jnp.float32)
    warmup = jnp.minimum(1.0, (step + 1) / max(cfg.warmup_steps, 1))
    left = jnp.clip((total - step) / jnp.maximum(total - cfg.warmup_steps, 1.0), 0.0, 1.0)
    if cfg.schedule == "constant":
        shape = jnp.float32(1.0)
    elif cfg.schedule == "cosine":
        shape = 0.5 * (1 + jnp.cos(jnp.pi * (1 - left)))
    else:
        shape = jnp.clip((total - step) / jnp.maximum(total * cfg.decay_share, 1.0), 0.0, 1.0)
    return warmup * (cfg.final_lr_share + (1 - cfg.final_lr_share) * shape)


def kinds(axes: Any) -> Any:
    """What each weight is to the optimizer, from its logical axes: matrix, embedding, table or vector."""

    def kind(names: tuple[str, ...]) -> str:
        if "buckets" in names:
            return "table"
        if "vocab" in names:
            return "embedding"
        own = [n for n in names if n not in ("layers", "taps", "lengths")]
        return "matrix" if len(own) > 1 and set(SIDES) & set(own) else "vector"  # biases have several axes, too

    return jax.tree.map(kind, axes, is_leaf=lambda x: isinstance(x, tuple))


def matrix_dims(names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers:
    """Which dimensions of a weight are the matrix's inputs and outputs; the others stack matrices."""
    inputs, outputs = sides(names)
    return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)


def muon(momentum: float, axes: Any) -> optax.GradientTransformation:
    """Orthogonalised momentum, scaled so that the root mean square of an update is 0.2 (Liu et al. 2025)."""
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    axes_of = {path_name(path): names for path, names in leaves}

    def dims(updates: Any) -> Any:  # of those weights that this transformation is given
        return jax.tree_util.tree_map_with_path(lambda path, _: matrix_dims(axes_of[path_name(path)]), updates)

    def rescale(updates: Any, params: Any = None) -> Any:
        del params

        def one(path: tuple, u: jax.Array) -> jax.Array:
            d = matrix_dims(axes_of[path_name(path)])
            sides = [math.prod(u.shape[i] for i in side) for side in (d.reduction_axis, d.output_axis)]
            return u * (0.2 * max(sides) ** 0.5)

        return jax.tree_util.tree_map_with_path(one, updates)

    orthogonal = optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dims)
    return optax.chain(orthogonal, optax.stateless(rescale))


def scale_by_row_adagrad(eps: float = 1e-20) -> optax.GradientTransformation:
    """Adagrad (Duchi et al. 2011) with one accumulator for each row of a look-up table, (..., rows, width).

    A row that no token of the batch looks up has no gradient and stays as it is: no moment moves it. State is one
    number a row, where Adam has two for each weight.
    """

    def init(params: Any) -> Any:
        return jax.tree.map(lambda p: jnp.zeros(p.shape[:-1], jnp.float32), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        state = jax.tree.map(lambda s, g: s + jnp.mean(g * g, axis=-1), state, updates)
        return jax.tree.map(lambda g, s: g * jax.lax.rsqrt(s + eps)[..., None], updates, state), state

    return optax.GradientTransformation(init, update)


def make_optimizer(cfg: OptimConfig, axes: Any) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation, at learning rate 1 (see :func:`learning_rate`).

    Its ``update`` takes ``router``, the sums of the routers by layer group, if experts are compensated.

    Args:
        cfg: what to build.
        axes: logical axes of every weight (:func:`dsjax.sharding.logical_axes`).
    """
    kind = kinds(axes)
    adam = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    matrix, matrix_lr = adam, cfg.lr
    if cfg.name == "muon":
        matrix, matrix_lr = muon(cfg.muon_momentum, axes), cfg.muon_lr
    groups = {
        "matrix": optax.chain(matrix, optax.add_decayed_weights(cfg.weight_decay), optax.scale(-matrix_lr)),
        "embedding": optax.chain(adam, optax.scale(-cfg.lr)),
        "vector": optax.chain(adam, optax.scale(-cfg.lr)),
        "table": optax.chain(scale_by_row_adagrad(), optax.scale(-cfg.table_lr)),
    }
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    steps = [clip, optax.partition(groups, kind)]
    if cfg.expert_compensation:
        # In front: so the norm that is clipped is that of the gradient which is used.
        steps.insert(0, compensate_experts(cfg.expert_compensation, cfg.expert_compensation_limit, axes))
    return optax.with_extra_args_support(optax.chain(*steps))
