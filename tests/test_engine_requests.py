"""What a request may ask of the engine: where to end, how many samples, what to tell; and what becomes of pages."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import logits
from test_engine import GREEDY, MODELS, alone, engine, params, prompt

from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer, train_tokenizer
from dsjax.infer.batching import Engine
from dsjax.infer.pages import account
from dsjax.infer.requests import Completion, Request
from dsjax.infer.sampling import SamplingConfig

HOT = SamplingConfig(2.0, 0, 1.0)


@functools.cache
def bytes_tokenizer() -> Tokenizer:
    """Tokens are single bytes; the models here use the first 32: the boundary, and "!" to "?"."""
    return train_tokenizer(["x"], 257)


def text_of(tokens: list[int]) -> str:
    return bytes_tokenizer().decode(tokens)


def only(made: Engine, request: Request) -> Completion:
    number = made.submit(request)
    return made.run()[number][0]


# ---------------------------------------------------------------- where it ends


def test_a_request_ends_at_its_own_end_tokens_or_at_none() -> None:
    tokens = alone("full", tuple(prompt(6)), 12)
    made = engine("full")
    cut = tokens.index(tokens[4])
    got = only(made, Request(prompt(6), 12, GREEDY, end_ids=[tokens[4], 31]))
    assert (got.tokens, got.finish) == (tokens[:cut], "end")
    ends = engine("full", end_ids=[tokens[4]])
    assert only(ends, Request(prompt(6), 12, GREEDY)).tokens == tokens[:cut]
    free = only(ends, Request(prompt(6), 12, GREEDY, end_ids=()))
    assert (free.tokens, free.finish) == (tokens, "length")


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_stop_string_ends_the_text_in_front_of_it(steps: int) -> None:
    """It lies across tokens, and is found whatever the number of tokens in a step; no event shows any of it."""
    tokens = alone("full", tuple(prompt(6)), 12)
    whole = text_of(tokens)
    made = engine("full", tokenizer=bytes_tokenizer(), steps=steps)
    for begin, end in ((3, 6), (0, 2), (9, 12)):
        stop = whole[begin:end]
        first = whole.index(stop)
        events = list(made.stream(Request(prompt(6), 12, GREEDY, stop=["never there", stop])))
        assert "".join(event.text for event in events) == whole[:first]
        assert [t for event in events for t in event.tokens] == tokens[: first + len(stop)]
        assert events[-1].finish == "stop"
    assert only(made, Request(prompt(6), 12, GREEDY, stop=["never there"])).text == whole


def test_what_could_become_a_stop_string_is_told_if_it_does_not() -> None:
    tokens = alone("full", tuple(prompt(6)), 12)
    whole = text_of(tokens)
    made = engine("full", tokenizer=bytes_tokenizer())
    got = only(made, Request(prompt(6), 12, GREEDY, stop=[whole[-4:] + "more"]))
    assert (got.text, got.finish) == (whole, "length")


def test_what_a_request_can_not_have_is_said() -> None:
    made = engine("full")
    for request, sentence in (
        (Request([1], stop=["a"]), "a request has stop strings; they need an engine that has a tokenizer"),
        (Request([1], top_log_probs=2), "top_log_probs is 2; the engine was made for 0"),
        (Request([1], top_log_probs=-1), "top_log_probs of a request is -1; it must be a whole number of at least 0"),
        (Request([1], num_samples=0), "num_samples of a request is 0; it must be a whole number of at least 1"),
        (Request([1], max_tokens=0), "max_tokens of a request is 0; it must be a whole number of at least 1"),
        (Request([1, 32, 2]), "a prompt has a token 32; the model has those from 0 to 31"),
        (Request([1], first_tokens=np.arange(40) > 31), "first_tokens of a request allows no token of the model"),
        (Request([1, -1, 2]), "a prompt has a token -1; the model has those from 0 to 31"),
        (Request([1], sampling=SamplingConfig(-1.0)), r"temperature is -1\.0; it must be a number >= 0"),
        (Request([1], sampling=SamplingConfig(math.nan)), "temperature is nan; it must be a number >= 0"),
        (Request([1], sampling=SamplingConfig(1.0, -1)), "top_k is -1; it must be an integer >= 0"),
        (Request([1], sampling=SamplingConfig(1.0, 0, 2.0)), r"top_p is 2\.0; it must be a number >= 0 and <= 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            made.submit(request)
    with pytest.raises(UserError, match=r"stop is .'a', ''.; it is a list of texts that are not empty"):
        engine("full", tokenizer=bytes_tokenizer()).submit(Request([1], stop=["a", ""]))
    assert not made.busy


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("max_tokens", 2.5, r"max_tokens of a request is 2\.5; it must be a whole number of at least 1"),
        ("max_tokens", True, "max_tokens of a request is True; it must be a whole number of at least 1"),
        ("num_samples", 1.5, r"num_samples of a request is 1\.5; it must be a whole number of at least 1"),
        ("top_log_probs", 0.5, r"top_log_probs of a request is 0\.5; it must be a whole number of at least 0"),
        ("seed", "1", "seed of a request is '1'; it must be a whole number$"),
    ],
)
def test_what_would_fail_in_every_step_is_refused_at_once(name: str, value: Any, sentence: str) -> None:
    request = Request([1])
    object.__setattr__(request, name, value)  # in tests types are checked before that
    with pytest.raises(UserError, match=sentence):
        request.check(48, 1, has_tokenizer=True)


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding"])
def test_a_cancelled_request_leaves_nothing(when: str) -> None:
    made = engine("full", batch_size=2)
    other = made.submit(Request(prompt(5), 30, GREEDY))
    if when == "waiting":
        made.submit(Request(prompt(4), 10, GREEDY))
    number = made.submit(Request(prompt(30, 3), 20, GREEDY))
    for _ in range({"waiting": 1, "prefilling": 2, "decoding": 7}[when]):
        made.step()
    (event,) = made.cancel(number)
    assert (event.finish, event.tokens) == ("cancelled", [])
    assert made.cancel(number) == made.cancel(99) == []
    got = made.run()
    assert number not in got
    assert other in got
    assert account(made.tables, made.prefixes).held == 0


def test_who_stops_reading_a_stream_cancels_it() -> None:
    made = engine("full")
    stream = made.stream(Request(prompt(5), 30, GREEDY, num_samples=2))
    next(stream)
    stream.close()
    assert not made.busy


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("name", ["full", "window", "segmented", "chosen"])
@pytest.mark.parametrize("length", [13, 16])  # pages have 4 slots, chunks 8 positions
def test_samples_share_a_prompt_that_is_computed_once(name: str, length: int) -> None:
    made = engine(name, batch_size=4)
    number = made.submit(Request(prompt(length), 6, HOT, seed=7, num_samples=5))
    got = made.run()[number]
    assert made.counts.prefilled == length
    assert made.counts.reused == 4 * length
    assert len({tuple(sample.tokens) for sample in got}) > 1
    single = engine(name)
    for seed, sample in enumerate(got, 7):
        assert sample.tokens == only(single, Request(prompt(length), 6, HOT, seed=seed)).tokens


def test_greedy_samples_are_what_one_would_get_alone_also_when_pages_are_short() -> None:
    made = engine("full", num_positions=48)
    number = made.submit(Request(prompt(14), 20, GREEDY, num_samples=4))
    want = alone("full", tuple(prompt(14)), 20)
    assert [sample.tokens for sample in made.run()[number]] == [want] * 4
    assert made.counts.preempted > 0


def test_samples_begin_with_allowed_tokens() -> None:
    made, allowed = engine("full"), np.zeros(32, bool)
    allowed[[7, 9]] = True
    number = made.submit(Request(prompt(13), 2, HOT, num_samples=6, first_tokens=allowed))
    assert {sample.tokens[0] for sample in made.run()[number]} == {7, 9}


def test_the_first_tokens_probability_is_the_models_whatever_may_come_first() -> None:
    made, allowed = engine("full", top_log_probs=4), np.zeros(32, bool)
    free = only(made, Request(prompt(6), 3, GREEDY, top_log_probs=4))
    allowed[[free.top[0][2][0], 3]] = True
    for of in (made, engine("full", top_log_probs=4)):  # behind a prompt that was kept, and one that was not
        got = only(of, Request(prompt(6), 3, GREEDY, first_tokens=allowed, top_log_probs=4))
        token, log_prob = free.top[0][2]
        assert got.tokens[0] == token
        assert [i for i, _ in got.top[0]] == [i for i, _ in free.top[0]]
        told = [got.log_probs[0], *(p for _, p in got.top[0])]
        np.testing.assert_allclose(told, [log_prob, *(p for _, p in free.top[0])], atol=1e-5)  # float32 sums
    ended = only(made, Request(prompt(6), 3, GREEDY, first_tokens=allowed, end_ids=[token]))
    assert ended.finish == "end"
    np.testing.assert_allclose(ended.end_log_prob, log_prob, atol=1e-5)


def test_a_prompt_that_another_request_is_computing_is_waited_for() -> None:
    made = engine("full", batch_size=4)
    numbers = [made.submit(Request([*prompt(24), tail], 4, GREEDY)) for tail in (1, 2, 3)]
    other = made.submit(Request(prompt(9, 5), 4, GREEDY))
    got = made.run()
    for number, tail in zip(numbers, (1, 2, 3), strict=True):
        assert got[number][0].tokens == alone("full", (*prompt(24), tail), 4)
    assert got[other][0].tokens == alone("full", tuple(prompt(9, 5)), 4)
    assert made.counts.prefilled == 25 + 1 + 1 + 9


# ---------------------------------------------------------------- what is told


def test_the_likeliest_tokens_are_told_with_their_probabilities() -> None:
    made = engine("full", top_log_probs=4)
    got = only(made, Request(prompt(6), 8, GREEDY, top_log_probs=3))
    row = [*prompt(6), *got.tokens]
    all_logits = logits(MODELS["full"], params("full"), np.array([row]))[0, 5:-1]
    log_probs = all_logits - np.log(np.exp(all_logits).sum(axis=1, keepdims=True))
    for told, token, want in zip(got.top, got.tokens, log_probs, strict=True):
        best = np.argsort(-want)[:3]
        assert [i for i, _ in told] == best.tolist()
        assert told[0][0] == token
        np.testing.assert_allclose([p for _, p in told], want[best], atol=1e-4)  # float32 logits
    assert only(made, Request(prompt(6), 8, GREEDY)).top == []


# ---------------------------------------------------------------- pages, programs


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["full", "window", "segmented", "chosen"]), st.data())
def test_every_page_is_free_or_kept_or_held(name: str, data: st.DataObject) -> None:
    """Whatever comes and goes: submitted, stepped, cancelled, preempted; the engine itself asserts it when idle."""
    made = engine(name, num_positions=70, tokenizer=bytes_tokenizer())
    sizes = sum(len(pool.owners) for group in made.tables.pools for part in group for pool in part)
    numbers: list[int] = []
    for _ in range(data.draw(st.integers(1, 14))):
        match data.draw(st.sampled_from(["submit", "submit", "step", "step", "cancel"])):
            case "submit":
                length, seed = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 2))
                samples, new = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
                stop = data.draw(st.sampled_from([(), ("#",), ("$%",)]))
                request = Request(prompt(length, seed), new, HOT, num_samples=samples, stop=stop)
                numbers.append(made.submit(request))
            case "step":
                made.step()
            case "cancel" if numbers:
                made.cancel(data.draw(st.sampled_from(numbers)))
        pages = account(made.tables, made.prefixes)
        assert pages.free + pages.evictable + pages.held == sizes
    made.run()
    pages = account(made.tables, made.prefixes)
    assert (pages.free + pages.evictable, pages.held) == (sizes, 0)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that are compiled within."""
    found: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", ["full", "segmented", "chosen"])
def test_nothing_is_compiled_after_warming_up(name: str) -> None:
    # A page size that no other test has: the programs are not there yet.
    made = engine(name, page_size=2, batch_size=5, chunk=32, top_log_probs=2, num_positions=200)
    with compilations() as before:
        made.warm_up()
    assert before
    allowed = np.ones(32, bool)
    allowed[3] = False
    with compilations() as after:
        for seed, length in enumerate((1, 2, 17, 31, 40, 5, 7, 33)):
            made.submit(Request(prompt(length, seed), 7, HOT, seed, num_samples=1 + seed % 3, top_log_probs=1))
            made.submit(Request(prompt(length, seed), 5, GREEDY, first_tokens=allowed))
            made.step()
        made.cancel(3)
        made.run()
        for seed, length in enumerate((1, 40, 33, 9)):
            made.submit(Request(prompt(length, seed), 7, SamplingConfig(0.5, 3, 0.9, 0.1), seed))
        made.run()
    assert made.counts.reused > 0
    assert not after


def test_warming_up_changes_nothing() -> None:
    made = engine("segmented")
    made.warm_up()
    number = made.submit(Request(prompt(19), 7, GREEDY))
    assert made.run()[number][0].tokens == alone("segmented", tuple(prompt(19)), 7)
