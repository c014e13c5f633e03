"""The tokenizer: exact, deterministic, deaf to special tokens spelt in text."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from dsjax.config import UserError
from dsjax.data.tokenizer import END, LAYOUT_SPLIT, SPLIT, load_tokenizer, parse_tokenizer, train_tokenizer

_TEXTS = ["def f(self):\n        return self.value_1 + 12345\n" * 20, "class A:\n    x = '<|end|>'\n\n    y = 2\n" * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(_TEXTS, 320, ("<|fim|>",))


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet=" \t\r\n_aé0.:(<|end>"))
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert not set(ids.tolist()) & set(tokenizer.special_ids.values())


def test_ids_of_special_tokens(tokenizer):
    assert tokenizer.special_ids == {END: 0, "<|fim|>": 1}
    assert tokenizer.end_id == 0
    assert tokenizer.decode([0, *tokenizer.encode("a").tolist(), 1]) == "a"


@pytest.mark.parametrize("split", [SPLIT, LAYOUT_SPLIT])
@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet=" \t\r\n_aZ0é.:(<|/>"))
def test_no_piece_holds_a_sign_behind_a_letter(split, text):
    pieces = pre_tokenizers.Split(Regex(split), behavior="isolated").pre_tokenize_str(text)
    assert not [piece for piece, _ in pieces if re.search(r"[A-Za-z0-9_][^A-Za-z0-9_\x80-\U0010ffff]", piece)]


# With the byte-level letter for a space; a text in the middle of an identifier; half of a character.
@pytest.mark.parametrize("name", ["EOS", "ĠEOS", "###", "##", "Ġ#", "12", "<EOS", "Q", "§", "ĊĠĠ", "aÃ"])
def test_a_name_that_text_may_spell_is_no_special_token(name):
    with pytest.raises(UserError, match=r"must have a letter or digit with a sign behind it, as '<\|end\|>'"):
        train_tokenizer(_TEXTS, 320, (name,))


@pytest.mark.parametrize("name", [END, "</s>", "[PAD]", "<a>", "a b", "<｜fim▁hole｜>", "終わり"])
def test_merges_never_spell_a_special_token(name):
    one = train_tokenizer([f"x {name} {name}y\n{name}(" * 50] * 9, 400, end_token=name)
    for text in (name, f" {name}", f"x{name}y\n{name}"):
        assert one.end_id not in one.encode(text)
        assert one.decode(one.encode(text)) == text


def test_line_end_with_indentation_is_one_token(tokenizer):
    assert tokenizer.decode(tokenizer.encode("):\n        return")[:1]) == "):\n        "


def test_encode_many_equals_encode(tokenizer):
    texts = [*_TEXTS, "", "x"]
    for one, text in zip(tokenizer.encode_many(texts), texts, strict=True):
        np.testing.assert_array_equal(one, tokenizer.encode(text))


def test_training_is_deterministic_across_processes(tokenizer):
    code = (
        f"from dsjax.data.tokenizer import *; print(train_tokenizer({_TEXTS!r}, 320, ('<|fim|>',)).to_json(), end='')"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert again == tokenizer.to_json()


def test_load_gives_the_same_ids(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(loaded.encode(_TEXTS[1]), tokenizer.encode(_TEXTS[1]))


def test_bad_tokenizer_files(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"does not exist"):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer.json"):
        load_tokenizer(path)
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    with pytest.raises(UserError, match=r"no special token '<eos>'; it has <.end.>"):
        load_tokenizer(path, end_token="<eos>")


@pytest.mark.parametrize("pattern", [r"\p{Lé", r"\p{" + "é" * 40 + "}", "[я-а]", "(?<é", "é["])
def test_a_wrong_pattern_beyond_ascii_does_not_abort_the_process(pattern: str) -> None:
    content = json.loads(train_tokenizer(["some text"], 300).to_json())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    with pytest.raises(UserError, match=r"here: not a tokenizer.json \(.*Oniguruma"):
        parse_tokenizer(json.dumps(content), "here")


def test_a_pattern_beyond_ascii_that_is_right_is_kept() -> None:
    content = json.loads(train_tokenizer(["some text"], 300).to_json())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[а-яё]+|é"
    assert json.loads(parse_tokenizer(json.dumps(content), "here").to_json()) == content


def test_merges_without_the_stated_prefix_do_not_abort_the_process() -> None:
    content = json.loads(train_tokenizer(["some text " * 9], 300).to_json())
    assert any(not second.isascii() or not first.isascii() for first, second in content["model"]["merges"])
    content["model"]["continuing_subword_prefix"] = "."
    with pytest.raises(
        UserError, match=r"here: not a tokenizer.json \(merge .* lacks the continuing_subword_prefix '.'"
    ):
        parse_tokenizer(json.dumps(content), "here")
