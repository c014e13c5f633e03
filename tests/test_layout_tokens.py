"""Tokens that stand for the form of texts: tokenizer, text as it comes, features, corpora, runs."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_cases import BYTES, library
from test_structure_corpus import config

import dsjax
from dsjax.config import UserError
from dsjax.data.build.fim import FimTokens
from dsjax.data.corpus import Source
from dsjax.data.marked import Marked, encode
from dsjax.data.pipeline import make_batches
from dsjax.data.prepare import prepare
from dsjax.data.structure.errors import BROKEN, REPAIR, RepairConfig, broken
from dsjax.data.structure.language import PYTHON
from dsjax.data.structure.repair import repair_tokens
from dsjax.data.structure.scanner import Scanner
from dsjax.data.structure.stored import prepared, scanner
from dsjax.data.token_names import byte_level_bytes
from dsjax.data.tokenizer import END, Tokenizer, load_tokenizer, parse_tokenizer, train_tokenizer
from dsjax.evals.report import evaluate_run
from dsjax.infer.detokenize import Detokenizer
from dsjax.infer.engine import heal
from dsjax.infer.grammar import PythonGrammar
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.fields import COLUMN, KIND, POINTERS
from dsjax.nn.mlp import MLPConfig
from dsjax.nn.structure import StructureConfig
from dsjax.runs import RunFolder, load_model
from dsjax.train import pretrain
from dsjax.train.optimizer import OptimConfig
from dsjax.train.pretrain import CheckpointConfig, Pretrain, TrainConfig

CODE = '''\
class A:
    """Of a."""

    def f(self, x):
        if x:
            return [
                x,
            ]
        return None

    def g(self):
        pass


def h():
    # é 深
    f(
        1)
'''
FIM = FimTokens().names


@functools.cache
def tokenizer() -> Tokenizer:
    texts = [CODE * 20, *(content.decode("utf-8", "replace") for _, content in library(6, 20_000))]
    return train_tokenizer(texts, 600, (*FIM, BROKEN, REPAIR), layout=True)


def ids_of(text: str) -> list[int]:
    return tokenizer().encode(text).tolist()


TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from((
        "def f(x):\n", "    ", "\n", "\n        ", "return x", "é", "深", "(", ")", '"""', "'", "#", "\t", "\x0f",
        "\x10", END,
    )),
    max_size=20,
).map("".join)  # fmt: skip
IDS = st.lists(st.integers(0, 599), max_size=60)


# ---------------------------------------------------------------- tokenizer


@settings(max_examples=120, deadline=None)
@given(TEXTS)
def test_round_trip_is_exact(text: str) -> None:
    ids = ids_of(text)
    assert tokenizer().decode(ids, skip_special=False) == text
    assert not set(ids) & set(tokenizer().special_ids.values())


def test_real_files_come_back_and_take_no_more_tokens_than_without() -> None:
    texts = [content.decode("utf-8", "replace") for _, content in library(6, 20_000)]
    plain = train_tokenizer(texts, 600)
    both = [[made.encode_many(texts) for made in (tokenizer(), plain)]]
    for with_layout, _ in both:
        for text, ids in zip(texts, with_layout, strict=True):
            assert tokenizer().decode(ids) == text
            np.testing.assert_array_equal(ids, tokenizer().encode(text))
    sizes = [sum(ids.size for ids in found) for found in both[0]]
    assert sizes[0] < 1.05 * sizes[1]


def test_the_end_of_a_line_and_all_that_ends_with_it_are_one_token() -> None:
    names, texts = tokenizer().names(), [tokenizer().decode([i]) for i in ids_of(CODE)]
    ends = {names[i] for i, text in zip(ids_of(CODE), texts, strict=True) if "\n" in text}
    assert {":ĊĠĠĠĠ", "):ĊĠĠĠĠ", "ĊĊď"} <= ends  # blocks begin, a method ends


def test_the_file_says_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer().to_json(), encoding="utf-8")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.layout
    assert loaded.decode(loaded.encode(CODE)) == CODE
    assert loaded.encode(CODE).tolist() == ids_of(CODE)
    assert not train_tokenizer([CODE], 300).layout
    other = tokenizer().to_json().replace("layout: python 1", "layout: python 2")
    with pytest.raises(UserError, match="has the layout 'python 2'; the one that is known here is 'python 1'"):
        parse_tokenizer(other, "it")


def test_training_does_not_depend_on_how_often() -> None:
    assert train_tokenizer([CODE], 300, layout=True).to_json() == train_tokenizer([CODE], 300, layout=True).to_json()


def test_half_of_a_surrogate_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="can not encode"):
        tokenizer().encode("a\ud800")


@settings(max_examples=150, deadline=None)
@given(IDS, IDS)
def test_every_sequence_of_tokens_is_a_text_and_none_of_it_is_taken_back(ids: list[int], more: list[int]) -> None:
    made = tokenizer()
    text, writer = made.decode(ids), made.writer()
    assert b"".join(writer.add(i) for i in ids).decode(errors="replace") == text
    whole = made.decode([*ids, *more])
    assert whole.startswith(text.rstrip("\ufffd"))
    assert "\ufffd" in text or whole == text + made.decode(more, behind=ids)


def test_a_text_begins_behind_a_special_token() -> None:
    end = tokenizer().end_id
    ids = [*ids_of("if x:\n    y"), end, *ids_of("if x:\n    y\nz")]
    assert tokenizer().decode(ids) == "if x:\n    yif x:\n    y\nz"
    assert tokenizer().decode(ids, skip_special=False) == "if x:\n    y<|end|>if x:\n    y\nz"


# ---------------------------------------------------------------- parts


@settings(max_examples=120, deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.booleans())
def test_a_middle_goes_on_behind_its_prefix(prefix: str, suffix: str, middle: str, suffix_first: bool) -> None:
    made = tokenizer()
    begin, hole, end = (made.special_ids[name] for name in FIM)
    parts = [begin, hole, suffix, end, prefix + middle] if suffix_first else [begin, prefix, hole, suffix, end, middle]
    ids = made.encode_parts(parts)
    shown = "".join(
        part if isinstance(part, str) else {begin: FIM[0], hole: FIM[1], end: FIM[2]}[part] for part in parts
    )
    assert made.decode(ids, skip_special=False) == shown
    if not suffix_first:
        alone = made.encode_parts([begin, prefix, hole, suffix, end])
        assert made.decode(ids[len(alone) :], behind=alone) == middle


@settings(max_examples=120, deadline=None)
@given(st.lists(TEXTS, max_size=5))
def test_masked_parts_are_cut_off_and_say_the_same(texts: list[str]) -> None:
    text, at, masked = "".join(texts), 0, []
    for number, part in enumerate(texts):
        if number % 2 and part:
            masked.append((at, at + len(part)))
        at += len(part)
    ids, weights = encode(Marked(text, masked=tuple(masked)), tokenizer())
    assert tokenizer().decode(ids) == text
    assert weights.size == ids.size
    # What is learned is, blanks apart, what is not masked.
    writer = tokenizer().writer()
    added = [(writer.add(int(i)), weight) for i, weight in zip(ids, weights, strict=True)]
    learned = b"".join(part for part, weight in added if weight)
    kept = "".join(part for number, part in enumerate(texts) if not number % 2).encode()
    assert learned.translate(None, b" \t") == kept.translate(None, b" \t")


def test_a_repair_is_a_line_by_itself() -> None:
    code = "def f(x):\n    if x:\n        return [x]\n    return None\n"
    for seed in range(20):
        case = broken(code, random.Random(seed))
        assert case is not None
        tokens, given = repair_tokens(tokenizer(), case)
        assert tokenizer().decode(tokens[given:]) == case.original
        assert tokenizer().decode(tokens[given:], behind=tokens[:given]) == case.original
        assert tokenizer().decode(tokens[:given]) == case.text


# ---------------------------------------------------------------- text as it comes


def pieces(made: Detokenizer, ids: list[int]) -> list[str]:
    return [*(made.add(i) for i in ids), made.end()]


@settings(max_examples=120, deadline=None)
@given(IDS, IDS)
def test_pieces_are_the_text_behind_what_was_before(before: list[int], ids: list[int]) -> None:
    got = pieces(Detokenizer(tokenizer(), before=before), ids)
    assert "".join(got) == tokenizer().decode(ids, behind=before)


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.integers(0, 60))
def test_a_prompt_and_its_continuation_are_one_text(text: str, cut: int) -> None:
    ids = [tokenizer().end_id, *ids_of(text)]
    begun = ids[: min(cut, len(ids))]
    got = pieces(Detokenizer(tokenizer(), before=begun), ids[len(begun) :])
    assert tokenizer().decode(begun, skip_special=True) + "".join(got) == text or "\ufffd" in "".join(got)


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("def f(x):\n", "    return x\n"),
        ("def f(x):\n    ", "return x\n"),
        ("class A:\n    def f(x):\n        return x\n", "\n    def g(): pass\n"),
        ("class A:\n    def f(x):\n        return x\n", "\n\nx = 1\n"),
        ("x = 'a\n    b", "c'\n"),
    ],
)
def test_what_a_healed_token_stood_for_is_not_new(prompt: str, rest: str) -> None:
    ids = [tokenizer().end_id, *ids_of(prompt)]
    healed, first = heal(tokenizer(), ids)
    names = tokenizer().names()
    # What follows, as it would have been said at once.
    form = str(tokenizer().said([prompt + rest])[0]).encode()
    begun = b"".join(byte_level_bytes(names[i]) for i in healed[1:])
    assert form.startswith(begun)
    more = tokenizer().encode_said(form[len(begun) :].decode()).tolist()
    assert first[more[0]]
    made = Detokenizer(tokenizer(), before=healed, healed=ids[-1])
    assert "".join(pieces(made, more)) == rest


def test_a_text_stops_where_its_text_says_so() -> None:
    ids = ids_of("if x:\n    y()\n    z()\n")
    made = Detokenizer(tokenizer(), ["\n    z"])
    assert "".join(pieces(made, ids)) == "if x:\n    y()"
    assert made.stopped


def test_a_grammar_says_that_it_can_not_be_had() -> None:
    with pytest.raises(UserError, match="layout"):
        PythonGrammar(tokenizer())


# ---------------------------------------------------------------- features

CATEGORIES = [column for name, column in COLUMN.items() if name not in POINTERS and name != "floor"]


def compare_features(text: str, tokens: list[int]) -> None:
    """Behind each token they are those behind its text and the blanks that wait."""
    features, writer = scanner("python", tokenizer()).scan(tokens), tokenizer().writer()
    slow, row = Scanner(PYTHON, BYTES), np.zeros(len(COLUMN), np.int16)
    for number, token in enumerate(tokens):
        added = writer.add(token)
        if added:
            row = slow.scan(list(added))[-1]
        waiting = writer.layout.waiting
        want = slow.copy().scan(list(waiting))[-1] if waiting else row
        if added or number:
            assert (features[number, CATEGORIES] == want[CATEGORIES]).all(), (text, number, added)


def test_features_are_those_of_the_text_in_real_files() -> None:
    for _, content in library(4, 6_000):
        text = content.decode("utf-8", "replace")
        compare_features(text, ids_of(text))


@settings(max_examples=150, deadline=None)
@given(TEXTS | st.lists(st.sampled_from(CODE.splitlines(keepends=True)), max_size=8).map("".join))
def test_features_are_those_of_any_text(text: str) -> None:
    compare_features(text, ids_of(text))


def test_features_depend_on_nothing_that_comes_and_go_on_from_a_copy() -> None:
    text = library(1)[0][1].decode("utf-8", "replace")
    ids, first = ids_of(text), scanner("python", tokenizer())
    whole = first.copy().scan(ids)
    for end in range(0, len(ids), max(len(ids) // 25, 1)):
        part = first.copy()
        np.testing.assert_array_equal(part.scan(ids[:end]), whole[:end])
        other = part.copy()
        for at in range(end, min(end + 12, len(ids))):
            np.testing.assert_array_equal(other.feed(ids[at]), whole[at])
        np.testing.assert_array_equal(part.scan(ids[end : end + 12]), whole[end : end + 12])


def test_the_end_of_a_line_tells_of_the_block_that_goes_on() -> None:
    """Behind `return None` and its end comes another statement of the function, or a sign says what ends."""
    ids = ids_of(CODE)
    names, features = tokenizer().names(), scanner("python", tokenizer()).scan(ids)
    depth = {name: features[i, COLUMN["depth"]] for i, name in enumerate(map(names.__getitem__, ids)) if "Ċ" in name}
    assert depth[next(name for name in depth if name.endswith("ĊĊď"))] == 1  # the class
    kinds = [int(features[i, COLUMN["kind"]]) for i, token in enumerate(ids) if names[token].endswith(":ĊĠĠĠĠ")]
    assert kinds[:2] == [KIND["class"], KIND["def"]]


# ---------------------------------------------------------------- corpora and runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("code")
    for number, (_, content) in enumerate(library(30, 15_000)):
        (root / f"{number:02}.py").write_bytes(content)
    return root


def test_a_corpus_with_layout_is_another_one(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    plain, cfg = prepare(config(folder), tmp_path), config(folder, layout=True)
    corpus = prepare(cfg, tmp_path)
    assert corpus.tokenizer.layout
    assert not plain.tokenizer.layout
    assert corpus.fingerprint != plain.fingerprint
    assert [d.text for d in corpus.held_out] == [d.text for d in plain.held_out]
    assert [d.num_bytes for d in corpus.held_out] == [d.num_bytes for d in plain.held_out]
    for document in corpus.held_out:
        assert corpus.tokenizer.decode(document.ids) == document.text
    assert prepare(cfg, tmp_path).fingerprint == corpus.fingerprint
    assert prepare(config(folder), tmp_path).fingerprint == plain.fingerprint


def test_a_tokenizer_file_decides(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    made = {layout: train_tokenizer([CODE], 300, layout=layout) for layout in (False, True)}
    for layout, one in made.items():
        (tmp_path / f"{layout}.json").write_text(one.to_json(), encoding="utf-8")
    for key in (False, True):
        cfg = config(folder, layout=key, tokenizer_path=str(tmp_path / "True.json"))
        assert prepare(cfg, tmp_path / "cache").tokenizer.layout
    with pytest.raises(UserError, match=r"data.layout is true; .*False.json is a tokenizer without layout"):
        prepare(config(folder, layout=True, tokenizer_path=str(tmp_path / "False.json")), tmp_path / "cache")


def test_masked_records_and_holes_in_a_corpus(tmp_path: pathlib.Path) -> None:
    texts = [f"def f{i}(x):\n    if x:\n        return {i}\n    return x\n" for i in range(40)]
    records = []
    for text in texts:
        prompt = text.index("\n") + 1
        records.append(Marked(text, masked=((0, prompt),)).record())
        hole = "".join((FIM[0], text[:20], FIM[1], text[30:], FIM[2], text[20:30]))
        spans = tuple((at, at + len(name)) for name in FIM for at in [hole.index(name)])
        records.append(Marked(hole, special=tuple(sorted(spans))).record())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cfg = config(tmp_path, sources=(Source(str(tmp_path / "a.jsonl"), marked=True),), layout=True, vocab_size=300,
                 special_tokens=tuple(FIM), near_duplicate_threshold=1.0)  # fmt: skip
    corpus = prepare(cfg, tmp_path / "cache")
    store, found = corpus.stores[0], set()
    for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
        ids, weights = np.asarray(store.tokens[begin:end]), np.asarray(store.weights[begin:end])
        text = corpus.tokenizer.decode(ids, skip_special=False)
        found.add(text)
        if not weights.all():
            learned = corpus.tokenizer.decode(ids[weights > 0], behind=ids[weights == 0])
            assert learned == text[text.index("\n") + 1 :]
    assert found <= {record["text"] for record in records}
    assert any(text.startswith(FIM[0]) for text in found)


@pytest.mark.slow
def test_a_run_is_trained_evaluated_and_sampled(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSJAX_CACHE", str(tmp_path / "cache"))
    structure = StructureConfig(pointers=("name",))
    group = LayerGroup(MLPConfig(d_ff=16), AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4))
    cfg = Pretrain(
        model=DecoderConfig(vocab_size=400, d_model=8, num_layers=1, groups=(group,), structure=structure),
        data=config(folder, layout=True, batch_size=8, special_tokens=(BROKEN, REPAIR), repair=RepairConfig(share=0.2)),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=2, eval_every=2, eval_documents=1),
        checkpoint=CheckpointConfig(every=2),
    )
    assert pretrain.run(cfg, tmp_path / "run", quiet=True) == 0
    report = evaluate_run(tmp_path / "run", num_samples=4, quiet=True)
    assert report["held_out_bytes"] == sum(d.num_bytes for d in prepare(cfg.data, tmp_path / "cache" / "data").held_out)
    assert report["parse_samples"] == 4
    assert report["real_parse_share"] > 0.5  # of bodies cut from the files, which say their own layout
    model = dsjax.load(tmp_path / "run")
    assert model.tokenizer is not None
    assert model.tokenizer.layout
    prompt = model.tokenizer.encode("def f(x):\n")
    out = model.generate(prompt[None], max_new_tokens=8)
    assert model.tokenizer.decode(out[0]).startswith("def f(x):\n")
    corpus = prepared(cfg.data, structure, tmp_path / "cache" / "data")
    with contextlib.closing(make_batches(corpus, cfg.data)) as batches:
        assert next(batches).features_BTC is not None
    assert load_model(RunFolder(tmp_path / "run")).tokenizer.layout
