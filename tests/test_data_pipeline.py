"""Rows, batches, state, hosts, mixtures and evaluation windows."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError
from dsjax.data.corpus import Source
from dsjax.data.pipeline import PackedRows, eval_windows, make_batches, mixed_rows
from dsjax.data.prepare import Corpus, CorpusReport, DataConfig, HeldOut, TokenStore
from dsjax.data.tokenizer import train_tokenizer

_TOKENIZER = train_tokenizer(["x"], 257)
_REPORT = CorpusReport(0, 0, (), (), 0, 0, 0, 0, 0, 0, 257)


def _store(documents) -> TokenStore:
    flat = np.concatenate([np.asarray(d, np.uint16) for d in documents])
    return TokenStore(flat, np.cumsum([0] + [len(d) for d in documents]))


def _corpus(*lengths_of_sources, fingerprint="f") -> Corpus:
    """Source s holds documents of these lengths, of tokens 10 + s."""
    stores = tuple(_store([[10 + s] * n for n in lengths]) for s, lengths in enumerate(lengths_of_sources))
    return Corpus(stores, (), _TOKENIZER, fingerprint, _REPORT)


def _numbered(*lengths) -> Corpus:
    """One source whose tokens are all different, so that rows show where they come from."""
    first = np.cumsum([1, *lengths])
    return Corpus((_store([range(a, b) for a, b in itertools.pairwise(first)]),), (), _TOKENIZER, "f", _REPORT)


def _config(num_sources=1, **values) -> DataConfig:
    values = {"seq_len": 8, "batch_size": 4, **values}
    return DataConfig(sources=values.pop("sources", tuple(Source() for _ in range(num_sources))), **values)


def _take(iterator, count):
    with contextlib.closing(iterator):
        return [next(iterator) for _ in range(count)]


def _assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


_LENGTHS = st.lists(st.integers(1, 25), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(_LENGTHS, st.integers(1, 12), st.integers(0, 5))
def test_rows_are_the_shuffled_concatenation(lengths, seq_len, seed):
    documents = [np.arange(n) + 100 * (i + 1) for i, n in enumerate(lengths)]
    rows = _stream_rows(_store(documents), seq_len, seed, epoch=seed % 2)
    tokens, targets, weight, ids, positions = (
        np.concatenate([r[k] for r in rows]) for k in ("tokens", "targets", "loss_weight", "document_ids", "positions")
    )
    real = weight > 0
    # Inputs, cut at each boundary, are the documents, each once; then padding.
    assert not real[np.argmin(real) :].any() or real.all()
    parts = np.split(tokens[real], np.flatnonzero(tokens[real] == 0)[1:])
    assert sorted(map(tuple, parts)) == sorted((0, *d) for d in documents)
    # The target is the next input of the stream; after the last document, the boundary.
    np.testing.assert_array_equal(targets[real], [*tokens[real][1:], 0])
    assert (ids[~real] == 0).all()
    assert (tokens[~real] == 0).all()
    for r in rows:
        used = int(r["loss_weight"].sum())
        ids, positions = r["document_ids"][:used], r["positions"][:used]
        new = np.flatnonzero(np.diff(ids)) + 1
        assert ids[0] == 1
        assert set(np.diff(ids)) <= {0, 1}
        np.testing.assert_array_equal(new, np.flatnonzero(r["tokens"][1:used] == 0) + 1)
        for part in np.split(positions, new):
            np.testing.assert_array_equal(part, np.arange(part.size))


def _stream_rows(store, seq_len, seed, epoch):
    """The rows of one epoch in the order of its stream, that is with the shuffle of the rows undone."""
    rows = PackedRows(store, seq_len=seq_len, seed=seed, end_id=0)
    found = [rows[epoch * rows.num_rows + i] for i in range(rows.num_rows)]
    return [found[i] for i in np.argsort(rows._layout(epoch).rows)]


def test_an_epoch_has_every_target_once_and_the_next_one_other_rows():
    documents = [range(a, a + 20) for a in range(1, 400, 20)]
    rows = PackedRows(_store(documents), seq_len=8, seed=0, end_id=0)
    epochs = [[rows[e * rows.num_rows + i] for i in range(rows.num_rows)] for e in range(3)]
    for epoch in epochs:
        targets = np.concatenate([r["targets"][r["loss_weight"] > 0] for r in epoch])
        assert sorted(targets) == sorted([*range(1, 401), *[0] * 20])
    kinds = [{tuple(r["tokens"]) for r in epoch} for epoch in epochs]
    assert len(kinds[0] & kinds[1]) < len(kinds[0]) / 2
    assert kinds[1] != kinds[2]


def test_rows_are_shuffled_within_an_epoch():
    rows = PackedRows(_store([range(1, 2000)]), seq_len=8, seed=3, end_id=0)
    order = [rows[i]["tokens"][0] for i in range(rows.num_rows)]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 4 / np.sqrt(len(order))


def test_batches_are_fixed_shape_numpy():
    (batch,) = _take(make_batches(_numbered(30, 30), _config()), 1)
    for leaf in jax.tree.leaves(batch):
        assert isinstance(leaf, np.ndarray)
        assert leaf.shape == (4, 8)
    assert batch.tokens_BT.dtype == batch.targets_BT.dtype == batch.documents.ids_BT.dtype == np.int32
    assert batch.loss_weight_BT.dtype == np.float32


def test_the_seed_decides_the_order():
    corpus = _numbered(*range(3, 40))
    a, b, c = (_take(make_batches(corpus, _config(seed=s)), 5) for s in (1, 1, 2))
    _assert_equal(a, b)
    assert any((x.tokens_BT != y.tokens_BT).any() for x, y in zip(a, c, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from([1, 2, 4]))
def test_state_restores_at_any_element(before, after, num_hosts):
    corpus, cfg = _corpus(range(3, 20), range(5, 9)), _config(2)
    straight = _take(make_batches(corpus, cfg, host_index=num_hosts - 1, num_hosts=num_hosts), before + after)
    first = make_batches(corpus, cfg, host_index=0, num_hosts=num_hosts)
    for _ in range(before):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    second = make_batches(corpus, cfg, host_index=num_hosts - 1, num_hosts=num_hosts)
    next(second)  # a restored iterator need not be fresh
    second.set_state(state)
    assert second.get_state() == state
    _assert_equal(_take(second, after), straight[before:])


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_hosts(num_hosts):
    corpus, cfg = _corpus(range(3, 20), range(5, 9)), _config(2)
    alone = _take(make_batches(corpus, cfg), 20)
    hosts = [make_batches(corpus, cfg, host_index=h, num_hosts=num_hosts) for h in range(num_hosts)]
    parts = [_take(h, 20) for h in hosts]
    for g in range(20):
        _assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *(p[g] for p in parts)), alone[g])
    assert len({json.dumps(h.get_state()) for h in hosts}) == 1


def test_another_batch_size_goes_on_with_the_next_row():
    corpus = _numbered(*range(3, 40))
    straight = np.concatenate([b.tokens_BT for b in _take(make_batches(corpus, _config(batch_size=1)), 18)])
    first = make_batches(corpus, _config(batch_size=4))
    for _ in range(3):
        next(first)
    first.close()
    second = make_batches(corpus, _config(batch_size=6))
    second.set_state(first.get_state())
    np.testing.assert_array_equal(_take(second, 1)[0].tokens_BT, straight[12:18])


def test_other_data_is_refused():
    state = make_batches(_corpus([9], fingerprint="a" * 64), _config()).get_state()
    other = make_batches(_corpus([9], fingerprint="b" * 64), _config())
    with pytest.raises(UserError, match=r"data changed: .* fingerprint a{16}, found b{16}; restore"):
        other.set_state(state)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4))
def test_mixture_follows_the_weights_from_the_start(weights):
    cfg = _config(sources=tuple(Source(weight=w) for w in weights))
    rows = mixed_rows(_corpus(*([5, 9] for _ in weights)), cfg)
    seen = np.asarray([max(rows[i]["tokens"]) - 10 for i in range(1000)])
    for length in (100, 1000):
        shares = np.bincount(seen[:length], minlength=len(weights)) / length
        # Whole-number proportions are within 1 % of the weights; interleaving is within one row per source.
        assert np.abs(shares - np.asarray(weights) / sum(weights)).max() < 0.01 + len(weights) / length


def test_a_corpus_smaller_than_a_batch_repeats():
    batches = _take(make_batches(_numbered(3), _config(batch_size=16)), 2)
    assert all((b.tokens_BT[:, :4] == [0, 1, 2, 3]).all() and (b.loss_weight_BT.sum(1) == 4).all() for b in batches)


def test_batch_must_divide_among_hosts():
    with pytest.raises(UserError, match=r"data.batch_size is 4; it must be a multiple of the number of hosts, 3"):
        make_batches(_numbered(30), _config(), host_index=0, num_hosts=3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 12), st.data())
def test_evaluation_counts_every_token_once_with_its_context(lengths, seq_len, data):
    context = data.draw(st.integers(0, seq_len - 1))
    documents = [HeldOut(str(i), "é" * n, np.arange(n, dtype=np.int32) + 100 * (i + 1)) for i, n in enumerate(lengths)]
    found = eval_windows(documents, seq_len=seq_len, context=context, batch_size=3, end_id=0)
    assert found.num_bytes.tolist() == [2 * n for n in lengths]
    assert found.num_targets.tolist() == [n + 1 for n in lengths]
    counted: list[list[int]] = [[] for _ in lengths]
    for batch, owner_BT in zip(found.batches, found.document_BT, strict=True):
        assert batch.tokens_BT.shape == owner_BT.shape == (3, seq_len)
        np.testing.assert_array_equal(batch.loss_weight_BT, owner_BT >= 0)
        for b, t in zip(*np.nonzero(batch.loss_weight_BT), strict=True):
            owner, target = owner_BT[b, t], batch.targets_BT[b, t]
            stream = [0, *documents[owner].ids, 0]
            place = len(stream) - 1 if target == 0 else stream.index(target)
            counted[owner].append(place)
            # What the target is predicted from: its document's part of the row, as the mask shows it.
            seen = batch.tokens_BT[b, : t + 1][batch.documents.ids_BT[b, : t + 1] == batch.documents.ids_BT[b, t]]
            assert batch.documents.ids_BT[b, t] > 0
            assert batch.documents.positions_BT[b, t] == seen.size - 1
            np.testing.assert_array_equal(seen, stream[place - seen.size : place])
            assert seen.size >= min(context + 1, place)
    assert [sorted(c) for c in counted] == [list(range(1, n + 2)) for n in lengths]


def test_evaluation_context_must_fit():
    with pytest.raises(UserError, match=r"context of evaluation is 8; it must be at least 0 and below seq_len, 8"):
        eval_windows([], seq_len=8, context=8, batch_size=1, end_id=0)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _config().seed = 1
