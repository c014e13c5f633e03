"""The engine within a grammar: programs that parse, whatever the model; and what else an engine does stays as it is."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import ATTENTION, graph, weights

from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer, train_tokenizer
from dsjax.infer.batching import Engine
from dsjax.infer.engine import heal
from dsjax.infer.grammar import Constraint, PythonGrammar
from dsjax.infer.grammar.constraint import parses
from dsjax.infer.requests import Completion, Request
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.masks import Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.sharding import MeshConfig, make_mesh

V = 384
HOT = SamplingConfig(1.0, 0, 1.0)


@functools.cache
def tokenizer() -> Tokenizer:
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    return train_tokenizer([(library / name).read_text() for name in ("ast.py", "copy.py", "textwrap.py")], V)


@functools.cache
def grammar(finish: bool = True) -> PythonGrammar:
    return PythonGrammar(tokenizer(), finish=finish)


def model(**options: Any) -> DecoderConfig:
    attention = dataclasses.replace(ATTENTION, num_heads=8, num_kv_heads=4, qk_norm=False, conv_taps=0)
    attention = dataclasses.replace(attention, **options)
    return DecoderConfig(V, 16, 2, (LayerGroup(MLPConfig(d_ff=24), attention),))


def engine(config: DecoderConfig | None = None, **options: Any) -> Engine:
    config = config or model()
    chosen = {
        "end_ids": [tokenizer().end_id],
        "max_length": 96,
        "batch_size": 4,
        "page_size": 4,
        "chunk": 8,
        "steps": 3,
    }
    return Engine(graph(config), weights(config), tokenizer=tokenizer(), **chosen | options)


def request(prompt: str = "", tokens: int = 40, **options: Any) -> Request:
    ids = [tokenizer().end_id, *tokenizer().encode(prompt).tolist()]
    return Request(ids, tokens, HOT, **{"grammar": grammar()} | options)


def answers(made: Engine, *requests: Request) -> list[list[Completion]]:
    numbers = [made.submit(r) for r in requests]
    got = made.run()
    return [got[number] for number in numbers]


def tokens_of(got: list[list[Completion]]) -> list[list[list[int]]]:
    return [[sample.tokens for sample in samples] for samples in got]


def whole(r: Request, got: Completion) -> bytes:
    """Prompt and continuation, by the bytes of their tokens."""
    texts = grammar().masks.texts
    return b"".join(texts[i] for i in [*r.prompt, *got.tokens])


PROMPTS = ("", "def f(x):\n    return", "x = [1, 'a", "if x:\n\ty\n", "class A:\n    def f(self", "f'{a", "import ")


@functools.cache
def alone(config: DecoderConfig | None = None) -> list[list[Completion]]:
    return [answers(engine(config), request(prompt, seed=n, num_samples=2))[0] for n, prompt in enumerate(PROMPTS)]


# ---------------------------------------------------------------- programs


def test_what_an_untrained_model_finishes_parses() -> None:
    made, requests = (
        engine(batch_size=8, steps=8),
        [request(p, seed=10 * n, num_samples=4) for n, p in enumerate(PROMPTS)],
    )
    got = [(r, sample) for r, samples in zip(requests, answers(made, *requests), strict=True) for sample in samples]
    ended = [(r, sample) for r, sample in got if sample.finish == "end"]
    assert all(parses(whole(r, sample)) for r, sample in ended)
    assert len(ended) >= 0.9 * len(got)  # the shortest way to the end is taken in time, but for an unlucky last token
    free = answers(engine(batch_size=8), *(request(p, grammar=None, num_samples=4) for p in PROMPTS))
    parsed = [parses(whole(r, s)) for r, samples in zip(requests, free, strict=True) for s in samples]
    assert sum(parsed) <= len(parsed) / 4  # the grammar did it


def test_each_token_is_the_one_that_masked_logits_give() -> None:
    """By hand: the model's logits where the grammar allows, the noise of the seed and the number of the token."""
    from flax import nnx

    config, r = model(), request("x = ", tokens=12, seed=5)
    merged = nnx.merge(graph(config), weights(config))
    (got,) = answers(engine(), r)[0]
    constraint, tokens = grammar().begin(r.prompt, [tokenizer().end_id]), list(r.prompt)
    for number, token in enumerate([*got.tokens, tokenizer().end_id][:12]):
        logits_V = np.asarray(merged.logits(merged(jnp.array([tokens]))))[0, -1]
        allowed_V = np.unpackbits(constraint.row(12 - number), bitorder="little")[:V].astype(bool)
        noise_V = jax.random.gumbel(jax.random.fold_in(jax.random.key(5), number), (V,))
        assert token == (np.where(allowed_V, logits_V, -np.inf) + noise_V).argmax()
        if token != tokenizer().end_id:
            exact = logits_V[token] - np.log(np.exp(logits_V - logits_V.max()).sum()) - logits_V.max()
            assert abs(got.log_probs[number] - exact) < 1e-4  # float32 sums in another order
            constraint.add(token)
        tokens.append(token)


# ---------------------------------------------------------------- beside what else an engine does


def test_requests_with_and_without_a_grammar_do_not_meet() -> None:
    requests = [request(p, seed=n, num_samples=2) for n, p in enumerate(PROMPTS)]
    free = [request(p, seed=n, grammar=None, tokens=20) for n, p in enumerate(PROMPTS)]
    mixed = answers(engine(steps=5), *(r for pair in zip(requests, free, strict=True) for r in pair))
    assert mixed[::2] == alone()
    assert tokens_of(mixed[1::2]) == tokens_of([answers(engine(), r)[0] for r in free])


@pytest.mark.parametrize("steps", [1, 8])
def test_steps_change_nothing(steps: int) -> None:
    requests = [request(p, seed=n, num_samples=2) for n, p in enumerate(PROMPTS)]
    assert answers(engine(steps=steps), *requests) == alone()


def test_preempted_requests_go_on_as_they_were() -> None:
    requests = [request(p, seed=n, num_samples=2) for n, p in enumerate(PROMPTS)]
    made = engine(num_positions=112)
    assert tokens_of(answers(made, *requests)) == tokens_of(alone())
    assert made.counts.preempted > 0


def test_states_that_can_not_be_taken_back_are_no_hindrance() -> None:
    config = model(segmented=Segmented(6, 4, 3), conv_taps=3)
    requests = [request(p, seed=n, num_samples=2) for n, p in enumerate(PROMPTS)]
    got = answers(engine(config, steps=8), *requests)
    assert got == alone(config)
    for r, samples in zip(requests, got, strict=True):
        assert all(parses(whole(r, s)) for s in samples if s.finish == "end")


@pytest.mark.parametrize("axes", [{"data": 4, "tensor": 2}, {"data": 2, "tensor": 4}], ids=str)
def test_eight_devices_are_one(axes: dict[str, int]) -> None:
    made = engine(mesh=make_mesh(MeshConfig(**axes)))
    requests = [request(p, seed=n, num_samples=2) for n, p in enumerate(PROMPTS)]
    got = answers(made, *requests)
    assert tokens_of(got) == tokens_of(alone())


def test_stop_strings_and_lengths_end_a_text_as_ever() -> None:
    r = request("", tokens=30, seed=3, grammar=grammar(finish=False))
    (got,) = answers(engine(), r)[0]
    assert (got.finish, len(got.tokens)) == ("length", 30) or got.finish == "end"
    stop = got.text[2:4]
    (stopped,) = answers(engine(), dataclasses.replace(r, stop=[stop]))[0]
    assert (stopped.text, stopped.finish) == (got.text[: got.text.index(stop)], "stop")


def test_a_healed_prompt_goes_on_from_its_last_token() -> None:
    ids, first = heal(tokenizer(), [tokenizer().end_id, *tokenizer().encode("def f(x):\n").tolist()])
    r = Request(ids, 40, HOT, num_samples=4, grammar=grammar(), first_tokens=first)
    for got in answers(engine(), r)[0]:
        assert whole(r, got).startswith(b"def f(x):\n")
        assert got.finish != "end" or parses(whole(r, got))


def test_an_end_that_python_refuses_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grammar lets no such end through, as far as is known: here Python is said to refuse the first one."""
    told: list[bytes] = []

    def ends_well(self: Constraint) -> bool:
        told.append(bytes(self.text))
        self.no_end = len(told) == 1
        return not self.no_end

    monkeypatch.setattr(Constraint, "ends_well", ends_well)
    r = request("x", tokens=40, seed=1)
    made = engine()
    (got,) = answers(made, r)[0]
    assert made.counts.preempted == 1
    assert len(told) == 2
    assert told[0] != told[1]
    assert told[1].startswith(told[0])
    assert whole(r, got) == told[1]
    assert parses(whole(r, got))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x = = 1", "the prompt is not the beginning of a Python program: line 1, column 5: '= 1' can not come there"),
        ("if x:\n  y\n z", "line 3, column 2: 'z' can not"),
        ("é = 'a\n", "line 1, column 7: '\\\\n' can not"),
    ],
)
def test_a_prompt_that_is_no_python_is_refused_with_its_place(prompt: str, message: str) -> None:
    made = engine()
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        made.submit(request(prompt))
    assert not made.busy


def test_a_grammar_goes_without_drafts() -> None:
    config = dataclasses.replace(model(), multi_token=MultiTokenConfig())
    with pytest.raises(UserError, match="draft is 2; a request with a grammar needs an engine that drafts no tokens"):
        engine(config, draft=2).submit(request())


def test_a_program_may_begin_behind_other_text() -> None:
    chat = tokenizer().encode("Please write a program, thanks!").tolist()
    r = Request(chat, 40, HOT, num_samples=4, grammar=grammar(), program=len(chat))
    for got in answers(engine(), r)[0]:
        assert got.finish != "end" or parses(got.text.encode())


def test_the_command_asks_for_a_program() -> None:
    from dsjax.infer.command import Options, request_of

    class Model:
        graph = params = mesh = None
        end_ids, max_length, templates = (tokenizer().end_id,), 96, {}

        def __init__(self) -> None:
            self.tokenizer = tokenizer()

    asked, _ = request_of(Model(), Options("x = ", grammar="python", heal=True))  # type: ignore[arg-type]
    assert isinstance(asked.grammar, PythonGrammar)
    assert asked.program == 0
    with pytest.raises(UserError, match="--draft does not go with --grammar"):
        Options("x", draft=1, grammar="python").check()
