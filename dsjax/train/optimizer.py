"""Optimizers and schedules, composed from Optax.

The transformations here have learning rate 1; the step multiplies their result by :func:`learning_rate`, which is
a function of the step and of the planned number of steps, so that a run can be planned anew without compiling anew.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeFloat, NonNegativeInt, OpenShare, PositiveFloat, Share


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for the matrices with AdamW for the rest.

    Attributes:
        name: ``adamw`` or ``muon``.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon's matrices.
        muon_momentum: decay of Muon's momentum.
        embedding_lr_scale: factor on ``lr`` for look-up tables (token and n-gram embeddings).
        b1, b2, eps: AdamW's moments and the term in its denominator.
        weight_decay: decoupled, scaled by the learning rate; norms and look-up tables are not decayed.
        clip_norm: global norm that gradients are clipped to; 0: not clipped.
        schedule: ``wsd`` (warm up, stay, decay linearly over the last ``decay_share``), ``cosine`` or ``constant``.
        warmup_steps: steps of linear warm-up from 0.
        decay_share: part of the run that ``wsd`` decays over.
        final_lr_share: the last learning rate over the peak.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 3e-3
    muon_lr: PositiveFloat = 0.02
    muon_momentum: OpenShare = 0.95
    embedding_lr_scale: PositiveFloat = 1.0
    b1: OpenShare = 0.9
    b2: OpenShare = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: NonNegativeFloat = 1.0
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: NonNegativeInt = 100
    decay_share: Share = 0.2
    final_lr_share: Share = 0.0


def learning_rate(
    cfg: OptimConfig, step: Int[Array, ""] | int, total_steps: Int[Array, ""] | int
) -> Float[Array, ""]:
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
    """What each weight is to the optimizer, from its logical axes: ``norm``, ``table`` or ``matrix``."""

    def kind(names: tuple[str, ...]) -> str:
        inner = [n for n in names if n != "layers"]
        if len(inner) == 1:
            return "norm"
        return "table" if inner[0] in ("vocab", "buckets") else "matrix"

    return jax.tree.map(kind, axes, is_leaf=lambda x: isinstance(x, tuple))


# First dimension after those that only stack matrices, and how many dimensions each side of the matrix has.
_STACKED = ("layers", "expert")


def _matrix_dims(names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Which dimensions of a weight are its inputs and its outputs; the others stack matrices."""
    inner = [i for i, n in enumerate(names) if n not in _STACKED]
    embed = names.index("embed")
    others = tuple(i for i in inner if i != embed)
    reads_embed = embed == inner[0]  # else it writes to the residual stream
    inputs, outputs = ((embed,), others) if reads_embed else (others, (embed,))
    return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)


def make_optimizer(cfg: OptimConfig, axes: Any) -> optax.GradientTransformation:
    """The gradient transformation, at learning rate 1 (see :func:`learning_rate`).

    Args:
        cfg: what to build.
        axes: logical axes of every weight (:func:`dsjax.sharding.logical_axes`).
    """
    kind = kinds(axes)

    def adamw(scale: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
            optax.add_decayed_weights(cfg.weight_decay),
            optax.scale(-cfg.lr * scale),
        )

    def undecayed(scale: float) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps), optax.scale(-cfg.lr * scale))

    groups = {"matrix": adamw(1.0), "norm": undecayed(1.0), "table": undecayed(cfg.embedding_lr_scale)}
    if cfg.name == "muon":
        dims = jax.tree.map(
            lambda names, k: _matrix_dims(names) if k == "matrix" else None,
            axes, kind, is_leaf=lambda x: isinstance(x, tuple),
        )
        groups["matrix"] = optax.chain(
            optax.contrib.scale_by_muon(beta=cfg.muon_momentum, weight_dimension_numbers=dims),
            optax.add_decayed_weights(cfg.weight_decay),
            optax.scale(-cfg.muon_lr),
        )
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    return optax.chain(clip, optax.partition(groups, kind))
