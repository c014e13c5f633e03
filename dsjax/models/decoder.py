"""The decoder: every language model of the library is a config of it.

A model is a list of layer groups (one dense layer, then 23 of experts ...). The layers of a group have the same
shapes, so their weights are stacked and the group runs as one `jax.lax.scan`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.config import UserError
from dsjax.models.decoder_config import ComputeConfig, DecoderConfig, LayerGroup
from dsjax.models.multi_token import MULTI_TOKEN, MultiTokenModule, shifted
from dsjax.models.output import DecoderOutput
from dsjax.models.stack import REMAT, Block, kept, scanned, unrolled
from dsjax.nn.cache import PAGE_SIZE, Cache, LayerCache, empty_group, written
from dsjax.nn.history import CopyHead, NgramEmbedding, history_of, longest_match
from dsjax.nn.latent_attention import indexer_loss
from dsjax.nn.masks import Documents
from dsjax.nn.moe import MoE, MoEConfig
from dsjax.nn.norm import RMSNorm
from dsjax.nn.rope import rope_angles
from dsjax.nn.router import RouterStats, RouterSums
from dsjax.nn.structure import Scopes, Structure, with_new_scopes
from dsjax.sharding import Buffer, param, shard, stack_layers

__all__ = ["ComputeConfig", "Decoder", "DecoderConfig", "LayerGroup", "without_values"]


class Decoder(nnx.Module):
    """Embedding, layer groups, final norm; logits apart, since a loss wants them in chunks. So are values."""

    def __init__(
        self,
        cfg: DecoderConfig,
        compute: ComputeConfig = ComputeConfig(),
        *,
        rngs: nnx.Rngs,
        with_logits: bool = True,
    ):
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
        if not cfg.tied and with_logits:
            self.w_logits = param(rngs, (D, V), ("embed", "vocab"), fan_in=D)
        # Last, so that the others are the same with and without.
        if cfg.values == "head":
            self.w_values = param(rngs, (D,), ("embed",), value=0.0)
        if cfg.critic is not None:
            self.critic = Decoder(cfg.critic, compute, rngs=rngs, with_logits=False)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        documents: Documents | None = None,
        *,
        features_BTC: Int[Array, "B T C"] | None = None,
        cache: Cache | None = None,
        cache_is_empty: bool = False,
        experts_BTLK: Int[Array, "B T L K"] | None = None,
        tell_experts: bool = False,
    ) -> DecoderOutput:
        """Hidden states of ``tokens_BT``: whole rows, or the T positions that follow what ``cache`` holds.

        With a cache, padding (document id 0) must stand at the end of a row; it is not counted in the lengths. Who
        knows that the cache holds nothing says so: then attention goes block by block, as in training. ``features_BTC``
        are those of the tokens (:mod:`dsjax.nn.fields`), of a model with ``structure``.

        ``experts_BTLK`` are router decisions to use, as the output has them with ``tell_experts``: by position,
        of all layers of experts. Where a position has -1, the router of that layer decides.
        """
        if (self.cfg.structure is None) != (features_BTC is None):
            raise UserError("a model with structure is run with the features of its tokens, and no other is")
        if experts_BTLK is not None and experts_BTLK.shape != (right := (*tokens_BT.shape, *self.cfg.decisions)):
            raise UserError(f"experts_BTLK has shape {experts_BTLK.shape}; for these tokens and this model: {right}")
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
                given_LBTX = self._given_to(index, experts_BTLK)
                x_BTD, layer_cache, stats = run(x_BTD, documents, history, rope, cache, given_LBTX, tell_experts)
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
        used_BTLK, own_BTLK = self._decisions(router) if tell_experts else (None, None)
        return DecoderOutput(hidden_BTD, cache, router, losses, copy, used_BTLK, own_BTLK)

    def _given_to(self, index: int, experts_BTLK: Any) -> Any:
        """Of decisions those of a group, (L, B, T, X)."""
        counts = [n if isinstance(g.ffn, MoEConfig) else 0 for g, n in self.cfg.sized_groups()]
        if experts_BTLK is None or not counts[index]:
            return None
        first, top_k = sum(counts[:index]), self.cfg.experts()[f"group_{index}"].top_k
        return jnp.moveaxis(experts_BTLK[:, :, first : first + counts[index], :top_k], 2, 0)

    def _decisions(self, router: dict[str, RouterStats]) -> tuple[Any, Any]:
        """What was used and what the routers chose by themselves, (B, T, L, K); none of a model without experts."""
        told = [stats.decisions for stats in router.values()]
        if not told:
            return None, None
        K = self.cfg.decisions[1]
        fill = lambda x: jnp.pad(x, [(0, 0)] * 3 + [(0, K - x.shape[-1])], constant_values=-1)  # noqa: E731
        joined = jax.tree.map(lambda *xs: jnp.moveaxis(jnp.concatenate([fill(x) for x in xs]), 0, 2), *told)
        return joined.used_BTX, joined.own_BTX

    def _with_scopes(self, documents, features_BTC, cache):
        """How long each position can be seen, for heads that see only what is still open."""
        if not self.cfg.scoped:
            return documents, cache
        before = Scopes.none(*features_BTC.shape[:2]) if cache is None else cache.scopes
        lengths_B = jnp.zeros(len(features_BTC), jnp.int32) if cache is None else cache.lengths_B
        scopes = with_new_scopes(before, features_BTC, documents.ids_BT, lengths_B)
        cache = None if cache is None else dataclasses.replace(cache, scopes=scopes)
        return dataclasses.replace(documents, closes_BS=scopes.closes_BS), cache

    def _run_group(self, index, depths, x_BTD, documents, history, rope, cache, given_LBTX, tell_experts, lengths_B):
        graph, state = nnx.split(getattr(self, f"group_{index}"))
        weights, whole, numbers, old = nnx.to_pure_dict(state), {}, None, None
        if cache is not None:
            numbers, old = jnp.arange(len(depths)), cache.groups[index]
            if isinstance(self.cfg.groups[index].ffn, MoEConfig):
                # Cut out of the stack, experts would be copied to be read; whole, only those that have rows are read.
                whole = {name: weights["ffn"].pop(name) for name in MoE.EXPERTS}

        def layer(depth, x_BTD, scanned):
            weights, state, number, given_BTX = scanned
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
                experts_BTX=given_BTX,
                tell_experts=tell_experts,
            )
            return x_BTD, (new, stats)

        attention, wrap = self.cfg.groups[index].attention, lambda layer: layer
        if self.compute.remat != "none" and cache is None:
            wrap = functools.partial(jax.checkpoint, policy=REMAT[self.compute.remat], prevent_cse=False)
        turn = depths[: len(attention.masks())]  # what layers see repeats with it
        layers = [functools.partial(layer, depth) for depth in turn]
        run = unrolled if self.compute.unroll else functools.partial(scanned, differentiable=cache is None)
        of_layers = (weights, old and old.state, numbers, given_LBTX)
        x_BTD, (new, stats) = run(layers, x_BTD, of_layers, len(depths), wrap)
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
        """The routers' losses, already weighted, of some groups of experts: summed over layers, as they stand in L."""
        losses: dict[str, Any] = {}
        experts = self.cfg.experts()
        if MULTI_TOKEN in router:
            experts[MULTI_TOKEN] = next(reversed(experts.values()))  # its layer is like the last ones
        for name in router:
            moe = experts[name]
            for loss, weight in moe.loss_weights().items():
                losses[loss] = losses.get(loss, 0.0) + weight * jnp.sum(router[name].losses[loss])
        return losses

    def moved_buffers(self, router: dict[str, RouterSums]) -> dict[str, Any]:
        """All buffers behind a step whose whole batch has these sums, by group of experts; others stay as they are."""
        moved = nnx.to_pure_dict(nnx.state(self, Buffer))
        for name, sums in router.items():
            path = (*name.split("/"), *(["block"] if name == MULTI_TOKEN else []), "ffn")
            experts: Any = functools.reduce(getattr, path, self)
            if buffers := experts.moved_buffers(sums):
                functools.reduce(operator.getitem, path, moved).update(buffers)
        return moved

    def values(
        self,
        out: DecoderOutput | None,
        tokens_BT: Int[Array, "B T"],
        documents: Documents | None = None,
        features_BTC: Int[Array, "B T C"] | None = None,
    ) -> Float[Array, "B T"]:
        """A number for each position, of what stands up to there; float32.

        Args:
            out: what this model has made of the tokens, from which a head reads them; a decoder of values does not.
            tokens_BT, documents, features_BTC: what was read, which a decoder of values reads, too.

        Raises:
            UserError: the model has no values.
        """
        return self.values_and_output(out, tokens_BT, documents, features_BTC)[0]

    def values_and_output(
        self, out: DecoderOutput | None, tokens_BT: Any, documents: Any = None, features_BTC: Any = None
    ) -> tuple[Float[Array, "B T"], DecoderOutput | None]:
        """The same, and the output of the decoder of values, if there is one: its routers have losses and loads, too.

        The names of its groups for :meth:`moved_buffers` begin with ``critic/``.
        """
        if self.cfg.values == "none":
            raise UserError("model.values is none; a model that is asked for values needs head or decoder")
        if self.cfg.critic is not None:
            own = self.critic(tokens_BT, documents, features_BTC=features_BTC)
            return self.critic.values(own, tokens_BT), own
        assert out is not None, "a head reads the hidden states"
        hidden_BTD, w_D = out.hidden_BTD.astype(jnp.float32), self.w_values[...]
        return jnp.einsum("BTD,D->BT", hidden_BTD, w_D, precision="highest"), None

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


def without_values(graph: Any, variables: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model without what makes its values: its graph and its variables. Others are as they were."""
    model = nnx.merge(graph, variables)
    if model.cfg.values == "none":
        return graph, variables
    cfg = dataclasses.replace(model.cfg, values="none")
    graph = nnx.split(nnx.eval_shape(lambda: Decoder(cfg, model.compute, rngs=nnx.Rngs(0))))[0]
    return graph, {name: x for name, x in variables.items() if name not in ("w_values", "critic")}
