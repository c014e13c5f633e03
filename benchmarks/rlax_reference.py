"""What rlax says of clipped surrogates and of generalized advantages, for tests of ours:

    python -m benchmarks.rlax_reference tests/oracles/rlax.npz

rlax reaches into JAX where later versions of JAX have nothing, so tests read what it said once: 0.1.9 on JAX 0.10.2.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rlax

CASES, LENGTH = 32, 9


def main(path: pathlib.Path) -> None:
    """Writes all cases: arrays whose first axis is the case."""
    rng = np.random.default_rng(0)
    shape = (CASES, LENGTH)
    given = {
        "ratio": np.exp(rng.normal(0, 0.4, shape)),
        "advantage": rng.normal(0, 1, shape),
        "epsilon": rng.uniform(0.05, 0.5, CASES),
        "reward": rng.normal(0, 1, shape),
        "value": rng.normal(0, 1, (CASES, LENGTH + 1)),
        "discount": rng.uniform(0, 1, CASES),
        "gae_lambda": rng.uniform(0, 1, CASES),
    }
    given["ratio"][0], given["advantage"][1] = 1.0, 0.0  # where clipping begins, and where nothing is learned
    given["discount"][:4], given["gae_lambda"][:4] = [0, 1, 1, 0.5], [0.5, 0, 1, 1]
    x = {name: jnp.asarray(value, jnp.float32) for name, value in given.items()}
    surrogate = jax.vmap(jax.value_and_grad(rlax.clipped_surrogate_pg_loss))
    x["loss"], x["d_loss_d_ratio"] = surrogate(x["ratio"], x["advantage"], x["epsilon"])
    # behind a text nothing is to come: its last discount is 0
    discount = jnp.where(jnp.arange(LENGTH) < LENGTH - 1, x["discount"][:, None], 0)
    estimate = jax.vmap(rlax.truncated_generalized_advantage_estimation)
    x["gae"] = estimate(x["reward"], discount, x["gae_lambda"], x["value"])
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in x.items()}
    np.savez(path, **arrays)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
