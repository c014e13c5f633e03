"""The benchmark models through dsjax: its config, its decoder, its training step."""

from collections.abc import Callable
from typing import Any

from benchmarks.timing import SPECS, make_batch
from dsjax.runtime import configure


def config(name: str) -> Any:
    """The pre-training config of a benchmark model, in the form that is fastest on a CPU."""
    from dsjax.data.prepare import DataConfig
    from dsjax.models.decoder import ComputeConfig, DecoderConfig, LayerGroup
    from dsjax.nn.attention import AttentionConfig
    from dsjax.nn.mlp import MLPConfig
    from dsjax.nn.moe import MoEConfig
    from dsjax.train.optimizer import OptimConfig
    from dsjax.train.pretrain import Pretrain

    spec = SPECS[name]
    attention = AttentionConfig(spec.num_heads, spec.num_heads, spec.d_head)
    ffn: MLPConfig | MoEConfig = MLPConfig(spec.d_ff)
    if spec.num_experts:
        ffn = MoEConfig(spec.num_experts, spec.experts_per_token, spec.d_ff, balance_coef=0.01 / spec.num_layers)
    return Pretrain(
        model=DecoderConfig(spec.vocab_size, spec.d_model, spec.num_layers, (LayerGroup(ffn, attention),)),
        data=DataConfig(vocab_size=spec.vocab_size, seq_len=spec.length, batch_size=spec.batch_size),
        optim=OptimConfig(lr=3e-4, b2=0.95, weight_decay=0.1, clip_norm=1.0, schedule="constant", warmup_steps=0),
        compute=ComputeConfig(unroll=True, loss_chunk=64),
    )


def make(name: str) -> tuple[Any, Callable, Callable]:
    """``(state, step_fn, make_batch)``, where ``state, loss = step_fn(state, batch)``; see :mod:`benchmarks.timing`."""
    configure()
    return make_returning_memory(name)


def make_returning_memory(name: str) -> tuple[Any, Callable, Callable]:
    """As :func:`make`, without the settings of the command line: what a step frees goes back to the kernel."""
    import jax.numpy as jnp
    import numpy as np

    from dsjax.data.batch import Batch
    from dsjax.nn.masks import Documents
    from dsjax.train.pretrain import build, place_batch

    mesh, trainer = build(config(name))

    def batch() -> Batch:
        raw = make_batch(SPECS[name])
        T = np.arange(raw["tokens"].shape[1])
        second = raw["documents"].astype(bool)
        positions = np.where(second, T - np.argmax(second, axis=1)[:, None], T).astype(np.int32)
        documents = Documents(raw["documents"] + 1, positions)
        return place_batch(Batch(raw["tokens"], raw["targets"], raw["weights"], documents), mesh)

    def step(state: Any, batch: Batch) -> tuple[Any, Any]:
        state, metrics = trainer.step(state, batch, jnp.int32(1000))
        return state, metrics["loss"]

    return trainer.init(0), step, batch
