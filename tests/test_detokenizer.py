"""Text as it comes: whole characters only, all of it, and nothing behind a stop string."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from dsjax.config import UserError
from dsjax.data.tokenizer import END, Tokenizer, train_tokenizer
from dsjax.infer.detokenize import Detokenizer
from dsjax.infer.engine import heal

TEXT = "def f(x):\n    return 'né 深度求索 😀'\n" * 30


@functools.cache
def byte_level() -> Tokenizer:
    return train_tokenizer([TEXT], 300)


@functools.cache
def sentence_piece(*further: str) -> Tokenizer:
    """As of the first Llama models: words with the space before them, and bytes for what is not in the vocabulary."""
    pieces = [END, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁a", "a", "b", "c", "▁dog", *further]
    inner = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([END])
    return Tokenizer(inner)


def pieces(made: Detokenizer, ids: list[int]) -> list[str]:
    return [*(made.add(i) for i in ids), made.end()]


def test_what_begins_with_a_token_is_told_by_text_and_not_by_names() -> None:
    tokenizer = sentence_piece("<", "<a")
    names = tokenizer.names()
    found = {names[i] for i in np.flatnonzero(tokenizer.extensions(names.index("<")))}
    assert found == {"<", "<a", "<0x3C>"}
    assert np.flatnonzero(tokenizer.extensions(tokenizer.end_id)).tolist() == [tokenizer.end_id]


IDS = st.lists(st.integers(0, 299), max_size=60)


@settings(max_examples=150, deadline=None)
@given(IDS | st.text("né深😀\ufffd ", max_size=20).map(lambda text: byte_level().encode(text).tolist()))
def test_the_pieces_are_the_text_and_none_is_taken_back(ids: list[int]) -> None:
    """Any ids, halves of characters and bytes that are none among them; longer than what is looked back at."""
    assert "".join(pieces(Detokenizer(byte_level()), ids)) == byte_level().decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.text("né深度😀 \n", max_size=30))
def test_no_character_is_shown_in_halves(text: str) -> None:
    made = Detokenizer(byte_level())
    ids = [i for c in text for i in byte_level().encode(c).tolist()]  # most characters take several
    shown = ""
    for i in ids:
        shown += made.add(i)
        assert text.startswith(shown)
    assert shown + made.end() == text


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["▁the", "▁a", "a", "▁dog", "é", "深", "😀"]), max_size=40))
def test_words_that_bring_their_space_and_bytes_that_stand_for_characters(words: list[str]) -> None:
    tokenizer = sentence_piece()
    ids = []
    for word in words:
        known = tokenizer._inner.token_to_id(word)
        ids += [1 + byte for byte in word.encode()] if known is None else [known]
    got = pieces(Detokenizer(tokenizer), ids)
    assert "".join(got) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in got)


def test_a_first_word_keeps_its_space_behind_a_prompt() -> None:
    tokenizer = sentence_piece()
    the, dog = (tokenizer._inner.token_to_id(word) for word in ("▁the", "▁dog"))
    assert pieces(Detokenizer(tokenizer), [dog]) == ["dog", ""]
    assert pieces(Detokenizer(tokenizer, before=[the]), [dog]) == [" dog", ""]


@pytest.mark.parametrize("cut", range(10))  # where the prompt ends: in front of, behind and within characters
@pytest.mark.parametrize("new", ["aa", "中a", "😀"])
def test_behind_a_prompt_of_bytes_its_characters_are_whole(cut: int, new: str) -> None:
    """This decoder gives up a whole run of bytes if the first or the last character of it is in halves."""
    tokenizer = sentence_piece()
    ids = [1 + byte for byte in f"深度学习深度学习{new}".replace("a", "").encode()]
    ids += [tokenizer._inner.token_to_id("a")] * new.count("a")
    size = len("深度学习深度学习".encode()) - cut
    shown = ("深度学习深度学习" + new)[8 - (cut + 2) // 3 :]
    assert "".join(pieces(Detokenizer(tokenizer, before=ids[:size]), ids[size:])) == shown
    assert "".join(pieces(Detokenizer(tokenizer, [new], before=ids[:size]), ids[size:])) == shown[: -len(new)]


def first_end(text: str, stops: list[str]) -> str:
    """The text in front of the stop string that is complete first, character by character."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab\n é", max_size=24),
    st.lists(st.text("ab\n é", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=24, max_size=24),
)
def test_where_a_text_stops_does_not_depend_on_its_tokens(text: str, stops: list[str], sizes: list[int]) -> None:
    ids, rest = [], text
    for size in sizes:
        ids += byte_level().encode(rest[:size]).tolist()
        rest = rest[size:]
    want = first_end(text, stops)
    made, shown = Detokenizer(byte_level(), stops), ""
    for i in ids:
        shown += made.add(i)
        assert want.startswith(shown)
        if made.stopped:
            break
    assert made.stopped == (want != text or any(text.endswith(stop) for stop in stops))
    assert shown + made.end() == want


def test_what_a_healed_token_stood_for_is_not_new() -> None:
    tokenizer = train_tokenizer(["if x:\n    y()\nfor i in z:\n    y()\n" * 50], 300)
    ids = [tokenizer.end_id, *tokenizer.encode("if x:\n").tolist()]
    healed, first = heal(tokenizer, ids)
    whole = tokenizer.encode("if x:\n    y").tolist()
    assert first[whole[len(healed) - 1]]
    made = Detokenizer(tokenizer, ["\n"], before=healed, healed=ids[-1])
    assert "".join(pieces(made, whole[len(healed) - 1 :])) == "    y"
    assert not made.stopped  # the line end was in the prompt


def test_special_tokens_have_no_text() -> None:
    tokenizer = byte_level()
    a, b = tokenizer.encode("ab").tolist()
    assert pieces(Detokenizer(tokenizer), [a, tokenizer.end_id, b]) == ["a", "", "b", ""]


@pytest.mark.parametrize("stop", [[""], ["a", ""], "text"])
def test_stop_strings_are_texts_that_are_not_empty(stop: list[str]) -> None:
    with pytest.raises(UserError, match="it is a list of texts that are not empty"):
        Detokenizer(byte_level(), stop)


def test_a_tokenizer_without_added_tokens_is_the_same_otherwise() -> None:
    content = json.loads(byte_level().to_json())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 300, "content": "<think>", "special": False})
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    (think,) = set(tokenizer.added_ids.values()) - {tokenizer.end_id}
    assert think in tokenizer.encode("a<think>b")
    assert think not in tokenizer.encode("a<think>b", added=False)
    assert tokenizer.decode(tokenizer.encode("a<think>b", added=False)) == "a<think>b"
