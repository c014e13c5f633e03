"""The decoder: every language model of the library is a config of it.

A model is a list of layer groups (one dense layer, then 23 of experts ...). The layers of a group have the same
shapes, so their weights are stacked and the group runs as one `jax.lax.scan`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeInt, PositiveFloat, PositiveInt, UserError
from dsjax.models.multi_token import MULTI_TOKEN, MultiTokenConfig, MultiTokenModule, shifted
from dsjax.models.output import DecoderOutput
from dsjax.models.stack import REMAT, Block, kept, scanned, unrolled
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.cache import PAGE_SIZE, Cache, LayerCache, empty_group, written
from dsjax.nn.history import CopyConfig, CopyHead, NgramConfig, NgramEmbedding, history_of, longest_match
from dsjax.nn.latent_attention import LatentAttentionConfig, indexer_loss
from dsjax.nn.masks import Documents
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import DynamicCapacity, MoE, MoEConfig
from dsjax.nn.norm import RMSNorm
from dsjax.nn.rope import rope_angles
from dsjax.nn.router import RouterStats, RouterSums
from dsjax.nn.structure import Scopes, Structure, StructureConfig, with_new_scopes
from dsjax.sharding import param, shard, stack_layers


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
    def scoped(self) -> bool:
        """Whether there are heads that see only what is still open."""
        return any(isinstance(g.attention, AttentionConfig) and g.attention.scope_heads for g in self.groups)

    def experts(self) -> dict[str, MoEConfig]:
        """The layer groups of experts, by name."""
        return {f"group_{i}": g.ffn for i, g in enumerate(self.groups) if isinstance(g.ffn, MoEConfig)}

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
        return total

    def num_params(self) -> int:
        """Parameters in all: what the optimizer moves. Buffers (the selection bias of experts) are not counted."""
        return self._num_params(active=False)

    def num_active_params(self) -> int:
        """Parameters that one token can use: all but the experts that it does not visit. Tables count whole.

        Modules that predict further tokens are not counted.
        """
        return self._num_params(active=True)

    def flops_per_token(self, seq_len: int, *, training: bool = True) -> float:
        """FLOPs of one token's matmuls, at full documents of ``seq_len``.

        Two for each weight of a matmul (an embedding look-up is none), and two for each channel of the products with
        the key and with the value of each (query, visible key) pair; a training step does three times the forward
        work (no remat counted).
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
        turn = math.lcm(*(g.attention.segmented.segment_size if g.attention.segmented else 1 for g in self.groups))
        return (self.kv_bytes(3 * turn, dtype) - self.kv_bytes(2 * turn, dtype)) / turn


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


class Decoder(nnx.Module):
    """Embedding, layer groups, final norm; logits apart, since a loss wants them in chunks."""

    def __init__(self, cfg: DecoderConfig, compute: ComputeConfig = ComputeConfig(), *, rngs: nnx.Rngs):
        self.cfg, self.compute = cfg, compute
        V, D = cfg.vocab_size, cfg.d_model
        # A tied embedding must give logits near 1, another one a residual stream that the layers can move.
        self.embedding = param(rngs, (V, D), ("vocab", "embed"), fan_in=D if cfg.tied else 4)
        if cfg.ngram is not None:
            self.ngram = NgramEmbedding(cfg.ngram, D, rngs=rngs)
        if cfg.copy is not None:
            self.copy = CopyHead(cfg.copy, V, D, rngs=rngs)
        if cfg.structure is not None:
            self.structure = Structure(cfg.structure, D, rngs=rngs)
        sizes: dict[str, Any] = {"d_model": D, "num_layers": cfg.num_layers, "norm_eps": cfg.norm_eps}
        for index, (group, num_layers) in enumerate(cfg.sized_groups()):
            make = lambda rngs, group=group: Block(group.attention, group.ffn, **sizes, rngs=rngs)  # noqa: E731
            setattr(self, f"group_{index}", stack_layers(make, num_layers, rngs))
        if cfg.multi_token is not None:
            last = cfg.groups[-1]
            further = lambda rngs: MultiTokenModule(last.attention, last.ffn, **sizes, rngs=rngs)  # noqa: E731
            self.multi_token = stack_layers(further, cfg.multi_token.num_modules, rngs)
        self.final_norm = RMSNorm(D, eps=cfg.norm_eps, rngs=rngs)
        if not cfg.tied:
            self.w_logits = param(rngs, (D, V), ("embed", "vocab"), fan_in=D)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        documents: Documents | None = None,
        *,
        features_BTC: Int[Array, "B T C"] | None = None,
        cache: Cache | None = None,
        cache_is_empty: bool = False,
    ) -> DecoderOutput:
        """Hidden states of ``tokens_BT``: whole rows, or the T positions that follow what ``cache`` holds.

        With a cache, padding (document id 0) must stand at the end of a row; it is not counted in the lengths. Who
        knows that the cache holds nothing says so: then attention goes block by block, as in training. ``features_BTC``
        are those of the tokens (:mod:`dsjax.nn.fields`), of a model with ``structure``.
        """
        if (self.cfg.structure is None) != (features_BTC is None):
            raise UserError("a model with structure is run with the features of its tokens, and no other is")
        documents = Documents.single(tokens_BT) if documents is None else documents
        history, cache = history_of(tokens_BT, documents, cache)
        # One table for all groups that have the same.
        table = functools.cache(functools.partial(rope_angles, history.positions_BT))
        with jax.named_scope("embed"):
            x_BTD = self.embedding[...][tokens_BT]
            if self.cfg.ngram is not None:
                x_BTD = x_BTD + self.ngram(history, self.compute.dtype)
            if self.cfg.copy is not None:
                match = longest_match(history, self.cfg.copy.max_match)
                x_BTD = x_BTD + self.copy.embed(*match)
            if features_BTC is not None:
                x_BTD = x_BTD + self.structure(features_BTC, history, self.embedding[...], self.compute.dtype)
                documents, cache = self._with_scopes(documents, features_BTC, cache)
            x_BTD = shard(x_BTD.astype(self.compute.dtype), "batch", "length", None)

        caches, router = [], {}
        lengths_B = None if cache is None or cache_is_empty else cache.lengths_B
        depth = 0
        for index, (group, num_layers) in enumerate(self.cfg.sized_groups()):
            a = group.attention
            with jax.named_scope(f"group_{index}"):
                rope = table(a.rope_width, a.rope_theta, a.rope_scaling)
                run = functools.partial(self._run_group, index, range(depth, depth + num_layers), lengths_B=lengths_B)
                x_BTD, layer_cache, stats = run(x_BTD, documents, history, rope, cache)
            caches.append(layer_cache)
            depth += num_layers
            if stats is not None:
                router[f"group_{index}"] = stats
        if cache is not None:
            new_B = jnp.sum(documents.ids_BT > 0, axis=1, dtype=jnp.int32)
            of_modules = cache.groups[len(caches) :]
            cache = Cache((*caches, *of_modules), cache.lengths_B + new_B, cache.tokens_BS, cache.scopes)
        hidden_BTD = self.final_norm(x_BTD)
        copy = self.copy.bonus(hidden_BTD, *match) if self.cfg.copy is not None else None
        losses = self.auxiliary_losses(router)
        if cache is None:
            losses |= indexer_loss([group.attention for group in self.cfg.groups], caches)
        return DecoderOutput(hidden_BTD, cache, router, losses, copy)

    def _with_scopes(self, documents, features_BTC, cache):
        """How long each position can be seen, for heads that see only what is still open."""
        if not self.cfg.scoped:
            return documents, cache
        before = Scopes.none(*features_BTC.shape[:2]) if cache is None else cache.scopes
        lengths_B = jnp.zeros(len(features_BTC), jnp.int32) if cache is None else cache.lengths_B
        scopes = with_new_scopes(before, features_BTC, documents.ids_BT, lengths_B)
        cache = None if cache is None else dataclasses.replace(cache, scopes=scopes)
        return dataclasses.replace(documents, closes_BS=scopes.closes_BS), cache

    def _run_group(self, index, depths, x_BTD, documents, history, rope, cache, lengths_B):
        graph, state = nnx.split(getattr(self, f"group_{index}"))
        weights, whole, numbers, old = nnx.to_pure_dict(state), {}, None, None
        if cache is not None:
            numbers, old = jnp.arange(len(depths)), cache.groups[index]
            if isinstance(self.cfg.groups[index].ffn, MoEConfig):
                # Cut out of the stack, experts would be copied to be read; whole, only those that have rows are read.
                whole = {name: weights["ffn"].pop(name) for name in MoE.EXPERTS}

        def layer(depth, x_BTD, scanned):
            weights, state, number = scanned
            if whole:
                weights = weights | {"ffn": weights["ffn"] | whole}
            x_BTD, new, stats = nnx.merge(graph, weights)(
                x_BTD,
                documents=documents,
                positions_BT=history.positions_BT,
                rope=rope,
                depth=depth,
                cache=None
                if old is None
                else LayerCache(old.pages, number, state, attention.cache_size(history.tokens_BS.shape[1])[0]),
                lengths_B=lengths_B,
            )
            return x_BTD, (new, stats)

        attention, wrap = self.cfg.groups[index].attention, lambda layer: layer
        if self.compute.remat != "none" and cache is None:
            wrap = functools.partial(jax.checkpoint, policy=REMAT[self.compute.remat], prevent_cse=False)
        turn = depths[: len(attention.masks())]  # what layers see repeats with it
        layers = [functools.partial(layer, depth) for depth in turn]
        run = unrolled if self.compute.unroll else functools.partial(scanned, differentiable=cache is None)
        x_BTD, (new, stats) = run(layers, x_BTD, (weights, old and old.state, numbers), len(depths), wrap)
        if old is None:
            return x_BTD, new, stats  # what layers make without a cache: the losses of their indexers, or None
        if lengths_B is None:
            return x_BTD, written(old, new, None), stats
        masks = [attention.mask(depth) for depth in turn]
        return x_BTD, kept(old, new, masks, documents, lengths_B, x_BTD, in_order=self.compute.unroll), stats

    def further_hidden(
        self, out: DecoderOutput, tokens_BT: Int[Array, "B T"], documents: Documents
    ) -> tuple[list[Float[Array, "B T D"]], RouterStats | None]:
        """Of each module of ``multi_token`` the hidden states that predict one token more (DeepSeek-V3, section 2.2).

        At position i the n-th, from 1, sees the tokens up to i + n, and predicts i + n + 1. What a position says whose
        i + n is in another document, or behind the row, means nothing (:func:`dsjax.models.multi_token.ahead`).

        Returns:
            Hidden states, to be turned into logits as those of ``out`` are; and what the modules' routers did.
        """
        assert self.cfg.multi_token is not None
        graph, state = nnx.split(self.multi_token)
        a, hidden_BTD, stats = self.cfg.groups[-1].attention, out.hidden_BTD, []
        rope, found = rope_angles(documents.positions_BT, a.rope_width, a.rope_theta, a.rope_scaling), []
        for number in range(self.cfg.multi_token.num_modules):

            def run(weights: Any, hidden_BTD: Any, number: int = number) -> Any:
                module = nnx.merge(graph, jax.tree.map(lambda x: x[number], weights))
                embedded_BTD = self.embedding[...][shifted(tokens_BT, number + 1)].astype(self.compute.dtype)
                found = module(hidden_BTD, embedded_BTD, documents, rope, depth=self.cfg.num_layers + number)
                return found[0], found[2]

            if self.compute.remat != "none":
                run = jax.checkpoint(run, policy=REMAT[self.compute.remat], prevent_cse=False)
            hidden_BTD, own = run(state, hidden_BTD)
            found.append(hidden_BTD)
            stats.append(own)
        return found, None if stats[0] is None else jax.tree.map(lambda *xs: jnp.stack(xs), *stats)

    def draft_hidden(
        self,
        number: int,
        hidden_BTD: Float[Array, "B T D"],
        tokens_BT: Int[Array, "B T"],
        ids_BT: Int[Array, "B T"],
        lengths_B: Int[Array, B],
        cache: Cache,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The same of module ``number``, from 0, for the T positions behind the first ``lengths_B`` of each row.

        Args:
            number: of the module.
            hidden_BTD: of the model, or of the module before, at these positions.
            tokens_BT: the tokens ``number + 1`` places ahead of them.
            ids_BT: 0 for padding, which stands at the end of a row.
            lengths_B: how many positions of its own cache the module looks at.
            cache: with those of the modules.

        Returns:
            Hidden states, and the cache with the positions written; its lengths, the model's, are as they were.
        """
        (graph, state), index = nnx.split(self.multi_token), len(self.cfg.groups) + number
        stack, a, old = nnx.to_pure_dict(state), self.cfg.groups[-1].attention, cache.groups[index]
        weights = jax.tree.map(lambda x: x[number], stack)
        if isinstance(self.cfg.groups[-1].ffn, MoEConfig):  # a cached layer has the experts of its whole group
            experts = {name: stack["block"]["ffn"][name] for name in MoE.EXPERTS}
            weights["block"]["ffn"] |= {name: w[number : number + 1] for name, w in experts.items()}
        positions_BT = lengths_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        documents, depth = Documents(ids_BT, positions_BT), self.cfg.num_layers + number
        with jax.named_scope(f"module_{number}"):
            state = jax.tree.map(lambda x: x[0], old.state)
            hidden_BTD, made, _ = nnx.merge(graph, weights)(
                hidden_BTD,
                self.embedding[...][tokens_BT].astype(self.compute.dtype),
                documents,
                rope_angles(positions_BT, a.rope_width, a.rope_theta, a.rope_scaling),
                depth=depth,
                cache=LayerCache(old.pages, jnp.int32(0), state, a.cache_size(cache.tokens_BS.shape[1])[0]),
                lengths_B=lengths_B,
            )
            made = jax.tree.map(lambda x: x[None], made)
            at = (documents, lengths_B, hidden_BTD)
            new = kept(old, made, [a.mask(depth)], *at, in_order=self.compute.unroll)
        return hidden_BTD, dataclasses.replace(cache, groups=(*cache.groups[:index], new, *cache.groups[index + 1 :]))

    def auxiliary_losses(self, router: dict[str, RouterStats]) -> dict[str, Float[Array, ""]]:
        """The routers' losses, already weighted, of some groups of experts."""
        losses: dict[str, Any] = {}
        experts = self.cfg.experts()
        if MULTI_TOKEN in router:
            experts[MULTI_TOKEN] = next(reversed(experts.values()))  # its layer is like the last ones
        for name in router:
            moe = experts[name]
            for loss, weight in moe.loss_weights().items():
                losses[loss] = losses.get(loss, 0.0) + weight * jnp.mean(router[name].losses[loss])
        return losses

    def moved_buffers(self, router: dict[str, RouterSums]) -> dict[str, Any]:
        """All buffers behind a step whose whole batch has these sums, by group of experts."""
        moved: dict[str, Any] = {}
        for name, sums in router.items():
            block: Any = getattr(self, name)
            block = block.block if name == MULTI_TOKEN else block
            if buffers := block.ffn.moved_buffers(sums):
                moved[name] = {"block": {"ffn": buffers}} if name == MULTI_TOKEN else {"ffn": buffers}
        return moved

    def output_weights(self) -> Float[Array, "D V"]:
        """The matrix that turns hidden states into logits."""
        return self.embedding[...].T if self.cfg.tied else self.w_logits[...]

    def logits(self, out: DecoderOutput) -> Float[Array, "B T V"]:
        """Scores of the next token, float32."""
        dtype = out.hidden_BTD.dtype
        if self.cfg.tied:
            # The result turned, not the embedding: XLA:CPU would copy that for each token. And the embedding in front:
            # behind, for two to a few dozen rows it takes up to twice as long.
            w_VD = self.embedding[...].astype(dtype)
            logits_BTV = jnp.einsum("VD,BTD->VBT", w_VD, out.hidden_BTD).transpose(1, 2, 0).astype(jnp.float32)
        else:
            logits_BTV = jnp.einsum("BTD,DV->BTV", out.hidden_BTD, self.w_logits[...].astype(dtype)).astype(jnp.float32)
        if out.copy is not None:
            chosen_BTV = jnp.arange(self.cfg.vocab_size) == out.copy.token_BT[..., None]
            logits_BTV = logits_BTV + jnp.where(chosen_BTV, out.copy.bonus_BT[..., None], 0)
        return shard(logits_BTV, "batch", "length", "vocab")

    def empty_cache(
        self,
        batch: int,
        slots: int,
        dtype: Any = None,
        *,
        page_size: int = PAGE_SIZE,
        parts: tuple[int, int] = (1, 1),
        lanes: int = 1,
        pools: Sequence[int] | None = None,
        num_drafting: int = 0,
    ) -> Cache:
        """A cache for ``batch`` sequences of up to ``slots`` positions (see :func:`dsjax.nn.cache.empty_pages`).

        ``pools``: of each group, the pages of a device's pool, which no sequence owns yet. ``num_drafting``: of so many
        modules of ``multi_token``, from the first on, there is a group each behind those of the model.
        """
        dtype, groups = dtype or self.compute.dtype, []
        of_modules = [(self.cfg.groups[-1], 1)] * num_drafting
        for index, (g, num_layers) in enumerate([*self.cfg.sized_groups(), *of_modules]):
            a, pool = g.attention, None if pools is None else pools[index]
            conv = (max(a.conv_taps - 1, 0), self.cfg.d_model)
            layout: dict[str, Any] = {"page_size": page_size, "parts": parts, "lanes": lanes, "pool": pool}
            sizes = (a.cache_size(slots), (a.num_cached_heads, *a.cached_widths), conv)
            groups.append(empty_group(num_layers, batch, *sizes, dtype, **layout))
        scopes = Scopes.none(batch, slots) if self.cfg.scoped else None
        return Cache(tuple(groups), jnp.zeros(batch, jnp.int32), jnp.zeros((batch, slots), jnp.int32), scopes)
