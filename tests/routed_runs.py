"""A model of experts small enough to train for some hundred steps in a test, on one device and on many."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.checkpoint import as_tree, flatten
from dsjax.data.batch import Batch
from dsjax.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.masks import Documents
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.sharding import MeshConfig, Rules, host_array_to_global, make_mesh
from dsjax.train.optimizer import OptimConfig
from dsjax.train.step import TrainState, make_trainer

ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8)
RATE, E, B, T = 0.01, 8, 8, 32
ONE = MeshConfig(data=1)
OPTIM = OptimConfig(lr=3e-3, warmup_steps=2)


def model_config(rate: float = RATE, several: bool = False) -> DecoderConfig:
    """Two layers of experts that nothing but the bias balances; ``several``: a dense one and two more behind them."""
    experts = LayerGroup(MoEConfig(E, 2, 8, balance_coef=0.0, bias_update_rate=rate), ATTENTION, num_layers=2)
    if not several:
        return DecoderConfig(64, 16, 2, (experts,))
    return DecoderConfig(64, 16, 5, (experts, LayerGroup(MLPConfig(d_ff=16), ATTENTION, num_layers=1), experts))


def routed_by(**moe: Any) -> DecoderConfig:
    """Two layers of experts, of this kind."""
    return DecoderConfig(64, 16, 2, (LayerGroup(MoEConfig(**{"d_ff": 8} | moe), ATTENTION),))


@functools.cache
def job(
    cfg: DecoderConfig = model_config(),
    mesh: MeshConfig = ONE,
    accumulate: int = 1,
    optim: OptimConfig = OPTIM,
    **compute: Any,
) -> Any:
    """A function batch -> the batch on its devices, and the trainer."""
    devices = make_mesh(mesh, jax.devices()[:1] if mesh == ONE else None)
    trainer = make_trainer(
        lambda rngs: Decoder(cfg, ComputeConfig(**compute), rngs=rngs),
        optim,
        devices,
        accumulate=accumulate,
    )
    spec = Rules().spec("batch", "length")
    return lambda batch: jax.tree.map(lambda x: host_array_to_global(np.asarray(x), devices, spec), batch), trainer


def random_batch(seed: int, tokens: int = 20) -> Batch:
    """Rows of one document; the last positions of some are padding."""
    rng = np.random.default_rng(seed)
    # Rows differ in their tokens, so that no row's loads are those of the batch.
    text = (rng.integers(0, tokens, (B, T + 1)) // (1 + np.arange(B)[:, None] % 3)).astype(np.int32)
    real = np.arange(T) < rng.integers(T // 2, T + 1, (B, 1))
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    return Batch(text[:, :-1], text[:, 1:], real.astype(np.float32), Documents(real.astype(np.int32), positions))


def trained(steps: int, *, seed: int = 0, **kind: Any) -> tuple[TrainState, list[dict[str, float]]]:
    place, trainer = job(**kind)
    state, records = trainer.init(np.uint32(seed)), []
    for i in range(steps):
        state, metrics = trainer.step(state, place(random_batch(1000 * seed + i)), jnp.int32(1000))
        records.append({name: float(x) for name, x in metrics.items()})
    return state, records


def arrays(state: TrainState) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten(as_tree(state)).items()}
