"""The course of fine-tuning for code: the order of rows, how they are packed, stages, repairs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError
from dsjax.data.marked import Marked, encode
from dsjax.data.prepare import Corpus, CorpusReport, TokenStore
from dsjax.data.structure.errors import RepairConfig
from dsjax.data.tokenizer import Tokenizer, train_tokenizer
from dsjax.train.curriculum import (
    CourseConfig,
    CourseRows,
    Stage,
    course_order,
    joined,
    packed,
    repairs_in_words,
    staged,
)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_order_has_everything_once(stages: list[int], strictness: float, seed: int) -> None:
    order = course_order([s / 3 for s in stages], strictness, seed)
    assert sorted(order.tolist()) == list(range(len(stages)))
    if strictness == 1:
        assert [stages[i] for i in order] == sorted(stages)


def test_without_strictness_stages_do_not_matter() -> None:
    assert course_order(np.linspace(0, 1, 40), 0.0, 5).tolist() == course_order(np.zeros(40), 0.0, 5).tolist()


def test_strictness_goes_from_order_to_nothing() -> None:
    assert [CourseConfig(epochs=3).strictness(e) for e in range(3)] == [1.0, 0.5, 0.0]
    assert [CourseConfig(order=0.5, epochs=2).strictness(e) for e in range(2)] == [0.5, 0.0]
    assert CourseConfig(epochs=1).strictness(0) == 1.0
    assert CourseConfig(order=0).strictness(0) == 0.0


@functools.cache
def words() -> Tokenizer:
    return train_tokenizer(["def f(x):\n    return x\n\n"] * 3, 300)


def corpus_of(*sizes: list[int], weights: bool = False, shares: tuple[float, ...] = ()) -> Corpus:
    """Stores of documents; tokens are numbered through from 1000, so that each has its place."""
    stores, first = [], 1000
    for lengths in sizes:
        tokens = np.arange(first, first + sum(lengths), dtype=np.int32)
        learned = (np.arange(tokens.size) % 2).astype(np.uint8) if weights else None
        stores.append(TokenStore(tokens, np.cumsum([0, *lengths]).astype(np.int64), weights=learned))
        first += sum(lengths)
    report = CorpusReport(0, 0, (), (), 0, 0, 0, 0, 0, 0, 0)
    return Corpus(tuple(stores), (), words(), "f" * 64, report, content="c", further_shares=shares)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(4, 16), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_packing_takes_every_position_once_and_cuts_no_document_that_fits(
    lengths: list[int], seq_len: int, seed: int
) -> None:
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    rows = packed(offsets, seq_len, seed)
    assert all(sum(end - begin for _, begin, end in row) <= seq_len for row in rows)
    places = [(d, at) for row in rows for d, begin, end in row for at in range(begin, end)]
    assert sorted(places) == [(d, at) for d, n in enumerate(lengths) for at in range(n + 1)]
    pieces = [d for row in rows for d, _, _ in row]
    for document, n in enumerate(lengths):
        assert pieces.count(document) == -(-(n + 1) // seq_len)


@given(
    st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=8), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_an_epoch_predicts_every_token_once(sizes: list[list[int]], weights: bool, seed: int) -> None:
    corpus = corpus_of(*sizes, weights=weights)
    rows = CourseRows(corpus, CourseConfig(epochs=2), seq_len=8, batch_size=1, seed=seed)
    end_id = corpus.tokenizer.end_id
    for epoch in range(2):
        seen = dict[tuple[int, int], float]()
        for index in range(epoch * rows.num_rows, (epoch + 1) * rows.num_rows):
            row = rows[index]
            for t in np.flatnonzero(row["document_ids"]):
                inside = row["positions"][t] > 0
                assert inside == (t > 0 and row["document_ids"][t - 1] == row["document_ids"][t])
                if inside:
                    assert row["tokens"][t] == row["targets"][t - 1]  # a text goes on
                pair = int(row["tokens"][t]), int(row["targets"][t])
                assert pair not in seen or end_id in pair
                seen[pair] = float(row["loss_weight"][t])
            assert not row["loss_weight"][row["document_ids"] == 0].any()
        for store in corpus.stores:
            for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
                own = [end_id, *np.asarray(store.tokens[begin:end]).tolist(), end_id]
                learned = [1.0] * (end - begin) if store.weights is None else store.weights[begin:end].tolist()
                for pair, weight in zip(itertools.pairwise(own), [*learned, 1.0], strict=True):
                    assert seen[pair] == weight


def test_the_first_epoch_goes_from_stage_to_stage_and_the_last_does_not() -> None:
    corpus = corpus_of([7] * 20, [7] * 20)
    rows = CourseRows(corpus, CourseConfig(epochs=3), seq_len=8, batch_size=8, seed=0)
    assert rows.num_rows == 40
    stages = [[rows.stage(e * 40 + i) for i in range(40)] for e in range(3)]
    assert stages[0] == [0] * 20 + [1] * 20
    assert 0 < sum(stages[1][:20]) < sum(stages[2][:20])  # some, then about half
    shuffled = CourseRows(corpus, CourseConfig(epochs=3, order=0), seq_len=8, batch_size=8, seed=0)
    first = [sorted(r[i]["tokens"].tobytes() for i in range(40)) for r in (rows, shuffled)]
    assert first[0] == first[1]  # the same rows in another order


def test_repairs_take_the_place_of_some_rows() -> None:
    corpus = corpus_of([7] * 40, [7] * 3, shares=(0.25,))
    rows = CourseRows(corpus, CourseConfig(epochs=2), seq_len=8, batch_size=8, seed=0)
    assert rows.num_rows == 40
    stages = [rows.stage(i) for i in range(80)]
    assert [sum(stages[:40]), sum(stages[40:])] == [10, 10]
    assert max(np.diff(np.flatnonzero(stages[:40]))) == 4  # spread evenly
    left_out = [{rows[e * 40 + i]["targets"].tobytes() for i in range(40) if not stages[e * 40 + i]} for e in range(2)]
    assert left_out[0] != left_out[1]


def functions_of(tokenizer: Tokenizer, num: int) -> TokenStore:
    """Functions of which the first line is read and the second learned, with tokens of their own on either side."""
    ids, weights, lengths = list[np.ndarray](), list[np.ndarray](), list[int]()
    for number in range(num):
        text = f"def f{number}(x):\n    return x\n"
        own, learned = encode(Marked(text, masked=((0, text.index("\n") + 1),)), tokenizer)
        ids, weights, lengths = [*ids, own], [*weights, learned.astype(np.uint8)], [*lengths, own.size]
    return TokenStore(np.concatenate(ids), np.cumsum([0, *lengths]).astype(np.int64), weights=np.concatenate(weights))


@pytest.mark.parametrize("layout", [False, True])
def test_several_functions_become_one_document(layout: bool) -> None:
    tokenizer = train_tokenizer(["def f(x):\n    return x\n\n"] * 3, 300, layout=layout)
    found = joined(functions_of(tokenizer, 5), 2, tokenizer, seed=0)
    documents = [slice(a, b) for a, b in itertools.pairwise(found.offsets)]
    texts = [tokenizer.decode(found.tokens[own]) for own in documents]
    names = [re.findall(r"f\d", text) for text in texts]
    assert [len(own) for own in names] == [2, 2, 1]
    assert sorted(itertools.chain(*names)) == [f"f{n}" for n in range(5)]
    assert list(itertools.chain(*names)) != [f"f{n}" for n in range(5)]
    for own, text, part in zip(names, texts, documents, strict=True):
        assert text == "\n\n".join(f"def {name}(x):\n    return x\n" for name in own)
        learned, at = list[str](), 0
        while at < part.stop - part.start:  # what is learned: the bodies
            weight = found.weights[part][at]
            end = next((i for i in range(at, part.stop - part.start) if found.weights[part][i] != weight), None)
            end = part.stop - part.start if end is None else end
            tokens = np.asarray(found.tokens[part])
            learned += [tokenizer.decode(tokens[at:end], behind=tokens[:at])] if weight else []
            at = end
        assert learned == ["    return x\n"] * len(own)


def test_stages_are_made_of_sources() -> None:
    corpus = corpus_of([2] * 4, [3] * 2, [5], shares=(0.5,))
    found = staged(corpus, CourseConfig(stages=(Stage(1), Stage(0, functions=4))), seed=0)
    assert np.diff(found.stores[0].offsets).tolist() == [3, 3]
    assert found.stores[1].offsets.size == 2
    assert len(found.stores) == 3
    assert found.stores[2] is corpus.stores[2]  # repairs stay behind
    assert found.content != corpus.content
    with pytest.raises(UserError, match=r"course\.stages\.0\.source is 2; there are 2 data\.sources"):
        staged(corpus, CourseConfig(stages=(Stage(2),)), seed=0)


def test_repairs_can_be_said_in_comments() -> None:
    tokenizer = words()
    text = "def f(x):\n    return x\n"
    tokens = tokenizer.encode(text)
    store = TokenStore(tokens, np.array([0, tokens.size]))
    corpus = dataclasses.replace(corpus_of([1]), stores=(store,))
    found = repairs_in_words(corpus, RepairConfig(share=0.5), seed=0)
    repairs = found.stores[-1]
    said = tokenizer.decode(repairs.tokens)
    learned = tokenizer.decode(np.asarray(repairs.tokens)[np.asarray(repairs.weights) > 0])
    assert said.startswith("# Broken:\n")
    assert learned in ("def f(x):\n", "    return x\n")
    assert said.endswith(f"# The line that mends it:\n{learned}")
    assert found.further_shares == (0.5,)
