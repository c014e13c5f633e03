"""The training step: a pure function from state and batch to state and metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from dsjax.checkpoint import key_name
from dsjax.data.batch import Batch
from dsjax.models.decoder import Decoder
from dsjax.models.multi_token import MULTI_TOKEN, ahead, shifted
from dsjax.nn.fields import COLUMN
from dsjax.nn.latent_attention import only_indexers_learn
from dsjax.nn.lora import LoraConfig, new_pairs, pair_axes, with_pairs
from dsjax.nn.losses import cross_entropy
from dsjax.nn.masks import Leaf
from dsjax.nn.moe import set_capacity
from dsjax.nn.router import RouterSums, drop_rates, router_metrics
from dsjax.sharding import Buffer, Rules, joined, logical_axes, replicated, shardings, split_variables, use_mesh
from dsjax.train.lora import FrozenWeights
from dsjax.train.optimizer import OptimConfig, learning_rate, make_optimizer

Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossReport:
    """What a loss function tells beside its loss. Like the loss, all of it adds up over micro-batches.

    Attributes:
        metrics: to log, ``loss`` among them.
        router: what the routers did, by group of experts: the model's buffers move by it, and it is logged.
    """

    metrics: dict[str, Leaf]
    router: dict[str, RouterSums]


# (model, batch, key, total weight of the whole batch) -> (loss to descend, report)
LossFunction = Callable[[Any, Batch, jax.Array, Float[Array, ""]], tuple[Float[Array, ""], LossReport]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
        step: updates applied.
        params: what is trained, float32: the weights, a nested dict, or the pairs beside frozen ones.
        buffers: float32 state without a gradient, a nested dict by the same names; empty for most models.
        opt_state: of the Optax transformation.
        rng: key data; every applied step splits it.
        frozen: weights that no step changes, by the same names; empty: all are trained. A checkpoint has them not.
    """

    step: Leaf
    params: Any
    buffers: Any
    opt_state: Any
    rng: Leaf
    frozen: Any = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> Any:
        """Parameters and buffers in one nested dict: with the graph, the model."""
        return joined(with_pairs(self.frozen, self.params) if self.frozen else self.params, self.buffers)

    @property
    def moving(self) -> TrainState:
        """What a step may change: without the frozen weights."""
        return dataclasses.replace(self, frozen={})


def next_token_loss(
    model: Decoder, batch: Batch, key: jax.Array, total_weight: Float[Array, ""]
) -> tuple[Float[Array, ""], LossReport]:
    """Mean cross-entropy over the batch's weight plus the model's auxiliary losses.

    While a model's indexers warm up, theirs alone.
    """
    del key
    out = model(batch.tokens_BT, batch.documents, features_BTC=batch.features_BTC)
    nll = cross_entropy(
        out.hidden_BTD,
        model.output_weights(),
        batch.targets_BT,
        batch.loss_weight_BT,
        out.copy,
        chunk=model.compute.loss_chunk,
    )
    loss = nll / total_weight
    metrics, router, losses = {"loss": loss}, dict(out.router), dict(out.losses)
    if model.cfg.multi_token is not None:
        further, stats = model.further_hidden(out, batch.tokens_BT, batch.documents)
        metrics["loss/multi_token"] = _further_loss(model, further, batch) / total_weight
        loss = loss + metrics["loss/multi_token"]
        if stats is not None:
            router[MULTI_TOKEN] = stats
            losses |= {f"multi_token_{k}": x for k, x in model.auxiliary_losses({MULTI_TOKEN: stats}).items()}
    if model.cfg.structure is not None and model.cfg.structure.next_leaf:
        metrics["loss/next_leaf"] = _next_leaf_loss(model, out.hidden_BTD, batch) / total_weight
        loss = loss + metrics["loss/next_leaf"]
    # What is a mean over these rows counts by their share of the whole batch, so that micro-batches add up.
    share = jnp.sum(batch.loss_weight_BT) / total_weight
    for name, value in losses.items():
        metrics[f"loss/{name}"] = value * share
        loss = loss + value * share
    if only_indexers_learn([group.attention for group in model.cfg.groups]):
        loss = metrics["loss/indexer"]
    return loss, LossReport(metrics, {name: stats.sums for name, stats in router.items()})


def _further_loss(model: Decoder, further: Sequence[jax.Array], batch: Batch) -> Float[Array, ""]:
    """The weighted loss of the tokens behind the next one, summed over the batch's weight."""
    assert model.cfg.multi_token is not None
    total = jnp.float32(0)
    for by, hidden_BTD in enumerate(further, start=1):
        weight_BT = shifted(batch.loss_weight_BT, by) * ahead(batch.documents.ids_BT, by)
        targets_BT, w_DV = shifted(batch.targets_BT, by), model.output_weights()
        total += cross_entropy(hidden_BTD, w_DV, targets_BT, weight_BT, chunk=model.compute.loss_chunk)
    return total * model.cfg.multi_token.weight / len(further)


def _next_leaf_loss(model: Decoder, hidden_BTD: jax.Array, batch: Batch) -> Float[Array, ""]:
    """The weighted loss of the leaf that the next token ends in, summed over the batch's weight."""
    assert model.cfg.structure is not None
    leaf_BT = batch.features_BTC[..., COLUMN["leaf"]].astype(jnp.int32)
    weight_BT = batch.loss_weight_BT * ahead(batch.documents.ids_BT, 1)  # what a row ends with has no next features
    w_DC, chunk = model.structure.w_leaf[...], model.compute.loss_chunk
    return model.cfg.structure.next_leaf * cross_entropy(hidden_BTD, w_DC, shifted(leaf_BT, 1), weight_BT, chunk=chunk)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The pure functions of one training job, and where its state lives.

    Attributes:
        init: seed -> TrainState, each array created on its own devices; without frozen weights, where there are some.
        step: (state, batch, total_steps, factor=None) -> (state, metrics); the given state is donated. ``factor`` is
            that of layers with a dynamic capacity, static; None: the largest.
        shapes: abstract TrainState with shardings, to restore into.
        axes: logical axes of the parameters.
        graph: the model without its variables, as it is evaluated: no expert drops a token.
        base: makes the frozen weights of ``shapes``, if there are such.
    """

    init: Callable[[Any], TrainState]
    step: Any  # a jitted function: also lowered and compiled ahead of time
    shapes: TrainState
    axes: Any
    graph: Any
    base: FrozenWeights | None = None


def make_trainer(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optim: OptimConfig,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    loss_fn: LossFunction = next_token_loss,
    rules: Rules = Rules(),
    lora: LoraConfig = LoraConfig(),
) -> Trainer:
    """Builds the jitted functions of a job; nothing is computed yet.

    Args:
        make_model: builds the model from random keys; one with buffers has ``moved_buffers`` (as the decoder).
        optim: optimizer and schedule.
        mesh: devices.
        accumulate: micro-batches that a batch is cut into.
        loss_fn: what is descended.
        rules: logical axis -> mesh axes.
        lora: if it has targets, pairs beside those are trained; of a model that has a ``compute.dtype``.

    Raises:
        UserError: the mesh does not fit the model, or the model has no such targets.
    """
    abstract = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
    graph, weight_axes = nnx.split(abstract)[0], logical_axes(abstract, nnx.Param)
    axes = pair_axes(lora, weight_axes) if lora.targets else weight_axes
    tx = make_optimizer(optim, axes)

    def init(seed: jax.Array) -> TrainState:
        key = jax.random.key(seed)
        _, params, buffers = split_variables(make_model(nnx.Rngs(jax.random.fold_in(key, 0))))
        if lora.targets:
            params = new_pairs(lora, jax.random.fold_in(key, 2), params, weight_axes)
        rng = jax.random.key_data(jax.random.fold_in(key, 1))
        return TrainState(jnp.int32(0), params, buffers, tx.init(params), rng)

    def training_model(factor: float | None) -> nnx.Module:
        model = make_model(nnx.Rngs(0))
        set_capacity(model, factor)
        return model

    def step(
        state: TrainState, batch: Batch, total_steps: jax.Array, factor: float | None = None
    ) -> tuple[TrainState, Metrics]:
        graph = nnx.split(nnx.eval_shape(lambda: training_model(factor)))[0]
        with use_mesh(mesh, rules):
            return _step(graph, tx, optim, loss_fn, accumulate, state, batch, total_steps)

    shapes = jax.eval_shape(init, 0)
    param_places = shardings(shapes.params, axes, mesh, rules)
    buffer_places = shardings(shapes.buffers, logical_axes(abstract, Buffer), mesh, rules)
    places = state_shardings(shapes, param_places, buffer_places, mesh)
    base = FrozenWeights.of(lora, abstract, mesh, rules) if lora.targets else None
    whole = places if base is None else dataclasses.replace(places, frozen=base.places)
    return Trainer(
        init=jax.jit(init, out_shardings=places),
        step=jax.jit(step, donate_argnums=0, static_argnames="factor", out_shardings=(whole, None)),
        shapes=_at(shapes if base is None else dataclasses.replace(shapes, frozen=base.shapes), whole),
        axes=axes,
        graph=graph,
        base=base,
    )


def _at(shapes: Any, places: Any) -> Any:
    """Abstract arrays with their shardings."""
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places)


def state_shardings(shapes: TrainState, param_places: Any, buffer_places: Any, mesh: Mesh) -> TrainState:
    """What the optimizer keeps of a parameter, or of each of its rows, lies where that lies; counters everywhere."""
    by_path = {_keys(path): place for path, place in jax.tree_util.tree_leaves_with_path(param_places)}
    shape_of = {_keys(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.params)}

    def place(path: tuple, leaf: Any) -> Any:
        keys = _keys(path)
        for start in range(len(keys)):
            shape = shape_of.get(keys[start:])
            if leaf.ndim and shape is not None and leaf.shape == shape[: leaf.ndim]:
                return NamedSharding(mesh, PartitionSpec(*by_path[keys[start:]].spec[: leaf.ndim]))
        return replicated(mesh)

    everywhere = replicated(mesh)
    opt = jax.tree_util.tree_map_with_path(place, shapes.opt_state)
    return TrainState(everywhere, param_places, buffer_places, opt, everywhere)


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(key_name(k) for k in path)


def _step(graph, tx, optim, loss_fn, accumulate, state, batch, total_steps):
    rng, key = jax.random.split(jax.random.wrap_key_data(state.rng))
    total_weight = jnp.maximum(jnp.sum(batch.loss_weight_BT), 1.0)

    def loss_of(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, LossReport]:
        variables = dataclasses.replace(state, params=params).variables
        return loss_fn(nnx.merge(graph, variables), part, key, total_weight)

    gradient = jax.grad(loss_of, has_aux=True)
    if accumulate == 1:
        grads, report = gradient(state.params, batch, key)
    else:
        grads, report = _accumulated(gradient, accumulate, state.params, batch, key)

    lr_share = learning_rate(optim, state.step, total_steps)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(report.metrics["loss"]) & jnp.isfinite(grad_norm)

    def update(_: None) -> TrainState:
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params, router=report.router)
            params = jax.tree.map(lambda p, u: p + lr_share * u, state.params, updates)
        buffers = state.buffers
        if buffers:
            buffers = nnx.merge(graph, state.variables).moved_buffers(report.router)
        if state.frozen:
            buffers = _placed(state.buffers, buffers)
        return TrainState(state.step + 1, params, buffers, opt_state, jax.random.key_data(rng))

    # A bad step leaves every bit of the state as it was.
    moved = jax.lax.cond(finite, update, lambda _: state.moving, None)
    state = dataclasses.replace(moved, frozen=state.frozen)
    metrics = (
        report.metrics
        | _router_metrics(report.router)
        | {
            "grad_norm": grad_norm,
            "lr": lr_share * optim.lr,
            "finite": finite.astype(jnp.float32),
            "tokens": jnp.sum(batch.loss_weight_BT > 0).astype(jnp.float32),
        }
    )
    return state, metrics


def _placed(old: Any, new: Any) -> Any:
    """Of moved buffers those that say where experts are. Frozen routers do not learn, so neither do their biases."""

    def one(path: tuple, before: jax.Array, after: jax.Array) -> jax.Array:
        return after if key_name(path[-1]) in ("replicas", "mean_load") else before

    return jax.tree_util.tree_map_with_path(one, old, new)


def _router_metrics(router: dict[str, RouterSums]) -> Metrics:
    """What is logged of a whole batch's routing, by group of experts; and what the capacity is chosen by."""
    metrics = {f"router/{name}/{key}": x for name, sums in router.items() for key, x in router_metrics(sums).items()}
    return metrics | {f"capacity/drop_rate_at_{factor}": rate for factor, rate in drop_rates(router).items()}


def _accumulated(gradient, accumulate: int, params: Any, batch: Batch, key: jax.Array) -> tuple[Any, LossReport]:
    """Gradients and reports summed over micro-batches of every ``accumulate``-th row.

    Strided, so that each device's rows give to every micro-batch and nothing moves.
    """

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1)

    parts = jax.tree.map(split, batch)
    keys = jax.random.split(key, accumulate)

    def one(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *part)), None

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts), keys[0]),
    )
    (grads, report), _ = jax.lax.scan(one, zeros, (parts, keys))
    return grads, report
