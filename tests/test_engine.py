"""The engine: many requests over the pages of one cache, each as if it were alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ATTENTION, V, graph, logits, random_tokens, weights

from dsjax.config import UserError
from dsjax.infer.batching import Engine
from dsjax.infer.pages import Layout, Pool, Prefixes, Tables, moves
from dsjax.infer.requests import Request
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.cache import held_positions, slots_of
from dsjax.nn.masks import Causal, Segmented
from dsjax.nn.mlp import MLPConfig
from dsjax.sharding import MeshConfig, make_mesh
from pallas_kernels.segmented_attention import Segments

GREEDY = SamplingConfig(temperature=0.0)
END = V - 1


def model(**attention: Any) -> DecoderConfig:
    options = {"qk_norm": False, "conv_taps": 0} | attention
    group = LayerGroup(MLPConfig(d_ff=24), dataclasses.replace(ATTENTION, **options))
    return DecoderConfig(V, 16, 2, (group,))


MODELS = {
    "full": model(),
    "window": model(window=5),
    "segmented": model(segmented=Segmented(6, 4, 3), conv_taps=3),
    "chosen": model(segmented=Segmented(4, top_segments=0)),
    "long segments": model(segmented=Segmented(48)),  # a tail has more pages than a chunk
}


@functools.cache
def params(name: str) -> Any:
    return weights(MODELS[name])


def engine(name: str, **options: Any) -> Engine:
    chosen = {"end_ids": [END], "max_length": 48, "batch_size": 3, "page_size": 4, "chunk": 8, "steps": 3} | options
    return Engine(graph(MODELS[name]), params(name), **chosen)


def run(made: Engine) -> dict[int, list[int]]:
    """The tokens of each request."""
    return {number: samples[0].tokens for number, samples in made.run().items()}


def prompt(length: int, seed: int = 0) -> list[int]:
    return random_tokens(1, length, seed)[0].tolist()


@functools.cache
def alone(name: str, tokens: tuple[int, ...], max_tokens: int) -> list[int]:
    """Greedy tokens by full forward passes, padded to one shape: causal, so padding changes nothing."""
    row = list(tokens)
    for _ in range(max_tokens):
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(row)] = row
        token = int(logits_of(name)(padded)[0, len(row) - 1].argmax())
        if token == END:
            break
        row.append(token)
    return row[len(tokens) :]


@functools.cache
def logits_of(name: str) -> Any:
    from flax import nnx

    definition = graph(MODELS[name])
    run = jax.jit(lambda p, tokens: (lambda m: m.logits(m(tokens)))(nnx.merge(definition, p)))
    return lambda tokens: np.asarray(run(params(name), tokens))


# ---------------------------------------------------------------- pages


def test_what_stands_in_front_of_a_prompt_is_no_part_of_it() -> None:
    prefixes = Prefixes(1, lambda *page: None)
    found = []
    for part in (0, 1):
        for cut in range(4):
            before = np.arange(cut, dtype=np.int32).tobytes()
            found += prefixes.keys(part, range(cut, 3), whole=True, salt=before)
    assert len(set(found)) == len(found) == 2 * (4 + 3 + 2 + 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 99)), max_size=60))
def test_a_page_is_free_or_has_owners(calls: list[tuple[str, int]]) -> None:
    pool, owned = Pool(5), list[int]()
    for call, number in calls:
        if call == "take" and pool.num_free:
            page = pool.take()
            assert page not in owned  # nobody had it
            owned.append(page)
        elif owned and call != "take":
            page = owned[number % len(owned)]
            if call == "share":
                pool.share(page)
                owned.append(page)
            else:
                pool.release(page)
                owned.remove(page)
        assert pool.num_free == 5 - len(set(owned))
    for page in owned:
        pool.release(page)
    assert sorted(pool.take() for _ in range(5)) == [0, 1, 2, 3, 4]


MASKS = {
    "full": (Causal(),),
    "window": (Causal(3), Causal(7)),
    "mixed": (Causal(3), Causal()),
    "segmented": (Segments(8, 4, 0), Segments(8, 4, 4)),
    "odd segments": (Segments(7, 2, 3),),
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(MASKS)),
    st.sampled_from([1, 2]),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=30),
)
def test_rows_never_share_what_they_write_and_leave_nothing_behind(name: str, parts: int, calls: list) -> None:
    layout = Layout(MASKS[name], 4, 10 * parts, parts)
    tables, lengths = Tables([layout, Layout((Causal(),), 4, 10 * parts, parts)], 4, [9, 12], 2), [0] * 4
    for row, more in calls:
        end = min(lengths[row] + more, 40)
        if more == 0:
            tables.clear(row)
            lengths[row] = 0
        elif tables.grow(row, lengths[row], end):
            lengths[row] = end
        for group, table in enumerate(tables.tables):
            for rows in ([0, 1], [2, 3]):  # of one batch part
                for columns in np.split(table[rows], parts, axis=1):
                    found = columns[columns >= 0].tolist()
                    assert len(set(found)) == len(found)
            for r, length in enumerate(lengths):
                needed = tables.layouts[group].needed(length, length)
                assert all(tables.page(group, r, logical) >= 0 for logical in needed)
    for row in range(4):
        tables.clear(row)
    free = [pool.num_free for group in tables.pools for part in group for pool in part]
    assert free == [9] * 2 * parts + [12] * 2 * parts


@pytest.mark.parametrize("name", MASKS)
def test_the_pages_of_a_row_hold_all_slots_and_closed_ones_are_not_written_again(name: str) -> None:
    masks, P = MASKS[name], 4
    layout = Layout(masks, P, 99)
    slots = np.arange(160)
    for mask in masks:
        at = np.asarray(slots_of(mask, np.zeros(1, int), 40, np.full(1, 40)))[0]
        assert at.max() < 160
        for length in range(1, 40):
            held = slots[np.asarray(held_positions(mask, slots, np.int32(length))) >= 0]
            if isinstance(mask, Segments) or mask.window is None:
                assert set((held // P).tolist()) <= set(layout.needed(length, length)), length
            for later in range(length, 40):
                # written when it comes, as part of a chunk of one
                slot = int(np.asarray(slots_of(mask, np.full(1, later), 1, np.ones(1, int)))[0, 0])
                assert slot // P not in layout.closed(length)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 60), st.integers(0, 60), st.sets(st.integers(0, 59), min_size=1, max_size=4))
def test_there_is_room_to_copy_all_pages_that_go_on_being_written(P: int, W: int, w: int, shifts: set[int]) -> None:
    for parts in (1, 2):
        layout = Layout(tuple(Segments(W, min(w, W), shift) for shift in {s % W for s in shifts}), P, 400, parts)
        for length in range(1, 3 * W):
            is_open = set(layout.needed(length, length)) - set(layout.closed(length))
            assert len(is_open) <= layout.num_copied
            moves(layout, [(logical, 0, 0) for logical in is_open], 0, 1)


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize("name", MODELS)
def test_a_crowd_gets_what_each_would_get_alone(name: str) -> None:
    """Prompts of all lengths, over chunks and segments; more of them than rows."""
    lengths = (1, 7, 8, 19, 30)
    made = engine(name)
    numbers = {made.submit(Request(prompt(n, n), 7, GREEDY)): n for n in lengths}
    got = run(made)
    for number, n in numbers.items():
        assert got[number] == alone(name, tuple(prompt(n, n)), 7), n
    assert all(running is None for running in made.rows)


def test_who_waits_for_no_first_token_gets_the_same_ones_in_fewer_steps() -> None:
    found = {}
    for streams in (True, False):
        made, sizes, pieces = engine("full", streams=streams), [], dict[int, list[int]]()
        for n in (1, 7, 8, 19, 30, 2, 3):
            made.submit(Request(prompt(n, n), 7, GREEDY, end_ids=()))
        while made.busy:
            events = made.step()
            sizes += [len(event.tokens) for event in events]
            for event in events:
                pieces.setdefault(event.request, []).extend(event.tokens)
        found[streams] = (pieces, sizes)
    assert found[True][0] == found[False][0]
    assert sum(found[True][1]) == sum(found[False][1]) == 7 * 7
    assert found[True][1].count(1) > found[False][1].count(1) == 7  # 3 + 3 + 1 of each
    assert set(found[False][1]) == {3, 1}


def test_samples_are_those_of_the_seed_in_any_company() -> None:
    sampling = SamplingConfig(1.3, 12, 0.9)
    one = engine("full")
    number = one.submit(Request(prompt(9), 12, sampling, seed=5))
    want = run(one)[number]
    crowd = engine("full")
    others = [crowd.submit(Request(prompt(5, s), 6, SamplingConfig(0.7), seed=s)) for s in range(4)]
    number = crowd.submit(Request(prompt(9), 12, sampling, seed=5))
    again = crowd.submit(Request(prompt(9), 12, sampling, seed=6))
    got = run(crowd)
    assert got[number] == want != got[again]
    assert set(got) == {*others, number, again}


@pytest.mark.parametrize("name", ["full", "window", "segmented", "chosen"])
def test_a_prefix_is_computed_once(name: str) -> None:
    made, first = engine(name), prompt(20)
    made.submit(Request(first, 4, GREEDY))
    made.run()
    for tail in ([], [3, 2, 1], prompt(9, 4)):
        tokens = first[:17] + tail
        before = made.counts.prefilled
        number = made.submit(Request(tokens, 6, GREEDY))
        assert run(made)[number] == alone(name, tuple(tokens), 6)
        assert made.counts.prefilled - before == len(tokens) - 16  # two chunks of 8 are there
    other = [first[0] % 5 + 1, *first[1:]]
    number = made.submit(Request(other, 3, GREEDY))
    before = made.counts.reused
    assert run(made)[number] == alone(name, tuple(other), 3)
    assert made.counts.reused == before  # one other token in front: nothing is the same


@pytest.mark.parametrize("name", ["full", "segmented"])
def test_requests_that_do_not_fit_together_wait_or_begin_again(name: str) -> None:
    """Room for little more than one of them at full length: others are preempted, and get the same tokens."""
    made = engine(name, num_positions=64)
    numbers = {made.submit(Request(prompt(12, s), 30, GREEDY)): s for s in range(4)}
    got = run(made)
    assert made.counts.preempted > 0
    for number, s in numbers.items():
        assert got[number] == alone(name, tuple(prompt(12, s)), 30)
    while made.prefixes.forget():
        pass
    pools = [pool for group in made.tables.pools for part in group for pool in part]
    assert [pool.num_free for pool in pools] == [len(pool._owners) for pool in pools]  # nothing is lost


def test_one_that_can_never_fit_says_so() -> None:
    made = engine("full", num_positions=16)
    made.submit(Request(prompt(30), 4, GREEDY))
    with pytest.raises(UserError, match="a request has 30 tokens, more than there are pages for; raise num_positions"):
        made.run()
    made.submit(Request([1] * 5, 40, GREEDY, num_samples=2))  # it fits at first
    after = made.submit(Request(prompt(5), 4, GREEDY))
    with pytest.raises(UserError, match="more than there are pages for; raise num_positions"):
        made.run()
    assert made.run()[after][0].tokens == alone("full", tuple(prompt(5)), 4)  # the others go on
    with pytest.raises(UserError, match="a prompt is empty"):
        made.submit(Request([]))
    with pytest.raises(UserError, match="a prompt has 48 tokens; the engine holds 48"):
        made.submit(Request([1] * 48))


def test_one_that_can_never_fit_ends_no_stream_beside_it() -> None:
    made, sentence = engine("full", num_positions=16), "more than there are pages for; raise num_positions"
    grows, other = Request([1] * 5, 40, GREEDY, end_ids=()), Request(prompt(5), 4, GREEDY)  # it fits at first
    want = alone("full", tuple(prompt(5)), 4)
    made.submit(grows)
    assert [t for event in made.stream(other) for t in event.tokens] == want
    with pytest.raises(UserError, match=sentence):
        made.run()
    assert made.run() == {}  # it is told once
    stream = made.stream(grows)
    next(stream)
    assert [t for event in made.stream(other) for t in event.tokens] == want
    assert made.run() == {}  # that is the stream's to tell
    with pytest.raises(UserError, match=sentence):
        list(stream)
    assert not made.busy
    assert made.run() == {}


def test_a_stream_gives_tokens_as_they_come_and_their_probabilities() -> None:
    made = engine("full")
    other = made.submit(Request(prompt(3), 20, GREEDY))
    events = list(made.stream(Request(prompt(6), 8, GREEDY)))
    tokens = [t for event in events for t in event.tokens]
    assert tokens == alone("full", tuple(prompt(6)), 8)
    assert len(events) > 1
    assert [event.ended for event in events] == [False] * (len(events) - 1) + [True]
    assert other not in {event.request for event in events}
    row = [*prompt(6), *tokens]
    all_logits = logits(MODELS["full"], params("full"), np.array([row]))[0]
    want = [all_logits[5 + i, t] - np.log(np.exp(all_logits[5 + i]).sum()) for i, t in enumerate(tokens)]
    np.testing.assert_allclose([p for event in events for p in event.log_probs], want, atol=1e-4)  # float32 logits


def test_only_the_given_first_tokens_come_first() -> None:
    made, only = engine("full"), np.zeros(V, bool)
    only[[7, 9]] = True
    for seed in range(6):
        more = np.ones(seed, bool)  # of a tokenizer that has more than the model
        first = np.concatenate([only, more])
        made.submit(Request(prompt(5), 2, SamplingConfig(2.0, 0, 1.0), seed, first_tokens=first))
    assert {tokens[0] for tokens in run(made).values()} <= {7, 9}


@pytest.mark.parametrize("mesh", [{"data": 2, "tensor": 2, "context": 2}, {"data": 1, "expert": 2, "tensor": 4}])
@pytest.mark.parametrize("name", ["full", "segmented"])
def test_eight_devices_give_the_tokens_of_one(name: str, mesh: dict[str, int]) -> None:
    made = engine(name, batch_size=4, mesh=make_mesh(MeshConfig(**mesh)))
    numbers = {made.submit(Request(prompt(n, n), 6, GREEDY)): n for n in (3, 17, 22, 17, 9)}
    got = run(made)
    for number, n in numbers.items():
        assert got[number] == alone(name, tuple(prompt(n, n)), 6)
    assert made.counts.reused > 0 or made.parts[0] > 1
