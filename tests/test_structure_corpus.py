"""Features and repairs beside a corpus: from scanning to rows, batches, runs and what is sampled of them."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import logging
import pathlib
import random
import textwrap

import numpy as np
import pytest
from structure_cases import library

import dsjax
from dsjax.config import UserError, validate
from dsjax.data.corpus import Source
from dsjax.data.pipeline import PackedRows, eval_windows, make_batches
from dsjax.data.prepare import Corpus, DataConfig, prepare
from dsjax.data.structure.errors import BROKEN, REPAIR, SHARES, RepairConfig, broken, functions
from dsjax.data.structure.repair import repairs, with_repairs
from dsjax.data.structure.stored import prepared, scanner, with_structure
from dsjax.evals.repair import repair_figures
from dsjax.evals.report import evaluate_run
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.fields import BEGINNING, NUM_FIELDS, POINTERS
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.structure import StructureConfig
from dsjax.runs import RunFolder, load_model
from dsjax.train import pretrain
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import CheckpointConfig, Pretrain, TrainConfig

STRUCTURE = StructureConfig(pointers=("block", "name"), next_leaf=0.1)
SPECIAL = (BROKEN, REPAIR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Thirty files of real code."""
    root = tmp_path_factory.mktemp("code")
    for number, (_, content) in enumerate(library(30, 15_000)):
        (root / f"{number:02}.py").write_bytes(content)
    return root


def config(folder: pathlib.Path, **change: object) -> DataConfig:
    data = DataConfig(sources=(Source(str(folder)),), vocab_size=400, seq_len=64, batch_size=4, held_out_share=0.2)
    return dataclasses.replace(data, **change)  # type: ignore[arg-type]


def document(corpus: Corpus, number: int) -> np.ndarray:
    store = corpus.stores[0]
    return store.tokens[int(store.offsets[number]) : int(store.offsets[number + 1])]


# ---------------------------------------------------------------- features


def test_the_features_of_a_corpus_are_those_of_its_documents_and_kept(folder: pathlib.Path, tmp_path) -> None:
    cfg, stages = config(folder), []
    plain = prepare(cfg, tmp_path)
    corpus = with_structure(plain, "python", tmp_path, progress=stages.append)
    first = scanner("python", corpus.tokenizer)
    stored = np.asarray(corpus.stores[0].features).reshape(-1, NUM_FIELDS)
    whole = [first.copy().scan(document(corpus, i)) for i in range(corpus.stores[0].offsets.size - 1)]
    assert (stored == np.concatenate(whole)).all()
    for held in corpus.held_out:
        assert held.features_TC is not None
        assert (held.features_TC == first.copy().scan(held.ids)).all()
    assert len(stages) == 1
    again = with_structure(prepare(cfg, tmp_path), "python", tmp_path, progress=stages.append)
    assert len(stages) == 1  # from the cache
    assert again.fingerprint == corpus.fingerprint != plain.fingerprint
    assert with_structure(plain, "c", tmp_path).fingerprint != corpus.fingerprint


def test_nothing_changes_for_who_asks_for_no_structure(folder: pathlib.Path, tmp_path) -> None:
    cfg = config(folder)
    plain = prepare(cfg, tmp_path)
    assert prepared(cfg, None, tmp_path).fingerprint == plain.fingerprint
    (entry,) = tmp_path.iterdir()
    with_structure(plain, "python", tmp_path)
    assert prepare(cfg, tmp_path).fingerprint == plain.fingerprint
    assert len([path for path in tmp_path.iterdir() if not path.name.startswith(".")]) == 2
    assert entry.is_dir()
    with contextlib.closing(make_batches(plain, cfg)) as batches:
        assert next(batches).features_BTC is None


def test_damaged_features_are_made_again(folder: pathlib.Path, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    plain = prepare(config(folder), tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    want = np.asarray(with_structure(plain, "python", tmp_path).stores[0].features)
    (entry,) = [path for path in tmp_path.iterdir() if path.name not in before]
    for damage in ("change", "cut", "checks", "offer"):
        file = entry / "features_0"
        content = bytearray(file.read_bytes())
        if damage == "change":
            content[5000] ^= 1
            file.write_bytes(content)
        elif damage == "cut":
            file.write_bytes(content[:-34])
        elif damage == "checks":
            (entry / "checks_0").write_bytes(b"")
        else:
            (entry / "manifest.json").unlink()
        with caplog.at_level(logging.WARNING):
            got = with_structure(plain, "python", tmp_path)
        assert "it is built again" in caplog.text
        caplog.clear()
        assert (np.asarray(got.stores[0].features) == want).all()


def test_rows_have_the_features_of_their_tokens_and_point_to_nothing_outside(folder: pathlib.Path, tmp_path) -> None:
    corpus = with_structure(prepare(config(folder), tmp_path), "python", tmp_path)
    store, end = corpus.stores[0], corpus.tokenizer.end_id
    rows = PackedRows(store, seq_len=64, seed=3, end_id=end)
    stored, all_tokens = np.asarray(store.features).reshape(-1, NUM_FIELDS), np.asarray(store.tokens)
    pointers = list(POINTERS.values())
    for number in range(0, rows.num_rows, 7):
        row = rows[number]
        assert row["features"].dtype == np.int16
        parts = np.flatnonzero(np.diff(row["document_ids"], prepend=0) != 0)
        for begin, after in zip(parts, [*parts[1:], 64], strict=True):
            if row["document_ids"][begin] == 0:
                continue
            tokens, features = row["tokens"][begin:after], row["features"][begin:after]
            if tokens[0] == end:
                assert features[0].tolist() == list(BEGINNING)
                tokens, features = tokens[1:], features[1:]
            at = next(
                i for i in range(all_tokens.size - tokens.size + 1) if (all_tokens[i : i + tokens.size] == tokens).all()
                and (np.delete(stored[i : i + tokens.size], pointers, 1) == np.delete(features, pointers, 1)).all()
            )  # fmt: skip
            want = stored[at : at + tokens.size, pointers]
            place = row["positions"][begin:after][-len(features) :][:, None] if len(features) else want
            assert (features[:, pointers] == np.where(want <= place, want, 0)).all()


def test_windows_of_evaluation_have_the_features_of_the_whole_document(folder: pathlib.Path, tmp_path) -> None:
    corpus = with_structure(prepare(config(folder), tmp_path), "python", tmp_path)
    windows = eval_windows(corpus.held_out, seq_len=64, context=32, batch_size=4, end_id=corpus.tokenizer.end_id)
    counted = [np.zeros(0)] * len(corpus.held_out)
    kinds = [document.features_TC[:, 0] for document in corpus.held_out if document.features_TC is not None]
    seen: dict[int, list[int]] = {}
    for batch, owner_BT in zip(windows.batches, windows.document_BT, strict=True):
        assert batch.features_BTC.shape == (4, 64, NUM_FIELDS)
        for row, owner in zip(batch.features_BTC, owner_BT, strict=True):
            for number in set(owner.tolist()) - {-1}:
                seen.setdefault(number, []).extend(row[owner == number, 0].tolist())
    for number, found in seen.items():
        assert sorted(found) == sorted([BEGINNING[0], *kinds[number].tolist()])
    assert len(seen) == len(counted)


# ---------------------------------------------------------------- errors and repairs


def test_every_kind_of_error_breaks_real_code_and_its_line_mends_it() -> None:
    codes = [code for _, content in library(20, 30_000) for code in functions(content.decode("utf-8", "replace"), 30)]
    for kind in SHARES:
        rng, found = random.Random(kind), 0
        for code in codes[:150]:
            case = broken(code, rng, {kind: 1.0})
            if case is None:
                continue
            found += 1
            with pytest.raises(SyntaxError):
                ast.parse(case.text)
            assert case.kind == kind
            assert case.mended(case.original) == code
            pairs = zip(code.splitlines(), case.text.splitlines(), strict=True)
            assert [number for number, (was, now) in enumerate(pairs) if was != now] == [case.line]
        assert found >= 5, kind


def test_the_functions_of_a_file_stand_alone() -> None:
    text = textwrap.dedent(
        """\
        class A:
            @x
            def f(self):
                return '''
          a'''

            async def g(self):
                pass

        def h(): 1
        """
    )
    want = {"def f(self):\n    return '''\n  a'''\n", "async def g(self):\n    pass\n"}
    assert set(functions(text, 30)) == want  # one line has no room for an error and what mends it
    assert functions("def f(:\n", 30) == []
    assert functions("def f():\n    a\n    b\n", 2) == []


def test_errors_depend_on_document_and_seed_alone() -> None:
    texts = [content.decode("utf-8", "replace") for _, content in library(6, 30_000)]
    one = list(repairs(texts, RepairConfig(), 0))
    assert one == list(repairs(texts, RepairConfig(), 0)) != list(repairs(texts, RepairConfig(), 1))
    alone = list(repairs(texts[2:3], RepairConfig(), 0))
    assert alone
    assert [case for case in one if case in alone] == alone
    with pytest.raises(UserError, match="there is no kind of error 'typo'; there are bracket dropped, "):
        broken("x = 1\n", random.Random(0), {"typo": 1.0})


def test_a_text_without_a_place_for_an_error_has_none() -> None:
    for text in ("", "x\n", "x"):
        assert broken(text, random.Random(0), {"indentation": 1.0}) is None
    for shares in ({}, {"indentation": 0.0}, {"indentation": 1.0, "assigned": -1.0}):
        with pytest.raises(UserError, match="they must be numbers from 0, at least one above it"):
            broken("x = 1\n", random.Random(0), shares)


def test_a_form_feed_is_no_line() -> None:
    first, second = "def f(x):\n    '\f'\n    return x\n", "def g(x):\n    y = 1\n    return x\n"
    assert set(functions(f"import a\n\f\n{first}\n{second}", 30)) == {first, second}
    case = broken(first, random.Random(0), {"bracket dropped": 1.0})
    assert case is not None
    assert (case.line, case.mended(case.original)) == (0, first)


def test_repairs_are_a_source_of_their_own_and_only_what_mends_counts(folder: pathlib.Path, tmp_path) -> None:
    cfg = config(folder, special_tokens=SPECIAL, repair=RepairConfig(share=0.3))
    corpus = prepared(cfg, STRUCTURE, tmp_path)
    words, (plain, store) = corpus.tokenizer, corpus.stores
    assert plain.weights is None
    tokens, weights = np.asarray(store.tokens), np.asarray(store.weights)
    for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
        own, weight = tokens[begin:end], weights[begin:end]
        assert own[0] == words.special_ids[BROKEN]
        (at,) = np.flatnonzero(own == words.special_ids[REPAIR])
        assert (weight == (np.arange(end - begin) > at)).all()
        with pytest.raises(SyntaxError):
            ast.parse(words.decode(own[1:at]))
        assert len(words.decode(own[at + 1 :]).splitlines()) == 1
    with contextlib.closing(make_batches(corpus, cfg)) as batches:
        rows = [next(batches) for _ in range(60)]
    broken_rows = [
        (b.tokens_BT[i], b.targets_BT[i], b.loss_weight_BT[i])
        for b in rows
        for i in range(4)
        if b.loss_weight_BT[i].min() == 0 and b.documents.ids_BT[i].min() > 0
    ]
    assert abs(len(broken_rows) / 240 - 0.3) < 0.05  # but for a row in which all counts, and one with padding
    for _, targets, weight in broken_rows:
        special = np.isin(targets, [words.special_ids[name] for name in SPECIAL])
        assert (weight[special] == 0).all()  # nobody has to predict that something is broken
        assert (weight[targets == words.end_id] == 1).all() or (weight == 0).all()
    again = prepared(cfg, STRUCTURE, tmp_path)
    assert again.fingerprint == corpus.fingerprint
    assert (np.asarray(again.stores[1].tokens) == tokens).all()
    assert corpus.stores[1].features is not None


def test_repairs_want_their_tokens(folder: pathlib.Path, tmp_path) -> None:
    with pytest.raises(UserError, match=r"data.special_tokens is \(\); with repair it has '<\|broken\|>'"):
        validate(config(folder, repair=RepairConfig()), "data")
    with pytest.raises(UserError, match=r"data.repair needs the special token '<\|broken\|>'"):
        with_repairs(prepare(config(folder), tmp_path), RepairConfig(), 0, tmp_path)


# ---------------------------------------------------------------- a run


def test_a_run_with_structure_trains_resumes_is_evaluated_and_writes(
    folder: pathlib.Path, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSJAX_CACHE", str(tmp_path / "cache"))
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4, scope_heads=1)
    job = Pretrain(
        model=DecoderConfig(
            vocab_size=400,
            d_model=8,
            num_layers=1,
            groups=(LayerGroup(MLPConfig(d_ff=16), attention),),
            structure=STRUCTURE,
        ),
        data=config(folder, special_tokens=SPECIAL, repair=RepairConfig(share=0.2), batch_size=8, seq_len=128),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        train=TrainConfig(steps=6, log_every=2, eval_every=3, eval_documents=2),
        checkpoint=CheckpointConfig(every=3, keep=4),
    )
    run = tmp_path / "run"
    assert pretrain.run(job, run, quiet=True) == 0
    longer = dataclasses.replace(job, train=dataclasses.replace(job.train, steps=9))
    assert pretrain.run(longer, run, quiet=True) == 0
    report = evaluate_run(run, num_samples=4, quiet=True)
    assert 0 < report["bits_per_byte"] < 8
    assert report["parse_samples"] == 4
    model = dsjax.load(run)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("def f(x):\n    return")
    out = model.generate(ids[None], max_new_tokens=4, stop_at_eos=False)[0]
    logits = model.logits(out[None])[0]
    # What was generated greedily is what the model says of the whole text at once.
    assert np.asarray(logits).argmax(-1)[len(ids) - 1 : -1].tolist() == out[len(ids) :].tolist()
    loaded, held_out = load_model(RunFolder(run)), prepared(job.data, None, tmp_path / "cache" / "data").held_out
    monkeypatch.setattr("dsjax.evals.repair.LINE_TOKENS", 8)
    figures = repair_figures(loaded, held_out, limit=5)
    assert figures["samples"] == sum(n for _, n in figures["exact_by_kind"].values()) > 0
    assert figures["exact"] <= figures["parses"] <= 1  # a line as it was is one with which it parses
    other = dataclasses.replace(job, model=dataclasses.replace(job.model, structure=StructureConfig()))
    with pytest.raises(UserError, match=r"was trained with model\.structure"):
        pretrain.run(other, run, quiet=True)
