"""The engine with models that are told the structure of their text: each request is as if it were read alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import ATTENTION, graph, weights
from test_engine_requests import compilations
from test_grammar_engine import V, grammar, tokenizer

from dsjax.config import UserError
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.stored import scanner
from dsjax.infer.batching import Engine
from dsjax.infer.engine import complete, heal
from dsjax.infer.grammar.constraint import parses
from dsjax.infer.requests import Completion, Request
from dsjax.infer.sampling import RowSampling, SamplingConfig, sample_rows
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.fields import NUM_FIELDS
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.structure import StructureConfig
from dsjax.sharding import MeshConfig, make_mesh

GREEDY, HOT = SamplingConfig(0.0), SamplingConfig(1.0, 0, 1.0)
LENGTH = 96


def model(**attention: Any) -> DecoderConfig:
    options = {"num_heads": 8, "num_kv_heads": 4, "qk_norm": False, "conv_taps": 0} | attention
    group = LayerGroup(MLPConfig(d_ff=24), dataclasses.replace(ATTENTION, **options))
    structure = StructureConfig(pointers=("block", "bracket", "name", "same"))
    return DecoderConfig(V, 16, 2, (group,), structure=structure)


# What a row has beside its pages: levels and ends of scopes, inputs of a convolution. A window gives pages back.
MODELS = {
    "inputs": model(),
    "scoped": model(scope_heads=3),
    "window": model(scope_heads=2, window=9),
    "conv": model(scope_heads=4, conv_taps=3),
}


SOME = [name if name in ("scoped", "window") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@functools.cache
def params(name: str) -> Any:
    return weights(MODELS[name])


def engine(name: str, **options: Any) -> Engine:
    chosen = {"end_ids": [tokenizer().end_id], "max_length": LENGTH, "batch_size": 4, "page_size": 4, "chunk": 8}
    return Engine(graph(MODELS[name]), params(name), **chosen | {"tokenizer": tokenizer(), "steps": 3} | options)


TEXTS = (
    "x",
    "def f(a, b):\n    return g(a,",
    "class A:\n    def f(self):\n        if x:\n            y = [1, (2, {'a': 3",
    "class A:\n    def f(self):\n        if x:\n            y = 1\n    def g(self):\n        pass\nz = ",
    "if a:\n  b(c)\nelif",
    "for i in range(3):\n    print(i)\nprint('",
)


def tokens_of(text: str) -> list[int]:
    return [tokenizer().end_id, *tokenizer().encode(text).tolist()]


@functools.cache
def at_start() -> Scanner:
    return scanner("python", tokenizer())


@functools.cache
def chosen(name: str) -> Any:
    """The token behind a text, by a forward pass over all of it, and the model's log-probability of that."""
    definition = graph(MODELS[name])

    def run(params, tokens_1T, features_1TC, length, allowed_V, seed, number, settings):
        model = nnx.merge(definition, params)
        logits_V = model.logits(model(tokens_1T, features_BTC=features_1TC))[0, length - 1]
        key = jax.random.fold_in(jax.random.key(seed), number)
        token = sample_rows(jnp.where(allowed_V, logits_V, -jnp.inf)[None], key[None], settings)[0]
        return token, jax.nn.log_softmax(logits_V)[token]

    return jax.jit(run)


def naive(
    name: str, r: Request, sample: int = 0, allowed: Any = None, ends: Sequence[int] = ()
) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities without a cache: the text is read and computed anew for each token.

    ``allowed``: a constraint that says what may come.
    """
    tokens, log_probs = list(r.prompt), list[float]()
    settings = jax.tree.map(jnp.asarray, RowSampling.of([r.sampling]))
    for number in range(r.max_tokens):
        ahead, allowed_V = at_start().copy(), np.ones(V, bool)
        ahead.scan(r.before)
        padded, features = np.zeros((1, LENGTH), np.int32), np.zeros((1, LENGTH, NUM_FIELDS), np.int16)
        padded[0, : len(tokens)], features[0, : len(tokens)] = tokens, ahead.scan(tokens)
        if number == 0 and r.first_tokens is not None:
            allowed_V = np.pad(r.first_tokens, (0, V - len(r.first_tokens)))
        if allowed is not None:
            allowed_V &= np.unpackbits(allowed.row(r.max_tokens - number), bitorder="little")[:V] == 1
        given = (padded, features, len(tokens), allowed_V, np.uint32(r.seed + sample), number, settings)
        token, log_prob = map(float, chosen(name)(params(name), *given))
        if token in ends:
            break
        if allowed is not None:
            allowed.add(int(token))
        tokens.append(int(token))
        log_probs.append(log_prob)
    return tokens[len(r.prompt) :], log_probs


def request(text: str, tokens: int = 12, **options: Any) -> Request:
    return Request(tokens_of(text), tokens, **{"sampling": HOT, "end_ids": ()} | options)


def answers(made: Engine, *requests: Request) -> list[list[Completion]]:
    numbers = [made.submit(r) for r in requests]
    got = made.run()
    return [got[number] for number in numbers]


def check(name: str, got: list[list[Completion]], requests: Sequence[Request]) -> None:
    """All samples are what naive decoding gives."""
    for r, samples in zip(requests, got, strict=True):
        for number, sample in enumerate(samples):
            tokens, log_probs = naive(name, r, number)
            assert sample.tokens == tokens, (r, number)
            # float32 sums in another order, over two layers
            np.testing.assert_allclose(sample.log_probs, log_probs, atol=2e-4)


# ---------------------------------------------------------------- the same tokens


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(0.9, 40, 0.95)], ids=["greedy", "sampled"])
def test_a_crowd_gets_what_each_would_get_alone(name: str, sampling: SamplingConfig) -> None:
    """Prompts over several chunks and pages, more of them than rows."""
    requests = [request(text, 8 + n, sampling=sampling, seed=n) for n, text in enumerate(TEXTS)]
    check(name, answers(engine(name), *requests), requests)


def test_greedy_tokens_are_those_of_generation_in_batches() -> None:
    prompts = [tokens_of(text) for text in TEXTS]
    want = complete(
        graph(MODELS["scoped"]), params("scoped"), prompts, max_tokens=9, end_id=tokenizer().end_id, max_length=LENGTH,
        sampling=GREEDY, scanners=[at_start()] * len(prompts),
    )  # fmt: skip
    got = answers(engine("scoped"), *(Request(prompt, 9, GREEDY) for prompt in prompts))
    assert [samples[0].tokens for samples in got] == want


@pytest.mark.parametrize("steps", [1, 8])
def test_steps_change_nothing(steps: int) -> None:
    requests = [request(text, 11, seed=n) for n, text in enumerate(TEXTS[:3])]
    check("scoped", answers(engine("scoped", steps=steps), *requests), requests)


@pytest.mark.parametrize("name", SOME)
def test_preempted_requests_go_on_as_they_were(name: str) -> None:
    made = engine(name, num_positions=44 if name == "window" else LENGTH + 16)
    requests = [request(text, 24, seed=n) for n, text in enumerate(TEXTS[1:4])]
    got = answers(made, *requests)
    assert made.counts.preempted > 0
    check(name, got, requests)


# ---------------------------------------------------------------- shared pages


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_share_pages_close_what_is_open_apart(name: str) -> None:
    """The first goes on to close all that the shared prompt has open, the others stay inside; all at the same time."""
    shared, made = TEXTS[2], engine(name)
    tails = ("})]\n", ", 4", "}", "})]\nclass B:\n  x = 1\n")
    requests = [request(shared + tail, 14, seed=n) for n, tail in enumerate(tails)]
    assert len({tuple(r.prompt[:16]) for r in requests}) == 1  # two chunks, four pages
    got = answers(made, *requests)
    check(name, got, requests)
    assert made.counts.reused >= 3 * 16
    assert sum(len(r.prompt) for r in requests) == made.counts.prefilled + made.counts.reused
    # And one that comes when all of them have gone.
    (again,) = answers(made, late := request(shared + ", 5", 14, seed=9))
    check(name, [again], [late])


@pytest.mark.parametrize("name", MODELS)
def test_samples_share_a_prompt_that_is_computed_once(name: str) -> None:
    made, r = engine(name), request(TEXTS[2], 16, num_samples=6, seed=3)
    got = answers(made, r)
    assert made.counts.prefilled == len(r.prompt)
    assert made.counts.reused == 5 * len(r.prompt)
    assert len({tuple(sample.tokens) for sample in got[0]}) > 3
    check(name, got, [r])


def test_what_stood_in_front_of_a_prompt_counts_though_it_is_not_seen() -> None:
    """The same prompt inside a class, in brackets, and at the beginning: three texts that share no page."""
    prompt, made = tokenizer().encode("    def f(self, x):\n        return x + (1,").tolist(), engine("scoped")
    before = ([], tokens_of("class A:\n    y = 1\n\n"), tokens_of("foo(\n"))
    requests = [Request(prompt, 10, HOT, end_ids=(), before=tokens) for tokens in before]
    check("scoped", answers(made, *requests), requests)
    assert made.counts.reused == 0
    assert len({tuple(naive("scoped", r)[1]) for r in requests}) == 3  # it makes a difference
    (again,) = answers(made, requests[1])
    assert made.counts.reused >= 8
    check("scoped", [again], [requests[1]])


# ---------------------------------------------------------------- beside what else an engine does


def test_prompts_are_healed_and_texts_end_at_stop_strings() -> None:
    ids, first = heal(tokenizer(), tokens_of("def f(x):\n"))
    r = Request(ids, 12, HOT, end_ids=(), first_tokens=first, healed=tokens_of("def f(x):\n")[-1], num_samples=3)
    (got,) = answers(engine("scoped"), r)
    check("scoped", [got], [r])
    whole = got[0].text
    stop = whole[4:6]
    (stopped,) = answers(engine("scoped"), dataclasses.replace(r, stop=[stop], num_samples=1))
    assert (stopped[0].text, stopped[0].finish) == (whole[: whole.index(stop)], "stop")


def test_a_text_with_a_hole_goes_on_behind_its_prefix() -> None:
    """Any special token begins a text of its own, also when it is drawn."""
    end = tokenizer().end_id
    r = Request([*tokens_of("if x:\n  (y"), end, *tokens_of("z = [")], 12, HOT, end_ids=())
    check("scoped", answers(engine("scoped"), r), [r])


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("scoped", {"data": 2, "tensor": 2, "context": 2}),
        pytest.param("window", {"data": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("conv", {"expert": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_are_one(name: str, axes: dict[str, int]) -> None:
    made = engine(name, mesh=make_mesh(MeshConfig(**{"data": 1} | axes)))
    requests = [request(text, 7, seed=n, num_samples=1 + n % 2) for n, text in enumerate(TEXTS)]
    check(name, answers(made, *requests), requests)


@pytest.mark.parametrize("name", ["scoped", pytest.param("inputs", marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_warming_up(name: str) -> None:
    made = engine(name, page_size=2, batch_size=5, chunk=16, num_positions=220, top_log_probs=1)
    with compilations() as before:
        made.warm_up()
    assert before
    with compilations() as after:
        for seed, text in enumerate(TEXTS):
            made.submit(request(text, 7, seed=seed, num_samples=1 + seed % 3, top_log_probs=1))
            made.submit(request(text, 9, seed=seed, grammar=grammar(), end_ids=None))
            made.step()
        made.cancel(3)
        made.run()
    assert made.counts.reused > 0
    assert not after


# ---------------------------------------------------------------- within a grammar


@pytest.mark.parametrize("name", ["scoped", pytest.param("conv", marks=pytest.mark.slow)])
def test_within_a_grammar_each_token_is_the_one_that_masked_logits_give(name: str) -> None:
    requests = [
        request(text, 20, seed=n, grammar=grammar() if n % 2 else None, end_ids=None) for n, text in enumerate(TEXTS)
    ]
    for r, (got,) in zip(requests, answers(engine(name), *requests), strict=True):
        within = None if r.grammar is None else grammar().begin(r.prompt, [tokenizer().end_id])
        assert got.tokens == naive(name, r, allowed=within, ends=[tokenizer().end_id])[0]


def test_what_an_untrained_model_finishes_parses() -> None:
    requests = [
        request(text, 40, seed=n, grammar=grammar(), end_ids=None, num_samples=3) for n, text in enumerate(TEXTS)
    ]
    made = engine("scoped", num_positions=LENGTH + 16)
    texts = grammar().masks.texts
    ended = [
        b"".join(texts[i] for i in [*r.prompt, *sample.tokens])
        for r, samples in zip(requests, answers(made, *requests), strict=True)
        for sample in samples
        if sample.finish == "end"
    ]
    assert len(ended) >= 15  # of 18
    assert all(parses(text) for text in ended)
    assert made.counts.preempted > 0


def test_a_grammar_knows_what_stood_in_front_of_a_prompt() -> None:
    before, prompt = tokens_of("class A:\n    x = [1,\n"), tokenizer().encode("    2, (").tolist()
    r = Request(prompt, 40, HOT, num_samples=4, grammar=grammar(), before=before)
    for sample in answers(engine("scoped"), r)[0]:
        text = tokenizer().decode([*before[1:], *prompt, *sample.tokens])
        assert sample.finish != "end" or parses(text.encode())
    with pytest.raises(UserError, match="line 2, column"):
        engine("scoped").submit(dataclasses.replace(r, before=tokens_of("class A:\nx")))


# ---------------------------------------------------------------- what is refused


def test_without_a_tokenizer_there_is_nothing_to_read() -> None:
    with pytest.raises(UserError, match="the model has structure, which is read from text: there must be a tokenizer"):
        engine("scoped", tokenizer=None)


def test_structure_goes_without_drafts() -> None:
    cfg = dataclasses.replace(MODELS["inputs"], multi_token=MultiTokenConfig())
    with pytest.raises(UserError, match="draft is 1, but a model with structure is told of each token before the next"):
        Engine(graph(cfg), weights(cfg), end_ids=(), max_length=32, tokenizer=tokenizer(), draft=1)
