"""Low-rank fine-tuning (LoRA, arXiv 2106.09685): frozen weights W, trained pairs (a, b) of thin matrices beside them.

W' = W + alpha / rank * a b,   a (*inputs, rank), random;   b (rank, *outputs), 0 at first

Stacked weights, of layers or of experts, have a stack of pairs. A frozen weight is stored in the type that it is used
in, or in few bits (QLoRA, arXiv 2305.14314); then it is written out only while a layer computes with it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from dsjax.config import PositiveFloat, PositiveInt, UserError
from dsjax.nn.quantize import Kind, Quantized, dequantize, quantize
from dsjax.sharding import sides

Target = Literal["attention", "mlp", "experts"]
Path = tuple[str, ...]
EMBEDDINGS: tuple[Path, ...] = (("embedding",), ("w_logits",))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights get pairs, and how the others are kept.

    Attributes:
        targets: ``attention``, ``mlp`` (shared experts, too) and ``experts``: their matrices get pairs, which are all
            that is trained. Empty: every weight is trained, and nothing here counts.
        rank: inner width of a pair.
        alpha: a pair's product counts ``alpha / rank``.
        base: how the matrices of attention, feed-forward layers and experts are stored; none: in ``compute.dtype``.
    """

    targets: tuple[Target, ...] = ()
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    base: Kind | None = None

    def validate(self) -> None:
        if self.base is not None and not self.targets:
            raise UserError(
                f"base is {self.base}, but targets is empty: every weight is trained, and none is in few bits;"
                " set targets=attention,mlp,experts or some of them"
            )


# ---------------------------------------------------------------- one weight


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stored", "pair"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class FrozenWeight:
    """A weight that is not trained itself; it stands in a model where the array would.

    Attributes:
        stored: an array, or one in few bits.
        pair: (a, b) beside it, or none.
        scale: of their product.
    """

    stored: Any
    pair: Any
    scale: float

    def __getitem__(self, key: Any) -> FrozenWeight:
        """Itself: a variable's value is read by ``[...]``."""
        assert key is ..., key
        return self

    def astype(self, dtype: Any) -> Array:
        """As one array, the pair's product added: for who needs it whole."""
        return merged(self, dtype)


def written_out(stored: Any) -> Float[Array, ...]:
    """The numbers of an array that may be in few bits."""
    return dequantize(stored) if isinstance(stored, Quantized) else stored


def merged(w: FrozenWeight, dtype: Any = jnp.float32) -> Float[Array, ...]:
    """The frozen weight plus the product of its pair, summed in float32."""
    x = written_out(w.stored)
    if w.pair is None:
        return x.astype(dtype)
    a, b = w.pair
    stack = tuple(range(a.ndim + b.ndim - 2 - x.ndim))
    inner = ((a.ndim - 1,), (len(stack),))
    product = jax.lax.dot_general(a, b, (inner, (stack, stack)), precision="highest")
    return (x.astype(jnp.float32) + w.scale * product).astype(dtype)


# ---------------------------------------------------------------- the weights of a model


def target_of(path: Path, axes: tuple[str, ...]) -> Target | None:
    """What a weight is to ``targets``; none: no pair ever stands beside it. Routers are among those."""
    *_, module, name = ("", *path)
    if not name.startswith("w_") or name == "w_router":
        return None
    if module == "attention":
        return "attention"
    return ("experts" if "expert" in axes else "mlp") if module in ("ffn", "shared") else None


def pair_axes(cfg: LoraConfig, axes: Mapping[str, Any]) -> dict[str, Any]:
    """Logical axes of every pair, nested as the weights, ``a`` and ``b`` at the place of each.

    ``axes``: those of the weights.

    Raises:
        UserError: the model has no weight of a kind that is asked for.
    """
    flat = traverse_util.flatten_dict(dict(axes))
    kinds = {path: target_of(path, names) for path, names in flat.items()}
    for target in cfg.targets:
        if target not in kinds.values():
            there = ", ".join(sorted({kind for kind in kinds.values() if kind}))
            raise UserError(f"lora.targets has {target}, of which the model has no weights; it has {there}")
    pairs: dict[Path, tuple[str, ...]] = {}
    for path, names in flat.items():
        if kinds[path] in cfg.targets:
            inputs, outputs = sides(names)
            pairs[*path, "a"] = (*names[: inputs[0]], *(names[i] for i in inputs), "low_rank")
            pairs[*path, "b"] = (*names[: inputs[0]], "low_rank", *(names[i] for i in outputs))
    return traverse_util.unflatten_dict(pairs)


def new_pairs(cfg: LoraConfig, key: jax.Array, shapes: Any, axes: Any) -> dict[str, Any]:
    """Pairs whose products are 0: ``a`` is normal with variance 1 / inputs, ``b`` is 0.

    Args:
        cfg: what is asked for.
        key: of the random numbers.
        shapes: the weights, or anything nested like them with shapes.
        axes: logical axes of the weights.
    """
    shapes, axes = (traverse_util.flatten_dict(dict(tree)) for tree in (shapes, axes))
    pairs: dict[Path, jax.Array] = {}
    for number, (path, names) in enumerate(axes.items()):
        if target_of(path, names) in cfg.targets:
            shape, (inputs, outputs) = shapes[path].shape, sides(names)
            stack, ins, outs = shape[: inputs[0]], [shape[i] for i in inputs], [shape[i] for i in outputs]
            noise = jax.random.normal(jax.random.fold_in(key, number), (*stack, *ins, cfg.rank), jnp.float32)
            pairs[*path, "a"] = noise * np.prod(ins) ** -0.5
            pairs[*path, "b"] = jnp.zeros((*stack, cfg.rank, *outs), jnp.float32)
    return traverse_util.unflatten_dict(pairs)


def frozen(cfg: LoraConfig, path: Path, axes: tuple[str, ...], x: Array, dtype: Any) -> FrozenWeight | Array:
    """One weight as it is kept: matrices as ``cfg`` says, embeddings in ``dtype``, routers and vectors in float32.

    ``dtype`` is that of the computation, in which matrices and embeddings are used anyway.
    """
    if target_of(path, axes) is not None:
        return FrozenWeight(quantize(x, cfg.base) if cfg.base else x.astype(dtype), None, cfg.alpha / cfg.rank)
    return x.astype(dtype if path in EMBEDDINGS else jnp.float32)


def with_pairs(weights: Any, pairs: Any) -> dict[str, Any]:
    """Frozen weights, nested, with the pairs that stand beside them."""
    weights, pairs = (traverse_util.flatten_dict(dict(tree)) for tree in (weights, pairs))
    for path in {path[:-1] for path in pairs}:
        weights[path] = dataclasses.replace(weights[path], pair=(pairs[*path, "a"], pairs[*path, "b"]))
    return traverse_util.unflatten_dict(weights)


def tuned(cfg: LoraConfig, x: np.ndarray, pair: Sequence[np.ndarray] = ()) -> np.ndarray:
    """What one frozen matrix, and its pair if it has one, amount to: float32, computed on this machine's processor."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(_tuned(cfg, x, tuple(pair) or None))


@functools.partial(jax.jit, static_argnums=0)
def _tuned(cfg: LoraConfig, x: jax.Array, pair: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    return merged(FrozenWeight(quantize(x, cfg.base) if cfg.base else x, pair, cfg.alpha / cfg.rank))
