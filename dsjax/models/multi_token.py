"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): modules that predict one token more each.

The n-th module joins the hidden state of position i with the embedding of token i + n, runs one layer, and predicts
token i + n + 1 with the model's own output matrix. In training that is a further loss; in decoding a draft.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsjax.config import NonNegativeFloat, PositiveInt
from dsjax.models.stack import Block
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.cache import LayerCache, Made
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.linear import project
from dsjax.nn.masks import Documents
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.nn.norm import RMSNorm
from dsjax.nn.router import RouterStats
from dsjax.sharding import param, shard

MULTI_TOKEN = "multi_token"  # its name among the groups of experts


@dataclasses.dataclass(frozen=True)
class MultiTokenConfig:
    """Modules with a layer like the model's last ones.

    Attributes:
        num_modules: further tokens that are predicted at each position.
        weight: of the mean of their losses.
    """

    num_modules: PositiveInt = 1
    weight: NonNegativeFloat = 0.3


class MultiTokenModule(nnx.Module):
    """One module; embedding and output matrix are the model's."""

    def __init__(
        self,
        attention: AttentionConfig | LatentAttentionConfig,
        ffn: MLPConfig | MoEConfig,
        d_model: int,
        *,
        num_layers: int,
        norm_eps: float,
        rngs: nnx.Rngs,
    ):
        D = d_model
        self.embedding_norm, self.hidden_norm = (RMSNorm(D, eps=norm_eps, rngs=rngs) for _ in range(2))
        self.w_join = param(rngs, (2, D, D), ("halves", "embed", "mlp"), fan_in=2 * D)
        self.block = Block(attention, ffn, D, num_layers=num_layers, norm_eps=norm_eps, rngs=rngs)
        self.final_norm = RMSNorm(D, eps=norm_eps, rngs=rngs)

    def __call__(
        self,
        hidden_BTD: Float[Array, "B T D"],
        embedded_BTD: Float[Array, "B T D"],
        documents: Documents,
        rope: tuple[Float[Array, "B T h"], ...],
        *,
        depth: int,
        cache: LayerCache | None = None,
        lengths_B: Int[Array, B] | None = None,
    ) -> tuple[Float[Array, "B T D"], Made | None, RouterStats | None]:
        """Hidden states that predict one token more than ``hidden_BTD`` do, what to keep, and what the router did.

        Args:
            hidden_BTD: of the model, or of the module before, behind the final norm.
            embedded_BTD: of each position the embedding of the token that its hidden state predicts.
            documents: which document each position belongs to.
            rope: table of :func:`dsjax.nn.rope.rope_angles`.
            depth: number of the layer, as far as it says what a query sees.
            cache: of its layer, and the positions that it holds: as for :class:`dsjax.nn.attention.Attention`.
            lengths_B: see ``cache``.
        """
        both_BT2D = jnp.stack([self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)], axis=2)
        x_BTD = shard(project(both_BT2D, self.w_join[...], num_inputs=2), "batch", "length", None)
        x_BTD, made, stats = self.block(
            x_BTD,
            documents=documents,
            positions_BT=documents.positions_BT,
            rope=rope,
            depth=depth,
            cache=cache,
            lengths_B=lengths_B,
        )
        return self.final_norm(x_BTD), made, stats


def shifted(x_BT: Shaped[Array, "B T"], by: int) -> Shaped[Array, "B T"]:
    """What stands ``by`` positions ahead; 0 where the row ends before."""
    return jnp.pad(x_BT[:, by:], [(0, 0), (0, min(by, x_BT.shape[1]))])


def ahead(ids_BT: Int[Array, "B T"], by: int) -> Bool[Array, "B T"]:
    """Whether the position that is ``by`` ahead belongs to the same document."""
    return (shifted(ids_BT, by) == ids_BT) & (ids_BT > 0)
