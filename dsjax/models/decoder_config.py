"""What a decoder is: layer groups, what stands beside them, and what that costs; and how it is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from dsjax.config import NonNegativeInt, PositiveFloat, PositiveInt, UserError
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.history import CopyConfig, NgramConfig
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import DynamicCapacity, MoEConfig
from dsjax.nn.structure import StructureConfig


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """``num_layers`` equal layers; none: as many as are left of the model's ``num_layers``."""

    ffn: MLPConfig | MoEConfig = MLPConfig()
    attention: AttentionConfig | LatentAttentionConfig = AttentionConfig()
    num_layers: PositiveInt | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder-only language model.

    Attributes:
        vocab_size: tokens V.
        d_model: width D.
        num_layers: layers in all groups together.
        groups: the layer groups, first to last.
        tied: the output matrix is the embedding, transposed.
        norm_eps: added to the mean square in every RMSNorm.
        ngram: hashed n-gram embeddings at the input, or none.
        copy: the continuation of the longest match, at input and output, or none.
        multi_token: modules that predict further tokens, or none.
        structure: what it is given of the syntax around its tokens, or none.
        values: a number for each position (a value in PPO, a reward in models of rewards): by a ``head`` on the hidden
            states, by another whole ``decoder`` that reads the same tokens, or none.
    """

    vocab_size: PositiveInt = 4096
    d_model: PositiveInt = 256
    num_layers: PositiveInt = 8
    groups: tuple[LayerGroup, ...] = (LayerGroup(),)
    tied: bool = False
    norm_eps: PositiveFloat = 1e-6
    ngram: NgramConfig | None = None
    copy: CopyConfig | None = None
    multi_token: MultiTokenConfig | None = None
    structure: StructureConfig | None = None
    values: Literal["none", "head", "decoder"] = "none"

    def validate(self) -> None:
        if not self.groups:
            raise UserError("groups is empty; a model has at least one layer group")
        open_groups = [g for g in self.groups if g.num_layers is None]
        fixed = sum(g.num_layers or 0 for g in self.groups)
        if len(open_groups) > 1:
            raise UserError("groups: only one group can leave num_layers open; give the others a number")
        if open_groups and fixed >= self.num_layers:
            raise UserError(f"num_layers is {self.num_layers}; it must exceed the {fixed} that its groups give")
        if not open_groups and fixed != self.num_layers:
            raise UserError(f"num_layers is {self.num_layers}; its groups have {fixed}")
        if len(self._dynamic_capacities()) > 1:
            raise UserError("groups differ in their dynamic ffn.capacity; one controller chooses for all layers")
        if self.scoped and (self.structure is None or self.multi_token is not None):
            missing = "it needs structure" if self.structure is None else "it does not go with multi_token"
            raise UserError(f"groups: a group has attention.scope_heads; {missing}")

    @property
    def critic(self) -> DecoderConfig | None:
        """The decoder that makes the values alone, with a head for those and no logits; None: there is none."""
        return dataclasses.replace(self, values="head", multi_token=None) if self.values == "decoder" else None

    @property
    def scoped(self) -> bool:
        """Whether there are heads that see only what is still open."""
        return any(isinstance(g.attention, AttentionConfig) and g.attention.scope_heads for g in self.groups)

    @property
    def turn(self) -> int:
        """Positions behind which all layers cut a row as before: a text that begins at a multiple of it is read as in a
        row of its own. 1: no layer cuts rows."""
        return math.lcm(*(g.attention.segmented.segment_size for g in self.groups if g.attention.segmented))

    def experts(self) -> dict[str, MoEConfig]:
        """The layer groups of experts, by name."""
        return {f"group_{i}": g.ffn for i, g in enumerate(self.groups) if isinstance(g.ffn, MoEConfig)}

    @property
    def decisions(self) -> tuple[int, int]:
        """Sizes of what routers decide of a token: L layers of experts, and K, the largest ``top_k`` of those."""
        moes = [(n, g.ffn.top_k) for g, n in self.sized_groups() if isinstance(g.ffn, MoEConfig)]
        return sum(n for n, _ in moes), max((top_k for _, top_k in moes), default=0)

    @property
    def decision_dtype(self) -> np.dtype:
        """The type that decisions are told in."""
        return np.result_type(np.int16, *(moe.decision_dtype for moe in self.experts().values()))

    def _dynamic_capacities(self) -> set[DynamicCapacity]:
        return {moe.capacity for moe in self.experts().values() if isinstance(moe.capacity, DynamicCapacity)}

    def dynamic_capacity(self) -> DynamicCapacity | None:
        """What chooses the capacity factor of the layers that have a dynamic one, if there are such."""
        return next(iter(self._dynamic_capacities()), None)

    def sized_groups(self) -> tuple[tuple[LayerGroup, int], ...]:
        """Each group with its number of layers."""
        rest = self.num_layers - sum(g.num_layers or 0 for g in self.groups)
        return tuple((g, g.num_layers or rest) for g in self.groups)

    def _num_params(self, active: bool) -> int:
        V, D = self.vocab_size, self.d_model
        total = (1 if self.tied else 2) * V * D + D
        for group, num_layers in self.sized_groups():
            ffn = group.ffn.num_active_params(D) if active else group.ffn.num_params(D)
            total += num_layers * (group.attention.num_params(D) + ffn + 2 * D)
        if self.ngram is not None:
            total += self.ngram.num_params(D)
        if self.copy is not None:
            total += self.copy.num_params(V, D)
        if self.structure is not None:
            total += self.structure.num_params(D)
        if self.multi_token is not None and not active:
            last = self.groups[-1]
            block = last.attention.num_params(D) + last.ffn.num_params(D) + 2 * D
            total += self.multi_token.num_modules * (block + 2 * D * D + 3 * D)
        if self.values == "head" and not active:
            total += D
        if self.critic is not None and not active:
            total += self.critic.num_params() - (0 if self.tied else V * D)
        return total

    def num_params(self) -> int:
        """Parameters in all: what the optimizer moves. Buffers (the selection bias of experts) are not counted."""
        return self._num_params(active=False)

    def num_active_params(self) -> int:
        """Parameters that one token can use: all but the experts that it does not visit. Tables count whole.

        Modules that predict further tokens are not counted, nor is what makes values.
        """
        return self._num_params(active=True)

    def flops_per_token(self, seq_len: int, *, training: bool = True) -> float:
        """FLOPs of one token's matmuls, at full documents of ``seq_len``.

        Two for each weight of a matmul (an embedding look-up is none), and two for each channel of the products with
        the key and with the value of each (query, visible key) pair; a training step does three times the forward
        work (no remat counted), and has values.
        """
        pairs = 0.0
        for attention, layer, num_layers in self.attentions():
            pairs += num_layers * attention.pair_products(seq_len, layer) / seq_len
        if not training:
            return 2 * (self.num_matmul_params() + pairs)
        further = 0.0
        if self.multi_token is not None:
            D, a, ffn = self.d_model, self.groups[-1].attention, self.groups[-1].ffn
            weights = a.num_matmul_params(D) + ffn.num_active_params(D) + (2 * D + self.vocab_size) * D
            further = self.multi_token.num_modules * (weights + a.pair_products(seq_len) / seq_len)
        if self.values == "head":
            further += self.d_model
        if self.critic is not None:
            further += self.critic.num_matmul_params() - self.vocab_size * self.d_model + self.d_model + pairs
        return 6 * (self.num_matmul_params() + pairs + further)

    def num_matmul_params(self) -> int:
        """Weights that one token is multiplied with."""
        D = self.d_model
        weights = self.vocab_size * D
        if self.ngram is not None:
            weights += len(self.ngram.sizes) * self.ngram.d_table * D
        if self.structure is not None:
            weights += self.structure.num_matmul_params(D)
        for group, num_layers in self.sized_groups():
            weights += num_layers * (group.attention.num_matmul_params(D) + group.ffn.num_active_params(D))
        return weights

    def attentions(self) -> Iterator[tuple[AttentionConfig | LatentAttentionConfig, int, int]]:
        """Layers of a group that see the same: their attention, the number of the first one, and how many they are."""
        first = 0
        for group, num_layers in self.sized_groups():
            turn = len(group.attention.masks())
            for place in range(min(turn, num_layers)):
                yield group.attention, first + place, len(range(place, num_layers, turn))
            first += num_layers

    def kv_bytes(self, length: int, dtype: Any = "bfloat16") -> int:
        """Bytes of the decode cache of one sequence of ``length`` positions."""
        total = 0
        for group, num_layers in self.sized_groups():
            (slots, sums), (key, value) = group.attention.cache_size(length), group.attention.cached_widths
            heads = num_layers * group.attention.num_cached_heads
            total += heads * ((key + value) * slots * jnp.dtype(dtype).itemsize + key * sums * 4)
        return total

    def kv_bytes_per_token(self, dtype: Any = "bfloat16", length: int | None = None) -> float:
        """Bytes of the decode cache for each of ``length`` positions of a sequence; None: for one more of a long one.

        Segments that are not full count as part of the whole ones: a mean.
        """
        if length is not None:
            return self.kv_bytes(length, dtype) / length
        return (self.kv_bytes(3 * self.turn, dtype) - self.kv_bytes(2 * self.turn, dtype)) / self.turn


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed: nothing here changes what it computes.

    Attributes:
        dtype: of matmuls and activations; weights, norms, softmax and loss stay float32.
        remat: what the backward pass recomputes: nothing, everything but matmul outputs, or everything.
        unroll: write the layers of a group out instead of scanning over them: faster on CPU, longer to compile.
        loss_chunk: positions T whose logits exist at a time; 0: all.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    unroll: bool = False
    loss_chunk: NonNegativeInt = 0
