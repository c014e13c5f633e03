"""Gradient compensation: starved experts learn at the pace of busy ones, those that drop tokens as if they did not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dsjax.checkpoint import path_name
from dsjax.nn.router import RouterSums


def compensation(sums: RouterSums, *, alpha: float, limit: float) -> Float[Array, "*layers E"]:
    """The factor on each expert's gradient, ``clip((mean load / load_e)^alpha / (kept_e / load_e), 1/limit, limit)``.

    The gradient of an expert is a sum over the tokens that it computed. The first part brings that sum from ``load_e``
    towards what the mean load would give (``alpha`` = 1: all the way); the second puts the tokens that it dropped in by
    those that it kept. An expert that no token chose has no gradient, and the factor 1.

    Args:
        sums: of the whole batch.
        alpha: how much of the difference in load is made up for.
        limit: the factor is between ``1 / limit`` and ``limit``.
    """
    load_E, kept_E = sums.load_E.astype(jnp.float32), sums.kept_E.astype(jnp.float32)
    chosen_E = (load_E > 0) & (kept_E > 0)
    load_E, kept_E = jnp.where(chosen_E, load_E, 1.0), jnp.where(chosen_E, kept_E, 1.0)
    mean = jnp.mean(sums.load_E.astype(jnp.float32), axis=-1, keepdims=True)
    factor_E = jnp.clip((mean / load_E) ** alpha * (load_E / kept_E), 1 / limit, limit)
    return jnp.where(chosen_E, factor_E, 1.0)


def compensate_experts(alpha: float, limit: float, axes: Any) -> optax.GradientTransformationExtraArgs:
    """Multiplies the gradient of every expert by its :func:`compensation`.

    ``update`` needs ``router``, the sums by layer group. A weight belongs to the group that its path begins with, and
    is one of experts if one of its logical axes is ``expert``; others are left alone, and so are groups that
    the loss made no use of. There is no state.

    Args:
        alpha, limit: see :func:`compensation`.
        axes: logical axes of every weight.
    """
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    axes_of = {path_name(path): names for path, names in leaves}

    def update(updates: Any, state: Any, params: Any = None, *, router: dict[str, RouterSums], **more: Any) -> Any:
        del params, more
        factors = {name: compensation(sums, alpha=alpha, limit=limit) for name, sums in router.items()}

        def one(path: tuple, g: jax.Array) -> jax.Array:
            name = path_name(path)
            group = next((group for group in factors if name.startswith(f"{group}/")), None)
            if "expert" not in axes_of[name] or group is None:
                return g
            factor = factors[group]  # layers E, or E
            return g * factor.reshape(*factor.shape, *(1,) * (g.ndim - factor.ndim)).astype(g.dtype)

        return jax.tree_util.tree_map_with_path(one, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
