"""Preparing a corpus: halves, cache, fingerprint, settings."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from dsjax.config import UserError
from dsjax.data.corpus import Document, Source
from dsjax.data.dedup import deduplicate
from dsjax.data.pipeline import PackedRows
from dsjax.data.prepare import DataConfig, _publish, prepare, split
from dsjax.data.tokenizer import train_tokenizer


def _write(folder: pathlib.Path, count: int = 30, salt: str = "") -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng([count, *salt.encode()])
    for i in range(count):
        words = rng.integers(0, 300, 40)
        body = "".join(f"    x_{w} = f({w})\n" for w in words)
        (folder / f"m{i:03}.py").write_text(f"def {salt}g{i}():\n{body}")
    (folder / "copy.py").write_text((folder / "m001.py").read_text())
    return folder


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = _write(tmp_path_factory.mktemp("source"))
    return DataConfig(sources=(Source(str(folder)),), vocab_size=400, held_out_share=0.2, seq_len=32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cfg, cache):
    return prepare(cfg, cache)


def _training_texts(corpus):
    tokens, offsets = corpus.training_documents()
    return [corpus.tokenizer.decode(tokens[a:b]) for a, b in itertools.pairwise(offsets)]


def test_halves_make_up_the_corpus_and_share_nothing(cfg, corpus):
    files = {p.read_text() for p in pathlib.Path(cfg.sources[0].path).iterdir()}
    training, held_out = _training_texts(corpus), [h.text for h in corpus.held_out]
    assert sorted(training + held_out) == sorted(files)
    assert not set(training) & set(held_out)
    assert held_out
    together = [Document(str(i), t) for i, t in enumerate(training + held_out)]
    assert not deduplicate(together, cfg.near_duplicate_threshold).dropped


def test_held_out_ids_give_the_text(corpus):
    for h in corpus.held_out:
        assert corpus.tokenizer.decode(h.ids) == h.text
        assert h.num_bytes == len(h.text.encode())


def test_report_counts(corpus):
    r = corpus.report
    assert r.num_read == 31
    assert r.num_training + r.num_held_out == 30
    assert [d[2] for d in r.duplicates] == [1.0]
    assert r.training_tokens == corpus.stores[0].tokens.size
    assert r.held_out_bytes == sum(h.num_bytes for h in corpus.held_out)


def test_tokenizer_never_sees_the_held_out_half(tmp_path):
    folder = _write(tmp_path / "s", 8)
    cfg = DataConfig(sources=(Source(str(folder)),), vocab_size=300, held_out_share=0.3)
    before = prepare(cfg, tmp_path / "c")
    edited = before.held_out[0]
    path = folder / edited.name
    # Find an edit that stays held out, then compare tokenizers.
    for i in range(1000):
        text = edited.text + "zqzq" * 50 + str(i)
        if int.from_bytes(Document("", text).digest[:8], "big") / 2**64 < 0.3:
            break
    path.write_text(text)
    after = prepare(cfg, tmp_path / "c")
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    assert after.fingerprint != before.fingerprint


def test_a_growing_corpus_moves_no_document_across():
    documents = [Document(str(i), f"text {i}") for i in range(400)]
    small = split(documents, range(100), 0.1)
    large = split(documents, range(400), 0.1)
    assert set(small[0]) <= set(large[0])
    assert set(small[1]) <= set(large[1])
    assert abs(len(large[1]) / 400 - 0.1) < 0.06  # 4 standard deviations


def test_neither_half_is_ever_empty():
    documents = [Document("a", "a"), Document("b", "b")]
    for share in (1e-9, 1 - 1e-9):
        training, held_out = split(documents, (0, 1), share)
        assert len(training) == len(held_out) == 1
    with pytest.raises(UserError, match=r"hold 1 distinct document"):
        split(documents, (0,), 0.5)


def test_cache_is_used_and_an_edited_file_is_a_new_entry(cfg, tmp_path):
    folder = _write(tmp_path / "s")
    cfg = dataclasses.replace(cfg, sources=(Source(str(folder)),))
    stages: list[str] = []
    first = prepare(cfg, tmp_path / "c", progress=stages.append)
    built = len(stages)
    second = prepare(cfg, tmp_path / "c", progress=stages.append)
    assert built > 2
    assert len(stages) == built + 1, "only reading"
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    np.testing.assert_array_equal(second.stores[0].tokens, first.stores[0].tokens)
    (folder / "m002.py").write_text("x = 1\n")
    assert prepare(cfg, tmp_path / "c").fingerprint != first.fingerprint
    assert len(list((tmp_path / "c").iterdir())) == 2


@pytest.mark.parametrize("victim", ["tokens_0", "held_out.jsonl", "tokenizer.json", "manifest.json", "missing"])
def test_a_damaged_cache_is_rebuilt_with_one_line(cfg, corpus, tmp_path, caplog, victim):
    prepare(cfg, tmp_path)
    (entry,) = tmp_path.iterdir()
    if victim == "missing":
        (entry / "offsets_0").unlink()
    else:
        content = bytearray((entry / victim).read_bytes())
        content[len(content) // 2] ^= 1
        (entry / victim).write_bytes(content)
    again = prepare(cfg, tmp_path)
    (record,) = caplog.records
    assert "is damaged" in record.message
    assert "\n" not in record.message
    assert again.fingerprint == corpus.fingerprint
    assert list(tmp_path.iterdir()) == [entry]


def test_the_first_to_publish_wins(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        _publish(tmp_path / name, tmp_path / "entry")
    assert (tmp_path / "entry" / "file").read_text() == "first"


def test_two_processes_may_race(cfg, corpus, tmp_path):
    code = (
        "import sys; from dsjax.data.prepare import *; from dsjax.data.corpus import Source;"
        f"print(prepare({cfg!r}, sys.argv[1]).fingerprint)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) for _ in range(2)]
    assert [p.communicate()[0].decode().strip() for p in both] == [corpus.fingerprint] * 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"seq_len": 64}, False),
        ({"seed": 1}, False),
        ({"vocab_size": 380}, False),
        ({"special_tokens": ("<|fim|>",)}, False),
        ({"held_out_share": 0.5}, False),
        ({"batch_size": 3}, True),
    ],
)
def test_fingerprint_changes_with_what_changes_the_rows(cfg, cache, corpus, change, same):
    assert (prepare(dataclasses.replace(cfg, **change), cache).fingerprint == corpus.fingerprint) is same


def test_a_loaded_tokenizer_is_used_and_must_fit(cfg, corpus, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(corpus.tokenizer.to_json(), encoding="utf-8")
    loaded = dataclasses.replace(cfg, tokenizer_path=str(path))
    assert prepare(loaded, tmp_path / "c").fingerprint == corpus.fingerprint
    with pytest.raises(UserError, match=r"vocab_size is 300; .* has 400 ids"):
        prepare(dataclasses.replace(loaded, vocab_size=300), tmp_path / "c")
    lossy = json.loads(corpus.tokenizer.to_json())
    lossy["normalizer"] = {"type": "Lowercase"}
    lossy["model"]["vocab"].pop("x"), lossy["model"].update(merges=[])
    path.write_text(json.dumps(lossy), encoding="utf-8")
    with pytest.raises(UserError, match=r"does not reproduce"):
        prepare(loaded, tmp_path / "c")


def test_another_boundary_of_the_same_tokenizer_is_another_corpus(cfg, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(["a b c"], 300, ("<|other|>",)).to_json(), encoding="utf-8")
    loaded = dataclasses.replace(cfg, tokenizer_path=str(path))
    found = prepare(loaded, tmp_path / "c")
    other = prepare(dataclasses.replace(loaded, end_token="<|other|>"), tmp_path / "c")
    assert (found.tokenizer.end_id, other.tokenizer.end_id) == (0, 1)
    assert found.content == other.content
    assert found.fingerprint != other.fingerprint


def test_a_source_of_duplicates_only_is_named(cfg, tmp_path):
    both = dataclasses.replace(cfg, sources=cfg.sources * 2)  # the same folder twice: copies of equal names
    with pytest.raises(UserError, match=r"data.sources.1 \(.*\) has no document left to train on: all 31 are"):
        prepare(both, tmp_path)
    assert not list(tmp_path.iterdir())  # nothing half-built is left


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sources": ()}, "data.sources is empty"),
        ({"sources": (Source(weight=0.0),)}, "data.sources.0.weight is 0.0"),
        ({"sources": (Source(weight=-1.0),)}, "data.sources.0.weight is -1.0"),
        ({"held_out_share": 0.0}, "data.held_out_share is 0.0"),
        ({"held_out_share": 1.0}, "data.held_out_share is 1.0"),
        ({"near_duplicate_threshold": 0.0}, "data.near_duplicate_threshold is 0.0"),
        ({"vocab_size": 256}, "data.vocab_size is 256; it must be at least 257"),
        ({"seq_len": 0}, "data.seq_len is 0"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"seed": -1}, "data.seed is -1"),
        ({"special_tokens": ("a", "a")}, "data.special_tokens is ('a', 'a'); names must be distinct"),
        ({"special_tokens": ("a",), "tokenizer_path": "t.json"}, "data.special_tokens is ('a',); with tokenizer_path"),
        ({"tokenizer_path": "nowhere.json"}, "'nowhere.json' does not exist"),
        ({"tokenizer_path": "a" * 300}, "cannot be read"),
        ({"end_token": "§"}, "data.end_token has '§'; a name must have a letter or digit with a sign behind it"),
        ({"special_tokens": ("<|a|>", "EOS")}, "data.special_tokens has 'EOS'; a name must have a letter or digit"),
        ({"end_token": "x\udcff"}, "data.end_token and special_tokens are ('x\\udcff',); one has half of a surrogate"),
    ],
)
def test_bad_settings_are_one_sentence(cfg, tmp_path, change, said):
    with pytest.raises(UserError) as caught:
        prepare(dataclasses.replace(cfg, **change), tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_marked_records_train_what_is_not_masked(tmp_path: pathlib.Path) -> None:
    """Special tokens become one id each, masked ones no targets; the same names in plain text stay text."""
    lines = []
    for number in range(12):
        text = f"<|hole|>question {number} <|hole|> answer {number}"
        begin = text.index(" answer")
        lines.append(json.dumps({"text": text, "special": [[0, 8]], "masked": [[0, begin]]}))
    (tmp_path / "marked.jsonl").write_text("\n".join(lines))
    (tmp_path / "plain.txt").write_text("nothing to hide here")
    sources = (Source(str(tmp_path / "marked.jsonl"), marked=True), Source(str(tmp_path / "plain.txt")))
    cfg = DataConfig(
        sources=sources[:1], vocab_size=300, special_tokens=("<|hole|>",), seq_len=16, batch_size=2,
        near_duplicate_threshold=1.0,
    )  # fmt: skip
    for _ in range(2):  # made, and read from the cache
        corpus = prepare(cfg, tmp_path / "cache")
        (store,) = corpus.stores
        tokens, weights = np.asarray(store.tokens), np.asarray(store.weights)
        hole = corpus.tokenizer.special_ids["<|hole|>"]
        for begin, end in itertools.pairwise(store.offsets):
            own, learned = tokens[begin:end], weights[begin:end].astype(bool)
            assert own[0] == hole
            assert (own == hole).sum() == 1
            said = corpus.tokenizer.decode(own[learned])
            assert said.startswith(" answer")
            assert corpus.tokenizer.decode(own[~learned]).startswith("question")
    rows = PackedRows(store, seq_len=16, seed=0, end_id=corpus.tokenizer.end_id)
    learned, targets = 0, 0
    for row in range(rows.num_rows):
        fields = rows[row]
        counted = fields["loss_weight"] > 0
        learned += int(counted.sum())
        targets += int((fields["targets"][counted] == corpus.tokenizer.end_id).sum())
        assert not (counted & (fields["targets"] == hole)).any()
    # Every token that is not masked, and the boundary behind each document, once.
    assert learned == int(weights.sum()) + len(store.offsets) - 1
    assert targets == len(store.offsets) - 1


def test_damaged_weights_are_made_again(tmp_path: pathlib.Path) -> None:
    lines = [json.dumps({"text": f"ask {n} tell {n}", "masked": [[0, 5]]}) for n in range(6)]
    (tmp_path / "marked.jsonl").write_text("\n".join(lines))
    cfg = DataConfig(
        sources=(Source(str(tmp_path / "marked.jsonl"), marked=True),), vocab_size=300, seq_len=16,
        near_duplicate_threshold=1.0,
    )  # fmt: skip
    first = np.asarray(prepare(cfg, tmp_path / "cache").stores[0].weights)
    (entry,) = (p for p in (tmp_path / "cache").iterdir() if not p.name.startswith("."))
    damaged = bytearray((entry / "weights_0").read_bytes())
    damaged[3] ^= 1
    (entry / "weights_0").write_bytes(damaged)
    np.testing.assert_array_equal(np.asarray(prepare(cfg, tmp_path / "cache").stores[0].weights), first)


def test_a_special_token_that_the_tokenizer_lacks_is_named(tmp_path: pathlib.Path) -> None:
    lines = [json.dumps({"text": f"<|fim_hole|> {n}", "special": [[0, 12]]}) for n in range(6)]
    (tmp_path / "marked.jsonl").write_text("\n".join(lines))
    cfg = DataConfig(sources=(Source(str(tmp_path / "marked.jsonl"), marked=True),), vocab_size=300)
    with pytest.raises(UserError, match=r"no special token '<\|fim_hole\|>': put it into data.special_tokens"):
        prepare(cfg, tmp_path / "cache")
