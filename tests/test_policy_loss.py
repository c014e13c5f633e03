"""Policies that are models: log-probabilities and entropies, routing losses, micro-batches, devices, padding."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, V, graph, weights

from dsjax.config import UserError
from dsjax.data.batch import Batch
from dsjax.models.decoder import ComputeConfig, Decoder
from dsjax.models.output import DecoderOutput
from dsjax.nn.history import CopyConfig
from dsjax.nn.masks import Documents
from dsjax.nn.moe import MoEConfig
from dsjax.rl.experience import Experience, experience_of, minibatch, place_experience
from dsjax.rl.log_probs import log_probs_and_entropies
from dsjax.rl.policy import PolicyConfig, explained_variance
from dsjax.rl.rollout import Rollout
from dsjax.rl.rows import written_rows
from dsjax.sharding import MeshConfig, make_mesh
from dsjax.train.optimizer import OptimConfig
from dsjax.train.policy_loss import policy_loss
from dsjax.train.step import make_trainer, next_token_loss

END, B, T = 0, 8, 12
SMALL = dataclasses.replace(DENSE, num_layers=1)
LAYER = MoEConfig(
    num_experts=4, top_k=2, d_ff=8, balance_coef=0.05, sequence_coef=0.02, z_coef=0.01, bias_update_rate=0.01
)
EXPERTS = dataclasses.replace(SMALL, groups=(dataclasses.replace(DENSE.groups[0], ffn=LAYER),))
EVERY_SWITCH = PolicyConfig(clip_low=0.02, clip_high=0.03, dual_clip=1.5, kl_coef=0.1, entropy_coef=0.01)


def texts(seed: int = 0) -> Any:
    """Rows with random texts behind prompts of three tokens; every third ended by its length."""
    rng = np.random.default_rng(seed)
    prompts = [[END, *rng.integers(1, V, 2).tolist()] for _ in range(B)]
    rollouts = []
    for n in range(B):
        ended, tokens = bool(n % 3), rng.integers(1, V, rng.integers(1, T - 3)).tolist()
        log_probs = rng.normal(-3, 0.3, len(tokens) + ended).tolist()
        rollouts.append(Rollout(tuple(tokens), tuple(log_probs), "", ended))
    return written_rows(prompts, rollouts, length=T, end_id=END)


def some_experience(aggregate: Any = "token", counts: Any = np.ones(B, bool), seed: int = 0) -> Experience:
    rows, rng = texts(seed), np.random.default_rng(seed + 1)
    told = np.nan_to_num(rows.told_NT, nan=-3.0)
    found = experience_of(
        rows,
        counts,
        rng.normal(size=(B, 1)) * rows.learned_NT,
        told,
        reference_log_prob_BT=told + rng.normal(0, 0.2, told.shape),
        correction_BT=rng.uniform(0.5, 1.5, told.shape),
    )
    return minibatch(found, range(B), aggregate, T)


# ---------------------------------------------------------------- log-probabilities and entropies


@functools.partial(jax.jit, static_argnums=0)
def scores(definition: Any, params: Any, batch: Experience) -> Any:
    """At two temperatures, and the logits."""
    model = nnx.merge(definition, params)
    out = model(batch.tokens_BT, batch.documents)
    of = functools.partial(log_probs_and_entropies, model, out, batch.targets_BT)
    return {1.0: of(), 0.5: of(temperature=0.5)}, model.logits(out)


@pytest.mark.parametrize(("name", "chunk"), [("small", 0), ("small", 5), ("tied", 5), ("copying", 5)])
def test_they_are_those_of_the_logits(name: str, chunk: int) -> None:
    copying = dataclasses.replace(SMALL, copy=CopyConfig(max_match=3))
    cfg = {"small": SMALL, "tied": dataclasses.replace(SMALL, tied=True), "copying": copying}[name]
    batch = some_experience()
    found, logits = scores(graph(cfg, loss_chunk=chunk), weights(cfg), batch)
    for temperature, (log_prob, entropy) in found.items():
        log_p = jax.nn.log_softmax(logits / temperature)
        expected = np.take_along_axis(np.asarray(log_p), batch.targets_BT[..., None], -1)[..., 0]
        np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=1e-5)  # one float32 softmax of 32
        np.testing.assert_allclose(entropy, -jnp.sum(jnp.exp(log_p) * log_p, -1), rtol=1e-5, atol=1e-5)
        assert float(jnp.min(entropy)) >= 0


def test_the_slope_of_entropies_is_that_of_the_logits() -> None:
    rng = np.random.default_rng(0)
    model, hidden = nnx.merge(graph(SMALL, loss_chunk=2), weights(SMALL)), rng.normal(size=(2, 5, SMALL.d_model))
    weight = rng.normal(size=(2, 5)).astype(np.float32)
    targets = jnp.asarray(rng.integers(0, V, (2, 5)))

    def of(hidden: Any, learn: bool) -> Any:
        out = DecoderOutput(hidden, None, {}, {}, None)
        return jnp.sum(weight * log_probs_and_entropies(model, out, targets, learn_entropy=learn)[1])

    def by_logits(hidden: Any) -> Any:
        log_p = jax.nn.log_softmax(hidden @ model.output_weights())
        return -jnp.sum(weight * jnp.sum(jnp.exp(log_p) * log_p, -1))

    x = jnp.asarray(hidden, jnp.float32)
    found, expected = jax.grad(of)(x, True), jax.grad(by_logits)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # sums over 32 float32 probabilities
    assert float(jnp.abs(expected).max()) > 0.1
    np.testing.assert_array_equal(jax.grad(of)(x, False), np.zeros_like(x))  # where none is asked for


@functools.cache
def slopes(definition: Any, cfg: PolicyConfig) -> Any:
    """A compiled function (params, batch) -> ((loss, metrics), gradients)."""

    def loss(params: Any, batch: Experience) -> Any:
        total = jnp.sum(batch.loss_weight_BT)
        loss, report = policy_loss(cfg)(nnx.merge(definition, params), batch, jax.random.key(0), total)
        return loss, (report.metrics, report.router)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_logits_of_a_chunk_exist_at_a_time_backward_too() -> None:
    params, batch = weights(SMALL), some_experience()
    whole, chunked = (slopes(graph(SMALL, loss_chunk=chunk), EVERY_SWITCH).lower(params, batch) for chunk in (0, 5))
    # sums over positions in another order, of float32 of size 1
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(compare, whole.compile()(params, batch), chunked.compile()(params, batch))
    assert f"tensor<{B}x{T}x{V}xf32>" in whole.as_text()
    assert f"tensor<{B}x{T}x{V}xf32>" not in chunked.as_text()
    assert f"tensor<{B}x5x{V}xf32>" in chunked.as_text()


# ---------------------------------------------------------------- in the training step


@functools.cache
def trainer_of(model_config: Any, cfg: PolicyConfig, num_devices: int, accumulate: int, mesh_config: MeshConfig) -> Any:
    mesh = make_mesh(mesh_config, jax.devices()[:num_devices])
    trainer = make_trainer(
        lambda rngs: Decoder(model_config, ComputeConfig(), rngs=rngs),
        OptimConfig(lr=3e-3, warmup_steps=0, schedule="constant"),
        mesh,
        accumulate=accumulate,
        loss_fn=policy_loss(cfg),
    )
    return trainer, mesh


def stepped(
    model_config: Any,
    cfg: PolicyConfig,
    batch: Experience,
    *,
    num_devices: int = 1,
    accumulate: int = 1,
    mesh_config: MeshConfig = MeshConfig(),
    steps: int = 1,
) -> Any:
    """Metrics and parameters behind some steps on one minibatch."""
    trainer, mesh = trainer_of(model_config, cfg, num_devices, accumulate, mesh_config)
    placed = place_experience(batch, mesh)
    state = trainer.init(np.uint32(0))
    for _ in range(steps):
        state, metrics = trainer.step(state, placed, 10)
    return jax.device_get((metrics, state.params))


@pytest.mark.parametrize(
    "split",
    [{"accumulate": 2}, {"accumulate": 2, "num_devices": 8, "mesh_config": MeshConfig(data=2, fsdp=2, tensor=2)}],
    ids=["micro-batches", "devices"],
)
def test_how_a_minibatch_is_cut_up_changes_no_step(split: dict[str, Any]) -> None:
    cfg, batch = dataclasses.replace(EVERY_SWITCH, ratio="sequence"), some_experience("sequence")
    metrics, params = stepped(SMALL, cfg, batch)
    assert 0 < metrics["policy/clip_low"] + metrics["policy/clip_high"] < 1
    names = [name for name in metrics if name.startswith(("loss", "policy/"))]
    assert len(names) >= 11
    other = stepped(SMALL, cfg, batch, **split)
    for name in (*names, "grad_norm"):  # float32: sums over micro-batches and devices are made in another order
        assert other[0][name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
    # Adam's first step is a sign, so what is nearly 0 may differ by the whole step of 3e-3
    close = jax.tree.map(lambda x, y: np.isclose(x, y, atol=1e-5).mean(), params, other[1])
    assert min(jax.tree.leaves(close)) > 0.98


def test_texts_with_an_advantage_become_likelier_and_others_less_likely() -> None:
    params, definition = weights(SMALL), graph(SMALL)
    batch = dataclasses.replace(some_experience(), old_log_prob_BT=None, correction_BT=None)
    slope = slopes(definition, PolicyConfig())(params, batch)[1]
    moved = jax.tree.map(lambda x, dx: x - 0.3 * dx, params, slope)
    before, after = (np.asarray(scores(definition, x, batch)[0][1.0][0]) for x in (params, moved))
    counts = batch.loss_weight_BT > 0
    assert ((after - before) * batch.advantage_BT)[counts].mean() > 0.01
    for sign in (1, -1):
        rows = (np.sign(batch.advantage_BT) == sign) & counts
        assert sign * (after - before)[rows].mean() > 0


def test_the_losses_of_routers_stay_and_their_sums_are_told() -> None:
    params, batch = weights(EXPERTS), jax.tree.map(jnp.asarray, some_experience())
    (loss, (metrics, router)), _ = slopes(graph(EXPERTS), EVERY_SWITCH)(params, batch)

    @jax.jit
    def of_next_tokens(params: Any, batch: Experience) -> Any:
        total = jnp.sum(batch.loss_weight_BT)
        return next_token_loss(nnx.merge(graph(EXPERTS), params), batch, jax.random.key(0), total)[1]

    same = of_next_tokens(params, batch)
    names = [name for name in same.metrics if name != "loss"]
    assert len(names) == 3
    for name in names:  # the same sums, fused with others
        assert float(metrics[name]) == pytest.approx(float(same.metrics[name]), rel=1e-6)
        assert float(metrics[name]) != 0
    parts = sum(metrics[name] for name in ("loss/policy", "loss/kl", "loss/entropy", *names))
    assert float(loss) == float(metrics["loss"]) == pytest.approx(float(parts), rel=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), router, same.router)


@pytest.mark.slow
def test_experts_over_devices_change_no_step() -> None:
    cfg, batch = PolicyConfig(entropy_coef=0.01), some_experience()
    one = stepped(EXPERTS, cfg, batch)
    eight = stepped(EXPERTS, cfg, batch, num_devices=8, mesh_config=MeshConfig(data=2, expert=2, tensor=2))
    for name in ("loss", "loss/policy", "loss/entropy", "loss/balance", "grad_norm"):
        # float32: sums over devices are made in another order
        assert eight[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-6), name


def test_rows_that_do_not_count_change_no_bit() -> None:
    """Nor what stands outside of the texts: its advantage, and what any policy or engine said of it."""
    counts, run = np.arange(B) % 4 != 1, slopes(graph(EXPERTS), EVERY_SWITCH)
    plain, other = some_experience(counts=counts), some_experience(counts=counts, seed=1)
    gone_B1 = ~counts[:, None]
    changed = {
        name: np.where(gone_B1, getattr(other, name), getattr(plain, name)) for name in ("tokens_BT", "targets_BT")
    }
    assert (changed["tokens_BT"] != plain.tokens_BT).any()
    for name in ("advantage_BT", "old_log_prob_BT", "reference_log_prob_BT", "correction_BT"):
        changed[name] = np.where(plain.loss_weight_BT == 0, np.nan, getattr(plain, name)).astype(np.float32)
    found = [run(weights(EXPERTS), batch) for batch in (plain, dataclasses.replace(plain, **changed))]
    jax.tree.map(np.testing.assert_array_equal, *found)
    counted = dataclasses.replace(some_experience(seed=0), **changed)  # while those that count do
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, found[0], run(weights(EXPERTS), counted))


@pytest.mark.parametrize("values", ["head", pytest.param("decoder", marks=pytest.mark.slow)])
def test_a_critic_learns_beside_the_policy(values: str) -> None:
    """Its routers' losses count, too; and without returns it is not asked."""
    cfg = dataclasses.replace(SMALL if values == "head" else EXPERTS, values=values)
    plain, rng = some_experience(), np.random.default_rng(5)
    returns = rng.normal(size=plain.tokens_BT.shape).astype(np.float32)
    batch = dataclasses.replace(plain, return_BT=returns, old_value_BT=0 * returns)
    run = slopes(graph(cfg), PolicyConfig(value_coef=0.5, value_clip=10.0))
    (loss, (metrics, router)), slope = run(weights(cfg), batch)

    @jax.jit
    def values_of(params: Any, batch: Experience) -> Any:
        model = nnx.merge(graph(cfg), params)
        return model.values(model(batch.tokens_BT, batch.documents), batch.tokens_BT, batch.documents)

    value = values_of(weights(cfg), batch)
    off = (np.asarray(value) - returns)[batch.loss_weight_BT > 0]
    assert float(metrics["loss/value"]) == pytest.approx(0.25 * (off**2).mean(), rel=1e-4)
    assert explained_variance(metrics) == pytest.approx(
        1 - off.var() / returns[batch.loss_weight_BT > 0].var(), abs=1e-4
    )
    assert jnp.abs(slope["w_values"] if values == "head" else slope["critic"]["w_values"]).max() > 0
    assert ("critic/group_0" in router) == ("loss/critic/balance" in metrics) == (values == "decoder")
    assert float(loss) == pytest.approx(sum(float(x) for n, x in metrics.items() if n.startswith("loss/")), rel=1e-5)


def test_only_experience_is_learned_from() -> None:
    model, batch = nnx.merge(graph(SMALL), weights(SMALL)), some_experience()
    plain = Batch(batch.tokens_BT, batch.targets_BT, batch.loss_weight_BT, Documents(*jax.tree.leaves(batch.documents)))
    with pytest.raises(TypeError, match="a policy learns from Experience, found Batch"):
        policy_loss(PolicyConfig())(model, plain, jax.random.key(0), jnp.float32(1))


def test_a_model_whose_indexers_warm_up_is_no_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsjax.train.policy_loss.only_indexers_learn", lambda groups: True)
    model = nnx.merge(graph(SMALL), weights(SMALL))
    with pytest.raises(UserError, match="while indexers warm up"):
        policy_loss(PolicyConfig())(model, some_experience(), jax.random.key(0), jnp.float32(1))
