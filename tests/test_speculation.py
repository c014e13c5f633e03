"""Decoding with drafts gives what decoding without them gives, token for token, and needs fewer steps for it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_folders import deepseek, random_tensors, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ATTENTION, V, graph, random_tokens, weights
from test_engine_requests import bytes_tokenizer, compilations

import dsjax
from dsjax.config import UserError
from dsjax.infer.batching import Engine
from dsjax.infer.requests import Drafts, Request
from dsjax.infer.sampling import SamplingConfig
from dsjax.infer.speculation import num_drafting
from dsjax.models.decoder import DecoderConfig, DecoderOutput, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.latent_attention import LatentAttentionConfig
from dsjax.nn.masks import Documents, Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.moe import MoEConfig
from dsjax.nn.rope import rope_angles

GREEDY, HOT = SamplingConfig(0.0), SamplingConfig(1.5, 0, 1.0)
SIZE, DRAFT = 64, 3
PLAIN = dataclasses.replace(ATTENTION, qk_norm=False, conv_taps=0)
EXPERTS = MoEConfig(num_experts=4, top_k=2, d_ff=8, num_shared_experts=1, scoring="sigmoid", selection_bias=True)
LATENT = LatentAttentionConfig(num_heads=4, q_rank=12, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=8)


def model(attention: Any, ffn: Any = MLPConfig(d_ff=24), modules: int = 1) -> DecoderConfig:
    return DecoderConfig(V, 16, 2, (LayerGroup(ffn, attention),), multi_token=MultiTokenConfig(modules))


MODELS = {
    "grouped": model(PLAIN),
    "all heads, two modules": model(dataclasses.replace(PLAIN, num_kv_heads=4), modules=2),
    "window": model(dataclasses.replace(PLAIN, window=5)),
    "latent experts": model(LATENT, EXPERTS),
}


def planted(cfg: DecoderConfig, by_layers: float) -> Any:
    """Random weights of a model that nearly goes by the last token alone, and of modules that do, too.

    What layers add to the residual stream is ``by_layers`` of what is random; so modules are as often right as that is
    little. A module takes the embedding of its token, and the model's output norm.
    """
    params, D = weights(cfg), cfg.d_model
    for block in (params["group_0"], params["multi_token"]["block"]):
        outs = [(block["attention"], "w_out"), (block["ffn"], "w_down")]
        if "shared" in block["ffn"]:
            outs.append((block["ffn"]["shared"], "w_down"))
        for part, name in outs:
            part[name] = part[name] * by_layers
    further = params["multi_token"]
    further["w_join"] = jnp.zeros_like(further["w_join"]).at[:, 0].set(jnp.eye(D))
    further["embedding_norm"]["scale"] = jnp.ones_like(further["embedding_norm"]["scale"])
    further["final_norm"]["scale"] = jnp.broadcast_to(
        params["final_norm"]["scale"], further["final_norm"]["scale"].shape
    )
    return params


@functools.cache
def params(name: str, by_layers: float = 0.5) -> Any:
    return planted(MODELS[name], by_layers)


def new_engine(name: str, draft: int, by_layers: float = 0.5, **options: Any) -> Engine:
    """Room for less than two rows at full length: requests are preempted."""
    chosen = {"end_ids": (), "max_length": SIZE, "batch_size": 3, "page_size": 4, "chunk": 8, "steps": 3}
    chosen |= {"num_positions": 100, "tokenizer": bytes_tokenizer(), "top_log_probs": 2} | options
    return Engine(graph(MODELS[name]), params(name, by_layers), draft=draft, **chosen)


engine = functools.cache(new_engine)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random_tokens(1, length, seed)[0].tolist()


# ---------------------------------------------------------------- the same tokens


@st.composite
def requests(draw: st.DrawFn) -> Request:
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    sampling = SamplingConfig(pick(0.0, 0.7, 1.5), pick(0, 5), pick(1.0, 0.9), pick(0.0, 0.1))
    return Request(
        prompt(draw(st.integers(1, 40)), pick(0, 1)),
        draw(st.integers(1, 20)),
        sampling,
        seed=draw(st.integers(0, 3)),
        num_samples=pick(1, 1, 2),
        end_ids=pick((), (), (3, 17)),
        stop=pick((), (), ("#",), ("$%", "&")),
        first_tokens=pick(None, None, np.arange(V) % 2 == 0),
        top_log_probs=pick(0, 2),
    )


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=10, deadline=None)
@given(asked=st.lists(requests(), min_size=1, max_size=5))
def test_what_comes_out_is_what_comes_out_without_drafts(name: str, asked: list[Request]) -> None:
    """In a crowd, with prompts in chunks, prefixes of earlier ones, and too few pages."""
    plain, drafting = engine(name, 0), engine(name, DRAFT)
    numbers = [(plain.submit(request), drafting.submit(request)) for request in asked]
    want, got = plain.run(), drafting.run()
    for theirs, mine in numbers:
        for one, other in zip(want[theirs], got[mine], strict=True):
            assert (other.tokens, other.text, other.finish) == (one.tokens, one.text, one.finish)
            # float32 logits of four positions at a time in place of one
            np.testing.assert_allclose(other.log_probs, one.log_probs, atol=1e-4)
            assert [[i for i, _ in top] for top in other.top] == [[i for i, _ in top] for top in one.top]
            assert one.drafts == Drafts()
            assert other.drafts.proposed == DRAFT * other.drafts.steps


def test_that_is_tried_with_all_there_is() -> None:
    """The engines above have preempted, taken over prefixes, and accepted some drafts and others not."""
    for name in MODELS:
        made = engine(name, DRAFT)
        for _ in range(2):
            for seed in range(3):
                made.submit(Request(prompt(30, seed), 25, HOT, seed, num_samples=2))
            made.run()
        assert made.counts.preempted > 0 or name == "window"  # whose rows need few pages
        assert made.counts.reused > 0
        assert 0.1 < made.counts.drafts.share < 0.95


# ---------------------------------------------------------------- the drafts


@functools.cache
def uncached(name: str) -> tuple[Any, Any]:
    """Hidden states of a whole row; and a module on a whole row: what it puts out, and the likeliest token there."""
    cfg, definition = MODELS[name], graph(MODELS[name])
    a = cfg.groups[-1].attention

    @jax.jit
    def hidden(params: Any, tokens_T: Any) -> Any:
        return nnx.merge(definition, params)(tokens_T[None]).hidden_BTD[0]

    @functools.partial(jax.jit, static_argnums=1)
    def module(params: Any, number: int, hidden_TD: Any, next_T: Any) -> Any:
        whole = nnx.merge(definition, params)
        one = nnx.merge(*jax.tree.map(lambda x: x[number], nnx.split(whole.multi_token)))
        documents = Documents.single(next_T[None])
        rope = rope_angles(documents.positions_BT, a.rope_width, a.rope_theta, a.rope_scaling)
        embedded_BTD = whole.embedding[...][next_T[None]]
        out = one(hidden_TD[None], embedded_BTD, documents, rope, depth=cfg.num_layers + number)[0]
        return out[0], jnp.argmax(whole.logits(DecoderOutput(out, None, {}, {}, None))[0], axis=-1)

    return functools.partial(hidden, params(name)), functools.partial(module, params(name))


def padded(row: list[int]) -> np.ndarray:
    return np.pad(np.array(row, np.int32), (0, SIZE - len(row)))


def drafted(name: str, row: list[int]) -> list[int]:
    """What modules say comes behind a row, each on whole rows as in training, the last one again on what it says."""
    hidden, module = uncached(name)
    length, num_modules, row = len(row) - 1, MODELS[name].multi_token.num_modules, list(row)
    given = np.array(hidden(padded(row)))
    for n in range(DRAFT):
        number, last = min(n, num_modules - 1), length - 1 + max(n - num_modules + 1, 0)
        out, says_T = module(number, given, padded(row[number + 1 :]))
        row.append(int(says_T[last]))
        if n + 1 < num_modules:
            given = np.array(out)
        else:
            given[last + 1] = out[last]
    return row[length + 1 :]


@pytest.mark.parametrize("name", MODELS)
def test_drafts_are_what_modules_say_of_whole_rows(name: str) -> None:
    """After prompts in chunks, behind taken-over prefixes, for samples of one prompt: seen by what is accepted."""
    made, total = engine(name, DRAFT), Drafts()
    while made.prefixes.forget():
        pass
    for length, samples in ((1, 1), (2, 1), (19, 1), (23, 1), (16, 2)):
        row = prompt(length, 5)
        rows = [list(row) for _ in range(samples)]
        before = made.counts.reused
        for event in made.stream(Request(row, 18, GREEDY, num_samples=samples)):
            mine, at, accepted = rows[event.sample], len(rows[event.sample]), 0
            mine += event.tokens
            for _ in range(0 if event.ended else event.drafts.steps):
                says = drafted(name, mine[: at + 1])
                right = int(np.cumprod(np.array(says) == padded(mine)[at + 1 : at + 1 + DRAFT]).sum())
                accepted, at = accepted + right, at + 1 + right
            if not event.ended:
                assert (event.drafts.accepted, at) == (accepted, len(mine)), (length, at)
            total += event.drafts
        assert (made.counts.reused > before) == (length in (23, 16))
    assert 0.1 < total.share < 0.95


@pytest.mark.parametrize("sampling", [GREEDY, HOT, SamplingConfig(1.0, 8, 0.9, 0.05)])
@pytest.mark.parametrize("name", ["grouped", "all heads, two modules", "latent experts"])
def test_right_drafts_are_all_accepted(name: str, sampling: SamplingConfig) -> None:
    """Modules that say what the model says: drawn with the same keys, so are the tokens."""
    made = new_engine(name, DRAFT, by_layers=0.0)
    number = made.submit(Request(prompt(9), 40, sampling))
    (got,) = made.run()[number]
    assert len(got.tokens) == 40
    assert got.drafts == made.counts.drafts == Drafts(30, 30, 10)
    assert str(got.drafts) == "accepted 100% of 3 drafts a step, 4.0 tokens a step"


# ---------------------------------------------------------------- around it


def test_nothing_is_compiled_after_warming_up() -> None:
    made = new_engine("grouped", 2, page_size=2, batch_size=4)  # which no other test has
    with compilations() as before:
        made.warm_up()
    assert before
    with compilations() as after:
        for seed, length in enumerate((1, 17, 30, 8, 30)):
            made.submit(Request(prompt(length, seed), 9, HOT, seed, num_samples=1 + seed % 3, top_log_probs=1))
            made.submit(Request(prompt(length), 5, GREEDY, first_tokens=np.arange(V) > 3))
            made.step()
        made.cancel(3)
        made.run()
    assert made.counts.reused > 0
    assert not after


def test_a_model_that_can_not_draft_says_why() -> None:
    config = MODELS["grouped"]
    assert num_drafting(config, 0) == 0
    assert num_drafting(config, 4) == 1
    assert num_drafting(MODELS["all heads, two modules"], 1) == 1
    without = dataclasses.replace(config, multi_token=None)
    with pytest.raises(
        UserError, match=r"draft is 2, but the model has no module of multi-token prediction to draft w"
    ):
        Engine(graph(without), weights(without), end_ids=(), max_length=8, draft=2)
    with pytest.raises(UserError, match="draft is -1; it must be at least 0"):
        num_drafting(config, -1)
    for changes, kind in (({"conv_taps": 3}, "a short convolution"), ({"segmented": Segmented(8)}, "segmented attent")):
        group = LayerGroup(MLPConfig(24), dataclasses.replace(PLAIN, **changes))
        with pytest.raises(UserError, match=f"draft is 1, but group_0 of the model has {kind}.*can not take back"):
            num_drafting(dataclasses.replace(config, groups=(group,)), 1)


def test_a_folders_module_is_loaded_and_drafts(tmp_path: pathlib.Path) -> None:
    """Logits are what they are without it."""
    config = deepseek(num_nextn_predict_layers=1)
    tensors, extra = random_tensors(config), f"model.layers.{config['num_hidden_layers']}."
    fewer = {name: x for name, x in tensors.items() if not name.startswith(extra)}
    models = [
        dsjax.load(write_folder(tmp_path / name, config, some))
        for name, some in (("with", tensors), ("without", fewer))
    ]
    assert [m.config.multi_token is not None for m in models] == [True, False]
    tokens_BT = random_tokens(2, 12)
    np.testing.assert_array_equal(models[0].logits(tokens_BT), models[1].logits(tokens_BT))
    found = []
    for loaded, draft in zip(models, (2, 0), strict=True):
        made = Engine(loaded.graph, loaded.params, end_ids=(), max_length=40, batch_size=1, chunk=16, draft=draft)
        number = made.submit(Request(tokens_BT[0].tolist(), 12, SamplingConfig(1.0)))
        found.append(made.run()[number][0].tokens)
    assert made.counts.drafts == Drafts()
    assert found[0] == found[1]
