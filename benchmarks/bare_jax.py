"""The benchmark models in one file of bare JAX: the peer that the library is measured against.

Straightforward but good: fused projections as 2-D matmuls, one whole-batch attention with a
materialised causal-and-documents mask, a log-sum-exp by hand, an unrolled loop over layers,
optax's AdamW. No custom gradient and no framework.

    python -m benchmarks.timing compare dense bare_jax
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import SPECS, Spec, make_batch


def init_params(key: jax.Array, spec: Spec) -> dict:
    """Truncated-normal weights with variance 1/fan_in; the norms start at one."""
    d, f, e = spec.d_model, spec.d_ff, spec.num_experts
    keys = iter(jax.random.split(key, 2 + 8 * spec.num_layers))

    def weight(shape, fan_in):
        return jax.random.truncated_normal(next(keys), -2, 2, shape, jnp.float32) * fan_in**-0.5

    def block():
        mixer = {"attention_norm": jnp.ones(d), "w_qkv": weight((d, 3 * d), d), "w_o": weight((d, d), d)}
        if e:
            return mixer | {
                "ff_norm": jnp.ones(d),
                "w_router": weight((d, e), d),
                "w_gate_up": weight((e, d, 2 * f), d),
                "w_down": weight((e, f, d), f),
            }
        return mixer | {"ff_norm": jnp.ones(d), "w_gate_up": weight((d, 2 * f), d), "w_down": weight((f, d), f)}

    return {
        "embed": weight((spec.vocab_size, d), d),
        "layers": [block() for _ in range(spec.num_layers)],
        "final_norm": jnp.ones(d),
        "head": weight((d, spec.vocab_size), d),
    }


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rope(x_BTNH: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array) -> jax.Array:
    """Rotates the two halves of each head; the tables hold H/2 angles."""
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    cos, sin = cos_TH[:, None, :], sin_TH[:, None, :]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attention(x_BTD: jax.Array, layer: dict, mask_B1TS: jax.Array, angles: tuple, spec: Spec) -> jax.Array:
    B, T, D = x_BTD.shape
    qkv = (x_BTD.reshape(B * T, D) @ layer["w_qkv"]).reshape(B, T, 3, spec.num_heads, spec.d_head)
    q, k, v = rope(qkv[:, :, 0], *angles), rope(qkv[:, :, 1], *angles), qkv[:, :, 2]
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q, k) * spec.d_head**-0.5
    probs_BNTS = jax.nn.softmax(jnp.where(mask_B1TS, scores_BNTS, -1e30), axis=-1)
    o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", probs_BNTS, v)
    return (o_BTNH.reshape(B * T, D) @ layer["w_o"]).reshape(B, T, D)


def swiglu(x_RD: jax.Array, w_gate_up: jax.Array, w_down: jax.Array) -> jax.Array:
    gate, up = jnp.split(x_RD @ w_gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ w_down


def moe(x_RD: jax.Array, layer: dict, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """Dropless top-k by computing every expert on every token, weighted (zero for those not chosen)."""
    probs_RE = jax.nn.softmax(x_RD @ layer["w_router"], axis=-1)
    gates_RX, chosen_RX = jax.lax.top_k(probs_RE, spec.experts_per_token)
    gates_RX = gates_RX / gates_RX.sum(axis=-1, keepdims=True)
    weights_RE = (jax.nn.one_hot(chosen_RX, spec.num_experts) * gates_RX[..., None]).sum(axis=1)
    out = jnp.zeros_like(x_RD)
    for e in range(spec.num_experts):
        out = out + weights_RE[:, e, None] * swiglu(x_RD, layer["w_gate_up"][e], layer["w_down"][e])
    share_E = (weights_RE > 0).mean(axis=0) / spec.experts_per_token
    return out, spec.num_experts * jnp.sum(share_E * probs_RE.mean(axis=0))


def loss_fn(params: dict, batch: dict, spec: Spec) -> jax.Array:
    """Mean cross-entropy over the real tokens, plus 0.01 of the experts' balance loss."""
    tokens_BT, ids_BT = batch["tokens"], batch["documents"]
    B, T = tokens_BT.shape
    frequencies = 10000.0 ** (-jnp.arange(0, spec.d_head, 2) / spec.d_head)
    angles_TH = jnp.arange(T)[:, None] * frequencies
    angles = jnp.cos(angles_TH), jnp.sin(angles_TH)
    mask_B1TS = (ids_BT[:, None, :, None] == ids_BT[:, None, None, :]) & jnp.tril(jnp.ones((T, T), bool))

    x = params["embed"][tokens_BT]
    balance = jnp.zeros(())
    for layer in params["layers"]:
        x = x + attention(rms_norm(x, layer["attention_norm"]), layer, mask_B1TS, angles, spec)
        h_RD = rms_norm(x, layer["ff_norm"]).reshape(B * T, -1)
        if spec.num_experts:
            y_RD, layer_balance = moe(h_RD, layer, spec)
            balance += layer_balance / spec.num_layers
        else:
            y_RD = swiglu(h_RD, layer["w_gate_up"], layer["w_down"])
        x = x + y_RD.reshape(B, T, -1)

    logits_RV = rms_norm(x, params["final_norm"]).reshape(B * T, -1) @ params["head"]
    top_R1 = jax.lax.stop_gradient(logits_RV.max(axis=-1, keepdims=True))
    log_sum_R = jnp.log(jnp.exp(logits_RV - top_R1).sum(axis=-1)) + top_R1[:, 0]
    target_R = jnp.take_along_axis(logits_RV, batch["targets"].reshape(-1, 1), axis=-1)[:, 0]
    weights_R = batch["weights"].reshape(-1)
    return jnp.sum(weights_R * (log_sum_R - target_R)) / weights_R.sum() + 0.01 * balance


def make(name: str) -> tuple[Any, Callable, Callable]:
    """The model ``name`` as ``(state, step_fn, make_batch)``: ``state, loss = step_fn(state, batch)``."""
    spec = SPECS[name]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, b1=0.9, b2=0.95, weight_decay=0.1))

    @jax.jit
    def init(key):
        params = init_params(key, spec)
        return params, tx.init(params)

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, spec)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return init(jax.random.key(0)), jax.jit(step, donate_argnums=0), lambda seed=0: make_batch(spec, seed)
