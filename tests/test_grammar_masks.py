"""Masks over a vocabulary: they are what trying each token gives, and what is drawn within them parses."""

from __future__ import annotations

import functools
import pathlib
import random
import string
import sysconfig

import numpy as np
import pytest
from grammar_cases import TAKEN
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError
from dsjax.data.tokenizer import Tokenizer, train_tokenizer
from dsjax.infer.grammar import Constraint, PythonGrammar
from dsjax.infer.grammar.constraint import parses
from dsjax.infer.grammar.masks import Masks
from dsjax.infer.grammar.reader import Reader
from dsjax.infer.grammar.vocabulary import token_bytes

LIBRARY = pathlib.Path(sysconfig.get_path("stdlib"))
BYTES = tuple(bytes([b]) for b in range(256))


@functools.cache
def tokenizer(size: int = 1024) -> Tokenizer:
    names = ("ast.py", "dataclasses.py", "inspect.py", "typing.py", "enum.py", "argparse.py")
    return train_tokenizer([(LIBRARY / name).read_text(encoding="utf-8") for name in names], size)


@functools.cache
def masks() -> Masks:
    return Masks(token_bytes(tokenizer()), Reader())


@functools.cache
def grammar() -> PythonGrammar:
    return PythonGrammar(tokenizer())


def bits(row: np.ndarray, size: int) -> np.ndarray:
    return np.unpackbits(row, bitorder="little")[:size].astype(bool)


def tried(made: Masks, text: bytes) -> np.ndarray:
    """Which tokens may follow, by reading the text with each."""
    reader = Reader()
    place = reader.read(reader.start, text)
    assert place is not None, text
    return np.array([bool(t) and reader.read(place, t) is not None for t in made.texts])


# ---------------------------------------------------------------- masks


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(TAKEN), st.integers(0, 200), st.integers(0, 2**32 - 1))
def test_a_mask_is_what_trying_each_token_gives(text: str, cut: int, seed: int) -> None:
    """Behind a beginning of some program, and behind a few tokens more that may follow."""
    made, rng = masks(), random.Random(seed)
    begun = text.encode()[:cut]
    place = made.reader.read(made.reader.start, begun)
    assert place is not None
    for _ in range(rng.randrange(4)):
        token = int(rng.choice(np.flatnonzero(bits(made.row(place), len(made.texts)))))
        begun += made.texts[token]
        place = made.after(place, token)
        assert place is not None
    assert bits(made.row(place), len(made.texts)).tolist() == tried(made, begun).tolist(), begun


def blocks(depth: int) -> bytes:
    return b"".join(b" " * n + b"if x:\n" for n in range(depth)) + b" " * depth


NEAR = (b"(" * 31, b"[" * 31, b"f(" * 30 + b"'", b"x = " + b"not " * 630, b"-" * 637, b"lambda: " * 318)


@pytest.mark.parametrize("text", [*NEAR, b"{" * 30 + b"f'{", blocks(49), blocks(50) + b"if x:"], ids=range(9))
def test_near_the_limits_of_nesting_a_mask_is_exact_too(text: bytes) -> None:
    place = masks().reader.read(masks().reader.start, text)
    assert place is not None
    assert bits(masks().row(place), len(masks().texts)).tolist() == tried(masks(), text).tolist()


def test_real_files_are_allowed_token_by_token() -> None:
    files = sorted(p for p in LIBRARY.glob("*.py") if 2000 < p.stat().st_size < 25_000)
    made, num = masks(), 0
    for path in random.Random(0).sample(files, 12):
        place = made.reader.start
        for token in tokenizer().encode(path.read_text(encoding="utf-8")).tolist():
            assert made.row(place)[token >> 3] >> (token & 7) & 1, (path, num)
            following = made.after(place, token)
            assert following is not None
            place, num = following, num + 1
        assert made.reader.is_whole(place)
    assert num > 15_000


@settings(max_examples=15, deadline=None)
@given(st.lists(st.binary(min_size=2, max_size=5), max_size=20), st.integers(0, 2**32 - 1))
def test_within_any_vocabulary_a_walk_ends_in_a_program(words: list[bytes], seed: int) -> None:
    rng = random.Random(seed)
    pieces = [rng.choice(TAKEN).encode() for _ in range(30)]
    more = [piece[at : at + rng.randint(2, 6)] for piece in pieces for at in range(0, len(piece), 4)]
    made, text = Masks([*BYTES, *words, *(w for w in more if w)], Reader()), b""
    place = made.reader.start
    for _ in range(rng.randint(1, 40)):
        token = int(rng.choice(np.flatnonzero(bits(made.row(place), len(made.texts)))))
        text += made.texts[token]
        following = made.after(place, token)
        assert following is not None
        place = following
    assert bits(made.row(place), len(made.texts)).tolist() == tried(made, text).tolist()
    assert parses(text + made.reader.ending(place)), text


# ---------------------------------------------------------------- samples


def sample(seed: int, most: int) -> tuple[bytes, bool]:
    """The text of an untrained model that is as likely to say one token as another; and whether it ended by itself."""
    rng, end = np.random.default_rng(seed), tokenizer().end_id
    begun = random.Random(seed).choice(TAKEN) if seed % 2 else ""
    begun = begun[: random.Random(seed).randrange(len(begun) + 1)]
    constraint: Constraint = grammar().begin(tokenizer().encode(begun).tolist(), [end])
    for left in range(most, 0, -1):
        allowed_V = bits(constraint.row(left), tokenizer().vocab_size)
        token = int(np.where(allowed_V, rng.random(allowed_V.size), -1).argmax())
        if token == end:
            return bytes(constraint.text), True
        constraint.add(token)
    return bytes(constraint.text), False


def check_samples(seeds: range, most: int) -> None:
    texts = [sample(seed, most) for seed in seeds]
    finished = [text for text, ended in texts if ended]
    assert [text for text in finished if not parses(text)] == []
    assert len(finished) >= 0.99 * len(texts)


def test_what_an_untrained_model_finishes_parses() -> None:
    check_samples(range(150), 64)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_samples_parse(part: int) -> None:
    check_samples(range(1000 + 2500 * part, 3500 + 2500 * part), 64)


# ---------------------------------------------------------------- constraints


def test_a_whole_number_gets_no_more_digits_than_python_reads() -> None:
    end = tokenizer().end_id
    digits = tokenizer().encode("1" * 3).tolist()
    constraint = grammar().begin(digits * 1400, [end])
    allowed_V = bits(constraint.row(10**6), tokenizer().vocab_size)
    starts = np.array([text[:1].isdigit() or text[:1] == b"_" for text in grammar().masks.texts])
    assert not (allowed_V & starts).any()
    assert allowed_V[end]
    assert allowed_V[tokenizer().encode(".").item()]
    assert constraint.ends_well()


def test_a_warm_grammar_gives_the_same_masks() -> None:
    texts = [(LIBRARY / "stat.py").read_text(encoding="utf-8"), "x = (= 1"]
    made = PythonGrammar(tokenizer())
    made.warm_up(texts)
    asked = made.masks.walks
    made.warm_up(texts)
    assert made.masks.walks == asked  # all is remembered
    place = made.masks.reader.read(made.masks.reader.start, texts[0].encode()[:1000])
    assert place is not None
    assert (
        bits(made.masks.row(place), len(made.masks.texts)).tolist()
        == tried(made.masks, texts[0].encode()[:1000]).tolist()
    )


def test_all_that_was_remembered_can_be_forgotten_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [sample(seed, 48) for seed in range(20)]
    monkeypatch.setattr("dsjax.infer.grammar.masks.MOST_PLACES", 50)
    assert [sample(seed, 48) for seed in range(20)] == expected


def test_a_text_is_brought_to_its_end_in_time() -> None:
    """Five tokens for ``x = (``: the bracket has to close at once."""
    end = tokenizer().end_id  # and one that the model states, without a text
    constraint = grammar().begin(tokenizer().encode("x = (").tolist(), [end, 5000])
    for left in range(12, 0, -1):
        token = int(np.flatnonzero(bits(constraint.row(left), tokenizer().vocab_size))[-1])
        if token == tokenizer().end_id:
            break
        constraint.add(token)
    assert parses(bytes(constraint.text))
    assert left >= 6


def test_the_bytes_of_tokens_are_the_text() -> None:
    texts = token_bytes(tokenizer())
    for text in ("def f():\n\treturn 'é 深 😀'\r\n", string.printable, "".join(map(chr, range(256)))):
        assert b"".join(texts[i] for i in tokenizer().encode(text).tolist()) == text.encode()
    assert texts[tokenizer().end_id] == b""


@functools.cache
def with_blank_in_front() -> PythonGrammar:
    """Of a tokenizer as SentencePiece makes them: a blank goes in front of a text, and the decoder takes it away."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    merges = [("d", "e"), ("de", "f"), ("\u2581", "def"), ("\u2581", "x"), ("\u2581", "\u2581")]
    letters = ["\u2581", *map(chr, range(0x21, 0x7F)), *(a + b for a, b in merges)]
    names = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab = {name: i for i, name in enumerate(names)}
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    inner.add_special_tokens(["<unk>", "<s>"])
    return PythonGrammar(Tokenizer(inner, end_token="<s>"))


@pytest.mark.parametrize(
    ("text", "stop"),
    [("def f():", 0), ("x = 1", 0), ("é = 1", 0), ("# c\nx", 0), ("", 0), (" x = 1", 2), ("\tx", 2), ("x = )", 5)],
)
def test_a_blank_that_the_decoder_drops_is_no_indentation(text: str, stop: int) -> None:
    made, tokens = with_blank_in_front(), with_blank_in_front().tokenizer
    prompt = [tokens.end_id, *tokens.encode(text).tolist()]
    assert tokens.decode(prompt) == text
    if stop:  # the column of what can not follow
        with pytest.raises(UserError, match=rf"line \d, column {stop}: "):
            made.begin(prompt, [tokens.end_id])
        return
    assert made.begin(prompt, [tokens.end_id]).ends_well() == parses(text.encode())


@pytest.mark.parametrize("is_first", [True, False])
def test_a_program_may_begin_with_a_blank_where_the_decoder_drops_it(is_first: bool) -> None:
    """Behind another text, as an answer in a chat is, the decoder leaves it where it is."""
    made = with_blank_in_front()
    end, texts = made.tokenizer.end_id, made.masks.texts
    constraint = made.begin([end] if is_first else [], [end])
    shown = [text.removeprefix(b" ") if is_first else text for text in texts]
    reader = Reader()
    fits = [bool(t) and reader.read(reader.start, s) is not None for t, s in zip(texts, shown, strict=True)]
    fits[end] = True  # an empty text is a program
    assert constraint.mask(len(texts)).tolist() == fits
    assert fits[made.ids[b" def"]] == is_first
    constraint.add(made.ids[b" x" if is_first else b"x"])
    assert constraint.ends_well()


def test_a_vocabulary_that_lacks_bytes_is_refused() -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    def made(vocab: dict[str, int], decoder: object) -> Tokenizer:
        inner = tokenizers.Tokenizer(models.BPE(vocab, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoder
        inner.add_special_tokens(["<|end|>"])
        return Tokenizer(inner)

    with pytest.raises(
        UserError, match=r"a grammar needs a tokenizer with a token for each byte; this one has none for b'"
    ):
        PythonGrammar(made({"a": 0, "b": 1}, decoders.ByteLevel()))
    with pytest.raises(UserError, match=r"whose decoder is ByteLevel or ByteFallback; this one's is WordPiece"):
        PythonGrammar(made({"a": 0, "b": 1}, decoders.WordPiece()))
